import itertools
import json
import os
import shutil
import struct
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    NO_POINTS,
    MakeTemplate,
    landmarks,
    opencv,
    picture,
    read_number,
    turned,
    write_points,
    write_rectangles,
    write_video,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gpurender import InputError, Template, frame_order, open_template
from gpurender.find import find_audio_encoder, find_network
from gpurender.pictures import keep_mask, read_mask, read_picture
from gpurender.rectangles import face_rect
from gpurender.template import Order, decoded_ahead
from gpurender.video import FEWEST, VideoFrames

IMAGES, LANDMARKS, PARSING = "full_body_img", "landmarks", "parsing"


def assert_frames(template: Template, images: list[Path], marks: list[Path]) -> None:
    """The template's frames are these images with these landmarks."""
    assert len(template) == len(images)
    frames, _ = template.frames(range(len(images)))
    for frame, file in zip(frames.cpu().numpy(), images, strict=True):
        if template.decoder == "dali" and template.device.type == "cuda":  # a GPU's rounding is its own
            assert np.abs(frame.astype(int) - opencv(file)).mean() <= 0.5
        else:
            np.testing.assert_array_equal(frame, opencv(file))
    assert template.rects.tolist() == [list(face_rect(file)) for file in marks]


def renumber(directory: Path, name: Callable[[int], str]) -> None:
    for file in sorted(directory.iterdir(), key=lambda file: -int(file.stem)):
        file.rename(directory / (name(int(file.stem)) + file.suffix))


def files(path: Path, directory: str, *names: str) -> list[Path]:
    return [path / directory / name for name in names]


# --- which files belong together -------------------------------------------------------------------------------------


def test_frames_are_in_the_order_of_their_numbers(make_template: MakeTemplate, device: torch.device) -> None:
    path = make_template(frames=12, width=260, height=200)
    template = open_template(path, device=device)
    jpgs = files(path, IMAGES, *(f"{i}.jpg" for i in range(12)))
    assert_frames(template, jpgs, files(path, LANDMARKS, *(f"{i}.lms" for i in range(12))))
    assert (template.width, template.height, template.parsing) == (260, 200, False)
    assert [note for note in template.notes if "DALI is not installed" not in note] == []
    assert repr(template) == "Template(anna: 12 frames of 260×200)"
    frames, keep = template.frames([11, 2])
    assert (frames.shape, frames.dtype, frames.device.type) == ((2, 3, 200, 260), torch.uint8, device.type)
    assert keep is None


def test_images_may_count_from_1_and_landmarks_from_0(make_template: MakeTemplate) -> None:
    path = make_template(parsing=True)
    renumber(path / IMAGES, lambda i: str(i + 1))
    template = open_template(path)
    jpgs = files(path, IMAGES, *(f"{i + 1}.jpg" for i in range(5)))
    assert_frames(template, jpgs, files(path, LANDMARKS, *(f"{i}.lms" for i in range(5))))
    assert template.notes == ["pictures are numbered from 1, landmarks from 0: paired in order"]


def test_images_from_1_may_lack_the_last_landmarks(make_template: MakeTemplate) -> None:
    path = make_template()
    renumber(path / IMAGES, lambda i: str(i + 1))
    (path / LANDMARKS / "4.lms").unlink()
    template = open_template(path)
    assert len(template) == 4
    assert template.notes[1] == "the last frame, 5.jpg, has no landmarks and is left out"


def test_all_may_count_from_1(make_template: MakeTemplate) -> None:
    path = make_template(parsing=True)
    for directory in (IMAGES, LANDMARKS, PARSING):
        renumber(path / directory, lambda i: str(i + 1))
    template = open_template(path)
    assert (len(template), template.parsing, template.notes) == (5, True, [])


