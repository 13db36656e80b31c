"""The cubic resize between face rectangles and 328×328 faces, batched by size; and the rectangles' checks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .color import check_surfaces
from .ops import check_no_tangents
from .rectangles import Rect


def resize_cubic(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """OpenCV's INTER_CUBIC: (B,C,H,W) to (B,C,*size), rounded and clamped to 8 bits if `pictures` are uint8."""
    if pictures.shape[-2:] == size:
        return pictures
    from kornia.geometry.transform import resize  # it takes a tenth of a second to load, and kernels do without

    exact = pictures if pictures.is_floating_point() else pictures.float()
    resized = resize(exact, size, interpolation="bicubic", align_corners=False, antialias=False)
    return resized if exact is pictures else resized.round_().clamp_(0, 255).to(torch.uint8)


def resize_cubic_transposed(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of `resize_cubic` from (B,C,*size) to the size of `pictures`, floating point.

    As two matrix products: torch's own backward adds up in an order that differs from run to run on a GPU.
    """
    if pictures.shape[-2:] == size:
        return pictures
    exact = torch.float64 if pictures.dtype == torch.float64 else torch.float32
    with torch.autocast(pictures.device.type, enabled=False):
        sides = zip(size, pictures.shape[-2:], strict=True)
        down, across = (weights(before, after, pictures.device, exact) for before, after in sides)
        return (down.T @ pictures.to(exact) @ across).to(pictures.dtype)


def weights(before: int, after: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(after,before): what each of `before` pixels weighs in each of `after`."""
    columns = torch.eye(before, device=device, dtype=dtype)[None, None]
    return resize_cubic(columns, (after, before))[0, 0]


def check_frames_and_rects(frames: Tensor, rects: Tensor) -> Tensor:
    """The rectangles as int64, after all checks of them and a batch of frames but those that read the rectangles: see
    `boxes_within`."""
    if frames.ndim == 3:
        check_surfaces(frames)
    elif frames.ndim != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) == 0:
        raise ValueError(f"frames are (B,3,H,W), or NV12 (B,H*3/2,W), given {tuple(frames.shape)}")
    elif frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(f"frames are uint8 or floating point, given {frames.dtype}")
    if not isinstance(rects, Tensor):
        raise ValueError(f"rects are a tensor, given {type(rects).__name__}; torch.tensor(rects) makes one")
    if rects.shape != (frames.shape[0], 4) or rects.is_floating_point():
        raise ValueError(f"rects are ({frames.shape[0]},4) integers, given {tuple(rects.shape)} {rects.dtype}")
    if rects.device.type != "cpu":
        raise ValueError(f"rects are read on the host: keep them there, given {rects.device}")
    check_no_tangents(frames)
    return rects.long()


def boxes_within(frames: Tensor, rects: Tensor) -> list[Rect]:
    """The rectangles as integers, after a look whether all are within the frames (B,3,H,W) or (B,H*3/2,W)."""
    height, width = frames.shape[-2:]
    if frames.ndim == 3:
        height = height * 2 // 3
    boxes: list[Rect] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in rects.tolist()]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"rectangle {i}, {(x0, y0, x1, y1)}, is empty or leaves the frame of {width}×{height}")
    return boxes


def same_size(boxes: list[Rect]) -> Iterator[tuple[tuple[int, int], list[tuple[int, Rect]]]]:
    """Groups of (index, rectangle) by the rectangles' (height, width): each is one batched resize."""
    groups: dict[tuple[int, int], list[tuple[int, Rect]]] = {}
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        groups.setdefault((y1 - y0, x1 - x0), []).append((i, (x0, y0, x1, y1)))
    yield from groups.items()
