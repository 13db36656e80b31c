"""Frames -> a video with its sound, or numbered pictures."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import chain, groupby
from pathlib import Path
from typing import Literal, NamedTuple, cast

import av
import av.error
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .audio import open_sound
from .errors import InputError, OutputError
from .output import check_output, complete_or_absent, describe

Codec = Literal["h264", "hevc", "av1"]
VIDEOS = (".mp4", ".mov", ".mkv")
PICTURES = (".png", ".jpg", ".jpeg")
NUMBER = re.compile(r"%(0[1-9][0-9]*)?d")
BT709 = 1  # H.273's code point for BT.709 primaries, transfer and matrix alike


class Encoder(NamedTuple):
    name: str  # FFmpeg's
    options: dict[str, str]
    quality: int  # constant quality where none is asked for: visually lossless
    qualities: range  # lower is better


ENCODERS: dict[str, Encoder] = {
    # superfast with veryfast's lookahead: measured 5 % faster end to end than veryfast for files 8 % larger.
    "h264": Encoder("libx264", {"preset": "superfast", "x264-params": "rc-lookahead=10:mbtree=1"}, 18, range(52)),
    "hevc": Encoder("libx265", {"preset": "veryfast", "x265-params": "log-level=error"}, 20, range(52)),
    "av1": Encoder("libsvtav1", {"preset": "10"}, 24, range(1, 64)),
}
JPEG_QUALITIES = range(2, 32)
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


def check_destination(out: str | Path, *, frames: int, codec: Codec, quality: int | None, overwrite: bool) -> None:
    """Raise InputError or OutputError where `write_frames` would, before any frame is rendered."""
    out = Path(out)
    suffix = out.suffix.lower()
    if is_pattern(out):
        if suffix not in PICTURES or len(NUMBER.findall(out.name)) != 1 or out.name.count("%") != 1:
            raise InputError(f"{out}: numbered pictures are named like frames/%05d.png or frames/%05d.jpg.")
    elif suffix not in VIDEOS:
        raise InputError(f"{out}: the output is a video ({', '.join(VIDEOS)}) or pictures such as frames/%05d.png.")
    elif suffix == ".mov" and codec == "av1":
        raise InputError(f"{out}: AV1 does not go into .mov; give .mp4 or .mkv.")
    if quality is not None:
        check_quality(quality, suffix if is_pattern(out) else codec)
    if not is_pattern(out):
        check_output(out, overwrite)
    elif out.parent.exists():
        for number in range(1, frames + 1):
            check_output(out.with_name(out.name % number), overwrite)
    else:
        check_output(out.parent, overwrite)  # will be made


def check_quality(quality: int, kind: str) -> None:
    if kind == ".png":
        raise InputError("PNG pictures are exact: --quality does not go with them.")
    allowed = ENCODERS[kind].qualities if kind in ENCODERS else JPEG_QUALITIES
    if quality not in allowed:
        raise InputError(f"quality {quality} is not within {allowed[0]} (best) to {allowed[-1]}, as {kind} has it.")


def frame_rate(fps: float) -> Fraction:
    """The rate as a fraction; 23.976, 29.97 and 59.94 are television's short for 24000/1001 and so on."""
    if not 0.01 <= fps <= 1000:
        raise InputError(f"{fps} frames a second is not within 0.01 to 1000.")
    television = Fraction(round(fps) * 1000, 1001)
    return television if abs(television - fps) < 1e-5 * fps else Fraction(fps).limit_denominator(1001)


def is_pattern(out: Path) -> bool:
    """Whether this names numbered pictures, not one video."""
    return "%" in out.name


def write_frames(
    batches: Iterable[Tensor],
    out: str | Path,
    *,
    fps: float,
    sound: str | Path | None = None,
    codec: Codec = "h264",
    quality: int | None = None,
    overwrite: bool = False,
) -> int:
    """Encode frames as they come; the file appears under its name once it is complete.

    A video is yuv420p in BT.709, limited range, and tagged so; an odd width or height is made even by repeating the
    last column or row. Sound is kept whole, at its own rate and channels, as AAC. Pictures are numbered from 1, and
    each appears once it is complete.

    Args:
        batches: of (B,3,H,W) uint8 RGB, any device; those not on the CPU are copied there.
        out: `.mp4`, `.mov` or `.mkv`; or a printf pattern of `.png` or `.jpg`, such as `frames/%05d.png`.
        fps: frames a second.
        sound: a file whose (first) sound track is put into the video; not for pictures.
        codec: of a video.
        quality: constant quality, lower is better: 0..51 (h264, 18 if None; hevc, 20), 1..63 (av1, 24), 2..31 (.jpg,
            2).
        overwrite: replace what is at `out`.

    Returns:
        the number of frames.

    Raises:
        InputError: `out` is no such name, or `fps` or `quality` out of range, or `sound` cannot be decoded.
        OutputError: `out` exists or cannot be written, or the disk is full. Nothing is left there.
    """
    out = Path(out)
    check_destination(out, frames=0, codec=codec, quality=quality, overwrite=overwrite)
    rate = frame_rate(fps)
    if is_pattern(out):
        return _write_pictures(batches, out, rate, JPEG_QUALITIES[0] if quality is None else quality, overwrite)
    return _write_video(batches, out, rate, sound, codec, quality, overwrite)


# --- video -----------------------------------------------------------------------------------------------------------


