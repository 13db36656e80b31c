import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_POINTS, write_points, write_rectangles
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender import InputError
from gpurender.rectangles import face_rect, read_rectangles

# --- landmarks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for tests of many examples."""
    return tmp_path_factory.mktemp("landmarks")


COORDINATE = st.decimals(-9999, 9999, places=3)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=53, max_size=60))
@settings(max_examples=40)
def test_rectangle_is_of_points_1_31_and_52_cut(place: Path, points: list[Any]) -> None:
    x0, x1, y0 = int(points[1][0]), int(points[31][0]), int(points[52][1])
    assert face_rect(write_points(place, points)) == (x0, y0, x1, y0 + x1 - x0)


@pytest.mark.parametrize(
    ("written", "read"),
    [("100", 100), ("100.0", 100), ("100.999", 100), ("-0.9", 0), ("-7.9", -7), ("1.009e2", 100), ("99.99999999", 100)],
)
def test_coordinates_are_cut(tmp_path: Path, written: str, read: int) -> None:
    points: list[Any] = [*NO_POINTS]
    points[1] = (written, 0)
    assert face_rect(write_points(tmp_path, points))[0] == read


@pytest.mark.parametrize("line", ["{} {}", "{}\t{}", "  {}    {}  ", "{} {}\n", "\n \n{} {}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_blanks_do_not_matter(tmp_path: Path, line: str, end: str) -> None:
    points: list[Any] = [*NO_POINTS]
    points[1], points[31], points[52] = (90, 1), (210.7, 2), (3, 60.2)
    assert face_rect(write_points(tmp_path, points, line, end)) == (90, 60, 210, 180)


def test_fewer_than_53_points_are_too_few(tmp_path: Path) -> None:
    face_rect(write_points(tmp_path, NO_POINTS))
    with pytest.raises(InputError, match="0.lms has 52 points; at least 53 are needed"):
        face_rect(write_points(tmp_path, NO_POINTS[1:]))


# --- a package's table -----------------------------------------------------------------------------------------------

NUMBER = st.integers(-(2**31) + 1, 2**31 - 1) | st.floats(-(2.0**31), 2.0**31, exclude_min=True, exclude_max=True)


@given(st.lists(st.lists(NUMBER, min_size=4, max_size=4), min_size=1, max_size=12))
@settings(max_examples=40)
def test_rectangles_are_cut_and_in_the_order_of_their_numbers(place: Path, rects: list[list[float]]) -> None:
    entries = {str(i): {"rect": rect, "landmarks": [[1, 2]], "score": None} for i, rect in enumerate(rects)}
    file = place / "table.json"
    file.write_text(json.dumps(dict(reversed(entries.items()))))
    assert read_rectangles(file) == [tuple(int(value) for value in rect) for rect in rects]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "1", "rect", "00", ""]), inner, max_size=3)
    ),
)


@given(JSON | st.dictionaries(st.sampled_from("012"), st.fixed_dictionaries({"rect": st.lists(JSON, max_size=5)})))
def test_any_json_is_read_or_told_in_one_line(place: Path, content: Any) -> None:
    file = place / "table.json"
    file.write_text(json.dumps(content))
    rects: list[Any] = []
    told = ""
    try:
        rects = read_rectangles(file)
    except InputError as error:
        told = str(error)
    assert [len(rect) for rect in rects] == [len(content[str(i)]["rect"]) for i in range(len(rects))]
    assert all(type(value) is int for rect in rects for value in rect)
    assert bool(rects) != (str(file) in told)
    assert "\n" not in told


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_told(place: Path, content: bytes) -> None:
    file = place / "table.json"
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        read_rectangles(file)


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    file = write_rectangles(tmp_path / "table.json", [(1, 2, 3, 4)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_rectangles(file) == [(1, 2, 3, 4)]


GOOD = '"0": {"rect": [1, 2, 3, 4]}'
FOUR = r"not four numbers x0, y0, x1, y1\."
BAD: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", r"table\.json, line 1: this is not JSON \(Expecting value\)\."),
    "cut off": ('{"0": {\n"rect": [1, 2', r"table\.json, line 2: this is not JSON \("),
    "not UTF-8": (b'{"0": "\xff"}', r"table\.json is not UTF-8 text\."),
    "deep": ("[" * 100_000, r"table\.json cannot be read \(.*recursion"),
    "long number": (f'{{"0": {{"rect": [{"9" * 5000}, 2, 3, 4]}}}}', r"table\.json cannot be read \("),
    "a list": ("[[1, 2, 3, 4]]", r'holds no rectangles: expected \{"0": \{"rect": \[x0, y0, x1, y1\]\}, "1": …\}\.'),
    "nothing": ("{}", "table.json holds no rectangles"),
    "from 1": (
        '{"1": {"rect": [1, 2, 3, 4]}}',
        r"table\.json: frame 0 is missing; its 1 entries are to be frames 0 to 0\.",
    ),
    "a gap": (f'{{{GOOD}, "2": {{}}}}', r"table\.json: frame 1 is missing; its 2 entries are to be frames 0 to 1\."),
    "zero before": (f'{{{GOOD}, "01": {{}}}}', "frame 1 is missing"),
    "a name": (f'{{{GOOD}, "version": 3}}', "frame 1 is missing"),
    "twice": (f"{{{GOOD}, {GOOD}}}", r"table\.json: '0' is there twice; remove one\."),
    "twice among many": (json.dumps(dict.fromkeys(range(100_000))).replace("99998", "99999"), "'99999' is there twice"),
    "no rect": (f'{{{GOOD}, "1": {{"box": [1, 2, 3, 4]}}}}', r'frame 1 has no "rect": \[x0, y0, x1, y1\]\.'),
    "no object": ('{"0": [1, 2, 3, 4]}', 'frame 0 has no "rect"'),
    "three": ('{"0": {"rect": [1, 2, 3]}}', r'table\.json, frame 0: "rect" is \[1, 2, 3\], ' + FOUR),
    "five": ('{"0": {"rect": [1, 2, 3, 4, 5]}}', FOUR),
    "text": ('{"0": {"rect": [1, 2, 3, "4"]}}', FOUR),
    "null": ('{"0": {"rect": null}}', '"rect" is null, ' + FOUR),
    "true": ('{"0": {"rect": [true, 2, 3, 4]}}', FOUR),
    "nan": ('{"0": {"rect": [NaN, 2, 3, 4]}}', r'"rect" is \[NaN, 2, 3, 4\], ' + FOUR),
    "infinity": ('{"0": {"rect": [1, 2, Infinity, 4]}}', FOUR),
    "2**31": ('{"0": {"rect": [1, 2, 3, 2147483648]}}', FOUR),
    "huge": ('{"0": {"rect": [1, 2, 3, 1e300]}}', FOUR),
    "long": (f'{{"0": {{"rect": {list(range(999))}}}}}', r'"rect" is \[0, 1, 2, .{40,60}, ' + FOUR),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_told(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    file = tmp_path / "table.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as error:
        read_rectangles(file)
    assert "\n" not in str(error.value)


def test_a_table_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \("):
        read_rectangles(tmp_path)
