"""Frames -> a video with its sound, or numbered pictures: what is asked for, and which encoder makes it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import av
import av.error
import torch
from av.container import OutputContainer
from av.packet import Packet
from torch import Tensor

from .cuda import is_out_of_memory
from .errors import DeviceError, InputError, OutputError, check_choice
from .mjpeg import MjpegEncoder
from .numbered import JPEG_QUALITIES, JPEG_QUALITY, write_pictures
from .nvenc import NvencEncoder
from .output import check_output, complete_or_absent, describe, errors_passed, is_of_source, is_pattern
from .software_encoder import LIBRARIES, Codec, SoftwareEncoder, check_size
from .sound import open_sound
from .sound_track import SoundTrack
from .timings import Timings

EncoderName = Literal["auto", "nvenc", "x264", "mjpeg"]
VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
PICTURES = (".png", ".jpg", ".jpeg")
LEAST_SIDE = 64  # pixels: with fewer, x265 writes beyond its memory, and SVT-AV1 waits for ever
NUMBER = re.compile(r"%(0[1-9][0-9]*)?d")


class VideoEncoder(Protocol):
    """Encodes frames into a track of a container: `SoftwareEncoder`, `NvencEncoder` or `MjpegEncoder`."""

    name: str

    def packets(self, batches: Iterable[Tensor], timings: Timings) -> Iterator[tuple[int, list[Packet]]]:
        """Encode frames, see `write_frames`: how many went in so far, and the packets that came out."""
        ...


class Written(NamedTuple):
    """What was written, and by what."""

    frames: int
    encoder: str
    notes: list[str]
    """why it was not the encoder that one would expect"""


def check_destination(
    out: str | Path,
    *,
    frames: int,
    codec: Codec = "h264",
    quality: int | None = None,
    encoder: EncoderName = "auto",
    overwrite: bool,
) -> None:
    """Raise InputError or OutputError where `write_frames` would, before any frame is rendered."""
    out = Path(out)
    suffix = out.suffix.lower()
    check_choice("encoder", encoder, get_args(EncoderName))
    check_choice("codec", codec, get_args(Codec))
    if is_pattern(out):
        if suffix not in PICTURES or len(NUMBER.findall(out.name)) != 1 or out.name.count("%") != 1:
            raise InputError(f"{out}: numbered pictures are named like frames/%05d.png or frames/%05d.jpg.")
        if encoder != "auto":
            raise InputError(f"{out}: numbered pictures are not made by a video encoder; leave out {encoder}.")
    elif suffix not in VIDEOS:
        raise InputError(f"{out}: the output is a video ({', '.join(VIDEOS)}) or pictures such as frames/%05d.png.")
    elif suffix == ".mov" and codec == "av1":
        raise InputError(f"{out}: AV1 does not go into .mov; give .mp4 or .mkv.")
    elif encoder == "mjpeg" and codec != "h264":
        raise InputError(f"the {encoder} encoder does not make {codec}; leave one of them out.")
    if quality is not None:
        check_quality(quality, suffix if is_pattern(out) else "mjpeg" if encoder == "mjpeg" else codec)
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
    allowed = LIBRARIES[kind].qualities if kind in LIBRARIES else JPEG_QUALITIES
    if quality not in allowed:
        raise InputError(f"quality {quality} is not within {allowed[0]} (best) to {allowed[-1]}, as {kind} has it.")


def frame_rate(fps: float) -> Fraction:
    """The rate as a fraction; 23.976, 29.97 and 59.94 are television's short for 24000/1001 and so on."""
    if not 0.01 <= fps <= 1000:
        raise InputError(f"{fps} frames a second is not within 0.01 to 1000.")
    television = Fraction(round(fps) * 1000, 1001)
    return television if abs(television - fps) < 1e-5 * fps else Fraction(float(fps)).limit_denominator(1001)


