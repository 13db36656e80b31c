"""Which part of the frames is judged: all of it, a rectangle, or each frame's face."""

import re
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..find import find_template
from ..rectangles import Rect, read_rectangles
from ..template import Order, frame_order, open_template
from .footage import Footage

FACE = "face"


class Judged(NamedTuple):
    """The part of each frame that is judged."""

    rects: dict[int, Rect] | Rect
    """by frame, or one for all"""
    view: Rect
    """what is around all of them"""
    words: str

    def rect(self, number: int) -> Rect:
        return self.rects[number] if isinstance(self.rects, dict) else self.rects


def judged_parts(
    rect: Rect | str | Path | None, a: Footage, b: Footage, order: Order, start: int, numbers: Sequence[int], least: int
) -> Judged:
    """The part of each frame that is judged.

    Args:
        rect: None is the whole frame; `(x0,y0,x1,y1)` or "x0,y0,x1,y1" the same part of every frame, half-open pixels;
            `face` the face rectangles of a reference set; or a template (`avatar`, a directory) or a package's
            `crop_rectangles.json`: their face rectangles in the order in which a render shows them.
        a, b: what is compared.
        order, start: see `frame_order`.
        numbers: the frames that are judged.
        least: the least width and height of the part.

    Raises:
        InputError: it is none of these, is not within the frames, or is too small.
    """
    width, height = a.size
    if rect is None:
        rects, words = (0, 0, width, height), "whole frames"
    elif not isinstance(rect, str | Path) or re.fullmatch(r" *-?[0-9]+( *, *-?[0-9]+){3} *", str(rect)):
        try:
            x0, y0, x1, y1 = map(int, str(rect).split(",")) if isinstance(rect, str | Path) else map(index, rect)
        except (TypeError, ValueError):
            raise InputError(f"{rect} is no rectangle; give x0, y0, x1, y1 in whole pixels.") from None
        rects, words = (x0, y0, x1, y1), f"the rectangle {x0},{y0},{x1},{y1}"
    elif str(rect) == FACE:
        rects, words = faces_of_sets(a, b, numbers), "the faces"
    else:
        table = template_rects(rect)
        shown = frame_order(len(table), range(numbers[-1] + 1), order, start)
        rects, words = {number: table[shown[number]] for number in numbers}, f"the faces of {rect}"
    for number, (x0, y0, x1, y1) in rects.items() if isinstance(rects, dict) else [(numbers[0], rects)]:
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(
                f"the rectangle {x0},{y0},{x1},{y1} of frame {number} is empty or leaves the {width}×{height} pixels."
            )
        if min(x1 - x0, y1 - y0) < least:
            raise InputError(f"{x1 - x0}×{y1 - y0} pixels are too few to judge: SSIM needs {least}×{least}.")
    if a.cut:
        words += ", without what makes odd sizes even in videos"
    return Judged(rects, around(list(rects.values()) if isinstance(rects, dict) else [rects]), words)


def faces_of_sets(a: Footage, b: Footage, numbers: Sequence[int]) -> dict[int, Rect]:
    for footage in (a, b):
        if footage.reference is not None:
            rects = {sample.index: sample.rect for sample in footage.reference.samples}
            found = {number: rect for number in numbers if (rect := rects[number]) is not None}
            if len(found) == len(numbers):
                return found
    raise InputError(
        "`face` means the face rectangles of a reference set, and none is given that has them; give x0,y0,x1,y1 or the "
        "template that was rendered."
    )


def template_rects(path: str | Path) -> list[Rect]:
    directory = find_template(path)
    if directory.is_dir():
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in open_template(directory, parsing=False).rects.tolist()]
    if directory.suffix == ".json" and directory.is_file():
        return read_rectangles(directory)
    raise InputError(
        f"{path} is no part to judge: give x0,y0,x1,y1, `face` (with a reference set), a template directory or a "
        "package's crop_rectangles.json."
    )


def around(rects: list[Rect]) -> Rect:
    x0, y0, x1, y1 = zip(*rects, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
