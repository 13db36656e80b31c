"""RGB <-> NV12, each byte read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cubic import nearest_in, read_rect, tile_of
from .nv12 import load_rgb, rgb_of, store_nv12

TILE = (8, 128)


def rgb_to_nv12(
    frames: Tensor,
    surfaces: Tensor,
    equations: tuple[float, float, int, int, int],
    but: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> None:
    """Fill `surfaces` (B,H*3/2,W), contiguous, H and W rounded up to even; see `gpurender.rgb_to_nv12`.

    Bytes moved a frame: 3·W·H read, 1.5·W·H written.

    Args:
        frames: (B,3,H,W) uint8 of any strides.
        equations: see `gpurender.color.equations`.
        but: (B,4) int32 rectangles on the device; tiles that touch theirs are left out.
        tile: rows and columns that one program makes, powers of two.
    """
    height, width = frames.shape[2:]
    rows, columns = tile_of(tile, TILE)
    grid = (triton.cdiv(width, columns), triton.cdiv(height, rows), len(frames))
    with torch.cuda.device_of(frames):  # which need not be the current one
        to_nv12_kernel[grid](
            frames, surfaces, surfaces if but is None else but, *frames.stride(),
            height, width, *equations, EVEN=height % 2 == width % 2 == 0, BUT=but is not None,
            TILE_Y=rows, TILE_X=columns,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def to_nv12_kernel(
    frames, surfaces, rects, frame_b: tl.int64, frame_c: tl.int64, frame_y: tl.int64, frame_x, height, width,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
    EVEN: tl.constexpr, BUT: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    top, left = tl.program_id(1) * TILE_Y, tl.program_id(0) * TILE_X
    wanted = tl.full((), True, tl.int1)
    if BUT:
        x0, y0, x1, y1 = read_rect(rects, b)
        wanted = (top >= y1) | (top + TILE_Y <= y0) | (left >= x1) | (left + TILE_X <= x0)
    if wanted:
        y, x = top + tl.arange(0, TILE_Y), left + tl.arange(0, TILE_X)
        red, green, blue = load_rgb(frames + b * frame_b, y, x, frame_c, frame_y, frame_x, height, width, EVEN)
        store_nv12(surfaces, b, y, x, red, green, blue, height, width, KR, KB, LOW, LUMA, CHROMA, EVEN, TILE_Y, TILE_X)


def nv12_to_rgb(
    surfaces: Tensor,
    frames: Tensor,
    equations: tuple[float, float, int, int, int],
    across: tuple[tuple[float, ...], tuple[float, ...]] | None,
    down: tuple[tuple[float, ...], tuple[float, ...]] | None,
    tile: tuple[int, int] | None = None,
) -> None:
    """Fill `frames` (B,3,H,W) uint8, contiguous; see `gpurender.nv12_to_rgb`.

    Bytes moved a frame: 1.5·W·H read (chroma by up to 25 pixels, from the cache), 3·W·H written.

    Args:
        surfaces: (B,H*3/2,W) of any strides.
        equations: see `gpurender.color.equations`.
        across, down: what the five chroma samples around a pixel weigh, for even and for odd columns and rows; None
            where each sample serves its 2×2 pixels.
        tile: rows and columns that one program makes, powers of two.
    """
    height, width = frames.shape[2:]
    rows, columns = tile_of(tile, TILE if across is None else (4, 64))  # more samples need more registers
    grid = (triton.cdiv(width, columns), triton.cdiv(height, rows), len(frames))
    with torch.cuda.device_of(surfaces):  # which need not be the current one
        to_rgb_kernel[grid](
            surfaces, frames, *surfaces.stride(), height, width, *equations,
            ACROSS=across, DOWN=down, TILE_Y=rows, TILE_X=columns, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def to_rgb_kernel(
    surfaces, frames, surface_b: tl.int64, surface_y: tl.int64, surface_x, height, width,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) * TILE_Y + tl.arange(0, TILE_Y)
    x = tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)
    within = (y < height)[:, None] & (x < width)[None, :]
    surface = surfaces + b * surface_b
    luma = tl.load(
        surface + y.to(tl.int64)[:, None] * surface_y + x.to(tl.int64)[None, :] * surface_x, mask=within, other=0
    )  # fmt: skip
    chroma = surface + height.to(tl.int64) * surface_y
    if ACROSS is None:
        at = chroma + (y // 2).to(tl.int64)[:, None] * surface_y + (x // 2 * 2).to(tl.int64)[None, :] * surface_x
        cb = tl.load(at, mask=within, other=0).to(tl.float32) - 128
        cr = tl.load(at + surface_x, mask=within, other=0).to(tl.float32) - 128
    else:
        cb = tl.zeros((TILE_Y, TILE_X), tl.float32)
        cr = tl.zeros((TILE_Y, TILE_X), tl.float32)
        for j in tl.static_range(5):
            row_cb = tl.zeros((TILE_Y, TILE_X), tl.float32)
            row_cr = tl.zeros((TILE_Y, TILE_X), tl.float32)
            row = nearest_in(y // 2 + j - 2, height // 2 - 1).to(tl.int64)
            for i in tl.static_range(5):
                column = nearest_in(x // 2 + i - 2, width // 2 - 1).to(tl.int64)
                weight = tl.where(x % 2 == 0, ACROSS[0][i], ACROSS[1][i])[None, :]
                at = chroma + row[:, None] * surface_y + (column * 2)[None, :] * surface_x
                row_cb += (tl.load(at, mask=within, other=0).to(tl.float32) - 128) * weight
                row_cr += (tl.load(at + surface_x, mask=within, other=0).to(tl.float32) - 128) * weight
            weight = tl.where(y % 2 == 0, DOWN[0][j], DOWN[1][j])[:, None]
            cb += row_cb * weight
            cr += row_cr * weight
    red, green, blue = rgb_of(luma.to(tl.float32), cb, cr, KR, KB, LOW, LUMA, CHROMA)
    pixel = frames + b * 3 * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
    plane = height.to(tl.int64) * width
    tl.store(pixel, red.to(tl.uint8), mask=within)
    tl.store(pixel + plane, green.to(tl.uint8), mask=within)
    tl.store(pixel + 2 * plane, blue.to(tl.uint8), mask=within)
