"""Faces back into frames: the network's picture in the crop's border, resized, written over the rectangle."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import Matrix, check_matrix, equations, fill_here, fill_reference, planes, surfaces_for
from .crop import BORDER, CROP, INNER
from .cubic import boxes_within, check_frames_and_rects, resize_cubic, resize_cubic_transposed, same_size
from .ops import (
    DLPack,
    Impl,
    as_tensor,
    check_impl,
    check_no_tangents,
    custom_op,
    fake_of,
    gradient_of,
    runs_kernel,
)
from .rectangles import Rect


def paste_faces(
    frames: Tensor | DLPack,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None = None,
    *,
    inplace: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Write the network's faces over the frames' face rectangles.

    Convention: as `crop_faces`. The prediction lies at [4:324,4:324] of the crop, whose 4-pixel border keeps the
    resized original, and the whole is resized (cubic) to the rectangle. Pixels outside the rectangle, and those in
    `keep`, stay bit for bit. There are two modes, by the frames' type. The exact 8-bit mode (uint8) *cuts* the
    prediction to 8 bits and rounds the resized face to them, as SyncTalk_2D does. The float mode, of values in 0..1,
    rounds nothing, and has gradients, first and second, with respect to frames, crops and predictions.

    Args:
        frames: (B,3,H,W) RGB, uint8 or floating point, of any strides; torch's or any library's that has DLPack.
        crops: (B,3,328,328) RGB, what `crop_faces` gave for these frames and rectangles.
        predictions: (B,3,320,320) floating point BGR in 0..1, from the network.
        rects: (B,4) integers on the host, `(x0,y0,x1,y1)`.
        keep: (B,H,W) bool, true where the frame's own pixel stays; None for nowhere.
        inplace: write into `frames` and return them; has no gradients.
        impl: `reference` is Kornia's resize, on any device; `kernel` is one Triton kernel. None is that on CUDA, and on
            a CPU in 8 bits another, compiled for this processor. Where the exact value lies within 0.02 of two levels'
            middle (0.05 for rectangles of over 4096 pixels a side), they may differ by one level: places between pixels
            are numbers of float32.

    Returns:
        (B,3,H,W), dtype and device of `frames`.

    Raises:
        ValueError: shapes, dtypes or devices are not these, or a rectangle leaves the frame or is empty; the kernel was
            asked for and cannot run, or forward-mode derivatives were; or in place, gradients are asked for, or the
            frames share memory or are read-only.

    >>> import torch
    >>> from gpurender import crop_faces, paste_faces
    >>> frames = torch.zeros(1, 3, 400, 400, dtype=torch.uint8)
    >>> rects = torch.tensor([[10, 20, 210, 220]])
    >>> pasted = paste_faces(frames, crop_faces(frames, rects), torch.ones(1, 3, 320, 320), rects)
    >>> pasted[0, :, 120, 110].tolist(), pasted[0, :, 300, 300].tolist()
    ([255, 255, 255], [0, 0, 0])
    """
    frames = as_tensor(frames, written=inplace)
    rects = check_faces(frames, crops, predictions, rects, keep)
    check_impl(impl)
    if not inplace:
        return paste_op(frames, crops, predictions, rects, keep, impl)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (frames, crops, predictions)):
        raise ValueError("pasting in place has no gradients; leave out inplace=True")
    if any(stride == 0 and size > 1 for size, stride in zip(frames.shape, frames.stride(), strict=True)):
        raise ValueError("frames that share memory cannot be pasted in place; leave out inplace=True, or clone() them")
    paste_in_place_op(frames, crops, predictions, rects, keep, impl)
    return frames


