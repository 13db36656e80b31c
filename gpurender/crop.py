"""Faces out of frames: batched crop and cubic resize, then the masked pair that the network sees."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import Matrix, check_matrix, equations, rgb_reference
from .cubic import (
    boxes_within,
    check_frames_and_rects,
    resize_cubic,
    resize_cubic_transposed,
    same_size,
)
from .ops import DLPack, Impl, as_tensor, check_impl, custom_op, fake_of, gradient_of, runs_kernel
from .rectangles import Rect

CROP = 328  # a face, resized
BORDER = 4  # of it that the network does not see
INNER = CROP - 2 * BORDER
MASK_X = slice(5, 315)  # of the inner picture, black to the network: the mouth that it has to draw
MASK_Y = slice(5, 310)


def crop_faces(
    frames: Tensor | DLPack,
    rects: Tensor,
    *,
    matrix: Matrix = "bt709",
    full_range: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Cut each frame's face rectangle and resize it to 328×328.

    Convention: rectangles are `(x0,y0,x1,y1)`, x to the right, y down, half-open, in pixels. The resize is cubic with
    a = -0.75, half-pixel centres (`align_corners=False`), no antialiasing, and repeats the edges of the *crop*
    (OpenCV's INTER_CUBIC). There are two modes, by the frames' type. The exact 8-bit mode (uint8, and NV12, whose
    pixels are rounded to 8 bits first) rounds to 8 bits, as SyncTalk_2D does. The float mode rounds nothing: values are
    left as they come, with overshoot, and have gradients, first and second, with respect to the frames.

    Args:
        frames: (B,3,H,W) RGB, uint8, or floating point of any range, of any strides; or NV12 surfaces (B,H*3/2,W)
            uint8; torch's or any library's that has DLPack, whose memory is read where it is.
        rects: (B,4) integers on the host, within the frames; sizes may differ within the batch.
        matrix, full_range: of NV12, see `nv12_to_rgb`; each chroma sample serves its 2×2 pixels.
        impl: `reference` is Kornia's resize, on any device; `kernel` is one Triton kernel. None is that on CUDA, and on
            a CPU in 8 bits another, compiled for this processor. Where the exact value lies within 0.02 of two levels'
            middle (0.05 for rectangles of over 4096 pixels a side), they may differ by one level: places between pixels
            are numbers of float32.

    Returns:
        (B,3,328,328), dtype and device of `frames`.

    Raises:
        ValueError: shapes, dtypes or devices are not these, or a rectangle leaves the frame or is empty; or the kernel
            was asked for and cannot run, or forward-mode derivatives were.

    >>> import torch
    >>> from gpurender import crop_faces
    >>> frames = torch.zeros(2, 3, 720, 1280, dtype=torch.uint8)
    >>> crop_faces(frames, torch.tensor([[100, 50, 284, 234], [90, 40, 280, 230]])).shape
    torch.Size([2, 3, 328, 328])
    """
    frames = as_tensor(frames)
    rects = check_frames_and_rects(frames, rects)
    check_impl(impl)
    check_matrix(matrix)
    return crop_op(frames, rects, None, matrix, full_range, impl)[0]


def crop_and_mask(
    frames: Tensor | DLPack,
    rects: Tensor,
    *,
    dtype: torch.dtype | None = None,
    matrix: Matrix = "bt709",
    full_range: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Crop each frame's face, and make of it what the network sees: `crop_faces` and `face_input` in one pass.

    Convention: as `crop_faces` and `face_input`.

    Args:
        frames, rects, matrix, full_range, impl: see `crop_faces`.
        dtype: of what the network sees, floating point; None is float32, or in float mode the frames' own.

    Returns:
        the crops, (B,3,328,328) of the frames' dtype, which `paste_faces` needs;
        the network's input, (B,6,320,320) of `dtype` in 0..1 (in float mode: in the frames' range); of uint8 frames
            computed in float32.

    Raises:
        ValueError: as `crop_faces`, or `dtype` is not floating point.

    >>> import torch
    >>> from gpurender import crop_and_mask
    >>> frames = torch.full((1, 3, 400, 400), 255, dtype=torch.uint8)
    >>> crops, inputs = crop_and_mask(frames, torch.tensor([[20, 30, 348, 358]]), dtype=torch.float16)
    >>> crops.shape, inputs.shape, inputs.dtype
    (torch.Size([1, 3, 328, 328]), torch.Size([1, 6, 320, 320]), torch.float16)
    >>> inputs[0, :, 160, 160].tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    frames = as_tensor(frames)
    rects = check_frames_and_rects(frames, rects)
    check_impl(impl)
    check_matrix(matrix)
    if dtype is None:
        dtype = frames.dtype if frames.is_floating_point() else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"the network's input is floating point, given {dtype}")
    crops, inputs = crop_op(frames, rects, dtype, matrix, full_range, impl)
    return crops, inputs


