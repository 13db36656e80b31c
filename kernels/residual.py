"""The U-Net's layers on a GPU: 1×1 convolutions with what follows them, and 3×3 depthwise ones with the 1×1 behind.

An inverted residual is two kernels: `pointwise` widens and clips, `depthwise` filters, clips and narrows again. What a
frame moves through memory is then the wide tensor, written once and read once, and little else. All tensors are
channels-last and contiguous as (B,H,W,C); sums are float32.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cubic import INTERPRETED

Activation = Literal["none", "relu", "sigmoid"]


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    activation: Activation,
    below: Tensor | None = None,
    added: Tensor | None = None,
    *,
    planes: bool = False,
    blocks: tuple[int, int, int, int] | None = None,
) -> None:
    """out = activation(x·weight + bias + upsampled(below) + added).

    Args:
        x: (B,H,W,C).
        weight: (C,M) of x's type.
        bias: (M,) float32.
        out: (B,H,W,M); of `planes`, (B,M,H,W).
        below: (B,H/2,W/2,M), upsampled bilinearly with corners aligned.
        added: (B,H,W,M).
        blocks: pixels and channels that one program makes, of how many of C at a time, by how many warps.
    """
    batch, height, width, channels = x.shape
    made = weight.shape[1]
    pixels = batch * height * width
    block_p, block_m, block_c, warps = blocks or pointwise_blocks(channels, made, below is not None)
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(made, block_m))
    with torch.cuda.device_of(x):
        pointwise_kernel[grid](
            x, weight, bias, x if below is None else below, x if added is None else added, out,
            pixels, height, width, channels, made,
            ACTIVATION=activation, UP=below is not None, ADD=added is not None, PLANES=planes,
            BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps, num_stages=3,
        )  # fmt: skip


def pointwise_blocks(channels: int, made: int, up: bool) -> tuple[int, int, int, int]:
    """By measurements of layers on an H200, 32 frames at a time; the interpreter's cost is by the program."""
    block_m = min(128, max(16, triton.next_power_of_2(made)))
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    if INTERPRETED:
        return 8192, block_m, block_c, 4
    if up and channels <= 64:
        return (16, block_m, block_c, 2) if channels <= 16 else (32, block_m, block_c, 4 if channels <= 32 else 8)
    block_p = 64 if up or channels >= 512 else 256 if block_m == 16 else 128
    return block_p, block_m, block_c, 4