def _write_video(
    batches: Iterable[Tensor],
    out: Path,
    rate: Fraction,
    sound: str | Path | None,
    codec: Codec,
    quality: int | None,
    overwrite: bool,
) -> int:
    encoder = ENCODERS[codec]
    kind = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}[out.suffix.lower()]
    count = 0
    with complete_or_absent(out, overwrite) as name, _encoder_errors(out), ExitStack() as open_files:
        container_options = {} if kind == "matroska" else {"movflags": "+faststart"}
        container = open_files.enter_context(av.open(name, "w", format=kind, options=container_options))
        options = {**encoder.options, "crf": str(encoder.quality if quality is None else quality)}
        video = cast(VideoStream, container.add_stream(encoder.name, rate, options=options))
        context = video.codec_context
        context.pix_fmt = "yuv420p"
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        if codec == "hevc" and kind != "matroska":
            context.codec_tag = "hvc1"  # the tag that Apple's players ask for
        track = _SoundTrack(container, sound, open_files) if sound is not None else None
        reformatter = VideoReformatter()
        for pixels in _pictures(batches):
            frame = _planar_frame(pixels, even=True)
            if count == 0:
                context.width, context.height = frame.width, frame.height
            frame = reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(video.encode(frame))
            count += 1
            if track is not None:
                track.write_until(count / rate)
        if count == 0:
            raise InputError("there are no frames to write.")
        container.mux(video.encode(None))
        if track is not None:
            track.write_until(None)
    return count


class _SoundTrack:
    """Re-encodes a file's sound into a container, as far as the video has come."""

    def __init__(self, container: OutputContainer, sound: str | Path, open_files: ExitStack) -> None:
        self._container = container
        source = open_files.enter_context(open_sound(sound))
        track = source.streams.audio[0]
        rates = av.Codec("aac", "w").audio_rates or [track.rate]
        rate = min(rates, key=lambda rate: abs(rate - track.rate))
        layout = track.layout.name
        if layout == f"{track.layout.nb_channels} channels":  # a plain WAV does not say which is which
            layout = LAYOUTS.get(track.layout.nb_channels, "stereo")
        self._stream = cast(AudioStream, container.add_stream("aac", rate, layout=layout))
        self._packets = self._encode(_decode(sound, source))
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

    def _encode(self, frames: Iterator[av.AudioFrame]) -> Iterator[Packet]:
        context = cast(AudioCodecContext, self._stream.codec_context)
        samples = 0
        for _, alike in groupby(frames, key=lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
            resampler = av.AudioResampler(context.format, context.layout, context.sample_rate)
            for frame in chain(alike, [None]):
                for converted in resampler.resample(frame):
                    # Counted from 0: the features were, whatever the source's time stamps say.
                    converted.pts, converted.time_base = samples, Fraction(1, context.sample_rate)
                    samples += converted.samples
                    yield from self._stream.encode(converted)
        yield from self._stream.encode(None)


def _decode(sound: str | Path, source: InputContainer) -> Iterator[av.AudioFrame]:
    try:
        yield from source.decode(source.streams.audio[0])
    except av.error.FFmpegError as error:
        raise InputError(f"{sound}: the sound breaks off ({error.strerror}).") from None


# --- pictures --------------------------------------------------------------------------------------------------------


def _write_pictures(batches: Iterable[Tensor], pattern: Path, rate: Fraction, quality: int, overwrite: bool) -> int:
    png = pattern.suffix.lower() == ".png"
    made_directory = not pattern.parent.exists()
    context: VideoCodecContext | None = None
    written = 0

    def write(packets: list[Packet]) -> None:
        nonlocal written
        for packet in packets:  # each is a whole file
            file = pattern.with_name(pattern.name % (written + 1))
            with complete_or_absent(file, overwrite) as name:
                Path(name).write_bytes(bytes(packet))
            written += 1

    try:
        if made_directory:
            try:
                pattern.parent.mkdir()
            except OSError as error:
                raise OutputError(describe(pattern.parent, error)) from None
        for count, pixels in enumerate(_pictures(batches)):
            frame = _planar_frame(pixels).reformat(format="rgb24" if png else "yuvj420p")
            if context is None:
                context = cast(VideoCodecContext, av.CodecContext.create("png" if png else "mjpeg", "w"))
                context.width, context.height, context.pix_fmt = frame.width, frame.height, frame.format.name
                context.time_base = 1 / rate
                context.options = {} if png else {"qmin": str(quality), "qmax": str(quality)}
                context.thread_type = "FRAME"
            frame.pts = count
            write(context.encode(frame))
        if context is None:
            raise InputError("there are no frames to write.")
        write(context.encode(None))
    except OSError as error:
        if isinstance(error, OutputError) and written:
            raise OutputError(f"{error} The first {written} pictures are complete.") from None
        raise
    finally:
        if made_directory and written == 0 and pattern.parent.is_dir():
            pattern.parent.rmdir()
    return written


# --- shared ----------------------------------------------------------------------------------------------------------


def _pictures(batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    for batch in batches:
        yield from batch.cpu().numpy()


def _planar_frame(pixels: np.ndarray, even: bool = False) -> av.VideoFrame:
    """(3,H,W) uint8 RGB as a planar frame, its size made even by repeating the last column and row if asked to."""
    height, width = pixels.shape[1:]
    pad_y, pad_x = (height % 2, width % 2) if even else (0, 0)
    frame = av.VideoFrame(width + pad_x, height + pad_y, "gbrp")
    for plane, channel in zip(frame.planes, (1, 2, 0), strict=True):
        target = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # pyright: ignore
        target[:height, :width] = pixels[channel]
        if pad_x:
            target[:height, width] = pixels[channel, :, -1]
        if pad_y:
            target[height] = target[height - 1]
    return frame


@contextmanager
def _encoder_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise OutputError(describe(out, OSError(error.errno, error.strerror))) from error
