"""What is compared: a video, pictures or a reference set -> its frames by their numbers."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from ..decoders import Frames
from ..encode import NUMBER
from ..errors import InputError, check_no_pipe
from ..pictures import SUFFIXES, open_pictures
from ..reference_set import METADATA, ReferenceSet, open_reference
from ..video import VideoFrames, open_video


@dataclass(frozen=True)
class Footage:
    """Frames of a render, numbered from 0 in the order in which they are shown.

    Attributes:
        path: as it was given.
        source: where the frames come from; it knows their size.
        numbers: which frames are here, rising: all of them, but for a reference set.
        total: how many the whole render has; None where a reference set does not say.
        fps: None for pictures, which do not say.
        reference: the reference set, if it is one.
        cut: the size to which frames are cut, at the right and below; None for all of them.
    """

    path: Path
    source: Frames
    numbers: Sequence[int]
    total: int | None
    fps: float | None
    reference: ReferenceSet | None = None
    cut: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.cut or self.source.size

    def frame(self, number: int) -> Tensor:
        """(3,H,W) uint8 RGB on the CPU.

        Raises:
            InputError: it cannot be decoded.
        """
        width, height = self.size
        return self.source.frames([bisect_left(self.numbers, number)])[0][:, :height, :width]


def open_footage(path: str | Path) -> Footage:
    """Open a video, a picture, a directory of numbered pictures, a pattern such as `frames/%05d.png`, or a reference
    set. Pictures may be numbered from anywhere: the first is frame 0. A video's colours are read by its tags; without
    tags it is taken for BT.601, as OpenCV takes it.

    Raises:
        InputError: it is none of these, or pictures are missing among the others.
    """
    path = Path(path)
    check_no_pipe(path)
    if (path / METADATA).is_file():
        reference = open_reference(path)
        numbers = [sample.index for sample in reference.samples]
        return Footage(path, reference, numbers, reference.total, reference.fps, reference)
    if path.is_dir():
        files = in_order(path, {file: number_in(file) for file in path.iterdir() if is_picture(file)})
    elif path.exists():
        if path.suffix.lower() not in SUFFIXES:
            video = VideoFrames(path)
            return Footage(path, video, range(len(video)), len(video), frame_rate_of(path))
        files = [path]
    elif NUMBER.search(path.name):
        files = in_order(path, matching(path))
    else:
        raise InputError(f"{path}: there is no such video, picture directory or reference set.")
    return Footage(path, open_pictures(files), range(len(files)), len(files), None)


def frame_rate_of(file: Path) -> float | None:
    container, stream = open_video(file)
    with container:
        return float(stream.average_rate) if stream.average_rate else None


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def number_in(file: Path) -> int:
    numbers = re.findall(r"[0-9]+", file.stem)
    if not numbers:
        raise InputError(f"{file} has no number in its name, so its place among the frames is not known.")
    return int(numbers[-1])


def matching(pattern: Path) -> dict[Path, int]:
    """The files that a printf pattern means, with their numbers."""
    if not pattern.parent.is_dir():
        raise InputError(f"{pattern}: {pattern.parent} is not a directory.")
    number = NUMBER.search(pattern.name)
    if number is None or pattern.name.count("%") != 1 or pattern.suffix.lower() not in SUFFIXES:
        raise InputError(f"{pattern}: numbered pictures are named like frames/%05d.png or frames/%05d.jpg.")
    named = re.compile(re.escape(pattern.name[: number.start()]) + "([0-9]+)" + re.escape(pattern.suffix))
    found = {file: int(name[1]) for file in pattern.parent.iterdir() if (name := named.fullmatch(file.name))}
    return {file: number for file, number in found.items() if file.name == pattern.name % number}


def in_order(path: Path, numbers: dict[Path, int]) -> list[Path]:
    """Files by rising number; a gap would put all frames behind it out of step."""
    if not numbers:
        raise InputError(f"{path} holds no pictures; expected numbered ones ({', '.join(SUFFIXES)}) or {METADATA}.")
    files = sorted(numbers, key=lambda file: (numbers[file], file.name))
    for file, following in pairwise(files):
        if numbers[file] == numbers[following]:
            raise InputError(f"{following} and {file.name} have the same number; remove one.")
        if numbers[following] > numbers[file] + 1:
            raise InputError(
                f"{path}: number {numbers[file] + 1} is missing between {file.name} and {following.name}, so frames "
                f"would be compared out of step. Pictures with gaps are compared as a reference set, with {METADATA}."
            )
    return files