@pytest.mark.parametrize("masks_like_images", [True, False])
def test_masks_count_as_images_or_from_0(make_template: MakeTemplate, masks_like_images: bool) -> None:
    path = make_template(frames=3, parsing=True)
    for i in range(3):
        mask = np.zeros((240, 320, 3), np.uint8)
        mask[i] = 255
        Image.fromarray(mask).save(path / PARSING / f"{i}.png")
    renumber(path / IMAGES, lambda i: str(i + 1))
    if masks_like_images:
        renumber(path / PARSING, lambda i: str(i + 1))
    _, keep = open_template(path).frames(range(3))
    assert keep is not None
    assert keep.any(2).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_mask_too_many_before_the_first_frame_moves_none(make_template: MakeTemplate) -> None:
    path = make_template(frames=4, parsing=True)
    for i in range(4):
        mask = np.zeros((240, 320, 3), np.uint8)
        mask[i] = 255
        Image.fromarray(mask).save(path / PARSING / f"{i}.png")
    (path / IMAGES / "0.jpg").unlink()
    (path / LANDMARKS / "0.lms").unlink()
    _, keep = open_template(path).frames(range(3))
    assert keep is not None
    assert keep.any(2).nonzero().tolist() == [[0, 1], [1, 2], [2, 3]]


def test_the_last_frame_may_lack_landmarks(make_template: MakeTemplate) -> None:
    path = make_template()
    (path / LANDMARKS / "4.lms").unlink()
    template = open_template(path)
    jpgs = files(path, IMAGES, *(f"{i}.jpg" for i in range(4)))
    assert_frames(template, jpgs, files(path, LANDMARKS, *(f"{i}.lms" for i in range(4))))
    assert template.notes == ["the last frame, 4.jpg, has no landmarks and is left out"]


def test_a_last_frame_that_is_left_out_may_lack_its_mask(make_template: MakeTemplate) -> None:
    path = make_template(parsing=True)
    count = len(open_template(path))
    (path / LANDMARKS / f"{count - 1}.lms").unlink()
    (path / PARSING / f"{count - 1}.png").unlink()
    template = open_template(path)
    assert (len(template), template.parsing) == (count - 1, True)


def test_stray_files_are_ignored(make_template: MakeTemplate) -> None:
    path = make_template(parsing=True)
    for directory in (path, path / IMAGES, path / LANDMARKS, path / PARSING):
        for name in (".DS_Store", "Thumbs.db", "notes.txt", "._0.jpg", "._0.lms", "._0.png", "0.jpg.bak", "cover.jpg"):
            (directory / name).write_text("stray")
        (directory / "more").mkdir()
    assert len(open_template(path)) == 5


@pytest.mark.parametrize("suffix", [".jpeg", ".png", ".JPG", ".JPEG", ".PNG"])
def test_suffixes(make_template: MakeTemplate, suffix: str) -> None:
    path = make_template(frames=2, suffix=suffix)
    assert_frames(
        open_template(path), files(path, IMAGES, f"0{suffix}", f"1{suffix}"), files(path, LANDMARKS, "0.lms", "1.lms")
    )


def test_numbers_may_have_gaps(make_template: MakeTemplate) -> None:
    path = make_template(frames=4, parsing=True)
    for directory in (IMAGES, LANDMARKS, PARSING):
        renumber(path / directory, lambda i: str(7 * i + 2))
    jpgs = files(path, IMAGES, "2.jpg", "9.jpg", "16.jpg", "23.jpg")
    assert_frames(open_template(path), jpgs, files(path, LANDMARKS, "2.lms", "9.lms", "16.lms", "23.lms"))


def test_names_may_be_padded_with_zeros(make_template: MakeTemplate) -> None:
    path = make_template(frames=11, width=260, height=200)
    renumber(path / IMAGES, lambda i: f"{i:05d}")
    jpgs = files(path, IMAGES, *(f"{i:05d}.jpg" for i in range(11)))
    assert_frames(open_template(path), jpgs, files(path, LANDMARKS, *(f"{i}.lms" for i in range(11))))


def test_one_frame(make_template: MakeTemplate, device: torch.device) -> None:
    template = open_template(make_template(frames=1), device=device)
    frames, _ = template.frames([0, 0, 0])
    assert len(template) == 1
    assert (frames[0] == frames[2]).all()


@pytest.mark.parametrize(
    ("there", "asked", "used"), [(1, None, 1), (0, None, 0), (1, False, 0), (0, False, 0), (1, True, 1)]
)
def test_parsing_is_used_if_there_and_wanted(
    make_template: MakeTemplate, device: torch.device, there: bool, asked: bool | None, used: bool
) -> None:
    template = open_template(make_template(parsing=bool(there)), device=device, parsing=asked)
    _, keep = template.frames([0, 3])
    assert template.parsing == bool(used)
    assert ("with parsing" in repr(template)) == bool(used)
    if keep is None:
        assert not used
    else:
        assert (keep.shape, keep.dtype, keep.device.type) == ((2, 240, 320), torch.bool, device.type)


