"""`gpurender compare`: figures, verdicts and exit codes for every mix of videos, pictures and patterns."""

import gc
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import MakeTemplate, Run, numbered_picture, write_rectangles, write_video
from PIL import Image
from test_likeness import by_scikit_image

import gpurender.compare.run
from gpurender import InputError, compare_frames, write_frames
from gpurender.compare.footage import Footage

WIDTH, HEIGHT, FRAMES = 96, 80, 12


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *words: run("compare", *words)


def write_pictures(
    directory: Path,
    frames: int = FRAMES,
    name: str = "{:05d}.png",
    first: int = 1,
    change: dict[int, int] | None = None,
) -> Path:
    """Numbered pictures; `change` adds levels to frames, from 0."""
    directory.mkdir()
    for i in range(frames):
        pixels = numbered_picture(WIDTH, HEIGHT, i)
        if change and i in change:
            pixels = np.clip(pixels.astype(int) + change[i], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / name.format(i + first))
    return directory


def lossless(file: Path, frames: int = FRAMES) -> Path:
    return write_video(file, frames, WIDTH, HEIGHT, codec="ffv1", pixel_format="bgr0")


KINDS: dict[str, Callable[[Path], str]] = {
    "video": lambda path: str(lossless(path / "a.mkv")),
    "directory from 1": lambda path: str(write_pictures(path / "one")),
    "directory from 0": lambda path: str(write_pictures(path / "zero", name="render_{}.png", first=0)),
    "pattern": lambda path: str(write_pictures(path / "p", name="x{:03d}.png", first=7) / "x%03d.png"),
}


@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_equal_renders_of_any_kind(tmp_path: Path, a: str, b: str) -> None:
    for side in "ab":
        (tmp_path / side).mkdir()
    comparison = compare_frames(KINDS[a](tmp_path / "a"), KINDS[b](tmp_path / "b"), min_psnr_db=math.inf, min_ssim=1.0)
    assert comparison.alike, str(comparison)
    assert list(comparison.figures) == list(range(FRAMES))
    assert comparison.overall == (0, math.inf, 1)
    assert comparison.worst() == []


def test_figures_of_a_video(tmp_path: Path) -> None:
    """OpenCV decodes, scikit-image measures."""
    video = write_video(tmp_path / "a.mp4", FRAMES, WIDTH, HEIGHT, options={"crf": "30"})
    comparison = compare_frames(video, write_pictures(tmp_path / "b"), rect=(10, 4, 90, 76))
    capture = cv2.VideoCapture(str(video))
    expected = []
    for number in range(FRAMES):
        found, pixels = capture.read()
        assert found
        a, b = pixels[..., ::-1], numbered_picture(WIDTH, HEIGHT, number)
        expected.append(by_scikit_image(a[4:76, 10:90], b[4:76, 10:90]))
        assert comparison.figures[number] == pytest.approx(expected[-1], abs=1e-6)
    mse = np.mean([figures[0] for figures in expected])
    overall = mse, 10 * np.log10(255**2 / mse), np.mean([figures[2] for figures in expected])
    assert comparison.overall == pytest.approx(overall, abs=1e-6)
    by_psnr = sorted(range(FRAMES), key=lambda number: expected[number][1])
    assert comparison.worst(4) == by_psnr[:4]


# --- what the program says -------------------------------------------------------------------------------------------


