"""The HTML page: self-contained, well-formed, and true to the figures."""

import base64
import io
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import numbered_picture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pages import Page
from PIL import Image
from test_compare import write_pictures

from gpurender import compare_frames
from gpurender.compare.page import HEIGHT, LEFT, MOST_POINTS, TOP, WIDTH, curve, most_different, tick_step

OPEN = ("p", "th", "td")  # tags that a page leaves open


def test_the_page(tmp_path: Path) -> None:
    a = write_pictures(tmp_path / "<i>a & b")
    b = write_pictures(tmp_path / "b", change={2: 2, 5: 40, 6: 8, 9: 20})
    comparison = compare_frames(a, b, html=tmp_path / "c.html", amplify=2)
    text = (tmp_path / "c.html").read_text("utf-8")
    page = Page(text, OPEN)
    words = "".join(page.words)
    assert "A is " + str(a) in words
    assert "Different" in words
    assert "below 40 dB PSNR or 0.95 SSIM are 3 of 12 frames: 5, 6, 9" in words
    headings = re.findall(r"frame (\d+): PSNR ([0-9.]+) dB, SSIM ([0-9.]+)", words)
    assert [int(number) for number, _, _ in headings] == [5, 9, 6]
    for number, psnr_db, ssim in headings:
        assert float(psnr_db) == pytest.approx(comparison.figures[int(number)].psnr_db, abs=0.01)
        assert float(ssim) == pytest.approx(comparison.figures[int(number)].ssim, abs=1e-5)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))) for link in page.links]
    assert len(pictures) == 9
    first, second, difference = pictures[:3]
    assert np.array_equal(first, numbered_picture(96, 80, 5))
    assert np.array_equal(difference, np.minimum(2 * np.abs(first.astype(int) - second), 255))
    curves = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert [len(points(svg)) for svg in curves] == [12, 12]
    lowest = [max(points(svg), key=lambda point: point[1])[0] for svg in curves]
    assert [len(svg.findall("circle")) for svg in curves] == [13, 13]  # each frame, and the worst once more
    assert lowest == [pytest.approx(LEFT + 5 / 11 * WIDTH, abs=0.1)] * 2


def test_equal_renders(tmp_path: Path) -> None:
    a = write_pictures(tmp_path / "a")
    compare_frames(a, a, html=tmp_path / "c.html", min_psnr_db=math.inf)
    words = "".join(Page((tmp_path / "c.html").read_text("utf-8"), OPEN).words)
    assert "Alike" in words
    assert "All of these frames are equal" in words
    assert "equal in every frame" in words


def test_a_single_picture(tmp_path: Path) -> None:
    a, b = (write_pictures(tmp_path / name, 1) / "00001.png" for name in "ab")
    compare_frames(a, b, html=tmp_path / "c.html")
    assert "<svg" not in (tmp_path / "c.html").read_text("utf-8")


def points(svg: ElementTree.Element) -> list[tuple[float, float]]:
    line = svg.find("polyline")
    assert line is not None
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.attrib["points"].split())]


@settings(max_examples=200)
@given(
    values=st.lists(st.floats(-1, 120) | st.just(math.inf), min_size=2, max_size=40),
    limit=st.floats(-1, 120) | st.just(math.inf),
    first=st.integers(0, 10_000),
)
@example(values=[0.0, 5e-324], limit=math.inf, first=0)
def test_any_curve_stays_in_its_place(values: list[float], limit: float, first: int) -> None:
    text = curve(list(range(first, first + len(values))), values, limit, "{:g}")
    if min(values) == math.inf:
        assert "equal in every frame" in text
        return
    svg = ElementTree.fromstring(text)
    drawn = points(svg)
    assert len(drawn) == len(values)
    for x, y in drawn:
        assert LEFT - 0.1 <= x <= LEFT + WIDTH + 0.1
        assert TOP - 0.1 <= y <= TOP + HEIGHT + 0.1
    assert len(svg.findall("line")) <= 10
    assert len(svg.findall("text")) <= 22
    assert "nan" not in text
    order = np.argsort(np.array(values), kind="stable")
    heights = np.array([y for _, y in drawn])[order]
    assert (np.diff(heights) <= 0).all()


@given(st.floats(1e-6, 1e9))
def test_steps_of_ticks(span: float) -> None:
    step = tick_step(span)
    assert 1.5 < span / step <= 6.001
    assert f"{step:.0e}"[0] in "125"


def test_a_long_video_keeps_its_worst_frame() -> None:
    values = [50.0] * 20_000
    values[12_345] = 20.0
    drawn = points(ElementTree.fromstring(curve(list(range(20_000)), values, 40, "{:g}")))
    assert len(drawn) <= MOST_POINTS
    x, _ = max(drawn, key=lambda point: point[1])
    assert x == pytest.approx(LEFT + 12_345 / 19_999 * WIDTH, abs=0.1)


def test_where_two_pictures_differ_most() -> None:
    a = torch.zeros(3, 400, 600, dtype=torch.uint8)
    b = a.clone()
    b[:, 250:280, 500:530] = 90
    b[:, 0:20, 0:20] = 255  # outside the part
    x0, y0, x1, y1 = most_different(a, b, (100, 100, 600, 400))
    assert x0 <= 500 < 530 <= x1
    assert y0 <= 250 < 280 <= y1
    assert x0 >= 100
    assert y1 <= 400
    assert most_different(a, b, (500, 250, 530, 280)) == (500, 250, 530, 280)