def test_sample(shared: Path, device: torch.device) -> None:
    path = shared / "sample" / "template"
    template = open_template(path, device=device)
    jpgs = files(path, IMAGES, *(f"{i}.jpg" for i in range(24)))
    assert_frames(template, jpgs, files(path, LANDMARKS, *(f"{i}.lms" for i in range(24))))
    _, keep = template.frames(range(24))
    assert keep is not None
    for i in range(24):
        blue, green, red = np.moveaxis(np.asarray(cv2.imread(str(path / PARSING / f"{i}.png"))), 2, 0)
        kept = (red == 255) & (((blue == 255) & (green == 255)) | ((blue == 0) & (green == 0)))
        np.testing.assert_array_equal(keep[i].cpu().numpy(), kept)
    for golden in json.loads((shared / "golden" / "frames.json").read_text())["frames"]:
        assert template.rects[golden["template"]].tolist() == golden["rect_xyxy"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_turned_frames_have_their_turned_size(make_template: MakeTemplate, orientation: int, suffix: str) -> None:
    path = make_template(frames=1, suffix=suffix)
    file = path / IMAGES / f"0{suffix}"
    Image.open(file).copy().save(file, exif=turned(orientation))
    (path / LANDMARKS / "0.lms").write_text(landmarks(40, 50, 200))
    template = open_template(path)
    assert (template.width, template.height) == ((320, 240) if orientation < 5 else (240, 320))
    assert_frames(template, [file], [path / LANDMARKS / "0.lms"])


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each picture was read, by directory and name."""
    counts: Counter[str] = Counter()

    def counting(read: Callable[[Path], torch.Tensor]) -> Callable[[Path], torch.Tensor]:
        def count(file: Path) -> torch.Tensor:
            counts[f"{file.parent.name}/{file.name}"] += 1
            return read(file)

        return count

    for read in (read_picture, read_mask):
        monkeypatch.setattr(f"gpurender.pictures.{read.__name__}", counting(read))
    return counts


@pytest.mark.parametrize("parsing", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 3, 5])
def test_any_budget_gives_the_same_frames(
    make_template: MakeTemplate, decoded: Counter[str], device: torch.device, parsing: bool, resident: int
) -> None:
    frame_bytes = 320 * 240 * (4 if parsing else 3)
    budget = 2 * resident * frame_bytes + frame_bytes if resident else 0
    path = make_template(parsing=parsing)
    template = open_template(path, device=device, memory_budget=budget, decoder="pillow")
    assert template.memory_left == budget - resident * frame_bytes
    assert not decoded
    for indices in ([0, 1, 2], [3, 4], [2, 2, 0], [4, 3, 2, 1, 0]):
        frames, keep = template.frames(indices)
        assert (keep is not None) == parsing
        for n, i in enumerate(indices):
            np.testing.assert_array_equal(frames[n].cpu().numpy(), opencv(path / IMAGES / f"{i}.jpg"))
            if keep is not None:
                mask = keep_mask(read_picture(path / PARSING / f"{i}.png"))
                assert torch.equal(keep[n].cpu(), mask)
    uses = [3, 2, 3, 2, 2]
    expected = {f"{IMAGES}/{i}.jpg": 1 if i < resident else uses[i] for i in range(5)}
    expected |= {f"{PARSING}/{i}.png": 1 if i < resident else uses[i] for i in range(5) if parsing}
    assert decoded == expected


def test_plenty_of_memory_is_not_all_taken(make_template: MakeTemplate, device: torch.device) -> None:
    template = open_template(make_template(), device=device, memory_budget=2**30)
    assert template.memory_left == 2**30 - 5 * 320 * 240 * 3


@pytest.mark.parametrize(("free", "budget"), [(None, 512), (600, 150), (900, 388), (1024, 512), (8192, 2048)])  # MiB
def test_the_default_budget_is_a_quarter_of_what_is_free(
    make_template: MakeTemplate, monkeypatch: pytest.MonkeyPatch, free: int | None, budget: int
) -> None:
    monkeypatch.setattr("gpurender.template.free_memory", lambda: None if free is None else free * 2**20)
    path = make_template()
    assert open_template(path, keep_frames=False).memory_left == budget * 2**20
    monkeypatch.setattr("gpurender.template.CPU_MEMORY_BUDGET", 5 * 320 * 240 * 3 - 1)
    assert open_template(path, keep_frames=False).memory_left == 0  # a large template is to stay small in memory


def test_default_budget_keeps_a_small_template(make_template: MakeTemplate, decoded: Counter[str]) -> None:
    template = open_template(make_template())
    for _ in range(2):
        template.frames(range(5))
    assert set(decoded.values()) == {1}
    assert template.memory_left > 256 * 2**20


@pytest.mark.parametrize("resident", [0, 3, 5])
def test_frames_that_stay_are_decoded_ahead(
    make_template: MakeTemplate, device: torch.device, decoded: Counter[str], resident: int
) -> None:
    path = make_template(parsing=True)
    template = open_template(path, device=device, memory_budget=2 * resident * 320 * 240 * 4, decoder="pillow")
    order = list(dict.fromkeys(frame_order(5, range(40))))
    with decoded_ahead(template, order):
        deadline = time.monotonic() + 10
        while len(decoded) < 2 * resident and time.monotonic() < deadline:
            time.sleep(0.01)
    first = {
        f"{folder}/{i}.{kind}": 1 for folder, kind in ((IMAGES, "jpg"), (PARSING, "png")) for i in order[:resident]
    }
    assert decoded == first
    frames, keep = template.frames(order[:resident] or [0])
    expected, masks = open_template(path, device=device, decoder="pillow").frames(order[:resident] or [0])
    assert torch.equal(frames, expected)
    assert keep is not None
    assert masks is not None
    assert torch.equal(keep, masks)


def test_who_no_longer_wants_frames_ahead_waits_for_few(
    make_template: MakeTemplate, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurender.template.AHEAD", 1)
    template = open_template(make_template(), memory_budget=2**30)
    begun, may_go, whole = threading.Event(), threading.Event(), template.keep

    def keep(indices: list[int]) -> None:
        begun.set()
        may_go.wait()
        whole(indices)

    monkeypatch.setattr(template, "keep", keep)
    with decoded_ahead(template, range(5)):
        assert begun.wait(10)
        threading.Timer(0.1, may_go.set).start()
    assert sum(decoded.values()) == 1


def test_what_cannot_be_decoded_ahead_is_told_when_it_is_used(make_template: MakeTemplate) -> None:
    path = make_template()
    (path / IMAGES / "3.jpg").write_bytes((path / IMAGES / "3.jpg").read_bytes()[:700])
    template = open_template(path, memory_budget=2**30)
    with decoded_ahead(template, range(5)):
        pass
    assert len(template.frames([0, 1, 2, 4])[0]) == 4
    with pytest.raises(InputError, match=r"3\.jpg is corrupt or truncated"):
        template.frames([3])


@pytest.mark.parametrize("indices", [[], [5], [-1], [0, 9]])
def test_frames_that_are_not_there(make_template: MakeTemplate, indices: list[int]) -> None:
    template = open_template(make_template())
    assert len(template.frames(torch.tensor([4, 0]))[0]) == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"frames are 0 to 4, at least one of them; given \["):
        template.frames(indices)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_frames_are_copies(make_template: MakeTemplate, device: torch.device, budget: int) -> None:
    template = open_template(make_template(parsing=True), device=device, memory_budget=budget)
    before = [part.clone() for part in template.frames([1]) if part is not None]
    for part in template.frames([1, 1]):
        assert part is not None
        part[0] = 0
        assert part[1].any()
    after = [part for part in template.frames([1]) if part is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- packages --------------------------------------------------------------------------------------------------------

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


def test_networks_of_a_package_are_found(make_package: MakeTemplate) -> None:
    path = make_package()
    (path / "models").mkdir()
    for name in ("generator.onnx", "audio_encoder.onnx"):
        (path / "models" / name).touch()
    assert find_network(path) == path / "models/generator.onnx"
    assert find_audio_encoder(path) == path / "models/audio_encoder.onnx"


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


# --- the order of frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "order", "start", "expected"),
    [
        (4, "bounce", 0, [1, 2, 3, 2, 1, 0, 1, 2]),
        (4, "bounce", 2, [3, 2, 1, 0, 1, 2]),
        (4, "bounce", 3, [2, 1, 0, 1, 2]),
        (2, "bounce", 0, [1, 0, 1, 0]),
        (2, "bounce", 1, [0, 1, 0, 1]),
        (1, "bounce", 0, [0, 0, 0]),
        (3, "loop", 0, [0, 1, 2, 0, 1]),
        (3, "loop", 2, [2, 0, 1, 2]),
        (1, "loop", 0, [0, 0, 0]),
        (3, "mirror", 0, [0, 1, 2, 2, 1, 0, 0, 1]),
        (3, "mirror", 2, [2, 2, 1, 0, 0, 1]),
        (1, "mirror", 0, [0, 0, 0]),
    ],
)
def test_orders(count: int, order: Order, start: int, expected: list[int]) -> None:
    assert frame_order(count, range(len(expected)), order, start) == expected


def test_other_orders_and_decoders_are_refused(make_template: MakeTemplate) -> None:
    wrong: Any = "ping-pong"
    with pytest.raises(InputError, match="'ping-pong' is no order of frames; choose bounce, loop, mirror"):
        frame_order(4, range(8), wrong)
    with pytest.raises(InputError, match="'ping-pong' is no decoder; choose auto, dali"):
        open_template(make_template(), decoder=wrong)


def test_an_empty_directory_of_masks_is_told_what_to_do_about(make_template: MakeTemplate) -> None:
    path = make_template()
    (path / "parsing").mkdir()
    with pytest.raises(InputError, match="holds no parsing masks; give --no-parsing to render without them"):
        open_template(path)
    assert not open_template(path, parsing=False).parsing


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_is_told_to_open_its_own(make_template: MakeTemplate) -> None:
    """Its decoders' threads are not there: it would wait for ever."""
    template = open_template(make_template())
    template.frames([0])
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process has threads
        child = os.fork()
    if child == 0:
        try:
            template.frames([1])
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reading, 1000).decode()
    assert told.startswith("a template cannot be used in a process that was forked since: load it there")


