"""The whole picture: a room, a body that breathes, and the head."""

import math
import random
from functools import cache

import numpy as np
import skia

from .character import SKIN, SKIN_DEEP, SKIN_SHADE, Head, Pose
from .paint import blurred, fill, linear, radial, smooth, stroke

WIDTH, HEIGHT = 1280, 720
FRAMES = 160
"""Of the template: 6.4 s at 25 a second, a loop."""


def pose(frame: int) -> Pose:
    """The head's pose in a frame of the template: slow turns and nods, each a whole number of times in the loop."""
    t = 2 * math.pi * frame / FRAMES
    blink = max(math.exp(-(((frame - at) / 1.9) ** 2)) for at in (22, 84, 90, 139))
    return Pose(
        x=640 + 7 * math.sin(t) + 2.5 * math.sin(2 * t + 1),
        y=296 + 2.5 * math.sin(2 * t) + 2 * math.sin(3 * t + 0.5),
        yaw=0.115 * math.sin(t + 0.4) + 0.03 * math.sin(3 * t),
        pitch=0.035 * math.sin(2 * t + 0.8) + 0.018 * math.sin(5 * t),
        roll=0.022 * math.sin(t - 0.9),
        scale=1.0 + 0.018 * math.sin(t + 2) + 0.006 * math.sin(3 * t),
        blink=blink if blink > 0.02 else 0.0,
    )


def breath(frame: int) -> float:
    """-1..1, two breaths in the loop."""
    return math.sin(4 * math.pi * frame / FRAMES)


def draw(frame: int, mouth: dict[str, float], rect: tuple[int, int, int, int] = (0, 0, WIDTH, HEIGHT)) -> np.ndarray:
    """One picture of the person, or a part of it.

    Args:
        frame: 0 to FRAMES - 1, for the pose.
        mouth: its shape, a value for each of `PARAMETERS`.
        rect: the part `(x0,y0,x1,y1)`, half-open, in pixels of the 1280×720 picture.

    Returns:
        (h,w,3) uint8 RGB.
    """
    x0, y0, x1, y1 = rect
    pixels = np.empty((y1 - y0, x1 - x0, 4), np.uint8)
    surface = skia.Surface(pixels, colorType=skia.kRGBA_8888_ColorType)
    with surface as canvas:
        canvas.translate(-x0, -y0)
        canvas.drawImage(room(), 0, 0)
        head = Head(pose(frame), mouth)
        head.paint_back(canvas)
        paint_body(canvas, head, breath(frame))
        head.paint(canvas)
    return pixels[:, :, :3].copy()


