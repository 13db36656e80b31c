"""Three plots as SVG text: bars with their spread, a curve, a roofline."""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .table import number, written

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

WIDTH = 860
LETTER = 7.2  # of a label: how wide, about
ROW = 28


def bars(rows: Sequence[tuple[str, float, float, float, float | None]], unit: str) -> str:
    """Rows of (name, value, smallest, largest, least possible) as horizontal bars from 0."""
    left, right, top = 150, 80, 8
    most = max((max(row[3], row[4] or 0.0) for row in rows), default=1.0) or 1.0
    ticks = round_ticks(most)
    scale = (WIDTH - left - right) / max(most, ticks[-1])
    height = top + ROW * len(rows) + 54
    parts = []
    for tick in ticks:
        x = left + tick * scale
        parts.append(line(x, top, x, height - 46, "grid"))
        parts.append(label(x, height - 29, f"{tick:g}", "middle", "soft"))
    parts.append(label((left + WIDTH - right) / 2, height - 8, unit, "middle", "soft"))
    for i, (name, value, low, high, least) in enumerate(rows):
        y = top + ROW * i
        parts.append(label(left - 10, y + 18, name, "end"))
        parts.append(f'<rect class="main" x="{left}" y="{y + 5}" width="{value * scale:.1f}" height="18" rx="2"/>')
        if least is not None:
            parts.append(f'<rect class="other" x="{left}" y="{y + 17}" width="{least * scale:.1f}" height="6"/>')
        parts.append(line(left + low * scale, y + 14, left + high * scale, y + 14, "range"))
        parts.append(label(left + max(high, least or 0.0) * scale + 8, y + 18, number(value)))
    return svg(height, parts, f"{unit} by stage")


