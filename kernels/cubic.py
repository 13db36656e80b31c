"""What the kernels share: cubic interpolation, rounding, and where rectangles are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET=1` was set when triton was imported: then kernels run on the CPU, slowly, for tests."""


def tile_of(asked: tuple[int, int] | None, compiled: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that one program makes: the interpreter's cost is by the program, so there it has large ones."""
    return asked or ((128, 512) if INTERPRETED else compiled)


def on_device(rects: Tensor, device: torch.device) -> Tensor:
    """(B,4) int32 of rectangles on the host, on a device; pinned on the way, so that nobody waits."""
    if device.type == "cpu":
        return rects.to(torch.int32).contiguous()
    pinned = torch.empty(rects.shape, dtype=torch.int32, pin_memory=True)  # the caller may change his meanwhile
    return pinned.copy_(rects).to(device, non_blocking=True)


def computed_in(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def read_rect(rects, b):
    """x0, y0, x1, y1 of a batch's rectangle."""
    rect = rects + b * 4
    return tl.load(rect), tl.load(rect + 1), tl.load(rect + 2), tl.load(rect + 3)


@triton.jit
def divided(dividend, divisor, ACC: tl.constexpr):
    """Rounded as the CPU rounds: `/` of float32 is less exact on a GPU."""
    dividend, divisor = tl.cast(dividend, ACC), tl.cast(divisor, ACC)
    if tl.float64 == ACC:
        return dividend / divisor
    else:  # noqa: RET505  (Triton compiles both branches' types unless it knows that one is not taken)
        return tl.div_rn(dividend, divisor)


@triton.jit
def four_taps(at, scale, ACC: tl.constexpr):
    """The first of the four pixels that an output pixel reads (the first and last may lie outside), and their weights.

    torch's `upsample_bicubic2d`, to the order of its operations: half-pixel centres, a = -0.75. Its compilers fuse
    multiplication and subtraction, which float64 does here; without, a pixel of 50,000 would be rounded otherwise.
    """
    real = (scale.to(tl.float64) * (at + 0.5) - 0.5).to(ACC)
    first = tl.floor(real)
    t = (real - first).to(tl.float64)  # as are weights, for a row and a column of a tile only
    before, here, next_, after = outer(t + 1), inner(t), inner(1 - t), outer(2 - t)
    return first.to(tl.int32) - 1, before.to(ACC), here.to(ACC), next_.to(ACC), after.to(ACC)


@triton.jit
def nth(n, first, second, third, fourth):
    """Of four, for a loop that is not unrolled: unrolled, the kernels would need more registers than there are."""
    return tl.where(n < 2, tl.where(n == 0, first, second), tl.where(n == 2, third, fourth))


@triton.jit
def inner(x):
    """Keys' kernel within a pixel of its centre."""
    return ((-0.75 + 2) * x - (-0.75 + 3)) * x * x + 1


@triton.jit
def outer(x):
    return ((-0.75 * x + 0.75 * 5) * x - 0.75 * 8) * x + 0.75 * 4


@triton.jit
def rounded(x):
    """To the nearest integer in 0..255, halves to even, of float32: adding 1.5·2²³ leaves no bits for a fraction."""
    return tl.clamp((x + 12582912.0) - 12582912.0, 0.0, 255.0)


@triton.jit
def nearest_in(n, last):
    """The nearest of 0..last. (Triton clamps integers since 3.9 alone.)"""
    return tl.minimum(tl.maximum(n, 0), last)
