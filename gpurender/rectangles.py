"""Face rectangles: from landmark files, or from a template package's crop_rectangles.json."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

LEFT, RIGHT, BOTTOM = 1, 31, 52
"""Landmarks that bound the face: x0 from 1, x1 from 31, y0 from 52."""

FARTHEST = 2**31
"""Coordinates are below this: far outside any frame, and finite."""

Rect = tuple[int, int, int, int]


def face_rect(file: Path) -> Rect:
    """The face rectangle `(x0,y0,x1,y1)`, half-open, from a landmark file: x0 = lms[1].x, y0 = lms[52].y, square."""
    try:
        lines = file.read_text("ascii").split("\n")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not a text file of landmarks, one `x y` a line.") from None
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x, y = (int(np.float32(value)) for value in line.split())  # read as float32 and cut, as the reference does
        except (ValueError, OverflowError):
            raise InputError(f"{file}, line {number}: {line.strip()[:40]!r} is not a point `x y`.") from None
        points.append((x, y))
    if len(points) <= BOTTOM:
        raise InputError(f"{file} has {len(points)} points; at least {BOTTOM + 1} are needed.")
    x0, x1, y0 = points[LEFT][0], points[RIGHT][0], points[BOTTOM][1]
    return x0, y0, x1, y0 + (x1 - x0)


def read_rectangles(file: Path) -> list[Rect]:
    """The face rectangles `(x0,y0,x1,y1)`, half-open pixels, of frames 0 to N-1 from `crop_rectangles.json`.

    The file is `{"0": {"rect": [x0, y0, x1, y1], …}, "1": …}`; what else it says of a frame is ignored. Fractions are
    cut off.

    Raises:
        InputError: the file is not that.
    """
    try:
        content = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_without_repeats)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: this is not JSON ({error.msg}).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}).") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f'{file} holds no rectangles: expected {{"0": {{"rect": [x0, y0, x1, y1]}}, "1": …}}.')
    keys = [str(i) for i in range(len(content))]
    for key in keys:
        if key not in content:
            raise InputError(
                f"{file}: frame {key} is missing; its {len(keys)} entries are to be frames 0 to {len(keys) - 1}."
            )
    return [_rectangle(file, key, content[key]) for key in keys]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"{key[:40]!r} is there twice; remove one.")
    return content


def _rectangle(file: Path, key: str, entry: Any) -> Rect:
    if not isinstance(entry, dict) or "rect" not in entry:
        raise InputError(f'{file}, frame {key} has no "rect": [x0, y0, x1, y1].')
    corners = entry["rect"]
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_coordinate, corners)):
        raise InputError(f'{file}, frame {key}: "rect" is {json.dumps(corners)[:60]}, not four numbers x0, y0, x1, y1.')
    x0, y0, x1, y1 = map(int, corners)
    return x0, y0, x1, y1


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FARTHEST  # NaN is not


def check_rect(frame: str, rect: Rect, size: tuple[int, int]) -> None:
    """Raise InputError where the rectangle of the frame of this name is empty, inverted or leaves (width, height)."""
    x0, y0, x1, y1 = rect
    width, height = size
    if x1 <= x0 or y1 <= y0:
        kind = "inverted" if x1 < x0 or y1 < y0 else "empty"
        raise InputError(
            f"frame {frame}: the face rectangle {rect} is {kind}; "
            "x0 (landmark 1) must be left of x1 (landmark 31), and y0 above y1."
        )
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise InputError(f"frame {frame}: the face rectangle {rect} leaves the frame of {width}×{height}.")
