"""What the drawings are painted with: smooth curves, gradients and soft edges."""

from collections.abc import Sequence

import skia

Point = tuple[float, float]
Colour = int
"""0xAARRGGBB."""


def smooth(points: Sequence[Point], closed: bool = False) -> skia.Path:
    """A Catmull-Rom spline through the points."""
    path = skia.Path()
    count = len(points)
    path.moveTo(*points[0])
    for k in range(count if closed else count - 1):
        before, start, end, after = (
            points[j % count] if closed else points[min(max(j, 0), count - 1)] for j in range(k - 1, k + 3)
        )
        path.cubicTo(
            start[0] + (end[0] - before[0]) / 6,
            start[1] + (end[1] - before[1]) / 6,
            end[0] - (after[0] - start[0]) / 6,
            end[1] - (after[1] - start[1]) / 6,
            *end,
        )
    if closed:
        path.close()
    return path


def between(edge: Sequence[Point], other: Sequence[Point]) -> skia.Path:
    """The area between two splines, given in the same direction."""
    path = smooth(edge)
    path.addPath(smooth(list(reversed(other))), skia.Path.AddPathMode.kExtend_AddPathMode)
    path.close()
    return path


def along(points: Sequence[Point], count: int) -> list[Point]:
    """`count` points at equal distances along the spline through the points, both ends included."""
    measure = skia.PathMeasure(smooth(points), False)
    found = []
    for k in range(count):
        position, _ = measure.getPosTan(measure.getLength() * k / (count - 1))
        found.append((position.x(), position.y()))
    return found


def linear(start: Point, end: Point, colours: Sequence[Colour], places: Sequence[float] | None = None) -> skia.Paint:
    shader = skia.GradientShader.MakeLinear([skia.Point(*start), skia.Point(*end)], list(colours), places)
    return skia.Paint(Shader=shader, AntiAlias=True, Dither=True)


def radial(centre: Point, radius: float, colours: Sequence[Colour], places: Sequence[float]) -> skia.Paint:
    shader = skia.GradientShader.MakeRadial(skia.Point(*centre), radius, list(colours), places)
    return skia.Paint(Shader=shader, AntiAlias=True, Dither=True)


def fill(canvas: skia.Canvas, path: skia.Path, paint: skia.Paint | Colour) -> None:
    canvas.drawPath(path, paint if isinstance(paint, skia.Paint) else skia.Paint(Color=paint, AntiAlias=True))


def stroke(
    canvas: skia.Canvas, path: skia.Path, colour: Colour, width: float, alpha: float, sigma: float = 0.0
) -> None:
    blurred(canvas, path, colour, sigma, alpha, width)


def blurred(
    canvas: skia.Canvas,
    path: skia.Path,
    colour: Colour,
    sigma: float,
    alpha: float,
    width: float = 0.0,
    offset: Point = (0.0, 0.0),
) -> None:
    """Fill a path, or stroke it where a width is given, with soft edges."""
    paint = skia.Paint(Color=colour, AntiAlias=True)
    paint.setAlphaf(alpha)
    if width:
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        paint.setStrokeWidth(width)
    if sigma:
        paint.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, sigma))
    if offset != (0.0, 0.0):
        path = skia.Path(path)
        path.offset(*offset)
    canvas.drawPath(path, paint)
