"""Batches of frames -> frames in the host's memory, for the encoders there, and how their videos tag colours."""

from collections.abc import Generator, Iterable, Iterator

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from torch import Tensor

from .color import rgb_to_nv12
from .prefetch import stage
from .timings import Timings

BT709 = 1  # H.273's code point for BT.709 primaries, transfer and matrix alike
CENTRED = "chromaloc=1"
"""Has x264 and x265 say where chroma is, as `color.py` and swscale make it: amid its 2×2 pixels. A video that says
nothing has it beside the left ones, and its colours are half a pixel off for those who heed that, as FFmpeg 8 does. AV1
has no word for it."""


def yuv_frames(batches: Iterable[Tensor], timings: Timings) -> Generator[av.VideoFrame]:
    """Frames on the host as yuv420p, BT.709 limited, by FFmpeg's swscale; their size made even."""
    reformatter = VideoReformatter()
    for pixels in host_pictures(batches):
        yield timings.measured(
            "colour",
            lambda pixels=pixels: reformatter.reformat(
                planar_frame(pixels, even=True),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            ),
        )


def nv12_frames(batches: Iterable[Tensor], device: torch.device, timings: Timings) -> Generator[av.VideoFrame]:
    """Frames on a device, RGB or NV12, as NV12 on the host, BT.709 limited; their size made even."""

    def copy_surfaces(frames: Tensor) -> tuple[Tensor, torch.Event | None]:
        surfaces = as_nv12(frames)
        if not surfaces.is_cuda:
            return surfaces.contiguous(), None
        copied = torch.empty(surfaces.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
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
