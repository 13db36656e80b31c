"""x264, x265 and SVT-AV1: video encoded on the host."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Literal, NamedTuple, cast

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .color import rgb_to_nv12
from .prefetch import stage
from .timings import Timings

Codec = Literal["h264", "hevc", "av1"]
BT709 = 1  # H.273's code point for BT.709 primaries, transfer and matrix alike


class Library(NamedTuple):
    name: str  # FFmpeg's
    options: dict[str, str]
    quality: int  # constant quality where none is asked for: visually lossless
    qualities: range  # lower is better


LIBRARIES: dict[Codec, Library] = {
    # superfast with veryfast's lookahead: measured 5 % faster end to end than veryfast for files 8 % larger. As with
    # veryfast, the same pictures need not give the same bytes where the width is no multiple of 128.
    "h264": Library("libx264", {"preset": "superfast", "x264-params": "rc-lookahead=10:mbtree=1"}, 18, range(52)),
    "hevc": Library("libx265", {"preset": "veryfast", "x265-params": "log-level=error"}, 20, range(52)),
    "av1": Library("libsvtav1", {"preset": "10"}, 24, range(1, 64)),
}


class SoftwareEncoder:
    """Frames to a video track by a library on the host.

    Frames on a GPU come as NV12, or are made NV12 there: half the bytes of RGB, and they alone cross to the host, into
    pinned memory, while the batch before is encoded.
    """

    def __init__(
        self,
        container: OutputContainer,
        codec: Codec,
        quality: int | None,
        rate: Fraction,
        device: torch.device,
        nv12: bool,
    ) -> None:
        library = LIBRARIES[codec]
        self.name = library.name
        self._device = device
        self._nv12 = nv12
        self._rate = rate
        options = {**library.options, "crf": str(library.quality if quality is None else quality)}
        self._stream = cast(VideoStream, container.add_stream(library.name, rate, options=options))
        context = self._stream.codec_context
        # x264 takes NV12 as it is; the others want its chroma in two planes.
        context.pix_fmt = "nv12" if nv12 and codec == "h264" else "yuv420p"
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        if codec == "hevc" and container.format.name != "matroska":
            context.codec_tag = "hvc1"  # the tag that Apple's players ask for

    def packets(self, batches: Iterable[Tensor], timings: Timings) -> Iterator[tuple[int, list[Packet]]]:
        """Encode frames, see `write_frames`: how many went in so far, and the packets that came out."""
        context = self._stream.codec_context
        host = torch.device("cpu")
        count = 0
        for frame in nv12_frames(batches, self._device, timings) if self._nv12 else yuv_frames(batches, timings):
            if count == 0:
                context.width, context.height = frame.width, frame.height
            if frame.format.name != context.pix_fmt:
                frame = frame.reformat(format=context.pix_fmt)
            frame.pts, frame.time_base = count, 1 / self._rate
            count += 1
            with scheduling_kept():
                packets = timings.measured("encode", lambda frame=frame: self._stream.encode(frame), host)
            yield count, packets
        yield count, timings.measured("encode", lambda: self._stream.encode(None), host)


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """SVT-AV1 makes the thread that opens it a real-time one where it may, as root. Threads that come from it later
    would be so too, and would starve each other for good where they wait by spinning, as OpenMP's do."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def yuv_frames(batches: Iterable[Tensor], timings: Timings) -> Iterator[av.VideoFrame]:
    """Frames on the host as yuv420p, BT.709 limited, by FFmpeg's swscale; their size made even."""
    reformatter = VideoReformatter()
    host = torch.device("cpu")
    for pixels in host_pictures(batches):
        yield timings.measured(
            "colour",
            lambda pixels=pixels: reformatter.reformat(
                planar_frame(pixels, even=True),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            ),
            host,
        )


def nv12_frames(batches: Iterable[Tensor], device: torch.device, timings: Timings) -> Iterator[av.VideoFrame]:
    """Frames on a device, RGB or NV12, as NV12 on the host, BT.709 limited; their size made even."""

    def copy_surfaces(frames: Tensor) -> tuple[Tensor, torch.Event | None]:
        surfaces = as_nv12(frames)
        if not surfaces.is_cuda:
            return surfaces, None
        copied = torch.empty(surfaces.shape, dtype=torch.uint8, pin_memory=True)
        copied.copy_(surfaces, non_blocking=True)
        return copied, torch.cuda.current_stream(device).record_event()

    on_host = device.type == "cpu"
    ready = map(copy_surfaces, batches) if on_host else stage("colour", copy_surfaces, batches, device, timings)
    for surfaces, copied in ready:
        if copied is not None:
            copied.synchronize()
        for surface in surfaces.numpy():
            # Not copied where PyAV takes it, which wants a height of a multiple of 4: encoders copy what they need.
            wrapped = av.VideoFrame.from_numpy_buffer if len(surface) % 6 == 0 else av.VideoFrame.from_ndarray
            frame = wrapped(surface, "nv12")
            frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
            yield frame


def as_nv12(frames: Tensor) -> Tensor:
    """Surfaces of frames (B,3,H,W) RGB; or the frames, if they are surfaces (B,H*3/2,W)."""
    return frames if frames.ndim == 3 else rgb_to_nv12(frames)


def host_pictures(batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """(3,H,W) uint8 of each frame; those that are not on the host are copied there."""
    for batch in batches:
        yield from batch.cpu().numpy()


def planar_frame(pixels: np.ndarray, even: bool = False) -> av.VideoFrame:
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
