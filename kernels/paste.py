"""Faces back into frames in one pass: put together, resized, kept pixels left out, made NV12 if asked to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .color import rgb_to_nv12
from .cubic import computed_in, divided, four_taps, nearest_in, nth, on_device, read_rect, rounded, tile_of
from .nv12 import load_rgb, store_nv12

CROP, BORDER, INNER = tl.constexpr(328), tl.constexpr(4), tl.constexpr(320)
TILE = (4, 128)


def paste(
    frames: Tensor,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None,
    out: Tensor | None = None,
    equations: tuple[float, float, int, int, int] = (0.0, 0.0, 0, 0, 0),
    tile: tuple[int, int] | None = None,
) -> None:
    """Write faces over `frames`, or the frames with their faces into NV12 surfaces `out`.

    See `gpurender.paste_faces` and `gpurender.paste_faces_nv12`. Bytes moved a frame of W×H uint8 with half-precision
    predictions and a rectangle of w×h: 614,400 of the prediction and about 16,000 of the crop's border read (each by up
    to 16 pixels, from the cache), w·h of `keep` if there is one; and 3·w·h written, or for NV12 3·W·H read and 1.5·W·H
    written: tiles that touch the rectangle by this kernel, all others by `rgb_to_nv12`'s, which needs fewer registers.

    Args:
        frames: (B,3,H,W) of any strides; uint8 for NV12.
        crops, predictions, keep: of any strides (in x below 6 million).
        rects: (B,4) on the host, checked.
        out: None to write over `frames`; or (B,H*3/2,W) uint8, contiguous, H and W rounded up to even.
        equations: of NV12, see `gpurender.color.equations`.
        tile: rows and columns that one program makes, powers of two.
    """
    if not len(frames):
        return
    rows, columns = tile_of(tile, TILE)
    boxes = on_device(rects, frames.device)
    if out is not None:
        rgb_to_nv12(frames, out, equations, boxes, (rows, columns))
    height, width = frames.shape[2:]
    of_tile = torch.tensor([columns, rows])
    tiles = (rects[:, 2:] - 1) // of_tile - rects[:, :2] // of_tile + 1
    with torch.cuda.device_of(frames):  # which need not be the current one
        paste_kernel[(*tiles.max(0).values.tolist(), len(frames))](
            frames, crops, predictions, frames if keep is None else keep, boxes,
            frames if out is None else out,
            *frames.stride(), *crops.stride(), *predictions.stride(), *((0, 0, 0) if keep is None else keep.stride()),
            height, width, *equations, NV12=out is not None, EVEN=height % 2 == width % 2 == 0, KEEP=keep is not None,
            ROUND=frames.dtype == torch.uint8, ACC=computed_in(frames.dtype), TILE_Y=rows, TILE_X=columns,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def paste_kernel(
    frames, crops, predictions, keep, rects, out,
    frame_b: tl.int64, frame_c: tl.int64, frame_y: tl.int64, frame_x,
    crop_b: tl.int64, crop_c: tl.int64, crop_y: tl.int64, crop_x,
    prediction_b: tl.int64, prediction_c: tl.int64, prediction_y: tl.int64, prediction_x,
    keep_b: tl.int64, keep_y: tl.int64, keep_x,
    frame_height, frame_width,
    KR: tl.constexpr, KB: tl.constexpr, LOW: tl.constexpr, LUMA: tl.constexpr, CHROMA: tl.constexpr,
    NV12: tl.constexpr, EVEN: tl.constexpr, KEEP: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    x0, y0, x1, y1 = read_rect(rects, b)
    top, left = (y0 // TILE_Y + tl.program_id(1)) * TILE_Y, (x0 // TILE_X + tl.program_id(0)) * TILE_X
    if (top < y1) & (left < x1):
        tile_y, tile_x = top + tl.arange(0, TILE_Y), left + tl.arange(0, TILE_X)
        # A surface of an odd size ends with its last row or column twice.
        y, x = (tile_y, tile_x) if EVEN else (tl.minimum(tile_y, frame_height - 1), tl.minimum(tile_x, frame_width - 1))
        new = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
        if KEEP:
            kept = keep + b * keep_b + y.to(tl.int64)[:, None] * keep_y + x.to(tl.int64)[None, :] * keep_x
            new &= tl.load(kept, mask=new, other=1) == 0
        height, width = y1 - y0, x1 - x0
        face_y, wy0, wy1, wy2, wy3 = four_taps(y - y0, divided(CROP, height, ACC), ACC)
        face_x, wx0, wx1, wx2, wx3 = four_taps(x - x0, divided(CROP, width, ACC), ACC)
        wx = (wx0, wx1, wx2, wx3)
        crop = crops + b * crop_b
        prediction = predictions + b * prediction_b - BORDER * (prediction_y + prediction_x)
        face_red = tl.zeros((TILE_Y, TILE_X), ACC)
        face_green = tl.zeros((TILE_Y, TILE_X), ACC)
        face_blue = tl.zeros((TILE_Y, TILE_X), ACC)
        for j in range(4):
            wy = nth(j, wy0, wy1, wy2, wy3)[:, None]
            v = nearest_in(face_y + j, CROP - 1)
            drawn_rows = (v >= BORDER) & (v < BORDER + INNER)
            row_red = tl.zeros((TILE_Y, TILE_X), ACC)
            row_green = tl.zeros((TILE_Y, TILE_X), ACC)
            row_blue = tl.zeros((TILE_Y, TILE_X), ACC)
            for i in tl.static_range(4):
                u = nearest_in(face_x + i, CROP - 1)
                drawn = drawn_rows[:, None] & ((u >= BORDER) & (u < BORDER + INNER))[None, :]
                of_crop = crop + v[:, None] * crop_y + u[None, :] * crop_x
                of_network = prediction + v[:, None] * prediction_y + u[None, :] * prediction_x
                row_red += wx[i][None, :] * face_pixel(
                    of_crop, of_network + 2 * prediction_c, drawn, new, ROUND, ACC
                )  # fmt: skip
                row_green += wx[i][None, :] * face_pixel(
                    of_crop + crop_c, of_network + prediction_c, drawn, new, ROUND, ACC
                )  # fmt: skip
                row_blue += wx[i][None, :] * face_pixel(
                    of_crop + 2 * crop_c, of_network, drawn, new, ROUND, ACC
                )  # fmt: skip
            face_red += wy * row_red
            face_green += wy * row_green
            face_blue += wy * row_blue
        if ROUND:
            face_red, face_green, face_blue = rounded(face_red), rounded(face_green), rounded(face_blue)
        frame = frames + b * frame_b
        if NV12:
            red, green, blue = load_rgb(
                frame, tile_y, tile_x, frame_c, frame_y, frame_x, frame_height, frame_width, EVEN
            )  # fmt: skip
            red, green, blue = (
                tl.where(new, face_red, red), tl.where(new, face_green, green), tl.where(new, face_blue, blue)
            )  # fmt: skip
            store_nv12(
                out, b, tile_y, tile_x, red, green, blue, frame_height, frame_width,
                KR, KB, LOW, LUMA, CHROMA, EVEN, TILE_Y, TILE_X,
            )  # fmt: skip
        else:
            pixel = frame + y.to(tl.int64)[:, None] * frame_y + x.to(tl.int64)[None, :] * frame_x
            tl.store(pixel, face_red.to(frames.dtype.element_ty), mask=new)
            tl.store(pixel + frame_c, face_green.to(frames.dtype.element_ty), mask=new)
            tl.store(pixel + 2 * frame_c, face_blue.to(frames.dtype.element_ty), mask=new)


@triton.jit
def face_pixel(of_crop, of_network, drawn, wanted, ROUND: tl.constexpr, ACC: tl.constexpr):
    """A pixel of the face before it is resized: the network's, in the crop's border."""
    border = tl.load(of_crop, mask=wanted & ~drawn, other=0).to(ACC)
    inner = tl.load(of_network, mask=wanted & drawn, other=0)
    if ROUND:  # cut, not rounded, as the reference does
        inner = tl.floor(tl.clamp(inner.to(tl.float32) * 255, 0.0, 255.0))
    else:  # as far as the frame's type has it
        inner = inner.to(of_crop.dtype.element_ty).to(ACC)
    return tl.where(drawn, inner, border)
