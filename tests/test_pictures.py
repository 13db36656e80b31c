import io
import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import opencv, picture, turned
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gpurender import InputError
from gpurender.pictures import keep_mask, picture_size, read_mask, read_picture

PHOTO = picture(117, 83, 3)
RGBA = np.dstack([PHOTO, picture(117, 83, 9)[..., 0]])
ENCODED: dict[str, tuple[np.ndarray, str, dict[str, Any]]] = {
    "4:4:4": (PHOTO, "JPEG", {"subsampling": "4:4:4"}),
    "4:2:2": (PHOTO, "JPEG", {"subsampling": "4:2:2"}),
    "4:2:0": (PHOTO, "JPEG", {"subsampling": "4:2:0"}),
    "poor": (PHOTO, "JPEG", {"quality": 15}),
    "best": (PHOTO, "JPEG", {"quality": 100}),
    "progressive": (PHOTO, "JPEG", {"progressive": True}),
    "grey": (PHOTO[..., 0], "JPEG", {}),
    **{f"turned {i}": (PHOTO, "JPEG", {"exif": turned(i)}) for i in (*range(10), 255)},
    "turned by words": (PHOTO, "JPEG", {"exif": turned(6).tobytes().replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0")}),
    "turned elsewhere": (PHOTO, "JPEG", {"xmp": b'<x tiff:Orientation="6"/>'}),
    "png": (PHOTO, "PNG", {}),
    "grey png": (PHOTO[..., 0], "PNG", {}),
    "rgba": (RGBA, "PNG", {}),
    "grey and alpha": (PHOTO[..., :2], "PNG", {}),
    "sixteen bits of grey": (PHOTO[..., 0].astype(np.uint16) * 251, "PNG", {}),
    "one bit": (PHOTO[..., 0] > 128, "PNG", {}),
    "turned png": (PHOTO, "PNG", {"exif": turned(6)}),
}


def encode(path: Path, name: str) -> Path:
    pixels, kind, options = ENCODED[name]
    file = path / f"0.{'jpg' if kind == 'JPEG' else 'png'}"
    Image.fromarray(pixels).save(file, kind, **options)
    return file


@pytest.mark.parametrize("name", ENCODED)
def test_pixels_are_opencvs(tmp_path: Path, name: str) -> None:
    file = encode(tmp_path, name)
    pixels = read_picture(file)
    assert pixels.is_contiguous()
    assert picture_size(file) == (pixels.shape[2], pixels.shape[1])
    np.testing.assert_array_equal(pixels.numpy(), opencv(file))


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000", "AVIF", "BMP", "GIF", "TIFF", "PPM", "MPO"])
def test_what_opencv_reads_behind_a_suffix_is_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "0.png"
    Image.fromarray(PHOTO).save(file, kind)
    assert picture_size(file) == (PHOTO.shape[1], PHOTO.shape[0])
    assert read_picture(file).shape == opencv(file).shape


def test_an_orientation_as_older_imagemagick_writes_it_turns_nothing(tmp_path: Path) -> None:
    file, exif, texts = tmp_path / "0.png", turned(6).tobytes(), PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    Image.fromarray(PHOTO).save(file, pnginfo=texts)
    with Image.open(file) as opened:
        assert opened.getexif()[0x0112] == 6  # Pillow sees it
    assert picture_size(file) == (PHOTO.shape[1], PHOTO.shape[0])
    np.testing.assert_array_equal(read_picture(file).numpy(), opencv(file))


def test_postscript_behind_a_suffix_is_no_picture(tmp_path: Path) -> None:
    """Pillow would have Ghostscript run it."""
    file = tmp_path / "0.png"
    Image.fromarray(PHOTO).save(file, "EPS")
    for read in (picture_size, read_picture):
        with pytest.raises(InputError, match="not a JPEG or PNG picture"):
            read(file)


def test_an_orientation_behind_the_pixels_that_is_not_exif_turns_nothing(tmp_path: Path) -> None:
    file = tmp_path / "0.png"
    Image.fromarray(PHOTO).save(file)
    content, text = file.read_bytes(), b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    chunk = len(text).to_bytes(4, "big") + b"iTXt" + text + zlib.crc32(b"iTXt" + text).to_bytes(4, "big")
    file.write_bytes(content[:-12] + chunk + content[-12:])
    assert picture_size(file) == (PHOTO.shape[1], PHOTO.shape[0])
    np.testing.assert_array_equal(read_picture(file).numpy(), opencv(file))


def test_palette_pixels_are_opencvs(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).quantize(50).save(tmp_path / "0.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "0.png").numpy(), opencv(tmp_path / "0.png"))


def assert_kept(parsing: np.ndarray) -> None:
    keep = keep_mask(torch.from_numpy(parsing))
    assert keep.shape == parsing.shape[1:]
    for y, x in np.ndindex(*keep.shape):
        assert bool(keep[y, x]) == (tuple(parsing[:, y, x].tolist()) in {(255, 0, 0), (255, 255, 255)})


@given(arrays(np.uint8, (3, 5, 7), elements=st.sampled_from([0, 1, 254, 255]), fill=st.nothing()))
def test_red_and_white_are_kept(parsing: np.ndarray) -> None:
    assert_kept(parsing)


def test_colours_next_to_red_and_white_are_not_kept() -> None:
    levels = [0, 1, 127, 254, 255]
    assert_kept(np.array(list(itertools.product(levels, repeat=3)), np.uint8).T.reshape(3, 5, 25))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_pictures_are_read_or_told(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, kind, exif=turned(6))
    random = np.random.default_rng(5)
    told = 0
    for i in range(200):
        content = bytearray(stream.getvalue())
        for _ in range(3):
            content[random.integers(200 if i % 2 else len(content))] = random.integers(256)
        (tmp_path / "0.jpg").write_bytes(content)
        try:
            read_picture(tmp_path / "0.jpg")
        except InputError:
            told += 1
    assert told > 20


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1"])
def test_masks_are_those_of_the_pictures(tmp_path: Path, mode: str) -> None:
    colours = np.array([(255, 0, 0), (255, 255, 255), (0, 0, 0), (255, 0, 1), (0, 255, 0)], np.uint8)
    pixels = colours[np.random.RandomState(5).randint(0, 5, (19, 23))]
    made = Image.fromarray(pixels)
    file = tmp_path / "0.png"
    (made.quantize(16) if mode == "P" else made.convert(mode)).save(file)
    mask = read_mask(file)
    assert torch.equal(mask, keep_mask(read_picture(file)))
    assert mask.dtype == torch.bool
    assert 0 < mask.float().mean() < 1
    if mode != "P":
        return
    few = Image.frombytes("P", (2, 1), bytes([0, 7]))  # a palette of fewer colours than the pixels speak of
    few.putpalette([255, 0, 0])
    few.save(file)
    assert torch.equal(read_mask(file), keep_mask(read_picture(file)))
