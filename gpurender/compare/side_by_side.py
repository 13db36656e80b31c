"""Two renders beside each other and their difference, labelled, as frames of a video."""

from collections.abc import Iterable, Iterator
from math import ceil, inf

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..rectangles import Rect
from .comparison import Pair

LEAST, MOST = 480, 1280  # pixels: how wide each of the three is
GAP = 4
BACKGROUND, INK, ALARM = (24, 26, 30), (235, 235, 235), (255, 120, 105)


def side_by_side_frames(
    pairs: Iterable[Pair], names: tuple[str, str], view: Rect, amplify: float, held_to: tuple[float, float]
) -> Iterator[Tensor]:
    """Draw pairs of frames: A, B and their difference in a row, with a line above and one below.

    Small parts are enlarged by a whole number, pixel by pixel; large frames are made smaller.

    Args:
        pairs: of frames.
        names: of A and B.
        view: the part of the frames to show, `(x0,y0,x1,y1)`.
        amplify: what the absolute difference of levels is multiplied by.
        held_to: the PSNR in decibels and the SSIM below which a frame's figures are drawn in red.

    Yields:
        (1,3,H,W) uint8 RGB on the CPU, all of one size.
    """
    x0, y0, x1, y1 = view
    width, height = shown_size(x1 - x0, y1 - y0)
    letters = max(15, width // 48)  # pixels high
    font = ImageFont.load_default(letters)
    line = ceil(letters * 1.8)
    titles = (f"A: {names[0]}", f"B: {names[1]}", f"difference x {amplify:g}")
    blank = Image.new("RGB", (3 * width + 2 * GAP, height + 2 * line), BACKGROUND)
    draw = ImageDraw.Draw(blank)
    lefts = [k * (width + GAP) for k in range(3)]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + letters // 2, line // 2), fitting(title, font, width - letters), INK, font, anchor="lm")
    for pair in pairs:
        sheet = blank.copy()
        a, b = (picture[:, y0:y1, x0:x1] for picture in (pair.a, pair.b))
        for left, pixels in zip(lefts, (a, b, difference(a, b, amplify)), strict=True):
            sheet.paste(as_picture(pixels, (width, height)), (left, line))
        psnr_db, ssim = pair.figures.psnr_db, pair.figures.ssim
        figures = "equal" if psnr_db == inf else f"PSNR {psnr_db:.2f} dB    SSIM {ssim:.5f}"
        ink = ALARM if psnr_db < held_to[0] or ssim < held_to[1] else INK
        where = (letters // 2, line + height + line // 2)
        ImageDraw.Draw(sheet).text(where, f"frame {pair.number}    {figures}", ink, font, anchor="lm")
        yield torch.from_numpy(np.array(sheet)).permute(2, 0, 1)[None].contiguous()
        del pair, a, b


def shown_size(width: int, height: int) -> tuple[int, int]:
    """How large a part of the frames is drawn."""
    if width > MOST:
        return MOST, max(round(height * MOST / width), 1)
    enlarged = max(min(LEAST // width, LEAST // height), 1)
    return width * enlarged, height * enlarged


def difference(a: Tensor, b: Tensor, amplify: float) -> Tensor:
    """(3,H,W) uint8: the absolute difference of two pictures, multiplied, cut at 255."""
    return ((a.int() - b.int()).abs() * amplify).clamp(max=255).to(torch.uint8)


def as_picture(pixels: Tensor, size: tuple[int, int]) -> Image.Image:
    """Pixels (3,H,W) uint8 as a picture of some size."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if size > picture.size else Image.Resampling.BOX)


def fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, its beginning cut off if it is too wide; Pillow's own font has ASCII only."""
    text = text.encode("ascii", "replace").decode()
    head, _, tail = text.partition(": ")
    while tail and font.getlength(text) > width:
        tail = tail[1:]
        text = f"{head}: ...{tail}"
    return text