def paste_faces_nv12(
    frames: Tensor | DLPack,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None = None,
    *,
    matrix: Matrix = "bt709",
    full_range: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """The frames with the network's faces over their own, as NV12: `paste_faces` and `rgb_to_nv12` in one pass.

    Convention: as `paste_faces` in its exact 8-bit mode, and `rgb_to_nv12`. `frames` are not changed.

    Args:
        frames: (B,3,H,W) uint8 RGB of any strides; torch's or any library's that has DLPack.
        crops, predictions, rects, keep, impl: see `paste_faces`.
        matrix, full_range: see `rgb_to_nv12`.

    Returns:
        (B,H*3/2,W) uint8 on the device of `frames`, H and W rounded up to even.

    Raises:
        ValueError: as `paste_faces`, or `frames` are not uint8.

    >>> import torch
    >>> from gpurender import crop_faces, paste_faces_nv12
    >>> frames = torch.zeros(1, 3, 400, 400, dtype=torch.uint8)
    >>> rects = torch.tensor([[10, 20, 210, 220]])
    >>> surfaces = paste_faces_nv12(frames, crop_faces(frames, rects), torch.ones(1, 3, 320, 320), rects)
    >>> surfaces.shape, surfaces[0, 120, 110].item(), surfaces[0, 300, 300].item()
    (torch.Size([1, 600, 400]), 235, 16)
    """
    frames = as_tensor(frames)
    rects = check_faces(frames, crops, predictions, rects, keep)
    check_impl(impl)
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames that are made NV12 are uint8, given {frames.dtype}")
    check_matrix(matrix)
    return paste_nv12_op(frames, crops, predictions, rects, keep, matrix, full_range, impl)


def check_faces(frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None) -> Tensor:
    """The rectangles as int64, after a look whether all these go together."""
    if frames.ndim != 4:
        raise ValueError(f"frames are (B,3,H,W), given {tuple(frames.shape)}")
    rects = check_frames_and_rects(frames, rects)
    for name, tensor in (("crops", crops), ("predictions", predictions), ("keep", keep)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: give a tensor, not {type(tensor).__name__}; torch.from_dlpack makes one")
    check_no_tangents(crops, predictions)
    batch = frames.shape[0]
    if crops.shape != (batch, 3, CROP, CROP) or crops.dtype != frames.dtype:
        raise ValueError(f"crops are {(batch, 3, CROP, CROP)} {frames.dtype}, given {tuple(crops.shape)} {crops.dtype}")
    if predictions.shape != (batch, 3, INNER, INNER) or not predictions.is_floating_point():
        raise ValueError(
            f"predictions are {(batch, 3, INNER, INNER)} floats, given {tuple(predictions.shape)} {predictions.dtype}"
        )
    if keep is not None and (keep.shape != (batch, *frames.shape[2:]) or keep.dtype != torch.bool):
        raise ValueError(f"keep is {(batch, *frames.shape[2:])} bool, given {tuple(keep.shape)} {keep.dtype}")
    for name, tensor in (("crops", crops), ("predictions", predictions), ("keep", keep)):
        if tensor is not None and tensor.device != frames.device:
            raise ValueError(f"{name} are on {tensor.device}, but frames on {frames.device}; bring them together")
    return rects


# --- the ops ---------------------------------------------------------------------------------------------------------


@custom_op("paste")
def paste_op(
    frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None, impl: str | None
) -> Tensor:
    pasted = frames.clone()
    paste_over(pasted, crops, predictions, rects, keep, impl)
    return pasted


@fake_of("paste")
def _(
    frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None, impl: str | None
) -> Tensor:
    return torch.empty_like(frames)


@custom_op("paste_in_place", mutates=("frames",))
def paste_in_place_op(
    frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None, impl: str | None
) -> None:
    paste_over(frames, crops, predictions, rects, keep, impl)
    torch.autograd.graph.increment_version(frames)  # for whoever kept them for a gradient: kernels do not tell torch


@fake_of("paste_in_place")
def _(
    frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None, impl: str | None
) -> None: ...


@custom_op("paste_nv12")
def paste_nv12_op(
    frames: Tensor,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None,
    matrix: str,
    full_range: bool,
    impl: str | None,
) -> Tensor:
    surfaces = surfaces_for(frames)
    if not runs_kernel(impl, frames.device):
        pasted = frames.clone()
        paste_over(pasted, crops, predictions, rects, keep, impl)
        fill = fill_here if impl is None and frames.device.type == "cpu" else fill_reference
        fill(*planes(surfaces), pasted, equations(matrix, full_range))
        return surfaces
    boxes_within(frames, rects)
    from .kernels.paste import paste  # Triton takes a while to load, and is not everywhere

    paste(frames, crops, predictions, rects, keep, surfaces, equations(matrix, full_range))
    return surfaces


@fake_of("paste_nv12")
def _(
    frames: Tensor,
    crops: Tensor,
    predictions: Tensor,
    rects: Tensor,
    keep: Tensor | None,
    matrix: str,
    full_range: bool,
    impl: str | None,
) -> Tensor:
    return surfaces_for(frames)


def paste_over(
    frames: Tensor, crops: Tensor, predictions: Tensor, rects: Tensor, keep: Tensor | None, impl: str | None
) -> None:
    boxes = boxes_within(frames, rects)
    if runs_kernel(impl, frames.device):
        from .kernels.paste import paste

        paste(frames, crops, predictions, rects, keep)
    elif impl is None and frames.dtype == torch.uint8 and frames.device.type == "cpu":
        paste_here(frames, crops, predictions, boxes, keep)
    else:
        paste_reference(frames, crops, predictions, boxes, keep)


def paste_here(frames: Tensor, crops: Tensor, predictions: Tensor, boxes: list[Rect], keep: Tensor | None) -> None:
    """`paste_reference` into uint8 frames on a CPU, by the kernel for this processor if there is one for all."""
    from .face_kernels import kernel_for, paste_face  # LLVM takes a while to load

    if not all(kernel_for(x1 - x0) for x0, _, x1, _ in boxes):
        paste_reference(frames, crops, predictions, boxes, keep)
        return
    crops, predictions = crops.contiguous(), predictions.float().contiguous()
    keep = keep.contiguous() if keep is not None else None
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        stays = keep[i, y0:y1, x0:x1] if keep is not None else None
        paste_face(frames[i, :, y0:y1, x0:x1], crops[i], predictions[i], stays)


def paste_reference(frames: Tensor, crops: Tensor, predictions: Tensor, boxes: list[Rect], keep: Tensor | None) -> None:
    faces = crops.clone()
    faces[:, :, BORDER:-BORDER, BORDER:-BORDER] = as_pixels(predictions, frames.dtype).flip(1)
    for size, members in same_size(boxes):
        resized = resize_cubic(torch.stack([faces[i] for i, _ in members]), size)
        for (i, (x0, y0, x1, y1)), face in zip(members, resized, strict=True):
            target = frames[i, :, y0:y1, x0:x1]
            if keep is not None:
                face = torch.where(keep[i, y0:y1, x0:x1], target, face)
            target.copy_(face)


def as_pixels(predictions: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.uint8:
        return predictions.to(dtype)
    return (predictions.float() * 255).clamp_(0, 255).to(torch.uint8)  # cut, not rounded, as the reference does


# Pasting is linear in frames and faces: its gradient is its transpose, whose gradient is pasting again.


@custom_op("paste_transposed")
def paste_transposed(pasted: Tensor, rects: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """What goes back to the frames, and to the 328×328 faces."""
    frames, faces = pasted.clone(), pasted.new_empty(len(pasted), 3, CROP, CROP)
    for _, members in same_size(boxes_within(pasted, rects)):
        of_rects = []
        for i, (x0, y0, x1, y1) in members:
            within = frames[i, :, y0:y1, x0:x1]
            stays = keep[i, y0:y1, x0:x1] if keep is not None else torch.zeros_like(within[0], dtype=torch.bool)
            of_rects.append(within.masked_fill(stays, 0))
            within.masked_fill_(~stays, 0)
        resized = resize_cubic_transposed(torch.stack(of_rects), (CROP, CROP))
        for (i, _), face in zip(members, resized, strict=True):
            faces[i] = face
    return frames, faces


@fake_of("paste_transposed")
def _(pasted: Tensor, rects: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pasted), pasted.new_empty(pasted.shape[0], 3, CROP, CROP)


def save_for_paste(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, _, predictions, rects, keep, _ = inputs
    ctx.save_for_backward(rects, keep)
    ctx.dtype = predictions.dtype


def paste_backward(ctx: Any, of_pasted: Tensor) -> tuple[Tensor | None, ...]:
    of_frames, of_faces = paste_transposed(of_pasted, *ctx.saved_tensors)
    of_predictions = of_faces[:, :, BORDER:-BORDER, BORDER:-BORDER]
    of_crops = of_faces - F.pad(of_predictions, (BORDER,) * 4)
    return of_frames, of_crops, of_predictions.flip(1).to(ctx.dtype), None, None, None


gradient_of("paste", paste_backward, save_for_paste)


def save_for_paste_transposed(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, rects, keep = inputs
    ctx.save_for_backward(rects, keep)


def paste_transposed_backward(ctx: Any, of_frames: Tensor, of_faces: Tensor) -> tuple[Tensor | None, ...]:
    rects, keep = ctx.saved_tensors
    predictions = of_faces[:, :, BORDER:-BORDER, BORDER:-BORDER].flip(1)
    return paste_op(of_frames, of_faces, predictions, rects, keep, None), None, None


gradient_of("paste_transposed", paste_transposed_backward, save_for_paste_transposed)
