"""The side-by-side video: what its frames show, and that the program writes it."""

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_compare import lossless, write_pictures

from gpurender import Figures, compare_frames, compare_pictures
from gpurender.compare.comparison import Pair
from gpurender.compare.side_by_side import ALARM, BACKGROUND, GAP, INK, side_by_side_frames

HELD_TO = (40.0, 0.95)


def pair(width: int, height: int, change: int = 0, number: int = 7) -> Pair:
    a, b = (torch.from_numpy(picture(width, height, 0)).permute(2, 0, 1).contiguous() for _ in range(2))
    b += change
    return Pair(number, a, b, compare_pictures(a, b), {})


def drawn(*pairs: Pair, view: tuple[int, int, int, int], names: tuple[str, str] = ("a", "b")) -> list[np.ndarray]:
    frames = list(side_by_side_frames(pairs, names, view, 10, HELD_TO))
    assert all(frame.shape == frames[0].shape and frame.dtype == torch.uint8 for frame in frames)
    return [frame[0].permute(1, 2, 0).numpy() for frame in frames]


def below(sheet: np.ndarray, height: int) -> np.ndarray:
    line = (len(sheet) - height) // 2
    return sheet[line + height :]


def has(colour: tuple[int, int, int], pixels: np.ndarray) -> bool:
    return bool((pixels == colour).all(-1).any())


@pytest.mark.parametrize(("side", "times"), [(40, 12), (100, 4), (500, 1)])
def test_pixels_are_shown_as_they_are(side: int, times: int) -> None:
    (sheet,) = drawn(pair(640, 560, 6), view=(20, 10, 20 + side, 10 + side))
    shown = side * times
    assert sheet.shape[1] == 3 * shown + 2 * GAP
    line = (len(sheet) - shown) // 2
    panels = [sheet[line : line + shown, k * (shown + GAP) : k * (shown + GAP) + shown] for k in range(3)]
    a = picture(640, 560, 0)[10 : 10 + side, 20 : 20 + side]
    b = a + np.uint8(6)  # wraps, as the pair's does
    difference = np.minimum(10 * np.abs(a.astype(int) - b), 255)
    for panel, expected in zip(panels, (a, b, difference), strict=True):
        assert np.array_equal(panel, expected.repeat(times, 0).repeat(times, 1))


def test_large_frames_are_made_smaller() -> None:
    frame = torch.from_numpy(picture(2560, 1440, 0)).permute(2, 0, 1)
    (sheet,) = drawn(Pair(0, frame, frame, Figures(0, math.inf, 1), {}), view=(0, 0, 2560, 1440))
    assert sheet.shape[1] == 3 * 1280 + 2 * GAP
    line = (len(sheet) - 720) // 2
    means = picture(2560, 1440, 0).reshape(720, 2, 1280, 2, 3).mean((1, 3))
    assert np.abs(sheet[line : line + 720, :1280] - means).max() <= 1


def test_figures_below_the_threshold_are_red() -> None:
    good, bad, equal = drawn(pair(500, 400, 1), pair(500, 400, 9), pair(500, 400), view=(0, 0, 500, 400))
    assert has(INK, below(good, 400))
    assert not has(ALARM, below(good, 400))
    assert has(ALARM, below(bad, 400))
    assert has(INK, below(equal, 400))
    only_ssim = pair(500, 400, 1)._replace(figures=Figures(1, 48, 0.5))
    assert has(ALARM, below(drawn(only_ssim, view=(0, 0, 500, 400))[0], 400))


def test_long_and_foreign_names_stay_in_their_place() -> None:
    names = ("/home/" + "renders/" * 30 + "ümläut.mp4", "漢字.mp4")
    (sheet,) = drawn(pair(500, 400), view=(0, 0, 500, 400), names=names)
    line = (len(sheet) - 400) // 2
    for left in (500, 500 + GAP + 500):
        assert (sheet[:line, left : left + GAP] == BACKGROUND).all()
    assert has(INK, sheet[:line, 300:500])
    assert has(INK, sheet[:line, 500 + GAP : 600])


def test_the_video(tmp_path: Path) -> None:
    a, b = lossless(tmp_path / "a.mkv"), write_pictures(tmp_path / "b", change={4: 8})
    compare_frames(a, b, side_by_side=tmp_path / "c.mp4", rect=(8, 8, 88, 68))
    with av.open(str(tmp_path / "c.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert len(frames) == 12
    brightness = [frame[100:200, -200:].mean() for frame in frames]
    assert brightness.index(max(brightness)) == 4
    assert sum(value > 20 for value in brightness) == 1


def test_samples_are_shown_for_a_second(tmp_path: Path) -> None:
    a = write_pictures(tmp_path / "a", 3, first=0)
    samples = [{"index": number, "frame": f"{number:05d}.png"} for number in range(3)]
    text = json.dumps({"format": "gpurender reference set", "version": 1, "samples": samples})
    (a / "metadata.json").write_text(text)
    comparison = compare_frames(a, a, side_by_side=tmp_path / "c.mp4", min_psnr_db=math.inf)
    assert comparison.alike
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.streams.video[0].average_rate == 1
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_numbered_pictures(tmp_path: Path) -> None:
    a = write_pictures(tmp_path / "a", 3)
    compare_frames(a, a, side_by_side=tmp_path / "out" / "%d.png")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["1.png", "2.png", "3.png"]
    assert Image.open(tmp_path / "out" / "1.png").size[0] == 3 * 480 + 2 * GAP
