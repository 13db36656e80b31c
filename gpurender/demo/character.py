"""The drawn person's head: where everything is in a pose, and how it is painted.

Convention: head coordinates in pixels at scale 1, origin between the eyes, x to the picture's right, y down, z towards
the viewer. `Head.at` projects them into the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import skia

from .mouth import PARAMETERS
from .paint import Point, along, between, blurred, fill, linear, radial, smooth, stroke

SKIN, SKIN_LIGHT, SKIN_SHADE, SKIN_DEEP = 0xFFE2A382, 0xFFF3C3A2, 0xFFC27F62, 0xFF8E5140
BLUSH = 0xFFD9705F
LIP_UPPER, LIP_LOWER, LIP_LIGHT, LIP_LINE = 0xFFB9564F, 0xFFCB6B61, 0xFFEBA79B, 0xFF8C4240
CAVITY, TONGUE, TEETH, TEETH_SHADE = 0xFF602A30, 0xFF9A3A42, 0xFFE6DDD2, 0xFFBCB0A6
HAIR, HAIR_LIGHT, HAIR_DARK = 0xFF3B2A44, 0xFF7A5C86, 0xFF231829
IRIS, IRIS_DARK, EYE_WHITE, LASH = 0xFF4F8C86, 0xFF1F4544, 0xFFF6F3EE, 0xFF2A1B24

REST: dict[str, float] = dict.fromkeys(PARAMETERS, 0.0)
"""The mouth shut."""

PIVOT = (0.0, 190.0, -60.0)  # the neck's joint, about which the head turns
VIEW_DISTANCE = 1500.0
MOUTH_Y = 141.0
JAW_DROP = 25.0  # of the chin at the widest
GAP = 50.0  # between the lips at the widest


@dataclass(frozen=True)
class Pose:
    """How the head is held: angles in radians (yaw to the picture's right, pitch down, roll clockwise), the picture's
    pixel between the eyes, scale, and how far the eyes are shut, 0..1."""

    x: float = 640.0
    y: float = 300.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    scale: float = 1.0
    blink: float = 0.0


class Head:
    """The head in one pose with one shape of the mouth."""

    def __init__(self, pose: Pose, mouth: dict[str, float]) -> None:
        self.pose = pose
        self.mouth = mouth
        self.jaw = JAW_DROP * mouth["jaw"]

    def at(self, x: float, y: float, z: float | None = None) -> Point:
        """The picture's point of a head point; z is the face's surface where it is not given."""
        pose = self.pose
        px, py, pz = PIVOT
        x, y, z = x - px, y - py, (surface(x, y) if z is None else z) - pz
        x, z = x * math.cos(pose.yaw) + z * math.sin(pose.yaw), z * math.cos(pose.yaw) - x * math.sin(pose.yaw)
        y, z = y * math.cos(pose.pitch) + z * math.sin(pose.pitch), z * math.cos(pose.pitch) - y * math.sin(pose.pitch)
        x, y = x * math.cos(pose.roll) - y * math.sin(pose.roll), x * math.sin(pose.roll) + y * math.cos(pose.roll)
        zoom = pose.scale * VIEW_DISTANCE / (VIEW_DISTANCE - z - pz)
        return pose.x + (x + px) * zoom, pose.y + (y + py) * zoom

    def points(self, points: Sequence[tuple[float, ...]]) -> list[Point]:
        return [self.at(*point) for point in points]

    def mirrored(self, points: Sequence[tuple[float, ...]], side: int) -> list[Point]:
        """The points of the picture's right (side 1) or left (-1) half, given for the right one."""
        return [self.at(side * x, *rest) for x, *rest in points]

    # --- shapes ------------------------------------------------------------------------------------------------------

    def outline(self) -> list[Point]:
        """The face's contour from the left temple over the chin to the right one."""
        half = [
            (141, -60, 20),
            (148, 0, 26),
            (147, 40, 30),
            (139, 92, 36),
            (113, 148, 44),
            (72, 196, 54),
            (31, 220, 62),
        ]
        drop = [0, 0, 0.02, 0.12, 0.45, 0.85, 1.0]
        right = [(x, y + self.jaw * d, z) for (x, y, z), d in zip(half, drop, strict=True)]
        left = [(-x, y, z) for x, y, z in right]
        return self.points([*left, (0, 225 + self.jaw, 66), *reversed(right)])

    def lips(self) -> dict[str, list[Point]]:
        """Outer and inner edges of both lips, each from the left corner to the right one."""
        m = self.mouth
        gap = GAP * m["open"]
        wide = m["wide"]
        half = 50 * (1 + (0.16 if wide > 0 else 0.32) * wide) - 5 * m["round"] - 5 * m["open"] + 1.5 * m["press"]
        rise, fall = 0.24 * gap, 0.76 * gap
        thick = (1 + 0.30 * m["round"] - 0.12 * abs(min(wide, 0)) - 0.14 * max(wide, 0)) * (1 - 0.50 * m["press"])
        upper, lower = 11.5 * thick, 15.5 * thick * (1 - 0.4 * m["tuck"])
        y = MOUTH_Y + 0.10 * self.jaw * (1 - m["press"])
        top, bottom = y - rise, y + fall
        corner = y + 0.34 * fall - 6.0 * (1 - m["round"]) - 2.0 * max(wide, 0)
        forward = 6 * m["round"]
        # From a pointed oval to a full one: how early towards the corners the lips bend.
        roundness = 0.62 - 0.12 * m["round"]

        def edge(height: float, reach: float, cupid: float = 0.0) -> list[Point]:
            """From corner to corner over `height` in the middle, with a dip of `cupid` in it."""
            points = []
            for u in (-1, -0.86, -0.6, -0.24, 0, 0.24, 0.6, 0.86, 1):
                rising = (1 - abs(u) ** 2.2) ** roundness
                x = u * reach
                py = corner + (height - corner) * rising + cupid * max(0.0, 1 - abs(u) / 0.24)
                points.append(self.at(x, py, surface(x, py) + forward))
            return points

        inner_top = edge(top, 0.92 * half)
        inner_low = edge(bottom, 0.92 * half)
        outer_top = edge(top - upper, half, cupid=0.30 * upper)
        outer_low = edge(bottom + lower, half)
        return {"outer top": outer_top, "inner top": inner_top, "inner low": inner_low, "outer low": outer_low}

    def eye(self, side: int) -> tuple[list[Point], list[Point]]:
        """The upper and the lower lid's edge, from the outer corner to the inner one."""
        shut = self.pose.blink
        x = (94, 82, 64, 46, 34)
        wide_open, closed, lower = (0, -16, -24, -15, 6), (0, 8, 12, 10, 6), (0, 11, 15, 12, 6)
        upper = [(x, y + (low - y) * shut) for x, y, low in zip(x, wide_open, closed, strict=True)]
        lower = [(x, y - 2 * shut * (y > 6)) for x, y in zip(x, lower, strict=True)]
        return self.mirrored(upper, side), self.mirrored(lower, side)

    def brow(self, side: int) -> tuple[list[Point], list[Point]]:
        """The upper and the lower edge of a brow, from the outer end to the inner one."""
        upper = [(102, -35), (86, -48), (66, -54), (48, -52), (32, -44)]
        lower = [(86, -42), (66, -46), (48, -43), (32, -36)]
        return self.mirrored(upper, side), self.mirrored(lower, side)

    # --- landmarks ---------------------------------------------------------------------------------------------------

    def landmarks(self) -> np.ndarray:
        """(110,2) float: the picture's points in SyncTalk_2D's numbering.

        0-32 the contour from the left temple to the right one; 33-41 and 42-50 the brows; 51-54 the nose from its tip
        up; 55-65 around the nose; 66-77 and 78-89 the eyes; 90-101 the lips' outer edge, 102-109 their inner one.
        """
        lips = self.lips()
        beside_nose = [(20, 8), (20, 78), (31, 98), (21, 109), (10, 106)]
        found: list[Point] = along(self.outline(), 33)
        for side in (-1, 1):
            upper, lower = self.brow(side)
            found += [*upper, *reversed(lower)]
        found += [self.at(x, y, surface(x, y) + nose_height(y)) for x, y in ((0, 62), (0, 36), (0, 12), (0, -12))]
        found += [*self.mirrored(beside_nose, -1), self.at(0, 110), *self.mirrored(beside_nose[::-1], 1)]
        for side in (-1, 1):
            upper, lower = self.eye(side)
            found += [*upper, *reversed(lower[1:-1])]
            found += self.mirrored([(64, -2), (64, 2), (72, -1), (56, -1)], side)
        found += [lips["outer top"][k] for k in (0, 2, 3, 4, 5, 6, 8)] + [lips["outer low"][k] for k in (7, 5, 4, 3, 1)]
        found += [lips["inner top"][k] for k in (0, 2, 4, 6, 8)] + [lips["inner low"][k] for k in (6, 4, 2)]
        return np.asarray(found, np.float64)

    # --- painting ----------------------------------------------------------------------------------------------------

    def paint_back(self, canvas: skia.Canvas) -> None:
        """What is behind the neck: the hair's back."""
        half = [
            (60, -196, -20),
            (128, -160, -40),
            (176, -70, -60),
            (186, 40, -60),
            (180, 140, -50),
            (160, 214, -40),
            (96, 236, -40),
        ]
        back = smooth(self.points([(-x, y, z) for x, y, z in reversed(half)] + half), closed=True)
        left, right = self.at(-180, 0, -50), self.at(180, 0, -50)
        fill(canvas, back, linear(left, right, [HAIR, HAIR_DARK, HAIR_DARK, HAIR_DARK]))
        canvas.save()
        canvas.clipPath(back, doAntiAlias=True)
        for k, (x, lean) in enumerate([(-168, 8), (-150, 6), (154, -6), (170, -8), (-132, 4), (138, -4)]):
            strand = smooth(self.points([(x - lean, -60, -50), (x, 60, -50), (x + lean, 230, -40)]))
            stroke(canvas, strand, HAIR_LIGHT, 5 + k % 3 * 2, 0.16, sigma=3)
        canvas.restore()

    def paint(self, canvas: skia.Canvas) -> None:
        """The face and the hair over it."""
        face = smooth([*self.outline(), *self.points([(110, -140, 20), (0, -178, 40), (-110, -140, 20)])], closed=True)
        light = self.at(-46, -20)
        fill(
            canvas, face, radial(light, 300 * self.pose.scale, [SKIN_LIGHT, SKIN, SKIN, SKIN_SHADE], [0, 0.36, 0.62, 1])
        )
        canvas.save()
        canvas.clipPath(face, doAntiAlias=True)
        self._paint_shading(canvas)
        self._paint_mouth(canvas)
        self._paint_nose(canvas)
        for side in (-1, 1):
            self._paint_eye(canvas, side)
        canvas.restore()
        self._paint_hair(canvas)

    def _paint_shading(self, canvas: skia.Canvas) -> None:
        scale = self.pose.scale
        jaw = self.jaw
        # The side away from the light, the jaw's underside and the temples turn away from us.
        for points, alpha, sigma in (
            (
                [(150, -80, 20), (118, -20), (116, 60), (96, 130 + 0.3 * jaw), (60, 190 + 0.9 * jaw), (150, 240, 30)],
                0.55,
                22,
            ),
            (
                [(-150, -80, 20), (-136, 0), (-134, 70), (-112, 140 + 0.4 * jaw), (-70, 200 + jaw), (-150, 240, 30)],
                0.30,
                16,
            ),
            ([(-80, 212 + jaw), (0, 218 + jaw), (80, 205 + jaw), (60, 250 + jaw), (-60, 250 + jaw)], 0.55, 11),
        ):
            blurred(canvas, smooth(self.points(points), closed=True), SKIN_DEEP, sigma * scale, alpha)
        for side in (-1, 1):
            cheek = self.at(side * 86, 78 + 0.1 * jaw)
            blurred(canvas, circle(cheek, 30 * scale), BLUSH, 17 * scale, 0.33)
            socket = smooth(
                self.mirrored([(108, -30), (64, -42), (26, -22), (30, 6), (62, -14), (100, 0)], side), closed=True
            )
            blurred(canvas, socket, SKIN_DEEP, 9 * scale, 0.34)
        blurred(canvas, circle(self.at(-70, 58), 17 * scale), SKIN_LIGHT, 12 * scale, 0.4)
        blurred(canvas, circle(self.at(-24, -92), 40 * scale), SKIN_LIGHT, 24 * scale, 0.6)
        blurred(canvas, circle(self.at(-8, 202 + jaw), 15 * scale), SKIN_LIGHT, 9 * scale, 0.55)

    def _paint_nose(self, canvas: skia.Canvas) -> None:
        scale = self.pose.scale

        def on(x: float, y: float) -> Point:
            return self.at(x, y, surface(x, y) + nose_height(y))

        shade = smooth(
            [on(10, -20), on(14, 30), on(26, 88), on(22, 106), on(2, 108), on(6, 60), on(4, 10)], closed=True
        )
        blurred(canvas, shade, SKIN_DEEP, 6 * scale, 0.36)
        under = smooth([on(-22, 104), on(0, 113), on(24, 104), on(14, 116), on(-12, 116)], closed=True)
        blurred(canvas, under, SKIN_DEEP, 4 * scale, 0.5)
        blurred(canvas, smooth([on(-5, -10), on(-6, 40), on(-7, 82)]), SKIN_LIGHT, 4 * scale, 0.75, width=8 * scale)
        blurred(canvas, circle(on(-5, 86), 8 * scale), 0xFFFFE7D2, 4 * scale, 0.8)
        for side in (-1, 1):
            nostril = smooth(
                [on(side * 6, 107), on(side * 14, 103), on(side * 21, 106), on(side * 13, 109)], closed=True
            )
            blurred(canvas, nostril, 0xFF6B352C, 1.2 * scale, 0.75)
            wing = smooth([on(side * 25, 84), on(side * 33, 98), on(side * 25, 108)])
            stroke(canvas, wing, SKIN_DEEP, 3 * scale, 0.45, sigma=1.6)

    def _paint_eye(self, canvas: skia.Canvas, side: int) -> None:
        scale = self.pose.scale
        upper, lower = self.eye(side)
        opening = between(upper, lower)
        fill(canvas, opening, EYE_WHITE)
        canvas.save()
        canvas.clipPath(opening, doAntiAlias=True)
        x, y = self.at(side * 63 - 1, -3)
        canvas.drawCircle(
            x, y, 18 * scale, radial((x, y + 5), 18.5 * scale, [0xFF8CC7B8, IRIS, IRIS_DARK], [0, 0.6, 1])
        )
        canvas.drawCircle(x, y, 7.8 * scale, skia.Paint(Color=0xFF14181C, AntiAlias=True))
        blurred(canvas, smooth(upper), LASH, 4 * scale, 0.55, width=9 * scale)  # the lid's shadow
        canvas.drawCircle(x - 5.5, y - 6, 3.8 * scale, skia.Paint(Color=0xF0FFFFFF, AntiAlias=True))
        canvas.drawCircle(x + 5, y + 6, 1.9 * scale, skia.Paint(Color=0xA0FFFFFF, AntiAlias=True))
        canvas.restore()
        stroke(canvas, smooth(upper), LASH, 4.2 * scale, 0.95)
        stroke(canvas, smooth(lower), SKIN_DEEP, 1.8 * scale, 0.65)
        crease = [(92, -14), (81, -27), (63, -33), (45, -25)]
        stroke(canvas, smooth(self.mirrored(crease, side)), SKIN_DEEP, 2 * scale, 0.55, sigma=0.8)
        top, bottom = self.brow(side)
        blurred(canvas, between(top, [top[0], *bottom]), HAIR, 1.1 * scale, 0.92)

    def _paint_mouth(self, canvas: skia.Canvas) -> None:
        scale, m = self.pose.scale, self.mouth
        lips = self.lips()
        left, right = lips["outer top"][0], lips["outer top"][-1]
        bottom = lips["outer low"][4]
        blurred(canvas, circle((bottom[0] + 2, bottom[1] + 9 * scale), 17 * scale), SKIN_DEEP, 7 * scale, 0.36)
        for x, y in (left, right):
            blurred(canvas, circle((x, y + scale), 5 * scale), SKIN_DEEP, 4 * scale, 0.5)

        inside = between(lips["inner top"], lips["inner low"])
        top, low = lips["inner top"][4][1], lips["inner low"][4][1]
        canvas.save()
        canvas.clipPath(inside, doAntiAlias=True)
        self._paint_inside(canvas, (left[0] + right[0]) / 2, top, low, right[0] - left[0])
        canvas.restore()

        upper = between(lips["outer top"], lips["inner top"])
        lower = between(lips["outer low"], lips["inner low"])
        crest = lips["outer top"][3][1]
        fill(canvas, upper, linear((0, crest), (0, top + 1), [LIP_LOWER, LIP_UPPER]))
        fill(canvas, lower, linear((0, low), (0, bottom[1]), [LIP_LOWER, LIP_LOWER, LIP_UPPER]))
        canvas.save()
        canvas.clipPath(lower, doAntiAlias=True)
        shine = (bottom[0] - 9 * scale, low + 0.42 * (bottom[1] - low))
        blurred(canvas, ellipse(shine, 15 * scale, 0.22 * (bottom[1] - low) + 0.5), LIP_LIGHT, 2.6 * scale, 0.85)
        canvas.restore()
        seam = smooth(lips["inner top"])
        stroke(canvas, seam, LIP_LINE, 1.8 * scale, 0.9 - 0.5 * min(1, 4 * m["open"]), sigma=0.5)

    def _paint_inside(self, canvas: skia.Canvas, x: float, top: float, low: float, width: float) -> None:
        scale, m = self.pose.scale, self.mouth
        canvas.drawPaint(skia.Paint(Color=CAVITY))
        gap = low - top
        half = 0.5 * width * (0.72 - 0.14 * m["round"])
        # The tongue lies on the mouth's floor and rises to the upper teeth.
        height = (0.42 + 0.5 * m["tongue"]) * gap
        tongue = ellipse((x, low + 6 * scale), 0.36 * width * (1 - 0.25 * m["tongue"]), height)
        fill(canvas, tongue, linear((0, low - height), (0, low), [TONGUE, 0xFF7E2E36]))
        # The upper teeth stand still, and the lips part before them; the lower ones come up to meet them.
        upper_end = self.at(0, MOUTH_Y + 5 + 1.5 * m["teeth"] - 4 * m["round"] * (1 - m["teeth"]))[1]
        lower_start = min(upper_end + (0.5 + 0.8 * self.jaw * (1 - 0.5 * m["teeth"])) * scale, low - 2.5 * scale)
        row = skia.Rect.MakeLTRB(x - 0.82 * half, lower_start, x + 0.82 * half, low + 30)
        paint = linear((0, lower_start), (0, lower_start + 14 * scale), [TEETH_SHADE, 0xFFA89C92])
        paint.setAlphaf(min(1.0, 1.6 * m["teeth"]))
        canvas.drawRoundRect(row, 5 * scale, 5 * scale, paint)
        row = skia.Rect.MakeLTRB(x - half, min(top, upper_end) - 30, x + half, upper_end)
        paint = linear((0, upper_end - 9 * scale), (0, upper_end), [TEETH_SHADE, TEETH])
        paint.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, 0.7 * scale))
        canvas.drawRoundRect(row, 6 * scale, 6 * scale, paint)
        blurred(
            canvas, smooth([(x - half, top), (x, top - 1), (x + half, top)]), CAVITY, 2.2 * scale, 0.5, width=3 * scale
        )

    def _paint_hair(self, canvas: skia.Canvas) -> None:
        scale = self.pose.scale
        cap = [
            (-154, 70, 4), (-166, 0, 0), (-170, -80, -10), (-140, -160, 0), (-70, -208, 20), (20, -216, 30),
            (100, -192, 20), (154, -130, -5), (172, -50, -10), (166, 20, 0), (154, 70, 4), (143, 10, 26),
            (134, -52, 40), (104, -100, 60), (60, -112, 80), (10, -104, 92), (-40, -86, 96), (-86, -62, 84),
            (-122, -34, 60), (-142, 14, 30),
        ]  # fmt: skip
        path = smooth(self.points(cap), closed=True)
        blurred(canvas, path, 0xFF5A2F2A, 8 * scale, 0.28, offset=(2, 8))
        light, dark = self.at(-90, -190, 40), self.at(150, 40, 0)
        fill(canvas, path, linear(light, dark, [HAIR_LIGHT, HAIR, HAIR_DARK], [0, 0.45, 1]))
        canvas.save()
        canvas.clipPath(path, doAntiAlias=True)
        for k in range(9):
            start = (-20 + 10 * k, -212 + 1.2 * k, 30)
            bend = (-96 + 20 * k, -150 + 2 * k, 70)
            end = (-140 + 24 * k, -60 - 4 * k, 60)
            strand = smooth(self.points([start, bend, end]))
            stroke(canvas, strand, HAIR_LIGHT if k % 2 else HAIR_DARK, (3 + k % 3) * scale, 0.30, sigma=1.6)
        shine = smooth(self.points([(-120, -128, 40), (-60, -166, 60), (10, -172, 70)]))
        stroke(canvas, shine, 0xFFB79AC2, 13 * scale, 0.33, sigma=7)
        canvas.restore()


def surface(x: float, y: float) -> float:
    """The face's depth: an egg."""
    return 40 + 92 * math.sqrt(max(0.0, 1 - (x / 168) ** 2 - ((y - 10) / 300) ** 2))


def nose_height(y: float) -> float:
    """How far the nose's ridge is in front of the face."""
    return 26 * max(0.0, 1 - abs(y - 88) / 100) ** 1.3


def circle(centre: Point, radius: float) -> skia.Path:
    return skia.Path().addCircle(*centre, radius)


def ellipse(centre: Point, half_width: float, half_height: float) -> skia.Path:
    x, y = centre
    return skia.Path().addOval(skia.Rect.MakeLTRB(x - half_width, y - half_height, x + half_width, y + half_height))
