"""Faces out of frames in one pass: cut, resized, masked, normalised."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cubic import computed_in, divided, four_taps, nearest_in, nth, on_device, read_rect, rounded, tile_of
from .nv12 import rgb_of

CROP, BORDER = tl.constexpr(328), tl.constexpr(4)
INNER = tl.constexpr(320)
MASK_LEFT, MASK_RIGHT, MASK_TOP, MASK_BOTTOM = (tl.constexpr(edge) for edge in (5, 315, 5, 310))


def crop(
    frames: Tensor,
    rects: Tensor,
    crops: Tensor,
    inputs: Tensor | None,
    equations: tuple[float, float, int, int, int],
    tile: tuple[int, int] | None = None,
) -> None:
    """Fill `crops` (B,3,328,328), and `inputs` (B,6,320,320) if given, both contiguous; see `gpurender.crop_faces`.

    Of a rectangle of w×h, bytes moved a frame with uint8 RGB and half-precision inputs: 3·w·h read (each pixel is read
    by up to 16·(328/w)·(328/h) outputs, from the cache), 322,752 and 1,228,800 written.

    Args:
        frames: (B,3,H,W) of any strides, or (B,H*3/2,W) NV12.
        rects: (B,4) on the host, checked.
        equations: of NV12, see `gpurender.color.equations`.
        tile: rows and columns that one program makes, powers of two.
    """
    nv12 = frames.ndim == 3
    strides = (frames.stride(0), 0, *frames.stride()[1:]) if nv12 else frames.stride()
    rows, columns = tile_of(tile, (4, 64))
    grid = (triton.cdiv(CROP.value, rows) * triton.cdiv(CROP.value, columns), len(frames))
    with torch.cuda.device_of(frames):  # which need not be the current one
        crop_kernel[grid](
            frames, on_device(rects, frames.device), crops, crops if inputs is None else inputs, *strides,
            frames.shape[1] * 2 // 3, *equations, NV12=nv12, ROUND=frames.dtype == torch.uint8,
            INPUTS=inputs is not None, ACC=computed_in(frames.dtype), TILE_Y=rows, TILE_X=columns,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def crop_kernel(
    frames, rects, crops, inputs, by_frame: tl.int64, by_channel: tl.int64, by_row: tl.int64, by_column,
    luma_rows,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
    NV12: tl.constexpr, ROUND: tl.constexpr, INPUTS: tl.constexpr, ACC: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    across: tl.constexpr = (CROP + TILE_X - 1) // TILE_X
    y = tl.program_id(0) // across * TILE_Y + tl.arange(0, TILE_Y)
    x = tl.program_id(0) % across * TILE_X + tl.arange(0, TILE_X)
    within = (y < CROP)[:, None] & (x < CROP)[None, :]

    x0, y0, x1, y1 = read_rect(rects, b)
    width, height = x1 - x0, y1 - y0
    top, wy0, wy1, wy2, wy3 = four_taps(y, divided(height, CROP, ACC), ACC)
    left, wx0, wx1, wx2, wx3 = four_taps(x, divided(width, CROP, ACC), ACC)
    wx = (wx0, wx1, wx2, wx3)

    frame = frames + b * by_frame
    red = tl.zeros((TILE_Y, TILE_X), ACC)
    green = tl.zeros((TILE_Y, TILE_X), ACC)
    blue = tl.zeros((TILE_Y, TILE_X), ACC)
    for j in range(4):
        wy = nth(j, wy0, wy1, wy2, wy3)[:, None]
        row = y0 + nearest_in(top + j, height - 1)
        row_red = tl.zeros((TILE_Y, TILE_X), ACC)
        row_green = tl.zeros((TILE_Y, TILE_X), ACC)
        row_blue = tl.zeros((TILE_Y, TILE_X), ACC)
        for i in tl.static_range(4):
            column = x0 + nearest_in(left + i, width - 1)
            at = frame + row.to(tl.int64)[:, None] * by_row + column.to(tl.int64)[None, :] * by_column
            if NV12:
                chroma_row = (luma_rows + row // 2).to(tl.int64)
                chroma = frame + chroma_row[:, None] * by_row + (column // 2 * 2).to(tl.int64)[None, :] * by_column
                r, g, b_ = rgb_of(
                    tl.load(at, mask=within, other=0).to(ACC),
                    tl.load(chroma, mask=within, other=0).to(ACC) - 128,
                    tl.load(chroma + by_column, mask=within, other=0).to(ACC) - 128,
                    KR, KB, LOW, LUMA, CHROMA,
                )  # fmt: skip
            else:
                r = tl.load(at, mask=within, other=0).to(ACC)
                g = tl.load(at + by_channel, mask=within, other=0).to(ACC)
                b_ = tl.load(at + 2 * by_channel, mask=within, other=0).to(ACC)
            row_red += wx[i][None, :] * r
            row_green += wx[i][None, :] * g
            row_blue += wx[i][None, :] * b_
        red += wy * row_red
        green += wy * row_green
        blue += wy * row_blue

    if ROUND:
        red, green, blue = rounded(red), rounded(green), rounded(blue)
    crop_ = crops + b * (3 * CROP * CROP) + y[:, None] * CROP + x[None, :]
    store_three(crop_, CROP * CROP, red, green, blue, within)
    if INPUTS:
        if ROUND:
            red, green, blue = divided(red, 255, ACC), divided(green, 255, ACC), divided(blue, 255, ACC)
        else:  # as far as the crop's type has it
            crop_type: tl.constexpr = crops.dtype.element_ty
            red, green, blue = red.to(crop_type), green.to(crop_type), blue.to(crop_type)
        y -= BORDER
        x -= BORDER
        within = ((y >= 0) & (y < INNER))[:, None] & ((x >= 0) & (x < INNER))[None, :]
        input_ = inputs + b * (6 * INNER * INNER) + y[:, None] * INNER + x[None, :]
        store_three(input_, INNER * INNER, blue, green, red, within)
        shown = ((y < MASK_TOP) | (y >= MASK_BOTTOM))[:, None] | ((x < MASK_LEFT) | (x >= MASK_RIGHT))[None, :]
        masked = input_ + 3 * INNER * INNER
        store_three(
            masked, INNER * INNER, tl.where(shown, blue, 0.0), tl.where(shown, green, 0.0), tl.where(shown, red, 0.0),
            within,
        )  # fmt: skip


@triton.jit
def store_three(at, plane: tl.constexpr, first, second, third, within):
    tl.store(at, first.to(at.dtype.element_ty), mask=within)
    tl.store(at + plane, second.to(at.dtype.element_ty), mask=within)
    tl.store(at + 2 * plane, third.to(at.dtype.element_ty), mask=within)