@triton.jit(do_not_specialize=["pixels"])
def pointwise_kernel(
    x, weight, bias, below, added, out, pixels, height, width,
    C: tl.constexpr, M: tl.constexpr,
    ACTIVATION: tl.constexpr, UP: tl.constexpr, ADD: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = p < pixels
    wanted = m < M
    at = p.to(tl.int64)
    sums = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        taken = c < C
        pixel = tl.load(x + at[:, None] * C + c[None, :], mask=there[:, None] & taken[None, :], other=0.0)
        part = tl.load(weight + c[:, None] * M + m[None, :], mask=taken[:, None] & wanted[None, :], other=0.0)
        sums = tl.dot(pixel, part, sums, input_precision="ieee")
    sums += tl.load(bias + m, mask=wanted, other=0.0)[None, :]
    stored = there[:, None] & wanted[None, :]
    if UP:  # as torch's upsample_bilinear2d with align_corners
        low_height, low_width = height // 2, width // 2
        column = p % width
        row = p // width % height
        frame = (p // width // height).to(tl.int64)
        y = row.to(tl.float32) * ((low_height - 1).to(tl.float32) / (height - 1).to(tl.float32))
        left_at = column.to(tl.float32) * ((low_width - 1).to(tl.float32) / (width - 1).to(tl.float32))
        y0 = y.to(tl.int32)
        x0 = left_at.to(tl.int32)
        y1 = tl.minimum(y0 + 1, low_height - 1)
        x1 = tl.minimum(x0 + 1, low_width - 1)
        down = (y - y0.to(tl.float32))[:, None]
        right = (left_at - x0.to(tl.float32))[:, None]
        upper = below + (((frame * low_height + y0) * low_width) * M)[:, None] + m[None, :]
        lower = below + (((frame * low_height + y1) * low_width) * M)[:, None] + m[None, :]
        x0, x1 = (x0 * M)[:, None], (x1 * M)[:, None]
        a = tl.load(upper + x0, mask=stored, other=0.0).to(tl.float32)
        b = tl.load(upper + x1, mask=stored, other=0.0).to(tl.float32)
        c_ = tl.load(lower + x0, mask=stored, other=0.0).to(tl.float32)
        d = tl.load(lower + x1, mask=stored, other=0.0).to(tl.float32)
        above = a + right * (b - a)
        sums += above + down * (c_ + right * (d - c_) - above)
    if ADD:
        sums += tl.load(added + at[:, None] * M + m[None, :], mask=stored, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        sums = tl.maximum(sums, 0.0)
    if ACTIVATION == "sigmoid":
        sums = tl.sigmoid(sums)
    if PLANES:
        size = height * width
        where = out + ((at // size) * M * size + at % size)[:, None] + (m * size)[None, :]
    else:
        where = out + at[:, None] * M + m[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=stored)


def depthwise(
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    out: Tensor,
    project: tuple[Tensor, Tensor] | None = None,
    added: Tensor | None = None,
    *,
    blocks: tuple[int, int, int, int] | None = None,
) -> None:
    """out = relu(x * taps + bias), or that times a matrix: relu(…)·weight + bias + added.

    A program goes down a strip of columns and keeps the sums of three rows in registers, so that each pixel is read
    three times (for the columns beside it), not nine.

    Args:
        x: (B,H,W,C).
        taps: (9,C) float32, row by row.
        bias: (C,) float32.
        out: (B,H,W,C), or (B,H,W,M).
        project: weight (C,M) of x's type and bias (M,) float32; C and M up to 256.
        added: (B,H,W,M).
        blocks: rows, columns and channels of x that one program takes, and by how many warps; with `project`, all
            channels.
    """
    batch, height, width, channels = x.shape
    made = out.shape[3]
    weight, shift = project or (x, bias)
    rows, columns, block_c, warps = blocks or depthwise_blocks(channels, height, width, project is not None)
    strips = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    grid = (strips * batch, 1 if project else triton.cdiv(channels, block_c))
    with torch.cuda.device_of(x):
        depthwise_kernel[grid](
            x, taps, bias, weight, shift, x if added is None else added, out, height, width, channels, made,
            PROJECT=project is not None, ADD=added is not None, ROWS=rows, COLUMNS=columns, BLOCK_C=block_c,
            BLOCK_M=max(16, triton.next_power_of_2(made)), num_warps=warps, num_stages=1,
        )  # fmt: skip


def depthwise_blocks(channels: int, height: int, width: int, project: bool) -> tuple[int, int, int, int]:
    """By measurements of layers on an H200, 32 frames at a time; the interpreter's cost is by the program."""
    block = max(16, triton.next_power_of_2(channels))
    if INTERPRETED:
        return height, max(16, triton.next_power_of_2(width)), block, 4
    if not project and height <= 20:
        return (10, 8, min(block, 64), 4) if height > 10 else (10, 16, min(block, 64), 8)
    block = block if project else min(block, 128)
    columns = max(16, 1024 // block)
    rows = 20 if height > 80 else 10 if height > 16 else 4
    return rows, columns, block, max(1, columns * block // 512)


@triton.jit
def depthwise_kernel(
    x, taps, bias, weight, shift, added, out, height, width,
    C: tl.constexpr, M: tl.constexpr, PROJECT: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    across = (width + COLUMNS - 1) // COLUMNS
    strips = across * ((height + ROWS - 1) // ROWS)
    frame = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    top = strip // across * ROWS
    column = strip % across * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.arange(0, BLOCK_M)
    taken = c < C
    here = (column < width)[:, None]
    beside_left = ((column > 0) & (column <= width))[:, None] & taken[None, :]
    beside_none = here & taken[None, :]
    beside_right = (column + 1 < width)[:, None] & taken[None, :]
    pixel = x + (frame * height * width + column)[:, None] * C + c[None, :]
    row_bias = tl.load(bias + c, mask=taken, other=0.0)[None, :]
    if PROJECT:
        matrix = tl.load(weight + c[:, None] * M + m[None, :], mask=taken[:, None] & (m < M)[None, :], other=0.0)
        made_bias = tl.load(shift + m, mask=m < M, other=0.0)[None, :]

    ending = tl.zeros((COLUMNS, BLOCK_C), tl.float32)  # of the row above the one that is read
    begun = tl.zeros((COLUMNS, BLOCK_C), tl.float32)  # of the row that is read
    first = top > 0
    at = pixel + (top - 1).to(tl.int64) * width * C
    left = tl.load(at - C, mask=beside_left & first, other=0.0)
    middle = tl.load(at, mask=beside_none & first, other=0.0)
    right = tl.load(at + C, mask=beside_right & first, other=0.0)
    for step in range(ROWS + 2):
        row = top - 1 + step
        a, b, d = left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)
        more = (row + 1 < height) & (row < top + ROWS)  # the next row's pixels come while this one's are added up
        at += width * C
        left = tl.load(at - C, mask=beside_left & more, other=0.0)
        middle = tl.load(at, mask=beside_none & more, other=0.0)
        right = tl.load(at + C, mask=beside_right & more, other=0.0)
        sums = ending + weighted(a, b, d, taps + 6 * C, c, taken, C) + row_bias
        ending = begun + weighted(a, b, d, taps + 3 * C, c, taken, C)
        begun = weighted(a, b, d, taps, c, taken, C)
        sums = tl.maximum(sums, 0.0)
        whole = (row > top) & (row <= height)
        where = (frame * height + row - 1) * width + column
        if PROJECT:
            stored = here & (m < M)[None, :] & whole
            made = tl.dot(sums.to(x.dtype.element_ty), matrix, input_precision="ieee") + made_bias
            if ADD:
                made += tl.load(added + where[:, None] * M + m[None, :], mask=stored, other=0.0).to(tl.float32)
            tl.store(out + where[:, None] * M + m[None, :], made.to(out.dtype.element_ty), mask=stored)
        else:
            spot = out + where[:, None] * C + c[None, :]
            tl.store(spot, sums.to(out.dtype.element_ty), mask=beside_none & whole)


@triton.jit
def weighted(left, middle, right, taps, c, taken, C: tl.constexpr):
    first = tl.load(taps + c, mask=taken, other=0.0)[None, :]
    second = tl.load(taps + C + c, mask=taken, other=0.0)[None, :]
    third = tl.load(taps + 2 * C + c, mask=taken, other=0.0)[None, :]
    return left * first + middle * second + right * third


def depthwise_halving(
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    out: Tensor,
    project: tuple[Tensor, Tensor],
    *,
    blocks: tuple[int, int, int, int, int] | None = None,
) -> None:
    """`depthwise` of stride 2, projected.

    Args:
        x, taps, bias, project: see `depthwise`; of any number of channels.
        out: (B,H/2,W/2,M).
        blocks: rows, columns and channels that one program makes, of how many of C at a time, by how many warps.
    """
    batch, height, width, made = out.shape
    channels = x.shape[3]
    rows, columns, block_m, block_c, warps = blocks or halving_blocks(channels, made)
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    with torch.cuda.device_of(x):
        depthwise_halving_kernel[(tiles * batch, triton.cdiv(made, block_m))](
            x, taps, bias, *project, out, height, width, channels, made,
            ROWS=rows, COLUMNS=columns, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps, num_stages=2,
        )  # fmt: skip


def halving_blocks(channels: int, made: int) -> tuple[int, int, int, int, int]:
    """By measurements of layers on an H200, 32 frames at a time; the interpreter's cost is by the program."""
    block_m = min(128, max(16, triton.next_power_of_2(made)))
    block_c = min(32, max(16, triton.next_power_of_2(channels)))
    return (32, 256, block_m, block_c, 4) if INTERPRETED else (8, 16, block_m, block_c, 4)


@triton.jit
def depthwise_halving_kernel(
    x, taps, bias, weight, shift, out, height, width, C: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across = (width + COLUMNS - 1) // COLUMNS
    tiles = across * ((height + ROWS - 1) // ROWS)
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tl.arange(0, ROWS * COLUMNS)
    row = tile // across * ROWS + p // COLUMNS
    column = tile % across * COLUMNS + p % COLUMNS
    there = (row < height) & (column < width)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    made = tl.zeros((ROWS * COLUMNS, BLOCK_M), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        sums = tl.zeros((ROWS * COLUMNS, BLOCK_C), tl.float32) + tl.load(bias + c, mask=c < C, other=0.0)[None, :]
        for dy in tl.static_range(3):
            y = row * 2 + (dy - 1)
            for dx in tl.static_range(3):
                z = column * 2 + (dx - 1)  # the last row and column are within: sizes are even
                inside = there & (y >= 0) & (z >= 0)
                pixel = x + ((frame * 2 * height + y) * (2 * width) + z)[:, None] * C + c[None, :]
                value = tl.load(pixel, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                sums += value * tl.load(taps + (3 * dy + dx) * C + c, mask=c < C, other=0.0)[None, :]
        part = tl.load(weight + c[:, None] * M + m[None, :], mask=(c < C)[:, None] & (m < M)[None, :], other=0.0)
        made = tl.dot(tl.maximum(sums, 0.0).to(x.dtype.element_ty), part, made, input_precision="ieee")
    made += tl.load(shift + m, mask=m < M, other=0.0)[None, :]
    where = ((frame * height + row) * width + column)[:, None] * M + m[None, :]
    tl.store(out + where, made.to(out.dtype.element_ty), mask=there[:, None] & (m < M)[None, :])