def test_golden_order(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "frames.json").read_text())
    assert frame_order(golden["template_frames"], range(golden["count"])) == golden["template_index"]


COUNTS = st.integers(1, 30).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count - 1)))
ORDERS = st.sampled_from(["bounce", "loop", "mirror"])


@given(COUNTS, ORDERS, st.integers(0, 200), st.integers(0, 200))
def test_order_stays_within_and_can_be_split(at: tuple[int, int], order: Order, split: int, more: int) -> None:
    count, start = at
    whole = frame_order(count, range(split + more), order, start)
    assert all(0 <= i < count for i in whole)
    parts = [frame_order(count, part, order, start) for part in (range(split), range(split, split + more))]
    assert [*parts[0], *parts[1]] == whole


@given(COUNTS.filter(lambda at: at[0] > 1))
def test_bounce_goes_step_by_step_through_all(at: tuple[int, int]) -> None:
    count, start = at
    indices = frame_order(count, range(3 * count), "bounce", start)
    assert all(abs(a - b) == 1 for a, b in itertools.pairwise(indices))
    assert set(indices) == set(range(count))


@pytest.mark.parametrize("order", ["bounce", "loop", "mirror"])
@pytest.mark.parametrize("start", [-1, 5, 99])
def test_start_outside_the_template_is_told(order: Order, start: int) -> None:
    with pytest.raises(InputError, match=f"start frame {start} is not within the template's frames 0 to 4"):
        frame_order(5, range(3), order, start)