def paint_body(canvas: skia.Canvas, head: Head, breath: float) -> None:
    lift = 2.6 * breath
    x = 640 + 0.3 * (head.pose.x - 640)
    y = 720 - lift
    # The neck joins the head to the shoulders.
    left, right = head.at(-62, 150, -20), head.at(62, 150, -20)
    neck = smooth(
        [left, (x - 66, y - 190), (x - 98, y - 130), (x, y - 20), (x + 98, y - 130), (x + 66, y - 190), right]
    )
    neck.close()
    fill(canvas, neck, linear((left[0], 0), (right[0], 0), [SKIN, SKIN, SKIN_SHADE]))
    canvas.save()
    canvas.clipPath(neck, doAntiAlias=True)
    chin = [
        head.at(-130, 130),
        head.at(-70, 214 + head.jaw),
        head.at(0, 240 + head.jaw),
        head.at(80, 214 + head.jaw),
        head.at(140, 130),
    ]
    blurred(canvas, smooth(chin, closed=True), SKIN_DEEP, 13, 0.75, offset=(6, 16))
    for side in (-1, 1):
        tendon = smooth([(x + side * 56, y - 200), (x + side * 26, y - 130), (x + side * 12, y - 106)])
        stroke(canvas, tendon, SKIN_DEEP, 5, 0.22, sigma=4)
    canvas.restore()
    wide = 4 * breath
    body = [
        (x - 98, y - 148), (x - 200 - wide, y - 112), (x - 296 - wide, y - 60), (x - 348, y + 60), (x + 348, y + 60),
        (x + 296 + wide, y - 60), (x + 200 + wide, y - 112), (x + 98, y - 148), (x + 54, y - 74), (x, y - 40),
        (x - 54, y - 74),
    ]  # fmt: skip
    jumper = smooth(body, closed=True)
    blurred(canvas, jumper, 0xFF101820, 12, 0.35, offset=(6, -2))
    fill(canvas, jumper, linear((x - 300, y - 130), (x + 320, y + 20), [0xFF3F9C97, 0xFF2C7478, 0xFF17474F]))
    canvas.save()
    canvas.clipPath(jumper, doAntiAlias=True)
    for k in range(-13, 14):  # the knit's ribs
        rib = smooth([(x + 24 * k, y - 160), (x + 26 * k + wide * k / 13, y - 60), (x + 28 * k, y + 20)])
        stroke(canvas, rib, 0xFF0E3940, 2.5, 0.22, sigma=1)
    for side in (-1, 1):
        sleeve = smooth([(x + side * 214, y - 100), (x + side * 226, y - 40), (x + side * 214, y + 30)])
        stroke(canvas, sleeve, 0xFF0B2B33, 9, 0.4, sigma=6)
    canvas.restore()
    collar = smooth([(x - 99, y - 150), (x - 56, y - 76), (x, y - 42), (x + 56, y - 76), (x + 99, y - 150)])
    stroke(canvas, collar, 0xFF12424A, 20, 0.9)
    stroke(canvas, collar, 0xFF4BB0A8, 15, 1.0)
    stroke(canvas, collar, 0xFF1D5E66, 2, 0.5)


@cache
def room() -> skia.Image:
    """The background, with detail for an encoder to work on: shelves of books, a window, plants, a lamp's light."""
    chance = random.Random(7)
    surface = skia.Surface(WIDTH, HEIGHT)
    with surface as canvas:
        canvas.drawPaint(linear((0, 0), (WIDTH, HEIGHT), [0xFF53617F, 0xFF6C6A86, 0xFF4A3F5C]))
        paint_window(canvas)
        paint_shelves(canvas, chance)
        paint_plant(canvas, chance)
        blurred(canvas, skia.Path().addCircle(1010, 130, 150), 0xFFFFD9A0, 70, 0.35)
        canvas.drawPaint(radial((640, 330), 860, [0x00000000, 0x00000000, 0x8A120C1E], [0, 0.55, 1]))
    return softened(surface.makeImageSnapshot())


def softened(image: skia.Image) -> skia.Image:
    """Out of focus a little, as behind a person, with the grain of a sensor that stands still."""
    surface = skia.Surface(WIDTH, HEIGHT)
    with surface as canvas:
        blur = skia.ImageFilters.Blur(1.6, 1.6, skia.TileMode.kClamp)
        canvas.drawImage(image, 0, 0, skia.SamplingOptions(), skia.Paint(ImageFilter=blur))
    pixels = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType).astype(np.float32)
    grain = np.random.RandomState(5).normal(0, 1.6, (HEIGHT, WIDTH, 1))
    pixels[:, :, :3] = np.clip(pixels[:, :, :3] + grain, 0, 255)
    return skia.Image.fromarray(pixels.round().astype(np.uint8), colorType=skia.kRGBA_8888_ColorType)


