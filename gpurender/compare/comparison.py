"""How alike two renders are, and where they are least so: a few lines for a person, JSON for a program."""

from dataclasses import dataclass
from math import inf, log10
from typing import Any, NamedTuple

from torch import Tensor

from ..report import installed
from .likeness import Figures

WORST = 3


class Pair(NamedTuple):
    """A frame of two renders."""

    number: int
    a: Tensor  # (3,H,W) uint8 RGB on the CPU
    b: Tensor
    figures: Figures
    arrays: dict[str, float]
    """of two reference sets: the largest absolute difference in each array behind the frame"""


@dataclass(frozen=True)
class Comparison:
    """How alike two renders are.

    Attributes:
        a, b: as they were given.
        size: (width, height) of the frames.
        part: what was judged, in words.
        figures: of each compared frame, by its number.
        arrays: of two reference sets, the largest absolute difference in each array, and the frame where that is.
        min_psnr_db, min_ssim, tolerance: what each frame, and each array, is held to.
        unequal: in words, which frames one of them lacks.
    """

    a: str
    b: str
    size: tuple[int, int]
    part: str
    figures: dict[int, Figures]
    arrays: dict[str, tuple[float, int]]
    min_psnr_db: float
    min_ssim: float
    tolerance: float
    unequal: list[str]

    @property
    def overall(self) -> Figures:
        """Of all frames: the mean of their MSE, the PSNR of that mean, the mean of their SSIM."""
        mse = sum(figures.mse for figures in self.figures.values()) / len(self.figures)
        mean_ssim = sum(figures.ssim for figures in self.figures.values()) / len(self.figures)
        return Figures(mse, 10 * log10(255**2 / mse) if mse else inf, mean_ssim)

    def worst(self, count: int = WORST) -> list[int]:
        """The frames of the lowest PSNR, the worst first; equal frames are not among them."""
        unlike = [number for number, figures in self.figures.items() if figures.mse]
        return sorted(unlike, key=lambda number: (self.figures[number].psnr_db, self.figures[number].ssim))[:count]

    def below(self) -> list[int]:
        """The frames with less PSNR or SSIM than they are held to."""
        return [
            number
            for number, figures in self.figures.items()
            if figures.psnr_db < self.min_psnr_db or figures.ssim < self.min_ssim
        ]

    def differences(self) -> list[str]:
        """Why the two are not alike, in words; empty where they are."""
        found = list(self.unequal)
        if below := self.below():
            found.append(
                f"below {self.min_psnr_db:g} dB PSNR or {self.min_ssim:g} SSIM are {len(below)} of {len(self.figures)} "
                f"frames: {listed(below)}"
            )
        for name, (largest, frame) in self.arrays.items():
            if not largest <= self.tolerance:
                found.append(f"{name} is up to {largest:.3g} apart (frame {frame}), more than {self.tolerance:g}")
        return found

    @property
    def alike(self) -> bool:
        return not self.differences()

    def __str__(self) -> str:
        width, height = self.size
        least_psnr = min(self.figures, key=lambda number: self.figures[number].psnr_db)
        least_ssim = min(self.figures, key=lambda number: self.figures[number].ssim)
        most_unlike = self.figures[least_psnr]
        worst = [f"{n} ({self.figures[n].psnr_db:.2f} dB, {self.figures[n].ssim:.5f})" for n in self.worst()]
        lines = [
            f"A is {self.a}",
            f"B is {self.b}",
            f"compared {len(self.figures)} frames of {width}×{height}, {self.part}; counted from 0",
            "          overall     worst frame",
            f"MSE   {self.overall.mse:11.4g} {most_unlike.mse:11.4g}  ({least_psnr})",
            f"PSNR  {decibels(self.overall.psnr_db):>11} {decibels(most_unlike.psnr_db):>11}  ({least_psnr})",
            f"SSIM  {self.overall.ssim:11.6f} {self.figures[least_ssim].ssim:11.6f}  ({least_ssim})",
            f"worst frames: {', '.join(worst)}" if worst else "all of these frames are equal",
            *(
                f"{name}: up to {largest:.3g} apart (frame {number})" if largest else f"{name}: equal"
                for name, (largest, number) in self.arrays.items()
            ),
        ]
        verdict = [f"different: {difference}" for difference in self.differences()]
        alike = f"alike: every frame has at least {self.min_psnr_db:g} dB PSNR and {self.min_ssim:g} SSIM"
        return "\n".join([*lines, *(verdict or [alike])])

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: a PSNR that is infinite is null."""
        return {
            "a": self.a,
            "b": self.b,
            "width": self.size[0],
            "height": self.size[1],
            "part": self.part,
            "alike": self.alike,
            "differences": self.differences(),
            "held_to": {
                "min_psnr_db": finite(self.min_psnr_db),
                "min_ssim": self.min_ssim,
                "tolerance": self.tolerance,
            },
            "overall": as_json(self.overall),
            "worst": self.worst(),
            "frames": [{"frame": number, **as_json(figures)} for number, figures in self.figures.items()],
            "arrays": {name: {"largest": finite(x), "frame": frame} for name, (x, frame) in self.arrays.items()},
            "versions": installed(),
        }


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def decibels(value: float) -> str:
    return "equal" if value == inf else f"{value:.2f} dB"


def finite(value: float) -> float | None:
    return value if abs(value) < inf else None


def as_json(figures: Figures) -> dict[str, float | None]:
    return {"mse": figures.mse, "psnr_db": finite(figures.psnr_db), "ssim": figures.ssim}
