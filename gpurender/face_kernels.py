"""Faces cropped and pasted by the kernels for this processor."""

import functools
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .jit import compiled, this_processor
from .kernels.face_rows import CROP, LEAST_WIDTH, scratch_words, taps, write_crop, write_paste

kept_by_thread = threading.local()


def kernel_for(width: int) -> bool:
    """Whether there are kernels for this processor and for rectangles of this width."""
    return bool(this_processor().lanes) and width >= LEAST_WIDTH


def crop_face(crop: Tensor, face: Tensor) -> None:
    """`crop_faces` of one face on a CPU, in less time. Where the exact value lies within 0.02 of two levels' middle,
    they may differ by one level.

    Args:
        crop: (3,328,328) uint8, contiguous, which is written.
        face: (3,h,w) uint8 RGB of any strides, for whose width there is a kernel.
    """
    if face.stride(2) != 1:
        face = copied(face)
    _, height, width = face.shape
    of_plane, of_row, _ = face.stride()
    sizes, across, down = np.array([width, height, of_row, of_plane], np.int64), taps(width, CROP), taps(height, CROP)
    crop_function()(
        face.data_ptr(),
        *(array.ctypes.data for array in (sizes, *across, *down)),
        own_scratch(scratch_words((width, height), CROP)).data_ptr(),
        crop.data_ptr(),
    )


def paste_face(face: Tensor, crop: Tensor, prediction: Tensor, keep: Tensor | None) -> None:
    """`paste_faces` in place, of one frame on a CPU, in less time. Where the exact value lies within 0.02 of two
    levels' middle, they may differ by one level: ten bytes in a million.

    Args:
        face: (3,h,w) uint8 RGB of any strides: the rectangle in the frame, for whose width there is a kernel.
        crop: (3,328,328) uint8 RGB, contiguous.
        prediction: (3,320,320) float32 BGR in 0..1, contiguous.
        keep: (h,w) bool, contiguous rows: where the frame stays.
    """
    near = face if face.stride(2) == 1 else copied(face)
    _, height, width = near.shape
    of_plane, of_row, _ = near.stride()
    sizes = np.array([width, height, of_row, of_plane, 0 if keep is None else keep.stride(0)], np.int64)
    across, down = taps(CROP, width), taps(CROP, height)
    paste_function(keep is not None)(
        crop.data_ptr(),
        prediction.data_ptr(),
        *(array.ctypes.data for array in (sizes, *across, *down)),
        own_scratch(scratch_words((CROP, CROP), width)).data_ptr(),
        near.data_ptr(),
        keep.data_ptr() if keep is not None else None,
    )
    if near is not face:
        face.numpy()[:] = near.numpy()


def copied(pixels: Tensor) -> Tensor:
    """A contiguous copy on the CPU, by NumPy: torch's threads would wait for each other longer than it takes."""
    return torch.from_numpy(pixels.numpy().copy("C"))


def own_scratch(words: int) -> Tensor:
    """This thread's memory, at least so much: new memory for each face would cost more than pasting takes."""
    scratch: Tensor | None = getattr(kept_by_thread, "scratch", None)
    if scratch is None or len(scratch) < words:
        scratch = kept_by_thread.scratch = torch.empty(words, dtype=torch.float32, device="cpu")
    return scratch


@functools.cache
def crop_function() -> Callable[..., None]:
    lanes = this_processor().lanes
    name = f"crop_{lanes}"
    return compiled(name, lambda module: write_crop(module, name, lanes), pointers=8)


@functools.cache
def paste_function(keep: bool) -> Callable[..., None]:
    lanes = this_processor().lanes
    name = f"paste_{lanes}_{int(keep)}"
    return compiled(name, lambda module: write_paste(module, name, lanes, keep), pointers=10)
