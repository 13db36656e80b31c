"""A template's frames as video encoders take them, ready but for the face: on a CPU, where colour takes longer than a
copy."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .color import equations, fill_here, planes, rgb_to_nv12
from .crop import CROP, crop_faces, face_input
from .cubic import boxes_within
from .paste import check_faces, paste_here
from .template import Template


class Backdrop(NamedTuple):
    """A template's frame: as NV12, as RGB where a face will change it, and the face itself."""

    surface: Tensor  # (H*3/2,W) uint8 NV12, H and W rounded up to even
    around: Tensor  # (1,3,h,w) uint8 RGB: the face rectangle, and the pixels that share chroma samples with it
    keep: Tensor | None  # (1,h,w) bool
    corner: tuple[int, int]  # of `around` in the frame: x and y, even
    rects: Tensor  # (1,4) the face rectangle in `around`
    crop: Tensor  # (1,3,328,328) uint8 RGB


class Backdrops:
    """Makes a template's frames backdrops: once each, while they fit a memory budget; others at each use.

    Attributes:
        memory_left: bytes of the budget that backdrops will not take.
        memory_for_all: bytes in which the backdrops of all frames that are shown again fit.
    """

    def __init__(self, template: Template, shown_again: Collection[int], memory_budget: int) -> None:
        """
        Args:
            shown_again: the frames worth keeping.
        """
        self._template = template
        self._shown_again = shown_again
        self._kept: dict[int, Backdrop] = {}
        surface = (template.width + 1) // 2 * 2 * ((template.height + 1) // 2 * 3)
        rects = template.rects[list(shown_again)]
        around = ((rects[:, 2:] - rects[:, :2] + 2).prod(1) * (3 + template.parsing)).sum().item()
        self.memory_for_all = needed = len(rects) * (surface + 3 * CROP**2) + int(around)
        self.memory_left = max(memory_budget - needed, 0)
        # One block, which takes memory as it is filled: kept pieces among what comes and goes would scatter it.
        self._block = torch.empty(min(needed, memory_budget), dtype=torch.uint8, device="cpu")

    def __call__(self, indices: Sequence[int]) -> list[Backdrop]:
        made: dict[int, Backdrop] = {}
        missing = [i for i in dict.fromkeys(indices) if i not in self._kept]
        if missing:
            frames, keep = self._template.frames(missing)
            for k, i in enumerate(missing):
                made[i] = backdrop(frames[k], keep[k] if keep is not None else None, self._template.rects[i])
                if i in self._shown_again:
                    self._keep(i, made[i])
        return [self._kept.get(i) or made[i] for i in indices]

    def _keep(self, index: int, made: Backdrop) -> None:
        pixels = [tensor for tensor in (made.surface, made.around, made.keep, made.crop) if tensor is not None]
        if sum(tensor.nbytes for tensor in pixels) > len(self._block):
            return
        kept = []
        for tensor in pixels:
            place, self._block = self._block[: tensor.nbytes], self._block[tensor.nbytes :]
            kept.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor))
        surface, around, *keep, crop = kept
        self._kept[index] = made._replace(surface=surface, around=around, keep=keep[0] if keep else None, crop=crop)


def backdrop(frame: Tensor, keep: Tensor | None, rect: Tensor) -> Backdrop:
    """Of a frame (3,H,W) uint8 RGB, its keep mask (H,W) and its face rectangle (4,)."""
    x, y = (int(edge) // 2 * 2 for edge in rect[:2])
    right, bottom = (int(edge) + int(edge) % 2 for edge in rect[2:])
    around = frame[None, :, y:bottom, x:right].clone()
    keep = keep[None, y:bottom, x:right].clone() if keep is not None else None
    rects = rect[None] - torch.tensor([x, y, x, y], device="cpu")
    return Backdrop(rgb_to_nv12(frame[None])[0], around, keep, (x, y), rects, crop_faces(around, rects))


def crop_backdrops(backdrops: Sequence[Backdrop]) -> tuple[Tensor, Tensor]:
    """`crop_and_mask` of the frames that the backdrops are of."""
    crops = torch.cat([behind.crop for behind in backdrops])
    return crops, face_input(crops)


def paste_on_backdrops(backdrops: Sequence[Backdrop], crops: Tensor, predictions: Tensor) -> Tensor:
    """`paste_faces_nv12` of the frames that the backdrops are of: (B,H*3/2,W) uint8, in less time."""
    surfaces = torch.stack([behind.surface for behind in backdrops])
    luma, chroma = planes(surfaces)
    for i, (_, around, keep, (x, y), rects, _) in enumerate(backdrops):
        pasted = around.clone()
        face = crops[i : i + 1], predictions[i : i + 1]
        check_faces(pasted, *face, rects, keep)  # the engine may be the caller's own
        paste_here(pasted, *face, boxes_within(pasted, rects), keep)
        height, width = ((size + 1) // 2 for size in pasted.shape[2:])  # of its chroma
        of_luma = luma[i : i + 1, y : y + 2 * height, x : x + 2 * width]
        of_chroma = chroma[i : i + 1, y // 2 : y // 2 + height, x // 2 : x // 2 + width]
        fill_here(of_luma, of_chroma, pasted, equations("bt709", full_range=False))
    return surfaces
