"""Faces out of frames: batched crop and cubic resize, then the masked pair that the network sees."""

from collections.abc import Iterator

import torch
from kornia.geometry.transform import resize
from torch import Tensor

CROP = 328  # a face, resized
BORDER = 4  # of it that the network does not see
INNER = CROP - 2 * BORDER
MASK_X = slice(5, 315)  # of the inner picture, black to the network: the mouth that it has to draw
MASK_Y = slice(5, 310)


def crop_faces(frames: Tensor, rects: Tensor) -> Tensor:
    """Cut each frame's face rectangle and resize it to 328×328.

    Convention: rectangles are `(x0,y0,x1,y1)`, x to the right, y down, half-open, in pixels. The resize is cubic with
    a = -0.75, half-pixel centres (`align_corners=False`), no antialiasing, and repeats the edges of the *crop*
    (OpenCV's INTER_CUBIC). uint8 is rounded to 8 bits; floating point is left as it comes, with overshoot, and
    differentiable.

    Args:
        frames: (B,3,H,W) uint8, or floating point of any range.
        rects: (B,4) integers on the host, within the frames; sizes may differ within the batch.

    Returns:
        (B,3,328,328), dtype and device of `frames`.

    Raises:
        ValueError: shapes, dtypes or devices are not these, or a rectangle leaves the frame or is empty.

    >>> import torch
    >>> from gpurender import crop_faces
    >>> frames = torch.zeros(2, 3, 720, 1280, dtype=torch.uint8)
    >>> crop_faces(frames, torch.tensor([[100, 50, 284, 234], [90, 40, 280, 230]])).shape
    torch.Size([2, 3, 328, 328])
    """
    boxes = check_rects(frames, rects)
    crops = frames.new_empty(len(frames), 3, CROP, CROP)
    for _, members in same_size(boxes):
        faces = torch.stack([frames[i, :, y0:y1, x0:x1] for i, (x0, y0, x1, y1) in members])
        for (i, _), face in zip(members, resize_cubic(faces, (CROP, CROP)), strict=True):
            crops[i] = face
    return crops


def face_input(crops: Tensor) -> Tensor:
    """What the network sees of a 328×328 face: its inner 320×320 picture, whole and with the mouth blacked out.

    Convention: channels are B,G,R of the picture, then B,G,R of the masked one, in 0..1. The mask is x 5..314 and
    y 5..309 of the inner picture.

    Args:
        crops: (B,3,328,328) uint8 RGB, or floating point in 0..1.

    Returns:
        (B,6,320,320) float32, or the floating dtype of `crops`.

    >>> import torch
    >>> from gpurender import face_input
    >>> face_input(torch.zeros(1, 3, 328, 328, dtype=torch.uint8)).shape
    torch.Size([1, 6, 320, 320])
    """
    if crops.ndim != 4 or crops.shape[1:] != (3, CROP, CROP):
        raise ValueError(f"crops are (B,3,{CROP},{CROP}), given {tuple(crops.shape)}")
    inner = crops[:, :, BORDER:-BORDER, BORDER:-BORDER].flip(1)
    if not crops.is_floating_point():
        inner = inner.float() / 255
    pair = torch.cat([inner, inner], 1)
    pair[:, 3:, MASK_Y, MASK_X] = 0
    return pair


# --- shared with paste -----------------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]


def resize_cubic(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """OpenCV's INTER_CUBIC: (B,C,H,W) to (B,C,*size), rounded and clamped to 8 bits if `pictures` are uint8."""
    if pictures.shape[-2:] == size:
        return pictures
    if pictures.is_floating_point():
        return resize(pictures, size, interpolation="bicubic", align_corners=False, antialias=False)
    resized = resize(pictures.float(), size, interpolation="bicubic", align_corners=False, antialias=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def check_rects(frames: Tensor, rects: Tensor) -> list[Box]:
    """The rectangles as integers, after all checks on a batch of frames and its rectangles."""
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames are (B,3,H,W), given {tuple(frames.shape)}")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(f"frames are uint8 or floating point, given {frames.dtype}")
    if rects.shape != (len(frames), 4) or rects.is_floating_point():
        raise ValueError(f"rects are ({len(frames)},4) integers, given {tuple(rects.shape)} {rects.dtype}")
    if rects.device.type != "cpu":
        raise ValueError(f"rects are read on the host: keep them there, given {rects.device}")
    height, width = frames.shape[2:]
    boxes: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in rects.tolist()]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"rectangle {i}, {(x0, y0, x1, y1)}, is empty or leaves the frame of {width}×{height}")
    return boxes


def same_size(boxes: list[Box]) -> Iterator[tuple[tuple[int, int], list[tuple[int, Box]]]]:
    """Groups of (index, rectangle) by the rectangles' (height, width): each is one batched resize."""
    groups: dict[tuple[int, int], list[tuple[int, Box]]] = {}
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        groups.setdefault((y1 - y0, x1 - x0), []).append((i, (x0, y0, x1, y1)))
    yield from groups.items()
