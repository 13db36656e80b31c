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
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from .errors import InputError
from .prefetch import prefetch
from .sound import decoded_frames

AHEAD = 4096
"""Packets that may be ready before the picture has come so far, of 1024 samples each: a minute and a half at 48 kHz, in
two megabytes. A video in segments comes late and in large pieces; its sound is made meanwhile."""

ALIKE_SECONDS = 0.5
"""A sound and a picture that belong together differ by less."""

LAYOUTS = {
    f"{count} channels": layout
    for count, layout in enumerate(("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "6.1", "7.1"), 1)
}
"""For sound such as plain WAVs', which does not say which channel is which."""


class SoundTrack:
    """Re-encodes a file's sound into a container, as far as the video has come."""

    def __init__(self, container: OutputContainer, sound: str | Path, source: InputContainer) -> None:
        """`source` is the opened file `sound`."""
        self._container = container
        track = source.streams.audio[0]
        rates = av.Codec("aac", "w").audio_rates or [track.rate]
        rate = min(rates, key=lambda rate: abs(rate - track.rate))
        layout = track.layout.name
        self._channels = layout if layout.endswith("channels") else f"channels ({layout})"
        self._stream = cast(AudioStream, container.add_stream("aac", rate, layout=LAYOUTS.get(layout, layout)))
        try:
            self._stream.codec_context.open()
        except av.error.FFmpegError as error:
            raise self._impossible(sound, error) from None
        self._left_out = 0
        packets = prefetch(self._encode(sound, self._decode(sound, source)), AHEAD)
        self._packets = chain([next(packets, None)], packets)  # its thread begins when the first is asked for
        self._end = packets.close
        self._written_seconds: Fraction | float = 0

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
        notes = []
        if self._left_out:
            notes.append(f"what could not be decoded of the sound is left out: {self._left_out} of its packets")
        if abs(self._written_seconds - picture_seconds) > ALIKE_SECONDS:
            notes.append(
                f"the sound lasts {float(self._written_seconds):.2f} s, the picture {float(picture_seconds):.2f} s"
            )
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

    def _encode(self, sound: str | Path, frames: Iterator[av.AudioFrame]) -> Iterator[Packet]:
        try:
            yield from self._encoded(frames)
        except av.error.FFmpegError as error:
            raise self._impossible(sound, error) from None

    def _impossible(self, sound: str | Path, error: av.error.FFmpegError) -> InputError:
        return InputError(
            f"{sound}: FFmpeg cannot make AAC of its {self._channels} ({error.strerror}); mix it to stereo first."
        )

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
        yield from self._stream.encode(None)


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
