"""Templates whose frames are a video."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, LANDMARKS, PARSING, MakeTemplate, landmarks, read_number, write_rectangles, write_video
from PIL import Image

from gpurender import InputError, open_template
from gpurender.pictures import keep_mask, read_picture
from gpurender.video import FEWEST, VideoFrames

TABLE, VIDEO = "cache/crop_rectangles.json", "full_body_video.mp4"


def test_a_package(make_package: MakeTemplate, device: torch.device) -> None:
    path = make_package()
    template = open_template(path, device=device, decoder="pyav")
    assert (len(template), template.width, template.height, template.parsing, template.notes) == (
        12,
        160,
        120,
        False,
        [],
    )
    assert repr(template) == "Template(vera: 12 frames of 160×120)"
    assert (template.rects.dtype, template.rects.tolist()) == (
        torch.int64,
        [[30 + i, 20, 110 + i, 110] for i in range(12)],
    )
    frames, keep = template.frames([11, 2, 2, 0])
    assert (frames.shape, frames.dtype, frames.device.type) == ((4, 3, 120, 160), torch.uint8, device.type)
    assert keep is None
    assert [read_number(frame) for frame in frames.cpu().numpy()] == [11, 2, 2, 0]
    frames[1] = 0
    assert read_number(frames[2].cpu().numpy()) == read_number(template.frames([2])[0][0].cpu().numpy()) == 2


def test_a_packages_table_may_lie_beside_the_video(make_package: MakeTemplate) -> None:
    path = make_package()
    (path / TABLE).rename(path / "crop_rectangles.json")
    assert open_template(path).rects[3].tolist() == [33, 20, 113, 110]
    write_rectangles(path / TABLE, [(1, 2, 51, 62)] * 12)
    assert open_template(path).rects[3].tolist() == [1, 2, 51, 62]


def test_a_packages_table_wins_over_landmarks(make_package: MakeTemplate) -> None:
    path = make_package()
    (path / LANDMARKS).mkdir()
    assert open_template(path).rects[3].tolist() == [33, 20, 113, 110]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_package_may_have_landmarks_instead(make_package: MakeTemplate, missing: int) -> None:
    path = make_package()
    (path / TABLE).unlink()
    (path / LANDMARKS).mkdir()
    for i in range(12 - missing):
        (path / LANDMARKS / f"{i}.lms").write_text(landmarks(30 + i, 20, 110 + i))
    template = open_template(path)
    assert template.rects.tolist() == [[30 + i, 20, 110 + i, 100] for i in range(12 - missing)]
    assert template.notes == ["the last frame, 11, has no landmarks and is left out"] * missing


def test_the_last_frame_of_a_package_may_lack_a_rectangle(make_package: MakeTemplate) -> None:
    template = open_template(make_package(rects=11))
    assert len(template) == 11
    assert template.notes == ["the last frame, 11, has no rectangle and is left out"]


@pytest.mark.parametrize("both", [True, False])
def test_pictures_win_over_a_video(make_template: MakeTemplate, tmp_path: Path, both: bool) -> None:
    path = make_template()
    if both:
        write_video(path / VIDEO)
    template = open_template(path)
    assert (len(template), template.width) == (5, 320)
    assert template.notes == [f"the frames are those of {IMAGES}; {VIDEO} is not used"] * both


@pytest.mark.parametrize("count", [11, 12])
def test_a_package_may_have_masks(make_package: MakeTemplate, device: torch.device, count: int) -> None:
    path = make_package(parsing=True, rects=count)
    template = open_template(path, device=device)
    _, keep = template.frames([3, count - 1])
    assert keep is not None
    expected = keep_mask(read_picture(path / PARSING / "3.png"))
    assert all(torch.equal(mask.cpu(), expected) for mask in keep)
    assert not open_template(path, parsing=False).parsing


def test_a_turned_video_has_its_turned_size(make_package: MakeTemplate) -> None:
    template = open_template(make_package(turned=90, width=120, height=160))
    assert (template.width, template.height) == (160, 120)
    assert template.frames([0, 5])[0].shape == (2, 3, 120, 160)


@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_any_budget_gives_a_packages_frames(
    make_package: MakeTemplate, decoded: Counter[str], parsing: bool, kept: int
) -> None:
    path = make_package(parsing=parsing)
    frame, mask = VideoFrames(path / VIDEO).frame_bytes, 160 * 120 * parsing
    budget = 2 * kept * (frame + mask) + 1
    template = open_template(path, memory_budget=budget)
    taken = max(kept, FEWEST) * frame + kept * mask
    assert template.memory_left == max(budget - taken, 0)
    for indices in ([0, 1, 2, 3], [11, 10], [5, 5, 0], range(12), range(11, -1, -1)):
        frames, keep = template.frames(indices)
        assert [read_number(frame) for frame in frames.numpy()] == list(indices)
        assert (keep is not None) == parsing
    masks_read = [decoded[f"{PARSING}/{i}.png"] for i in range(12)]
    assert sum(reads == 1 for reads in masks_read) >= (kept if parsing else 0)


def test_a_small_package_leaves_most_of_a_large_budget(make_package: MakeTemplate) -> None:
    path = make_package()
    left = open_template(path, memory_budget=2**29).memory_left
    assert left == 2**29 - 12 * VideoFrames(path / VIDEO).frame_bytes


BAD_PACKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no video": (
        lambda p: (p / VIDEO).unlink(),
        r"vera is no template: it holds neither pictures, full_body_img/0\.jpg …, nor a package's full_body_video\.mp4",
    ),
    "bad video": (lambda p: (p / VIDEO).write_text("video"), r"full_body_video\.mp4 is not a video that can be read"),
    "no rectangles": (
        lambda p: (p / TABLE).unlink(),
        r"vera has no face rectangles: cache/crop_rectangles\.json is missing, and landmarks/0\.lms … too",
    ),
    "rectangles too few": (
        lambda p: write_rectangles(p / TABLE, [(1, 1, 9, 9)] * 10),
        r"crop_rectangles\.json has 10 rectangles, but full_body_video\.mp4 has 12 frames: they do not match",
    ),
    "rectangles too many": (
        lambda p: write_rectangles(p / TABLE, [(1, 1, 9, 9)] * 13),
        "has 13 rectangles, but full_body_video.mp4 has 12 frames",
    ),
    "landmarks too few": (
        lambda p: ((p / TABLE).unlink(), (p / LANDMARKS).mkdir(), (p / LANDMARKS / "0.lms").touch()),
        "vera has 12 frames and 1 landmark files that do not match: no landmarks for 1, 2, 3, 4, 5 and 5 more",
    ),
    "leaves": (
        lambda p: write_rectangles(p / TABLE, [*[(1, 1, 9, 9)] * 11, (100, 1, 161, 9)]),
        r"frame 11: the face rectangle \(100, 1, 161, 9\) leaves the frame of 160×120",
    ),
    "empty": (
        lambda p: write_rectangles(p / TABLE, [*[(1, 1, 9, 9)] * 11, (10, 5, 60, 5)]),
        r"frame 11: the face rectangle \(10, 5, 60, 5\) is empty; x0 .* left of x1 .* and y0 above y1",
    ),
    "inverted": (
        lambda p: write_rectangles(p / TABLE, [(10, 50, 60, 5), *[(1, 1, 9, 9)] * 11]),
        r"frame 0: the face rectangle \(10, 50, 60, 5\) is inverted",
    ),
    "another size of mask": (
        lambda p: Image.fromarray(np.zeros((121, 160, 3), np.uint8)).save(p / PARSING / "3.png"),
        r"3\.png is 160×121, but full_body_video\.mp4 is 160×120: frames and masks that belong together",
    ),
    "a mask too few": (lambda p: (p / PARSING / "3.png").unlink(), "parsing has no mask for 3; give --no-parsing"),
}


@pytest.mark.parametrize("name", BAD_PACKAGES)
def test_bad_packages_are_told(make_package: MakeTemplate, name: str) -> None:
    spoil, words = BAD_PACKAGES[name]
    path = make_package(parsing=True)
    spoil(path)
    with pytest.raises(InputError, match=words):
        open_template(path)
