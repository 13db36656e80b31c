import json
import os
import shutil
import struct
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
    IMAGES,
    LANDMARKS,
    NO_POINTS,
    PARSING,
    MakeTemplate,
    landmarks,
    opencv,
    picture,
    turned,
    write_points,
)
from PIL import Image

from gpurender import InputError, Template, frame_order, open_template
from gpurender.rectangles import face_rect


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


def test_an_empty_directory_of_masks_is_told_what_to_do_about(make_template: MakeTemplate) -> None:
    path = make_template()
    (path / "parsing").mkdir()
    with pytest.raises(InputError, match="holds no parsing masks; give --no-parsing to render without them"):
        open_template(path)
    assert not open_template(path, parsing=False).parsing


def test_other_orders_and_decoders_are_refused(make_template: MakeTemplate) -> None:
    wrong: Any = "ping-pong"
    with pytest.raises(InputError, match="'ping-pong' is no order of frames; choose bounce, loop, mirror"):
        frame_order(4, range(8), wrong)
    with pytest.raises(InputError, match="'ping-pong' is no decoder; choose auto, dali"):
        open_template(make_template(), decoder=wrong)


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