def face_input(crops: Tensor) -> Tensor:
    """What the network sees of a 328×328 face: its inner 320×320 picture, whole and with the mouth blacked out.

    Convention: channels are B,G,R of the picture, then B,G,R of the masked one, in 0..1. The mask is x 5..314 and
    y 5..309 of the inner picture.

    Args:
        crops: (B,3,328,328) uint8 RGB, or floating point in 0..1.

    Returns:
        (B,6,320,320) float32, or the floating dtype of `crops`.

    Raises:
        ValueError: `crops` have another shape or dtype.

    >>> import torch
    >>> from gpurender import face_input
    >>> face_input(torch.zeros(1, 3, 328, 328, dtype=torch.uint8)).shape
    torch.Size([1, 6, 320, 320])
    """
    if not isinstance(crops, Tensor):
        raise ValueError(f"crops: give a tensor, not {type(crops).__name__}; torch.from_dlpack makes one")
    if crops.ndim != 4 or crops.shape[1:] != (3, CROP, CROP):
        raise ValueError(f"crops are (B,3,{CROP},{CROP}), given {tuple(crops.shape)}")
    if crops.dtype != torch.uint8 and not crops.is_floating_point():
        raise ValueError(f"crops are uint8 or floating point, given {crops.dtype}")
    inner = crops[:, :, BORDER:-BORDER, BORDER:-BORDER].flip(1)
    if not crops.is_floating_point():
        pair = crops.new_empty(len(crops), 6, INNER, INNER, dtype=torch.float32)
        pair[:, :3].copy_(inner).div_(255)  # in its place: fresh memory for each step costs more than the step
        pair[:, 3:] = pair[:, :3]
    else:
        pair = torch.cat([inner, inner], 1)
    pair[:, 3:, MASK_Y, MASK_X] = 0
    return pair


# --- the op ----------------------------------------------------------------------------------------------------------


@custom_op("crop")
def crop_op(
    frames: Tensor, rects: Tensor, dtype: torch.dtype | None, matrix: str, full_range: bool, impl: str | None
) -> tuple[Tensor, Tensor]:
    boxes = boxes_within(frames, rects)
    if not runs_kernel(impl, frames.device):
        if frames.ndim == 3:
            frames = rgb_reference(frames, matrix, full_range, None)
        in_8_bits_here = frames.dtype == torch.uint8 and frames.device.type == "cpu"
        crops = (crop_each if impl is None and in_8_bits_here else crop_reference)(frames, boxes)
        return crops, frames.new_empty(0) if dtype is None else face_input(crops).to(dtype)
    from .kernels.crop import crop  # Triton takes a while to load, and is not everywhere

    crops, inputs = allocate(frames, dtype)
    crop(frames, rects, crops, None if dtype is None else inputs, equations(matrix, full_range))
    return crops, inputs


@fake_of("crop")
def _(
    frames: Tensor, rects: Tensor, dtype: torch.dtype | None, matrix: str, full_range: bool, impl: str | None
) -> tuple[Tensor, Tensor]:
    return allocate(frames, dtype)


def allocate(frames: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    crops = frames.new_empty(frames.shape[0], 3, CROP, CROP)
    if dtype is None:
        return crops, frames.new_empty(0)
    return crops, frames.new_empty(frames.shape[0], 6, INNER, INNER, dtype=dtype)


def crop_reference(frames: Tensor, boxes: list[Rect]) -> Tensor:
    crops = frames.new_empty(len(frames), 3, CROP, CROP)
    for _, members in same_size(boxes):
        faces = torch.stack([frames[i, :, y0:y1, x0:x1] for i, (x0, y0, x1, y1) in members])
        for (i, _), face in zip(members, resize_cubic(faces, (CROP, CROP)), strict=True):
            crops[i] = face
    return crops


def crop_each(frames: Tensor, boxes: list[Rect]) -> Tensor:
    """The same of uint8 frames on a CPU, by the kernel for this processor if there is one for all of them."""
    from .face_kernels import crop_face, kernel_for  # LLVM takes a while to load

    if not all(kernel_for(x1 - x0) for x0, _, x1, _ in boxes):
        return crop_reference(frames, boxes)
    crops = frames.new_empty(len(frames), 3, CROP, CROP)
    for crop, frame, (x0, y0, x1, y1) in zip(crops, frames, boxes, strict=True):
        face = frame[:, y0:y1, x0:x1]
        if face.shape == crop.shape:
            crop[:] = face
        else:
            crop_face(crop, face)
    return crops


# Cropping is linear: its gradient is its transpose, whose gradient is cropping again.


@custom_op("crop_transposed")
def crop_transposed(crops: Tensor, rects: Tensor, height: int, width: int) -> Tensor:
    frames = crops.new_zeros(len(crops), 3, height, width)
    for size, members in same_size(boxes_within(frames, rects)):
        faces = resize_cubic_transposed(torch.stack([crops[i] for i, _ in members]), size)
        for (i, (x0, y0, x1, y1)), face in zip(members, faces, strict=True):
            frames[i, :, y0:y1, x0:x1] = face
    return frames


@fake_of("crop_transposed")
def _(crops: Tensor, rects: Tensor, height: int, width: int) -> Tensor:
    return crops.new_empty(crops.shape[0], 3, height, width)


def save_for_crop(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    frames, rects, ctx.dtype, _, _, _ = inputs
    ctx.save_for_backward(rects)
    ctx.size = frames.shape[-2:]


def crop_backward(ctx: Any, of_crops: Tensor, of_inputs: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.dtype is not None:
        shown = torch.ones(INNER, INNER, dtype=torch.bool, device=of_inputs.device)
        shown[MASK_Y, MASK_X] = False
        inner = (of_inputs[:, :3] + of_inputs[:, 3:] * shown).flip(1).to(of_crops.dtype)
        of_crops = of_crops + F.pad(inner, (BORDER,) * 4)
    return crop_transposed(of_crops, *ctx.saved_tensors, *ctx.size), None, None, None, None, None


gradient_of("crop", crop_backward, save_for_crop)


def save_for_crop_transposed(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(inputs[1])


def crop_transposed_backward(ctx: Any, of_frames: Tensor) -> tuple[Tensor | None, ...]:
    (rects,) = ctx.saved_tensors
    return crop_op(of_frames, rects, None, "bt709", False, None)[0], None, None, None


gradient_of("crop_transposed", crop_transposed_backward, save_for_crop_transposed)
