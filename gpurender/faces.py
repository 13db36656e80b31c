"""A template's faces as the network and the paste need them: work that depends on the template alone, done once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .crop import crop_and_mask
from .engine import Engine
from .network import Encoded
from .template import Template

LEAST_SHARE = 0.125  # of a template's frames: what is kept of fewer is seldom shown again, and costs memory


class Faces:
    """Crops and network encodings of a template's frames, kept while they fit a memory budget.

    An output frame then costs the network's second half only. Frames beyond the budget are cropped and encoded at each
    use, which costs no more than the whole network. Where the budget is for a small part of the template only, nothing
    is kept.
    """

    def __init__(self, template: Template, engine: Engine, memory_budget: int) -> None:
        self._template = template
        self._engine = engine
        self._room = memory_budget
        self._kept: dict[int, tuple[Tensor, Encoded]] = {}

    def __call__(self, shown: Sequence[int], frames: Tensor) -> tuple[Tensor, list[Encoded]]:
        """Crops (B,3,328,328) uint8 and encodings of template frames `shown`, whose pixels are `frames` (B,3,H,W)."""
        new = {i: k for k, i in enumerate(shown) if i not in self._kept}
        made: dict[int, tuple[Tensor, Encoded]] = {}
        if new:
            pixels = torch.stack([frames[k] for k in new.values()])  # indexing with a list would wait for a GPU
            crops, inputs = crop_and_mask(pixels, self._template.rects[list(new)])
            encoded = self._engine.encode(inputs)
            made = dict(zip(new, zip(crops, encoded, strict=True), strict=True))
        for i, (crop, encoding) in made.items():
            size = crop.nbytes + sum(tensor.nbytes for tensor in encoding)
            if not self._kept and self._room < LEAST_SHARE * len(self._template) * size:
                self._room = 0
            if size <= self._room:
                self._room -= size
                # Copies: a slice would keep the memory of its whole batch.
                self._kept[i] = crop.clone(), tuple(tensor.clone() for tensor in encoding)
        ready = [self._kept.get(i) or made[i] for i in shown]
        return torch.stack([crop for crop, _ in ready]), [encoding for _, encoding in ready]