def test_alike_is_0(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"), change={3: 1})
    result = run("a", "b/%05d.png")
    assert result.exit_code == 0, result.output
    assert "compared 12 frames of 96×80, whole frames; counted from 0" in result.stdout
    assert "worst frames: 3 (48." in result.stdout
    assert "alike: every frame has at least 40 dB PSNR and 0.95 SSIM" in result.stdout
    assert "compared 12 of 12 frames" in result.stderr
    assert run("a", "a").stdout.count("equal") >= 2


def test_one_wrong_frame_is_1(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"), change={9: 12})
    result = run("a", "b")
    assert result.exit_code == 1
    assert "different: below 40 dB PSNR or 0.95 SSIM are 1 of 12 frames: 9" in result.stdout
    assert run("a", "b", "--min-psnr", 20, "--min-ssim", 0.5).exit_code == 0
    assert run("a", "b", "--min-psnr", 20, "--min-ssim", 1).exit_code == 1
    assert run("a", "b", "--frames", 9, "--min-psnr", "inf").exit_code == 0


def test_quiet_leaves_the_exit_code(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"), change={0: 100})
    result = run("a", "b", "--quiet")
    assert (result.exit_code, result.output) == (1, "")


def test_unequal_lengths_are_1(run: Run) -> None:
    write_pictures(Path("a"))
    lossless(Path("b.mkv"), 10)
    result = run("a", "b.mkv")
    assert result.exit_code == 1
    assert "different: A has 12 frames, B has 10" in result.stdout
    assert "compared 10 frames" in result.stdout
    assert "different: A has 10 frames, B has 12" in run("b.mkv", "a").stdout
    assert run("a", "b.mkv", "--frames", 11).exit_code == 1
    assert run("a", "b.mkv", "--frames", 10).exit_code == 0


def test_the_json_file(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"), change={3: 5})
    assert run("a", "b", "--json", "c.json", "--min-psnr", 20, "--min-ssim", 0.5).exit_code == 0

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    told = json.loads(Path("c.json").read_text(), parse_constant=refuse)
    assert (told["a"], told["width"], told["alike"], told["differences"]) == ("a", 96, True, [])
    assert [entry["frame"] for entry in told["frames"]] == list(range(FRAMES))
    assert told["frames"][0] == {"frame": 0, "mse": 0, "psnr_db": None, "ssim": 1}
    assert told["frames"][3]["psnr_db"] == pytest.approx(by_scikit_image(*altered(3, 5))[1])
    assert told["overall"]["mse"] == pytest.approx(told["frames"][3]["mse"] / FRAMES)
    assert told["worst"] == [3]


def altered(number: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = numbered_picture(WIDTH, HEIGHT, number)
    return pixels, np.clip(pixels.astype(int) + levels, 0, 255).astype(np.uint8)


# --- parts of the frames ---------------------------------------------------------------------------------------------


def test_a_rectangle_alone(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"))
    for file in Path("b").iterdir():
        pixels = np.array(Image.open(file))
        pixels[:, :30] = 0
        Image.fromarray(pixels).save(file)
    assert run("a", "b").exit_code == 1
    assert run("a", "b", "--rect", "30,0,96,80", "--min-psnr", "inf").exit_code == 0
    assert run("a", "b", "--rect", "29,0,96,80", "--min-psnr", "inf").exit_code == 1


def test_the_faces_of_a_template(run: Run, make_template: MakeTemplate, tmp_path: Path) -> None:
    template = make_template(frames=4)
    faces = [(90 + 2 * i, 60 + i, 210 + 2 * i + 3 * (i % 3), 180 + i + 3 * (i % 3)) for i in range(4)]
    order = [1, 2, 3, 2, 1, 0, 1]
    for side in "ab":
        (tmp_path / side).mkdir()
    for number, shown in enumerate(order):
        pixels = np.array(Image.open(template / f"full_body_img/{shown}.jpg"))
        Image.fromarray(pixels).save(f"a/{number}.png")
        outside = np.ones(pixels.shape[:2], bool)
        x0, y0, x1, y1 = faces[shown]
        outside[y0:y1, x0:x1] = False
        pixels[outside] += 1
        Image.fromarray(pixels).save(f"b/{number}.png")
    table = write_rectangles(tmp_path / "crop_rectangles.json", faces)
    equal = ("--min-psnr", "inf", "--min-ssim", 1)
    assert run("a", "b", *equal).exit_code == 1
    assert run("a", "b", "--rect", template, *equal).exit_code == 0
    assert run("a", "b", "--rect", table, *equal).exit_code == 0
    assert run("a", "b", "--rect", template, "--order", "loop", *equal).exit_code == 1
    assert run("a", "b", "--rect", template, "--start-frame", 1, *equal).exit_code == 1


# --- what cannot be compared is 2 ------------------------------------------------------------------------------------


def refused(run: Run, words: str, *arguments: object) -> None:
    before = {str(file) for file in Path().rglob("*")}
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" not in result.output
    assert {str(file) for file in Path().rglob("*")} == before


def test_what_is_no_render(run: Run) -> None:
    write_pictures(Path("a"))
    Path("empty").mkdir()
    refused(run, "nothing.mp4: there is no such video", "a", "nothing.mp4")
    refused(run, "empty holds no pictures", "a", "empty")
    refused(run, "empty/%05d.png holds no pictures", "a", "empty/%05d.png")
    refused(run, "none is not a directory", "a", "none/%05d.png")
    refused(run, "numbered pictures are named like", "a", "a/%05d.bmp")
    Path("text.mp4").write_text("These are words.\n" * 100)
    refused(run, "text.mp4 is not a video that can be read", "a", "text.mp4")
    Path("text.png").write_text("These are words.\n")
    refused(run, "text.png cannot be read (not a JPEG or PNG picture)", "a", "text.png")
    shutil.copytree("a", "gap")
    os.remove("gap/00005.png")
    refused(run, "number 5 is missing between 00004.png and 00006.png", "a", "gap")
    refused(run, "number 5 is missing", "gap/%05d.png", "a")
    shutil.copytree("a", "double")
    shutil.copy("a/00001.png", "double/x1.png")
    refused(run, "x1.png and 00001.png have the same number", "double", "a")
    shutil.copy("a/00001.png", "double/cover.png")
    refused(run, "cover.png has no number in its name", "double", "a")
    whole = Path("a/00007.png").read_bytes()
    shutil.copytree("a", "cut")
    Path("cut/00007.png").write_bytes(whole[: len(whole) // 2])
    refused(run, "00007.png is corrupt or truncated", "a", "cut", "--json", "c.json", "--side-by-side", "c.mp4")


def test_odd_frames_and_their_video_with_even_ones(run: Run) -> None:
    y, x = torch.arange(71)[:, None], torch.arange(85)
    soft = torch.stack([128 + 60 * torch.sin((x + k * y) / 20) for k in range(3)])
    frames = soft.to(torch.uint8)[None].repeat(3, 1, 1, 1)
    for out in ("a/%d.png", "a.mp4"):
        write_frames([frames], out, fps=25)
    result = run("a", "a.mp4")
    assert result.exit_code == 0, result.output
    assert "whole frames, without what makes odd sizes even in videos" in result.stdout


@pytest.mark.parametrize("rect", [(1, 2, 3), [1, 2, 3, 4, 5], (1.5, 2, 30, 40), 7])
def test_a_rectangle_has_four_numbers(run: Run, rect: object) -> None:
    write_pictures(Path("a"))
    with pytest.raises(InputError, match="is no rectangle; give x0, y0, x1, y1"):
        compare_frames("a", "a", rect=rect)  # pyright: ignore[reportArgumentType]
    for given in ([10, 10, 40, 40], torch.tensor([10, 10, 40, 40]), np.array([10, 10, 40, 40])):
        assert compare_frames("a", "a", rect=given).alike  # pyright: ignore[reportArgumentType]


def test_results_beside_what_is_read_may_be_made_again(run: Run) -> None:
    write_pictures(Path("a"))
    write_pictures(Path("b"))
    for options in (("--json", "a/f.json"), ("--html", "a/page.html"), ("--side-by-side", "a/both.mp4")):
        for _ in range(2):
            assert run("a", "b/%05d.png", *options, "--overwrite").exit_code == 0
    assert run("a", "b", "--side-by-side", "a/sheets/%d.png").exit_code == 0  # a directory of its own


def test_odd_sizes_that_are_no_frames_and_their_video(run: Run) -> None:
    for name, size in (("a", (85, 72)), ("b", (86, 71))):
        Path(name).mkdir()
        Image.new("RGB", size).save(f"{name}/0.png")
    refused(run, "frames of different sizes cannot be compared", "a", "b")


def test_different_sizes(run: Run) -> None:
    write_pictures(Path("a"))
    write_video(Path("b.mp4"), FRAMES, WIDTH, HEIGHT + 2)
    refused(run, "a is 96×80, but b.mp4 is 96×82: frames of different sizes cannot be compared", "a", "b.mp4")


def test_bad_parts_and_thresholds(run: Run) -> None:
    write_pictures(Path("a"))
    refused(run, "10,10,97,50 of frame 0 is empty or leaves the 96×80 pixels", "a", "a", "--rect", "10,10,97,50")
    refused(run, "is empty or leaves", "a", "a", "--rect", "50,10,20,40")
    refused(run, "is empty or leaves", "a", "a", "--rect=-1,10,20,40")
    refused(run, "10×30 pixels are too few to judge: SSIM needs 11×11", "a", "a", "--rect", "0,0,10,30")
    refused(run, "1,2,3 is no part to judge", "a", "a", "--rect", "1,2,3")
    refused(run, "`face` means the face rectangles of a reference set", "a", "a", "--rect", "face")
    refused(run, "a least PSNR of nan cannot be used; give decibels", "a", "a", "--min-psnr", "nan")
    refused(run, "a least SSIM of 2.0 cannot be used; give -1 to 1", "a", "a", "--min-ssim", "2")
    refused(run, "an amplification of inf cannot be used", "a", "a", "--amplify", "inf")
    refused(run, "'tpu' is not a device", "a", "a", "--device", "tpu")
    Image.new("RGB", (30, 10)).save("tiny.png")
    refused(run, "30×10 pixels are too few to judge", "tiny.png", "tiny.png")


def test_outputs_that_are_there(run: Run) -> None:
    write_pictures(Path("a"))
    for option in ("--json", "--html", "--side-by-side"):
        Path("mine.mp4").write_text("mine")
        refused(run, "mine.mp4 exists; give --overwrite", "a", "a", option, "mine.mp4")
        refused(run, "is not a directory", "a", "a", option, "no/where.mp4")
        assert Path("mine.mp4").read_text() == "mine"
        assert run("a", "a", option, "mine.mp4", "--overwrite").exit_code == 0
        assert Path("mine.mp4").read_bytes() != b"mine"
        refused(run, "mine.mp4 is what is read", "mine.mp4", "a", option, "mine.mp4", "--overwrite")
        refused(run, "00001.png is among what is read", "a", "mine.mp4", option, "a/00001.png", "--overwrite")
        refused(run, "00001.png is among what is read", "mine.mp4", "a/%05d.png", option, "a/00001.png", "--overwrite")
    for a in ("a", "a/%05d.png"):
        refused(run, "is among what is read", a, "mine.mp4", "--side-by-side", "a/sheet%d.png", "--overwrite")


# --- memory ----------------------------------------------------------------------------------------------------------


class Counting:
    """Frames that count how many of them are alive."""

    def __init__(self) -> None:
        self.size: tuple[int, int] = (WIDTH, HEIGHT)
        self.alive = self.most = 0

    def frames(self, indices: Sequence[int]) -> list[torch.Tensor]:
        frames = []
        for i in indices:
            frame = torch.from_numpy(numbered_picture(WIDTH, HEIGHT, i)).permute(2, 0, 1).contiguous()
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(frame, self.gone)
            frames.append(frame)
        return frames

    def gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_few_frames_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side_by_side: bool) -> None:
    sources = {"a": Counting(), "b": Counting()}
    monkeypatch.setattr(
        gpurender.compare.run, "open_footage", lambda name: Footage(Path(name), sources[name], range(100), 100, 25.0)
    )
    gc.disable()  # frames have to go by themselves
    try:
        comparison = compare_frames("a", "b", side_by_side=tmp_path / "c.mp4" if side_by_side else None)
    finally:
        gc.enable()
    assert len(comparison.figures) == 100
    for source in sources.values():
        assert source.most <= 6
        assert source.alive == 0


def test_an_error_in_a_frame_is_raised(tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path / "a"), write_pictures(tmp_path / "b")
    (b / "00004.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"00004.png"):
        compare_frames(a, b)
