"""Picture files -> pixels, and parsing pictures -> keep masks."""

import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import InputError
from .host import usable_cores

SUFFIXES = (".jpg", ".jpeg", ".png")
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a bad file."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
"""What is behind those suffixes in practice, and OpenCV reads. Pillow would have Ghostscript run what is EPS."""
ELSEWHERE = ("xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Where Pillow, not OpenCV, looks for an orientation if Exif has none."""
ORIENTATION = 0x0112  # Exif tag; OpenCV turns pictures by it as it reads them, and so do we
LYING = (5, 6, 7, 8)  # its values by which width and height change places


class Pictures:
    """Picture files of one size, decoded at each use.

    Attributes:
        files: of the pictures, in their order.
        size: (width, height) in pixels.
    """

    def __init__(self, files: list[Path], size: tuple[int, int]) -> None:
        self.files = files
        self.size = size
        self._decoders = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB on the CPU, of each.

        Raises:
            InputError: a picture cannot be decoded, or has another size by now.
        """
        return self._read(read_picture, indices)

    def keep_masks(self, indices: Sequence[int]) -> list[Tensor]:
        """(H,W) bool on the CPU, of each parsing picture: its `keep_mask`.

        Raises:
            InputError: as `frames`.
        """
        return self._read(read_mask, indices)

    def _read(self, read: Callable[[Path], Tensor], indices: Sequence[int]) -> list[Tensor]:
        def checked(i: int) -> Tensor:
            pixels = read(self.files[i])
            width, height = self.size
            if pixels.shape[-2:] != (height, width):
                raise InputError(f"{self.files[i]} is not {width}×{height} any more.")
            return pixels

        return list(self._decoders.map(checked, indices))


def open_pictures(files: list[Path], like: tuple[str, tuple[int, int]] | None = None) -> Pictures:
    """Pictures of one size, checked by their headers only: that of the first, or that of `like`, a name and a size."""
    whose, size = like or (files[0].name, picture_size(files[0]))
    for file in files:
        if (other := picture_size(file)) != size:
            raise InputError(
                f"{file} is {other[0]}×{other[1]}, but {whose} is {size[0]}×{size[1]}: "
                "frames and masks that belong together have one size."
            )
    return Pictures(files, size)


def picture_size(file: Path) -> tuple[int, int]:
    """(width, height) of a picture file, by its header."""
    try:
        with opened_by_exif(file) as picture:
            exif = Image.Image.getexif(picture)  # a PNG's own getexif decodes all of the picture
            turned = exif.get(ORIENTATION) in LYING  # which may be anything in a careless file
            width, height = picture.size
    except UNREADABLE as error:
        raise InputError(f"{file} cannot be read ({why_unreadable(error)}).") from None
    return (height, width) if turned else (width, height)


def opened_by_exif(file: Path) -> Image.Image:
    """A picture file, about whose orientation nothing but its Exif tag says anything."""
    picture = Image.open(file, formats=known_formats())
    without_other_tags(picture)
    return picture


@cache
def known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow


def without_other_tags(picture: Image.Image) -> None:
    for key in ELSEWHERE:
        picture.info.pop(key, None)


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """A picture turned upright as its Exif tag says; raises InputError for what fails while it is open."""
    try:
        with opened_by_exif(file) as picture:
            picture.load()  # a PNG's tags may be behind its pixels
            without_other_tags(picture)
            ImageOps.exif_transpose(picture, in_place=True)
            upright: Image.Image = picture
            if upright.mode == "I;16":  # Pillow would clip 16 bits of grey instead of taking the upper eight
                upright = Image.fromarray((np.array(upright) >> 8).astype(np.uint8))
            yield upright
    except UNREADABLE as error:
        raise InputError(f"{file} is corrupt or truncated ({why_unreadable(error)}).") from None


def why_unreadable(error: Exception) -> str:
    return "not a JPEG or PNG picture" if isinstance(error, UnidentifiedImageError) else str(error)


def in_rgb(picture: Image.Image) -> Image.Image:
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy


def read_picture(file: Path) -> Tensor:
    """(3,H,W) uint8 RGB on the CPU; the same pixels as OpenCV's, within one level where the file is CMYK."""
    with opened(file) as picture:
        pixels = np.asarray(in_rgb(picture))
    planes = torch.empty(3, *pixels.shape[:2], dtype=torch.uint8)
    planes.numpy()[:] = pixels.transpose(2, 0, 1)
    return planes


def read_mask(file: Path) -> Tensor:
    """The `keep_mask` of a parsing picture: (H,W) bool on the CPU. Little of it holds Python's lock."""
    with opened(file) as picture:
        if picture.mode == "P":  # what is kept is a question of 256 colours
            palette = np.zeros((256, 3), np.uint8)
            colours = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette[: len(colours)] = colours
            return torch.from_numpy(np.array(picture.point(kept(*palette.T).tolist(), "L")).view(bool))
        return torch.from_numpy(kept(*map(np.asarray, in_rgb(picture).split())))


def keep_mask(parsing: Tensor) -> Tensor:
    """(H,W) bool: where a parsing picture (3,H,W) RGB is red (255,0,0) or white, the template's pixel stays."""
    return kept(*parsing)


T = TypeVar("T", Tensor, np.ndarray)


def kept(red: T, green: T, blue: T) -> T:
    return cast(T, (red == 255) & (green == blue) & ((green == 0) | (green == 255)))