def paint_window(canvas: skia.Canvas) -> None:
    glass = skia.Rect.MakeLTRB(70, 60, 380, 470)
    canvas.drawRect(glass, linear((0, 60), (0, 470), [0xFF86B7DA, 0xFFBFD9E3, 0xFFF3D9B8]))
    canvas.save()
    canvas.clipRect(glass)
    for x, y, r in ((130, 180, 34), (168, 168, 44), (214, 182, 36), (310, 256, 30), (346, 246, 40)):
        blurred(canvas, skia.Path().addCircle(x, y, r), 0xFFFFFFFF, 8, 0.75)
    hills = smooth([(40, 400), (120, 360), (210, 388), (300, 350), (420, 396), (420, 500), (40, 500)], closed=True)
    fill(canvas, hills, linear((0, 350), (0, 470), [0xFF6D9C86, 0xFF3F6F62]))
    canvas.restore()
    frame = skia.Paint(Color=0xFFE9E2D6, Style=skia.Paint.kStroke_Style, StrokeWidth=14, AntiAlias=True)
    canvas.drawRect(glass, frame)
    canvas.drawLine(225, 60, 225, 470, frame)
    canvas.drawLine(70, 250, 380, 250, frame)
    canvas.drawRect(skia.Rect.MakeLTRB(48, 470, 402, 492), linear((0, 470), (0, 492), [0xFFF3ECE0, 0xFFB9AE9F]))


def paint_shelves(canvas: skia.Canvas, chance: random.Random) -> None:
    spines = (
        0xFFC8553D,
        0xFFE0A458,
        0xFF4F7CAC,
        0xFF7FB069,
        0xFFD9C5A0,
        0xFF8D6A9F,
        0xFF2E4057,
        0xFFB86F52,
        0xFF9FB8AD,
    )
    for shelf in (176, 330, 484, 638):
        x = 880.0
        while x < 1236:
            wide, tall = chance.uniform(13, 30), chance.uniform(84, 122)
            if chance.random() < 0.12:
                x += chance.uniform(16, 40)
                continue
            top = shelf - tall
            colour = chance.choice(spines)
            book = skia.Rect.MakeLTRB(x, top, x + wide, shelf)
            canvas.drawRect(book, skia.Paint(Color=colour, AntiAlias=True))
            canvas.drawRect(book, linear((x, 0), (x + wide, 0), [0x38FFFFFF, 0x00000000, 0x66000000]))
            for y in (top + 12, top + 18, shelf - 20):
                canvas.drawRect(skia.Rect.MakeLTRB(x + 2, y, x + wide - 2, y + 2.5), skia.Paint(Color=0x90FFF3D0))
            x += wide + 1.5
        board = skia.Rect.MakeLTRB(862, shelf, 1254, shelf + 14)
        canvas.drawRect(board, linear((0, shelf), (0, shelf + 14), [0xFF9A6B4B, 0xFF5E3D2A]))
        blurred(canvas, skia.Path().addRect(board), 0xFF000000, 9, 0.35, offset=(0, 16))
    for x in (856, 1248):
        side = skia.Rect.MakeLTRB(x, 20, x + 14, 700)
        canvas.drawRect(side, linear((x, 0), (x + 14, 0), [0xFF8A5E42, 0xFF55361F]))


def paint_plant(canvas: skia.Canvas, chance: random.Random) -> None:
    pot = smooth([(96, 560), (250, 560), (234, 700), (112, 700)], closed=True)
    for k in range(26):
        angle = -math.pi / 2 + chance.uniform(-1.25, 1.25)
        length = chance.uniform(90, 190)
        x, y = 172 + chance.uniform(-36, 36), 566
        tip = (x + length * math.cos(angle), y + length * math.sin(angle))
        across = (-math.sin(angle) * length * 0.13, math.cos(angle) * length * 0.13)
        middle = (0.45 * x + 0.55 * tip[0], 0.45 * y + 0.55 * tip[1])
        a = (middle[0] + across[0], middle[1] + across[1])
        b = (middle[0] - across[0], middle[1] - across[1])
        leaf = smooth([(x, y), a, tip, b], closed=True)
        shades = [0xFF7CB68A, 0xFF3D7F5E] if k % 2 else [0xFF4F9468, 0xFF225242]
        fill(canvas, leaf, linear(tip, (x, y), shades))
        stroke(canvas, smooth([(x, y), middle, tip]), 0xFF1B4434, 1.6, 0.5)
    fill(canvas, pot, linear((96, 0), (250, 0), [0xFFD98F6C, 0xFFB9694A, 0xFF74392A]))
