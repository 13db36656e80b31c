"""Faces back into frames: the network's picture in the crop's border, resized, written over the rectangle."""

import torch
from torch import Tensor

from .crop import BORDER, CROP, INNER, check_rects, resize_cubic, same_size


def paste_faces(
    frames: Tensor,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """Write the network's faces over the frames' face rectangles.

    Convention: as `crop_faces`. The prediction lies at [4:324,4:324] of the crop, whose 4-pixel border keeps the
    resized original, and the whole is resized (cubic) to the rectangle. With uint8 frames the prediction is *cut* to 8
    bits and the resized face rounded to them, as in SyncTalk_2D; in floating point nothing is rounded, and values are
    0..1. Pixels outside the rectangle, and those in `keep`, stay bit for bit.

    Args:
        frames: (B,3,H,W) RGB, uint8 or floating point.
        crops: (B,3,328,328) RGB, what `crop_faces` gave for these frames and rectangles.
        predictions: (B,3,320,320) floating point BGR in 0..1, from the network.
        rects: (B,4) integers on the host, `(x0,y0,x1,y1)`.
        keep: (B,H,W) bool, true where the frame's own pixel stays; None for nowhere.
        inplace: write into `frames` and return it.

    Returns:
        (B,3,H,W), dtype and device of `frames`.

    Raises:
        ValueError: shapes, dtypes or devices are not these, or a rectangle leaves the frame or is empty.

    >>> import torch
    >>> from gpurender import crop_faces, paste_faces
    >>> frames = torch.zeros(1, 3, 400, 400, dtype=torch.uint8)
    >>> rects = torch.tensor([[10, 20, 210, 220]])
    >>> pasted = paste_faces(frames, crop_faces(frames, rects), torch.ones(1, 3, 320, 320), rects)
    >>> pasted[0, :, 120, 110].tolist(), pasted[0, :, 300, 300].tolist()
    ([255, 255, 255], [0, 0, 0])
    """
    boxes = check_rects(frames, rects)
    batch = len(frames)
    if crops.shape != (batch, 3, CROP, CROP) or crops.dtype != frames.dtype:
        raise ValueError(f"crops are {(batch, 3, CROP, CROP)} {frames.dtype}, given {tuple(crops.shape)} {crops.dtype}")
    if predictions.shape != (batch, 3, INNER, INNER) or not predictions.is_floating_point():
        raise ValueError(f"predictions are {(batch, 3, INNER, INNER)} floats, given {tuple(predictions.shape)}")
    if keep is not None and (keep.shape != (batch, *frames.shape[2:]) or keep.dtype != torch.bool):
        raise ValueError(f"keep is {(batch, *frames.shape[2:])} bool, given {tuple(keep.shape)} {keep.dtype}")

    faces = crops.clone()
    faces[:, :, BORDER:-BORDER, BORDER:-BORDER] = as_pixels(predictions, frames.dtype).flip(1)
    pasted = frames if inplace else frames.clone()
    for size, members in same_size(boxes):
        resized = resize_cubic(torch.stack([faces[i] for i, _ in members]), size)
        for (i, (x0, y0, x1, y1)), face in zip(members, resized, strict=True):
            target = pasted[i, :, y0:y1, x0:x1]
            if keep is not None:
                face = torch.where(keep[i, y0:y1, x0:x1], target, face)
            target.copy_(face)
    return pasted


def as_pixels(predictions: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.uint8:
        return predictions.to(dtype)
    return (predictions.float() * 255).clamp_(0, 255).to(torch.uint8)  # cut, not rounded, as the reference does