def write_frames(
    batches: Iterable[Tensor],
    out: str | Path,
    *,
    fps: float,
    sound: str | Path | None = None,
    codec: Codec = "h264",
    quality: int | None = None,
    encoder: EncoderName = "auto",
    overwrite: bool = False,
    timings: Timings | None = None,
) -> Written:
    """Encode frames as they come; the file appears under its name once it is complete.

    A video is 4:2:0 in BT.709, limited range, and tagged so, and an odd width or height is made even by repeating the
    last column or row (MJPEG: JFIF's colours in full range, and sizes as they are). Sound is kept whole, at its own
    rate and channels, as AAC. Pictures are numbered from 1, and each appears once it is complete.

    Args:
        batches: of (B,3,H,W) uint8 RGB; or, for a video that is not MJPEG, of (B,H*3/2,W) uint8 NV12 in BT.709, limited
            range, see `rgb_to_nv12`; all on one device. A frame alone is `frame[None]`: without, it is three surfaces.
        out: `.mp4`, `.mov` or `.mkv`; or a printf pattern of `.png` or `.jpg`, such as `frames/%05d.png`.
        fps: frames a second.
        sound: a file whose (first) sound track is put into the video; not for pictures.
        codec: of a video.
        quality: constant quality, lower is better: 0..51 (h264 and hevc), 1..63 (av1), 2..31 (mjpeg, .jpg); None is
            visually lossless. The host's h264 of 0 is lossless, which browsers do not play.
        encoder: `nvenc` is the GPU's own; `x264` is the host's (x265 and SVT-AV1 where `codec` asks for them), to which
            frames on a GPU are copied as NV12: to several x264 side by side, if there are six cores or more; `mjpeg`
            compresses on the frames' device. `auto` is NVENC for frames on a GPU that has it, else the host's.
        overwrite: replace what is at `out`.
        timings: is told what colour and encoding cost.

    Returns:
        the number of frames, and the encoder that made them.

    Raises:
        ValueError: frames are not of these types and shapes, or not all alike.
        InputError: `out` is no such name, or `fps` or `quality` out of range, or `sound` cannot be decoded.
        DeviceError: the encoder that was asked for is not here.
        OutputError: `out` exists or cannot be written, or the disk is full. No video is left there, and no
            unfinished picture.
    """
    out = Path(out)
    check_destination(out, frames=0, codec=codec, quality=quality, encoder=encoder, overwrite=overwrite)
    rate = frame_rate(fps)
    if isinstance(batches, Tensor):
        raise ValueError("batches of frames are written one after another: give a list of them, not a tensor")
    check = frames_like_the_first(surfaces=not is_pattern(out) and encoder != "mjpeg")
    if is_pattern(out):
        if sound is not None:
            raise InputError(f"{out}: numbered pictures have no sound; leave it out.")
        count = write_pictures(map(check, batches), out, rate, JPEG_QUALITY if quality is None else quality, overwrite)
        following = out.name % (count + 1)
        notes = [f"{following} is there, too, of a longer render before"] if out.with_name(following).exists() else []
        return Written(count, out.suffix[1:].lower(), notes)

    iterator = map(check, batches)
    first = next((batch for batch in iterator if len(batch)), None)
    if first is None:
        raise InputError("there are no frames to write.")
    with complete_or_absent(out, overwrite) as name, _encoder_errors(out), ExitStack() as open_files:
        source = open_files.enter_context(open_sound(sound)) if sound is not None else None
        kind = VIDEOS[out.suffix.lower()]
        container_options = {} if kind == "matroska" else {"movflags": "+faststart"}
        container = open_files.enter_context(av.open(name, "w", format=kind, options=container_options))
        video, notes = open_encoder(encoder, container, codec, quality, rate, first)
        track = None

        def begin_sound() -> SoundTrack | None:
            if sound is None or source is None:
                return None
            begun = SoundTrack(container, sound, source)
            open_files.callback(begun.close)
            return begun

        if container.streams.video:  # else it is there with the first packets, and the sound's comes behind it
            track = begin_sound()
        count = 0
        held = [first]
        del first
        packets_of = video.packets(emptied_then(held, errors_passed(iterator)), timings or Timings())
        with closing(packets_of):  # pyright: ignore[reportArgumentType]
            for count, packets in packets_of:
                if packets and track is None:
                    track = begin_sound()
                container.mux(packets)
                if track is not None:
                    track.write_until(count / rate)
        if track is not None:
            track.write_until(None)
            notes += track.notes(count / rate)
    return Written(count, video.name, notes)


