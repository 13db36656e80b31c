"""A face pasted by the kernel for this processor; by the reference where there is none."""

import functools
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .jit import compiled, this_processor
from .kernels.paste_rows import LEAST_WIDTH, scratch_words, taps, write_paste
from .paste import paste_faces

kept_by_thread = threading.local()


def paste_face(frame: Tensor, crop: Tensor, prediction: Tensor, rect: Tensor, keep: Tensor | None) -> None:
    """`paste_faces` in place, of one frame on a CPU, in less time. Where the exact value lies within 0.001 of two
    levels' middle, they may differ by one level: ten bytes in a million.

    Args:
        frame: (3,H,W) uint8 RGB, contiguous.
        crop: (3,328,328) uint8 RGB, contiguous.
        prediction: (3,320,320) float32 BGR in 0..1, contiguous.
        rect: (4,) integers: x0, y0, x1, y1 within the frame.
        keep: (H,W) bool, contiguous: where the frame stays.
    """
    x, y, right, bottom = rect.tolist()
    width, height = right - x, bottom - y
    kernel = paste_function(keep is not None) if width >= LEAST_WIDTH else None
    if kernel is None:
        of_one = keep[None] if keep is not None else None
        paste_faces(frame[None], crop[None], prediction[None], rect[None], of_one, inplace=True)
        return
    (left, across), (top, down) = taps(width), taps(height)
    _, frame_height, frame_width = frame.shape
    sizes = np.array([width, height, frame_width, frame_height * frame_width, frame_width], np.int64)
    scratch = own_scratch(scratch_words(width))
    corner = y * frame_width + x
    kernel(
        crop.data_ptr(),
        prediction.data_ptr(),
        *(array.ctypes.data for array in (sizes, left, across, top, down)),
        scratch.data_ptr(),
        frame.data_ptr() + corner,
        keep.data_ptr() + corner if keep is not None else None,
    )


def own_scratch(words: int) -> Tensor:
    """This thread's memory, at least so much: new memory for each face would cost more than pasting takes."""
    scratch: Tensor | None = getattr(kept_by_thread, "scratch", None)
    if scratch is None or len(scratch) < words:
        scratch = kept_by_thread.scratch = torch.empty(words)
    return scratch


@functools.cache
def paste_function(keep: bool) -> Callable[..., None] | None:
    lanes = this_processor().lanes
    if not lanes:
        return None
    name = f"paste_{lanes}_{int(keep)}"
    return compiled(name, lambda module: write_paste(module, name, lanes, keep), pointers=10)
