"""Frames -> numbered pictures, .png or .jpg."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from torch import Tensor

from .errors import InputError, OutputError
from .host_frames import host_pictures, planar_frame
from .output import complete_or_absent, describe

JPEG_QUALITY, JPEG_QUALITIES = 2, range(2, 32)  # FFmpeg's scale: lower is better


def write_pictures(batches: Iterable[Tensor], pattern: Path, rate: Fraction, quality: int, overwrite: bool) -> int:
    """Write frames under the names of a printf pattern, from 1; each appears once it is complete. Returns how many."""
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
        for count, pixels in enumerate(host_pictures(batches)):
            frame = planar_frame(pixels).reformat(format="rgb24" if png else "yuvj420p")
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