def curve(points: Sequence[tuple[int, float, float, float]], across: str, up: str) -> str:
    """Points of (number, value, smallest, largest) over powers of two, values from 0."""
    left, right, top, bottom = 60, 30, 16, 44
    height = 300
    most = max(point[3] for point in points)
    ticks = round_ticks(most)
    tall = (height - top - bottom) / max(most * 1.05, ticks[-1])
    step = (WIDTH - left - right) / len(points)
    parts = []
    for tick in ticks:
        y = height - bottom - tick * tall
        parts.append(line(left, y, WIDTH - right, y, "grid"))
        parts.append(label(left - 8, y + 4, f"{tick:g}", "end", "soft"))
    places = [(left + (i + 0.5) * step, height - bottom - value * tall) for i, (_, value, _, _) in enumerate(points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="path" points="{path}"/>')
    for (x, y), (name, value, low, high) in zip(places, points, strict=True):
        parts.append(line(x, height - bottom - low * tall, x, height - bottom - high * tall, "range"))
        parts.append(f'<circle class="main" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(label(x, y - 12, number(value), "middle"))
        parts.append(label(x, height - bottom + 18, str(name), "middle", "soft"))
    parts.append(label((left + WIDTH - right) / 2, height - 6, f"{across} (left: {up})", "middle", "soft"))
    return svg(height, parts, f"{up} by {across}")


class Point(NamedTuple):
    """A stage in a roofline: FLOP a byte, FLOP a second, and the precision that it computes in."""

    stage: str
    intensity: float
    rate: float
    precision: str


def roofline(points: Sequence[Point], bandwidth: float, rates: dict[str, float]) -> str:
    """Stages under the roofs of bytes a second and of FLOP a second by precision; both axes are logarithmic."""
    left, right, top, bottom = 110, 20, 26, 46
    height = 420
    bends = [rate / bandwidth for rate in rates.values()]
    x_low, x_high = decades([point.intensity for point in points] + bends, 0.5)
    y_low, y_high = decades([point.rate for point in points] + [*rates.values()], 0.3)

    def x(intensity: float) -> float:
        return left + (math.log10(intensity) - x_low) / (x_high - x_low) * (WIDTH - left - right)

    def y(rate: float) -> float:
        return height - bottom - (math.log10(rate) - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        parts.append(line(x(10.0**power), top, x(10.0**power), height - bottom, "grid"))
        parts.append(label(x(10.0**power), height - bottom + 18, f"{10.0**power:g}", "middle", "soft"))
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        parts.append(line(left, y(10.0**power), WIDTH - right, y(10.0**power), "grid"))
        parts.append(
            label(
                left - 8,
                y(10.0**power) + 4,
                written(10.0**power, "FLOP a second").replace(".00", "").replace(".0", ""),
                "end",
                "soft",
            )
        )
    dots = [(x(p.intensity) - 7, y(p.rate) - 7, x(p.intensity) + 7, y(p.rate) + 7) for p in points]
    taken: list[Box] = [*dots]
    for kind, rate in rates.items():
        start = max(10**x_low, 10**y_low / bandwidth)
        corners = ((start, bandwidth * start), (rate / bandwidth, rate), (10**x_high, rate))
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
        parts.append(f'<polyline class="roof" points="{path}"/>')
        words = f"matrix product, {kind}: {written(rate, 'FLOP a second')}"
        wide, base = LETTER * len(words), y(rate) - 7
        ends = (WIDTH - right - 4 - wide, x(rate / bandwidth) + 48)  # of the flat roof: right, left
        boxes = [(left, base - 13, left + wide, base + 9) for left in ends if left + wide < WIDTH]
        box = next((box for box in boxes if not any(overlap(box, dot) for dot in dots)), boxes[0])
        parts.append(label(box[0], base, words))
        taken.append(box)
        taken.append((x(rate / bandwidth), y(rate) - 2, WIDTH, y(rate) + 2))
    slope = math.sqrt(10**x_low * bends[0])
    if bandwidth * slope > 10**y_low:
        words = f"copy: {written(bandwidth, 'bytes a second')}"
        parts.append(label(x(slope) - 10, y(bandwidth * slope) - 10, words, "end"))
    parts += named_points(points, x, y, lambda p: min(bandwidth * p.intensity, rates[p.precision]), taken)
    parts.append(label((left + WIDTH - right) / 2, height - 6, "arithmetic a byte (FLOP)", "middle", "soft"))
    return svg(height, parts, "roofline")


def named_points(
    points: Sequence[Point],
    x: Callable[[float], float],
    y: Callable[[float], float],
    roof: Callable[[Point], float],
    taken: list[Box],
) -> Iterator[str]:
    """Dots with their names, each beside, above or below its dot, where nothing else is written."""
    for point in sorted(points, key=lambda point: -point.rate):
        px, py = x(point.intensity), y(point.rate)
        yield line(px, py, px, y(roof(point)), "drop")
        yield f'<circle class="main" cx="{px:.1f}" cy="{py:.1f}" r="5"/>'
        wide = LETTER * len(point.stage)
        lefts = [(px + 11, py + 5), (px - 11 - wide, py + 5)]
        lefts += [(px - wide / 2, py + shift) for shift in (-11, 21, -26, 36, -41, 51)]
        boxes = [(left, base - 12, left + wide, base + 3) for left, base in lefts]
        free = [box for box in boxes if box[0] > 0 and box[2] < WIDTH and not any(overlap(box, b) for b in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        yield label(box[0], box[3] - 3, point.stage)


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def decades(values: Sequence[float], margin: float) -> tuple[float, float]:
    logs = [math.log10(value) for value in values if value > 0]
    return min(logs) - margin, max(logs) + margin


def round_ticks(most: float) -> list[float]:
    """Three to six round numbers from 0 to `most`."""
    rough = most / 5
    unit = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= rough)
    return [k * step for k in range(math.floor(most / step) + 1)]


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def label(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    styled = f' class="{kind}"' if kind else ""
    return f'<text{styled} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def svg(height: float, parts: Sequence[str], title: str) -> str:
    drawn = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{html.escape(title)}</title>{drawn}</svg>"
    )
