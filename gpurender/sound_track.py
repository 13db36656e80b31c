"""A file's sound -> a video's sound track: AAC at its own rate and channels, on a thread of its own."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, groupby
from pathlib import Path
from typing import cast

import av
import av.error
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.codec.context import CodecContext
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from .errors import InputError, check_no_pipe
from .prefetch import prefetch
from .sound import damage, decoded_frames, open_sound

AHEAD = 4096
"""Packets that may be ready before the picture has come so far, of 1024 samples each: a minute and a half at 48 kHz, in
two megabytes. A video in segments comes late and in large pieces; its sound is made meanwhile."""

ALIKE_SECONDS = 0.5
"""A sound and a picture that belong together differ by less."""

LAYOUTS = {
    f"{count} channels": layout
    for count, layout in enumerate(("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "6.1", "7.1"), 1)
} | {"5.0(side)": "5.0", "5.1(side)": "5.1"}
"""For sound such as plain WAVs', which does not say which channel is which; and for AC-3's, whose names AAC lacks: it
would become a track of six channels that nobody knows."""


class SoundTrack:
    """Re-encodes a file's sound into a container, as far as the video has come."""

    def __init__(self, container: OutputContainer, sound: str | Path, source: InputContainer) -> None:
        """`source` is the opened file `sound`."""
        self._container = container
        rate, layout = rate_and_layout(source)
        self._stream = cast(AudioStream, container.add_stream("aac", rate, layout=layout))
        open_context(self._stream.codec_context, sound, source)
        self._left_out = 0
        self._written_seconds: Fraction | float = 0
        self._seconds: Fraction | float = 0
        packets = prefetch(self._encode(sound, source), AHEAD)
        # Its thread begins when the first is asked for: all is set by now.
        self._packets = chain([next(packets, None)], packets)
        self._end = packets.close

    def write_until(self, seconds: Fraction | None) -> None:
        """Write packets up to a time, or to the end."""
        while seconds is None or self._written_seconds < seconds:
            packet = next(self._packets, None)
            if packet is None:
                return
            if packet.pts is not None and packet.time_base is not None:
                self._written_seconds = packet.pts * packet.time_base
            self._container.mux(packet)

    def notes(self, picture_seconds: Fraction) -> list[str]:
        """What was unusual, once all is written."""
        notes = damage(self._left_out)
        if abs(self._seconds - picture_seconds) > ALIKE_SECONDS:
            notes.append(f"the sound lasts {float(self._seconds):.2f} s, the picture {float(picture_seconds):.2f} s")
        return notes

    def close(self) -> None:
        """End the thread, which reads the source."""
        self._end()

    def _decode(self, sound: str | Path, source: InputContainer) -> Iterator[av.AudioFrame]:
        def left_out() -> None:
            self._left_out += 1

        try:
            yield from decoded_frames(source, source.streams.audio[0], left_out)
        except av.error.FFmpegError as error:
            raise InputError(f"{sound}: the sound breaks off ({error.strerror}).") from None

    def _encode(self, sound: str | Path, source: InputContainer) -> Iterator[Packet]:
        try:
            yield from self._encoded(self._decode(sound, source))
        except av.error.FFmpegError as error:
            raise InputError(
                f"{sound}: FFmpeg makes no AAC of what it holds ({error.strerror}): samples are NaN, or far beyond 1."
            ) from None

    def _encoded(self, frames: Iterator[av.AudioFrame]) -> Iterator[Packet]:
        context = cast(AudioCodecContext, self._stream.codec_context)
        samples = 0
        for _, alike in groupby(frames, key=lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
            resampler = av.AudioResampler(context.format, context.layout, context.sample_rate)
            for frame in chain(_named(alike), [None]):
                for converted in resampler.resample(frame):
                    # Counted from 0: the features were, whatever the source's time stamps say.
                    converted.pts, converted.time_base = samples, Fraction(1, context.sample_rate)
                    samples += converted.samples
                    yield from self._stream.encode(converted)
        self._seconds = Fraction(samples, context.sample_rate)
        yield from self._stream.encode(None)


def check_sound(sound: str | Path) -> None:
    """Raise InputError if a sound cannot be that of a video, before any work is done for it."""
    check_no_pipe(Path(sound))  # it is opened again then
    with open_sound(sound) as source:
        context = cast(AudioCodecContext, av.CodecContext.create("aac", "w"))
        context.sample_rate, context.layout = rate_and_layout(source)
        context.format = "fltp"
        open_context(context, sound, source)


def rate_and_layout(source: InputContainer) -> tuple[int, str]:
    """The sample rate and the channels of the AAC that is made of a sound."""
    track = source.streams.audio[0]
    if track.layout.nb_channels < 1:
        raise InputError(f"{source.name} does not say how many channels its sound has; convert it to WAV first.")
    rates = av.Codec("aac", "w").audio_rates or [track.rate]
    return min(rates, key=lambda rate: abs(rate - track.rate)), LAYOUTS.get(track.layout.name, track.layout.name)


def open_context(context: CodecContext, sound: str | Path, source: InputContainer) -> None:
    try:
        context.open()
    except av.error.FFmpegError as error:
        layout = source.streams.audio[0].layout.name
        channels = layout if layout.endswith("channels") else f"channels ({layout})"
        raise InputError(
            f"{sound}: FFmpeg cannot make AAC of its {channels} ({error.strerror}); mix it to stereo first."
        ) from None


def _named(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """Frames that are alike, with the usual names for channels that have none: FFmpeg would take three for 2.1, and mix
    them."""
    interleaved = av.AudioResampler(format="flt")  # PyAV reads planes of 8 channels and more wrongly
    for frame in frames:
        if frame.layout.name not in LAYOUTS:
            yield frame
            continue
        for part in interleaved.resample(frame):
            named = av.AudioFrame.from_ndarray(part.to_ndarray(), "flt", LAYOUTS[frame.layout.name])
            named.sample_rate = part.sample_rate
            yield named
