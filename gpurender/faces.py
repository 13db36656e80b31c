"""A template's faces as the network and the paste need them: work that depends on the template alone, done once."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from .engine import Engine
from .network import Encoded

LEAST_SHARE = 0.125  # of the frames shown again: where fewer fit, keeping them saves little time


class Faces:
    """Crops and network encodings of a template's frames, kept while they fit a memory budget.

    An output frame then costs the network's second half only. Frames beyond the budget are cropped and encoded at each
    use, which costs no more than the whole network. Where the budget is for few of them only, nothing is kept.

    Attributes:
        encoded: how many faces the network's first half has seen so far.
        memory_for_all: bytes in which the faces of all frames that are shown again fit; 0 until the first is seen.
    """

    def __init__(self, shown_again: Collection[int], engine: Engine, memory_budget: int) -> None:
        """
        Args:
            shown_again: the frames worth keeping.
        """
        self.encoded = 0
        self.memory_for_all = 0
        self._shown_again = shown_again
        self._engine = engine
        self._room = memory_budget
        self._kept: dict[int, tuple[Tensor, Encoded]] = {}

    def __call__(
        self, shown: Sequence[int], crop: Callable[[list[int]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Encoded]]:
        """The faces of some template frames.

        Args:
            shown: the frames' numbers.
            crop: `crop_and_mask` of some of them, given by where they are in `shown`.

        Returns:
            crops (B,3,328,328) uint8, and encodings.
        """
        new = {i: k for k, i in enumerate(shown) if i not in self._kept}
        made: dict[int, tuple[Tensor, Encoded]] = {}
        if new:
            crops, inputs = crop(list(new.values()))
            encoded = self._engine.encode(inputs)
            self.encoded += len(new)
            made = dict(zip(new, zip(crops, encoded, strict=True), strict=True))
        for i, (face, encoding) in made.items():
            if i not in self._shown_again:
                continue
            size = face.nbytes + sum(tensor.nbytes for tensor in encoding)
            self.memory_for_all = size * len(self._shown_again)
            if not self._kept and self._room < LEAST_SHARE * self.memory_for_all:
                self._room = 0
            if size <= self._room:
                self._room -= size
                self._kept[i] = face.clone(), alone(encoding)
        ready = [self._kept.get(i) or made[i] for i in shown]
        return torch.stack([face for face, _ in ready]), [encoding for _, encoding in ready]


def alone(encoding: Encoded) -> Encoded:
    """The encoding in memory of its own: a slice would keep that of its whole batch."""
    return tuple(
        tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone() for tensor in encoding
    )