def frames_like_the_first(surfaces: bool) -> Callable[[Tensor], Tensor]:
    """Gives a batch back, if it holds frames, of the size, kind and device of the first batch's.

    Args:
        surfaces: whether they may be NV12.
    """
    first: list[object] = []

    def check(batch: Tensor) -> Tensor:
        if not isinstance(batch, Tensor) or batch.dtype != torch.uint8:
            given = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"frames are uint8 tensors of levels 0 to 255, given {given}; of values in 0..1, "
                "(255 * frames).round().clamp(0, 255).to(torch.uint8)"
            )
        rgb = batch.ndim == 4 and batch.shape[1] == 3
        nv12 = batch.ndim == 3 and batch.shape[1] % 3 == 0 and batch.shape[2] % 2 == 0
        if not (rgb or (nv12 and surfaces)):
            allowed = "(B,3,H,W) RGB" + (" or (B,H*3/2,W) NV12 of even H and W" if surfaces else "")
            raise ValueError(f"batches are {allowed}, given {tuple(batch.shape)}; a frame alone is frame[None]")
        kind = tuple(batch.shape[1:]), batch.device
        if not first:
            first.append(kind)
        if first[0] != kind:
            raise ValueError(f"all frames are alike in size, kind and device: first {first[0]}, then {kind}")
        return batch

    return check


def emptied_then(held: list[Tensor], rest: Iterator[Tensor]) -> Iterator[Tensor]:
    """What is held, which is then let go, and the rest."""
    yield held.pop()
    yield from rest


def open_encoder(
    encoder: EncoderName, container: OutputContainer, codec: Codec, quality: int | None, rate: Fraction, first: Tensor
) -> tuple[VideoEncoder, list[str]]:
    """The encoder for frames like `first`, and notes on why it is not the one that one would expect."""
    device, (height, width) = first.device, first.shape[-2:]
    surfaces = first.ndim == 3
    if surfaces:
        height = height * 2 // 3
    notes = []
    if encoder == "mjpeg":
        return MjpegEncoder(container, quality, rate, device, (width, height)), notes
    if codec != "h264" and min(width, height) < LEAST_SIDE:
        raise InputError(
            f"frames of {width}×{height} cannot be made {codec}, whose encoders fail below {LEAST_SIDE}×{LEAST_SIDE}; "
            "take h264."
        )
    if encoder == "nvenc" and device.type != "cuda":
        raise DeviceError("the nvenc encoder takes frames on a GPU, and these are on the CPU; leave it out.")
    if encoder == "nvenc" or (encoder == "auto" and device.type == "cuda"):
        try:
            return NvencEncoder(container, codec, quality, rate, device, (width, height)), notes
        except DeviceError as error:
            if encoder == "nvenc":
                raise
            notes.append(f"NVENC is not used: {error}")
    check_size(codec, width, height)
    return SoftwareEncoder(container, codec, quality, rate, device, surfaces or device.type == "cuda"), notes


@contextmanager
def _encoder_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        if is_of_source(error):
            raise
        raise OutputError(describe(out, OSError(error.errno, error.strerror))) from error
    except RuntimeError as error:
        if is_of_source(error) or not is_out_of_memory(error):
            raise
        raise DeviceError(
            "the GPU has too little free memory to encode; give a smaller --batch or --memory, or --device cpu."
        ) from None
