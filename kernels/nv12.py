"""NV12 in kernels: H.273's equations on tiles of pixels."""

import triton
import triton.language as tl

from .cubic import rounded


@triton.jit
def load_rgb(frame, y, x, by_channel, by_row, by_column, height, width, EVEN: tl.constexpr):
    """A tile of pixels, as float32, of rows `y` and columns `x`; an odd size ends with its last row or column twice."""
    if not EVEN:
        y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    within = (y < height)[:, None] & (x < width)[None, :]
    pixel = frame + y.to(tl.int64)[:, None] * by_row + x.to(tl.int64)[None, :] * by_column
    red = tl.load(pixel, mask=within, other=0)
    green = tl.load(pixel + by_channel, mask=within, other=0)
    blue = tl.load(pixel + 2 * by_channel, mask=within, other=0)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@triton.jit
def store_nv12(
    surfaces, b, y, x, red, green, blue, height, width,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
    EVEN: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Write a tile of pixels (float32, 0..255) of rows `y` and columns `x` into surface `b`, of an even size."""
    if not EVEN:  # else it would no longer be known to be divisible by 16, and bytes would be written one by one
        height += height % 2
        width += width % 2
    surface = surfaces + b * (height // 2 * 3) * width
    within = (y < height)[:, None] & (x < width)[None, :]
    luma = surface + y.to(tl.int64)[:, None] * width + x[None, :]
    tl.store(luma, rounded(grey(red, green, blue, KR, KB) * (LUMA / 255) + LOW).to(tl.uint8), mask=within)

    y = tl.min(y, 0) // 2 + tl.arange(0, TILE_Y // 2)
    red, green, blue = mean(red, TILE_Y, TILE_X), mean(green, TILE_Y, TILE_X), mean(blue, TILE_Y, TILE_X)
    level = grey(red, green, blue, KR, KB)
    cb = (blue - level) * (CHROMA / 255 / (2 * (1 - KB))) + 128
    cr = (red - level) * (CHROMA / 255 / (2 * (1 - KR))) + 128
    # Cb and Cr alternate: joined, so that a program writes whole runs of bytes.
    pair = tl.reshape(tl.join(rounded(cb), rounded(cr)), (TILE_Y // 2, TILE_X))
    chroma = surface + (height + y).to(tl.int64)[:, None] * width + x[None, :]
    tl.store(chroma, pair.to(tl.uint8), mask=(y < height // 2)[:, None] & (x < width)[None, :])


@triton.jit
def grey(red, green, blue, KR: tl.constexpr, KB: tl.constexpr):
    return red * KR + green * (1 - KR - KB) + blue * KB


@triton.jit
def mean(plane, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Of each 2×2 pixels."""
    rows = tl.sum(tl.reshape(plane, (TILE_Y, TILE_X // 2, 2)), 2)
    return tl.sum(tl.reshape(rows, (TILE_Y // 2, 2, TILE_X // 2)), 1) * 0.25


@triton.jit
def rgb_of(
    luma, cb, cr,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
):  # fmt: skip
    """Pixels, rounded to 8 bits, of luma (float32 levels) and chroma (float32 levels less 128)."""
    level = (luma - LOW) * (255 / LUMA)
    blue = cb * (255 / CHROMA * 2 * (1 - KB))
    red = cr * (255 / CHROMA * 2 * (1 - KR))
    green = (red * KR + blue * KB) / (KR + KB - 1)
    return rounded(red + level), rounded(green + level), rounded(blue + level)