# --- bad input -------------------------------------------------------------------------------------------------------


def small_mask(path: Path) -> None:
    Image.fromarray(np.zeros((240, 319, 3), np.uint8)).save(path / PARSING / "3.png")


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (shutil.rmtree, "anna: there is no such template directory"),
    "no images directory": (
        lambda p: shutil.rmtree(p / IMAGES),
        r"anna is no template: .* pictures, full_body_img/0\.jpg …, nor a package.s full_body_video\.mp4",
    ),
    "no landmarks directory": (lambda p: shutil.rmtree(p / LANDMARKS), "landmarks is missing.*keeps its landmark file"),
    "no images": (
        lambda p: [file.unlink() for file in (p / IMAGES).iterdir()],
        r"full_body_img holds no frames: expected 0\.jpg",
    ),
    "no landmarks": (
        lambda p: [file.unlink() for file in (p / LANDMARKS).iterdir()],
        r"landmarks holds no landmark files: expected 0\.lms",
    ),
    "too few landmarks": (
        lambda p: [(p / LANDMARKS / f"{i}.lms").unlink() for i in (1, 4)],
        r"anna has 5 frames and 3 landmark files that do not match: no landmarks for 1\.jpg\.",
    ),
    "too few images": (
        lambda p: [(p / IMAGES / f"{i}.jpg").unlink() for i in (2, 4)],
        r"anna has 3 frames and 5 landmark files that do not match: no frame for 2\.lms, 4\.lms\.",
    ),
    "other numbers": (
        lambda p: renumber(p / IMAGES, lambda i: str(i + 100)),
        r"5 frames and 5 .* no landmarks for 100\.jpg, 101\.jpg.*; no frame for 0\.lms, .* 4\.lms\.",
    ),
    "duplicate": (
        lambda p: shutil.copy(p / IMAGES / "0.jpg", p / IMAGES / "0.png"),
        r"0\.png and 0\.jpg have the same number; remove one",
    ),
    "padded duplicate": (
        lambda p: shutil.copy(p / LANDMARKS / "0.lms", p / LANDMARKS / "00.lms"),
        r"0\.lms and 0+\.lms have the same number",
    ),
    "few points": (lambda p: write_points(p / LANDMARKS, NO_POINTS[:9]), "0.lms has 9 points; at least 53 are needed"),
    "no points": (lambda p: (p / LANDMARKS / "0.lms").write_text(""), "0.lms has 0 points"),
    "binary": (
        lambda p: (p / LANDMARKS / "2.lms").write_bytes(bytes(range(256))),
        "2.lms is not a text file of landmarks",
    ),
    "zeros": (lambda p: (p / LANDMARKS / "2.lms").write_bytes(bytes(99)), r"2.lms, line 1: .* is not a point `x y`"),
    "letters": (
        lambda p: write_points(p / LANDMARKS, [(1, 2), ("a", "b")]),
        "0.lms, line 2: 'a b' is not a point `x y`",
    ),
    "nan": (lambda p: write_points(p / LANDMARKS, [("nan", 3)]), "0.lms, line 1: 'nan 3' is not a point"),
    "infinity": (lambda p: write_points(p / LANDMARKS, [(3, "inf")]), "0.lms, line 1: '3 inf' is not a point"),
    "one number": (lambda p: write_points(p / LANDMARKS, [(3, "")]), "0.lms, line 1: '3' is not a point"),
    "three numbers": (lambda p: write_points(p / LANDMARKS, [(3, "4 5")]), "0.lms, line 1: '3 4 5' is not a point"),
    "commas": (lambda p: write_points(p / LANDMARKS, NO_POINTS, "{},{}"), "0.lms, line 1: '0.0,0.0' is not a point"),
    "another size": (
        lambda p: Image.fromarray(picture(322, 240, 1)).save(p / IMAGES / "3.jpg"),
        r"3\.jpg is 322×240, but 0\.jpg is 320×240: frames and masks that belong together",
    ),
    "another size of mask": (
        small_mask,
        r"3\.png is 319×240, but 0\.jpg is 320×240: frames and masks that belong together",
    ),
    "a mask too few": (
        lambda p: (p / PARSING / "3.png").unlink(),
        r"parsing has no mask for 3\.jpg; give --no-parsing",
    ),
    "no masks": (lambda p: [file.unlink() for file in (p / PARSING).iterdir()], "parsing holds no parsing masks"),
    "text": (lambda p: (p / IMAGES / "2.jpg").write_text("hello"), r"2\.jpg cannot be read \(not a JPEG or PNG"),
    "empty image": (lambda p: (p / IMAGES / "2.jpg").write_bytes(b""), r"2\.jpg cannot be read"),
    "corrupt header": (
        lambda p: (p / IMAGES / "2.jpg").write_bytes(b"\xff\xd8\xff" + bytes(500)),
        r"2\.jpg cannot be read",
    ),
    "huge": (lambda p: (p / IMAGES / "2.jpg").write_bytes(huge_png()), r"2\.jpg cannot be read \(Image size"),
    "a directory for an image": (
        lambda p: ((p / IMAGES / "2.jpg").unlink(), (p / IMAGES / "2.jpg").mkdir()),
        r"2\.jpg cannot be read",
    ),
    "a pipe for an image": (
        lambda p: ((p / IMAGES / "2.jpg").unlink(), os.mkfifo(p / IMAGES / "2.jpg")),
        r"2\.jpg is a pipe or a device",
    ),
    "masks that are elsewhere": (
        lambda p: (shutil.rmtree(p / PARSING), (p / PARSING).symlink_to("/nowhere")),
        "parsing is not a directory of parsing masks; give --no-parsing",
    ),
    "a directory for landmarks": (
        lambda p: ((p / LANDMARKS / "2.lms").unlink(), (p / LANDMARKS / "2.lms").mkdir()),
        r"2\.lms cannot be read \(Is a directory\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_templates_are_told(make_template: MakeTemplate, decoded: Counter[str], name: str) -> None:
    spoil, words = BAD[name]
    path = make_template(parsing=True)
    spoil(path)
    with pytest.raises(InputError, match=words):
        open_template(path)
    assert not decoded


def test_parsing_that_is_asked_for_must_be_there(make_template: MakeTemplate) -> None:
    with pytest.raises(InputError, match="parsing is missing: a template keeps its parsing masks there"):
        open_template(make_template(), parsing=True)


@pytest.mark.parametrize(
    ("corners", "words"),
    [
        ((-1, 60, 119), r"\(-1, 60, 119, 180\) leaves the frame of 320×240"),
        ((90, -1, 210), r"\(90, -1, 210, 119\) leaves the frame"),
        ((201, 60, 321), r"\(201, 60, 321, 180\) leaves the frame"),
        ((90, 121, 210), r"\(90, 121, 210, 241\) leaves the frame"),
        ((90, 60, 90), r"\(90, 60, 90, 60\) is empty"),
        ((90, 60, 89), r"\(90, 60, 89, 59\) is inverted; x0 \(landmark 1\) must be left of x1"),
    ],
)
def test_rectangles_that_cannot_be_are_told_at_once(
    make_template: MakeTemplate, decoded: Counter[str], corners: tuple[int, int, int], words: str
) -> None:
    path = make_template()
    (path / LANDMARKS / "3.lms").write_text(landmarks(*corners))
    with pytest.raises(InputError, match=rf"frame 3\.jpg: the face rectangle {words}"):
        open_template(path)
    assert not decoded


@pytest.mark.parametrize("corners", [(0, 0, 240), (80, 0, 320), (0, 239, 1), (319, 239, 320)])
def test_rectangles_may_touch_the_frames_edges(make_template: MakeTemplate, corners: tuple[int, int, int]) -> None:
    path = make_template()
    (path / LANDMARKS / "3.lms").write_text(landmarks(*corners))
    assert open_template(path).rects[3, :3].tolist() == list(corners)


@pytest.mark.parametrize("file", [f"{IMAGES}/2.jpg", f"{PARSING}/2.png"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_pictures_are_told_when_they_are_decoded(
    make_template: MakeTemplate, device: torch.device, file: str, kept: float
) -> None:
    path = make_template(parsing=True)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: int(len(content) * kept)])
    template = open_template(path, device=device)
    template.frames([0, 1, 3])
    with pytest.raises(InputError, match=f"{file.split('/')[1]} is corrupt or truncated"):
        template.frames([1, 2, 3])


def test_a_picture_that_changes_its_size_later_is_told(make_template: MakeTemplate) -> None:
    path = make_template()
    template = open_template(path)
    Image.fromarray(picture(100, 240, 1)).save(path / IMAGES / "2.jpg")
    with pytest.raises(InputError, match=r"2\.jpg is not 320×240 any more"):
        template.frames([2])


def test_a_picture_that_goes_away_later_is_told(make_template: MakeTemplate) -> None:
    path = make_template()
    template = open_template(path)
    (path / IMAGES / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"2\.jpg"):
        template.frames([2])
