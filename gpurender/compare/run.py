"""Two renders, frame by frame."""

import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from math import inf, isnan
from pathlib import Path

import torch
from torch import Tensor

from ..cuda import resolve_device
from ..encode import check_destination, write_frames
from ..errors import InputError
from ..output import check_outputs, is_pattern, write_text
from ..prefetch import prefetch
from ..progress import Progress, Silent
from ..rectangles import Rect
from ..reference_set import METADATA, array_differences
from ..template import Order
from .comparison import Comparison, Pair, listed
from .footage import Footage, open_footage
from .judged import Judged, judged_parts
from .likeness import WINDOW, Figures, compare_pictures
from .page import write_page
from .side_by_side import side_by_side_frames

MIN_PSNR_DB, MIN_SSIM = 40.0, 0.95
TOLERANCE = 0.01
SAMPLES_A_SECOND, PICTURES_A_SECOND = 1, 25


def compare_frames(
    a: str | Path,
    b: str | Path,
    *,
    rect: Rect | str | Path | None = None,
    order: Order = "bounce",
    start_frame: int = 0,
    frames: int | None = None,
    min_psnr_db: float = MIN_PSNR_DB,
    min_ssim: float = MIN_SSIM,
    tolerance: float = TOLERANCE,
    device: str | torch.device = "auto",
    side_by_side: str | Path | None = None,
    amplify: float = 10,
    html: str | Path | None = None,
    json_file: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two renders: videos, directories or patterns of numbered pictures, or reference sets, in any mix.

    Frame i of one is held against frame i of the other, read in step; a few are in memory at a time. Of a reference
    set, its samples are compared; of two, also the numbers that went into the network and came out. Every frame is held
    to the thresholds, so that one wrong frame among thousands is found.

    Args:
        a, b: see `open_footage`.
        rect: judge this part of the frames alone; see `judged_parts`.
        order, start_frame: the render's, for the rectangles of a template; see `frame_order`.
        frames: compare frames 0 to `frames`-1 alone. Without it, renders of different lengths are different.
        min_psnr_db, min_ssim: what every frame has to reach; infinity and 1 ask for equal frames.
        tolerance: how far apart the arrays of two reference sets may be anywhere.
        device: where to compute; `auto` is a GPU if there is one.
        side_by_side: a video (or numbered pictures) to write: A, B and their difference times `amplify`.
        html: a page to write: curves over the frames, and the worst frames.
        json_file: a file to write with `Comparison.as_dict`.
        overwrite: replace what is at these three.
        progress: is told about frames.

    Raises:
        InputError: one of the two cannot be read, their frames differ in size, they have no frame in common, the part
            to judge is not within them, or a number is out of range.
        DeviceError: there is no such device here.
        OutputError: something cannot be written.
    """
    inputs = [Path(path) for path in (a, b, rect) if isinstance(path, str | Path)]
    inputs += [path / name for path in inputs for name in (METADATA, "frames", "samples")]
    inputs += [path.parent for path in inputs if is_pattern(path) and not path.exists()]
    check_outputs([side_by_side, html, json_file], overwrite, inputs)
    if side_by_side is not None:
        check_destination(side_by_side, frames=0, overwrite=overwrite)
    for what, value, fits, allowed in (
        ("a least PSNR", min_psnr_db, not isnan(min_psnr_db), "decibels, or inf for equal frames"),
        ("a least SSIM", min_ssim, -1 <= min_ssim <= 1, "-1 to 1"),
        ("a tolerance", tolerance, tolerance >= 0, "0 or more"),
        ("an amplification", amplify, 0 <= amplify < inf, "0 or more"),
        ("a limit of frames", frames, frames is None or frames >= 1, "1 or more"),
    ):
        if not fits:
            raise InputError(f"{what} of {value} cannot be used; give {allowed}.")
    place = resolve_device(device)
    one, other = open_footage(a), open_footage(b)
    if one.size != other.size:
        if evened(one.size) != other.size and evened(other.size) != one.size:
            sizes = [f"{footage.path} is {footage.size[0]}×{footage.size[1]}" for footage in (one, other)]
            raise InputError(f"{sizes[0]}, but {sizes[1]}: frames of different sizes cannot be compared.")
        size = min(one.size, other.size)
        one, other = (replace(footage, cut=size) for footage in (one, other))
    numbers, unequal = in_common(one, other, frames)
    judged = judged_parts(rect, one, other, order, start_frame, numbers, least=WINDOW)

    figures: dict[int, Figures] = {}
    arrays: dict[str, tuple[float, int]] = {}

    def noted(pairs: Iterable[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            figures[pair.number] = pair.figures
            for name, largest in pair.arrays.items():
                if name not in arrays or largest > arrays[name][0] or isnan(largest):
                    arrays[name] = largest, pair.number
            yield pair
            del pair

    with closing(read_and_measured(one, other, numbers, judged, place)) as pairs:
        followed = noted((progress or Silent()).each(pairs, len(numbers)))
        if side_by_side is None:
            for _ in followed:
                pass
        else:
            samples = one.reference or other.reference
            fps = SAMPLES_A_SECOND if samples else one.fps or other.fps or PICTURES_A_SECOND
            sheets = side_by_side_frames(followed, (str(a), str(b)), judged.view, amplify, (min_psnr_db, min_ssim))
            write_frames(sheets, side_by_side, fps=fps, overwrite=overwrite)
    comparison = Comparison(
        str(a),
        str(b),
        one.size,
        judged.words,
        figures,
        arrays,
        min_psnr_db,
        min_ssim,
        tolerance,
        unequal,
    )
    if html is not None:
        write_page(Path(html), comparison, one, other, judged, amplify, overwrite)
    if json_file is not None:
        text = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(Path(json_file), text + "\n", overwrite)
    return comparison


def evened(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a video of such frames."""
    width, height = size
    return width + width % 2, height + height % 2


def read_and_measured(
    a: Footage, b: Footage, numbers: list[int], judged: Judged, device: torch.device
) -> Generator[Pair]:
    """The frames of both, with their figures; a thread reads ahead by a pair."""

    def read() -> Iterator[tuple[int, Tensor, Tensor]]:
        for number in numbers:
            yield number, a.frame(number), b.frame(number)

    with closing(prefetch(read())) as pairs:
        for number, of_a, of_b in pairs:
            x0, y0, x1, y1 = judged.rect(number)
            figures = compare_pictures(*(frame[:, y0:y1, x0:x1].to(device) for frame in (of_a, of_b)))
            arrays: dict[str, float] = {}
            if a.reference is not None and b.reference is not None:
                arrays = array_differences(a.reference, b.reference, number)
            yield Pair(number, of_a, of_b, figures, arrays)
            del of_a, of_b


def in_common(a: Footage, b: Footage, limit: int | None) -> tuple[list[int], list[str]]:
    """The frames that both have, below the limit, and what one of them lacks, in words."""
    unequal = []
    totals = [footage.total for footage in (a, b)]
    if totals[0] != totals[1] and None not in totals and min(total for total in totals if total) < (limit or inf):
        unequal.append(f"A has {totals[0]} frames, B has {totals[1]}")
    of_a, of_b = ({number for number in footage.numbers if number < (limit or inf)} for footage in (a, b))
    for name, missing, whose in (("A", of_b - of_a, b), ("B", of_a - of_b, a)):
        if missing and whose.reference is not None:
            unequal.append(f"{name} lacks frames {listed(sorted(missing))}")
    common = sorted(of_a & of_b)
    if not common:
        limited = f" below frame {limit}" if limit else ""
        raise InputError(f"{a.path} and {b.path} have no frame in common{limited}.")
    return common, unequal
