"""A comparison as one self-contained HTML page: figures, curves over the frames, the worst frames."""

import base64
import io
from collections.abc import Sequence
from html import escape
from math import ceil, floor, inf, log10
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..output import write_text
from ..rectangles import Rect
from .comparison import Comparison, decibels
from .footage import Footage
from .judged import Judged
from .side_by_side import as_picture, difference

WIDTH, HEIGHT = 900, 200  # of a curve's area
LEFT, TOP, BOTTOM = 70, 14, 34
MOST_POINTS = 1800
FEW_POINTS = 40
LEAST_SPAN = 1e-9  # of values that differ enough to be told apart by ticks
DETAIL = 120  # pixels: side of the square around the largest difference
ENLARGED = 4

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #68707a; --line: #d9dde2; --ground: #fff; --a: #1767c0;
  --bad: #c0281c; --good: #18794e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ad; --line: #363c44; --ground: #16191d;
  --a: #6cb0ff; --bad: #ff8578; --good: #5cc795; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
.alike { color: var(--good); } .different { color: var(--bad); } .soft, figcaption { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.wide { overflow-x: auto; } svg { width: 100%; min-width: 36rem; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--a); stroke-width: 1.5; stroke-linejoin: round; }
.limit { stroke: var(--bad); stroke-dasharray: 6 4; } .sample { fill: var(--a); } .dot, svg .least { fill: var(--bad); }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin: .3rem 0; }
p { overflow-wrap: anywhere; } figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
img { width: 100%; display: block; } .pixels { image-rendering: pixelated; }
@media print { .wide { overflow: visible; } svg { min-width: 0; } }
"""


def write_page(
    file: Path, comparison: Comparison, a: Footage, b: Footage, judged: Judged, amplify: float, overwrite: bool
) -> None:
    """Write the page; the worst frames are read again for it.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    worst = "".join(frame_rows(number, comparison, a, b, judged, amplify) for number in comparison.worst())
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(Path(comparison.a).name)} | {escape(Path(comparison.b).name)}</title>
<style>{STYLE}</style>
<h1 class="{"alike" if comparison.alike else "different"}">{"Alike" if comparison.alike else "Different"}</h1>
<p>A is {escape(comparison.a)}<br>B is {escape(comparison.b)}<br>
<span class="soft">{len(comparison.figures)} frames of {comparison.size[0]}×{comparison.size[1]},
{escape(comparison.part)}; counted from 0</span></p>
{reasons(comparison)}
{table(comparison)}
{curves(comparison)}
<h2>{"The worst frames" if worst else "All of these frames are equal"}</h2>
{worst}
<p class="soft">MSE: mean squared error of levels 0 to 255, over pixels and R, G, B. PSNR: 20·log₁₀ 255 − 10·log₁₀ MSE;
overall, of the frames' mean MSE. SSIM: Gaussian window of 11×11 pixels, sigma 1.5, mean over pixels and R, G, B.
A frame passes with {comparison.min_psnr_db:g} dB PSNR and {comparison.min_ssim:g} SSIM at least.</p>
</html>
"""
    write_text(file, page, overwrite)


def reasons(comparison: Comparison) -> str:
    return "".join(f'<p class="different">{escape(reason)}</p>' for reason in comparison.differences())


def table(comparison: Comparison) -> str:
    overall, every = comparison.overall, comparison.figures
    by_psnr = min(every, key=lambda number: every[number].psnr_db)
    by_ssim = min(every, key=lambda number: every[number].ssim)
    rows = [
        ("MSE", f"{overall.mse:.4g}", f"{every[by_psnr].mse:.4g}", by_psnr),
        ("PSNR", decibels(overall.psnr_db), decibels(every[by_psnr].psnr_db), by_psnr),
        ("SSIM", f"{overall.ssim:.6f}", f"{every[by_ssim].ssim:.6f}", by_ssim),
    ]
    lines = "".join(f"<tr><td>{name}<td>{whole}<td>{worst}<td>{number}</tr>" for name, whole, worst, number in rows)
    arrays = "".join(
        f"<tr><td>{escape(name)}, largest difference<td><td>{largest:.3g}<td>{number if largest else ''}</tr>"
        for name, (largest, number) in comparison.arrays.items()
    )
    return f"<table><tr><th><th>overall<th>worst frame<th>which</tr>{lines}{arrays}</table>"


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(comparison: Comparison) -> str:
    if len(comparison.figures) < 2:
        return ""
    numbers = list(comparison.figures)
    psnr_db = [figures.psnr_db for figures in comparison.figures.values()]
    similar = [figures.ssim for figures in comparison.figures.values()]
    return (
        f"<h2>PSNR, dB</h2><div class='wide'>{curve(numbers, psnr_db, comparison.min_psnr_db, '{:g}')}</div>"
        f"<h2>SSIM</h2><div class='wide'>{curve(numbers, similar, comparison.min_ssim, '{:.6g}')}</div>"
    )


def curve(numbers: list[int], values: list[float], limit: float, words: str) -> str:
    """An SVG of values over frames, with the limit where it is near; infinite values run along the top."""
    finite = [value for value in values if value < inf]
    if not finite:
        return '<p class="soft">equal in every frame</p>'
    low, high = min(finite), max(finite)
    if limit < inf and low - limit < 2 * (high - low) + 0.02 * abs(limit):
        low = min(low, limit)
    if limit < inf and limit > high:
        high = limit
    step = tick_step(next(span for span in (high - low, abs(high) / 10, 1.0) if span > LEAST_SPAN))
    low = step * (low // step)
    high = max(step * ceil(high / step), low + step)
    top = high + step if len(finite) < len(values) else high

    def x(number: float) -> float:
        return LEFT + (number - numbers[0]) / (numbers[-1] - numbers[0]) * WIDTH

    def y(value: float) -> float:
        return TOP + (1 - (min(value, top) - low) / (top - low)) * HEIGHT

    ticks = [low + k * step for k in range(round((high - low) / step) + 1)]
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{words.format(round(tick, 9))}</text>'
        for tick in ticks
    )
    if top > high:
        grid += f'<text x="{LEFT - 8}" y="{y(top) + 4:.1f}" text-anchor="end">equal</text>'
    frame_step = max(round(tick_step(numbers[-1] - numbers[0])), 1)
    first = -(-numbers[0] // frame_step) * frame_step
    grid += "".join(
        f'<text x="{x(number):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{number}</text>'
        for number in range(first, numbers[-1] + 1, frame_step)
    )
    if low <= limit <= high:
        grid += f'<line class="limit" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
        grid += (
            f'<text class="least" x="{LEFT + WIDTH}" y="{y(limit) - 5:.1f}" text-anchor="end">'
            f"least {words.format(limit)}</text>"
        )
    chosen = lowest_of_stretches(values)
    line = " ".join(f"{x(numbers[k]):.1f},{y(values[k]):.1f}" for k in chosen)
    worst = min(range(len(values)), key=values.__getitem__)
    if len(values) <= FEW_POINTS:  # a reference set's samples lie far apart
        grid += "".join(
            f'<circle class="sample" cx="{x(number):.1f}" cy="{y(value):.1f}" r="2.5"/>'
            for number, value in zip(numbers, values, strict=True)
        )
    return (
        f'<svg viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + BOTTOM}" role="img">{grid}'
        f'<polyline class="curve" points="{line}"/>'
        f'<circle class="dot" cx="{x(numbers[worst]):.1f}" cy="{y(values[worst]):.1f}" r="3.5">'
        f"<title>frame {numbers[worst]}: {words.format(values[worst])}</title></circle></svg>"
    )


def tick_step(span: float) -> float:
    """1, 2 or 5 times a power of ten: at most about 6 of them in a span."""
    unit = 10.0 ** floor(log10(span / 6))
    return next(k * unit for k in (1, 2, 5, 10) if span / (k * unit) <= 6)


def lowest_of_stretches(values: Sequence[float]) -> list[int]:
    """The positions to draw: of a long video, the lowest value of each stretch of frames."""
    stretch = ceil(len(values) / MOST_POINTS)
    return [
        min(range(start, min(start + stretch, len(values))), key=values.__getitem__)
        for start in range(0, len(values), stretch)
    ]


# --- frames ----------------------------------------------------------------------------------------------------------


def frame_rows(number: int, comparison: Comparison, a: Footage, b: Footage, judged: Judged, amplify: float) -> str:
    """A frame of both and the difference, and in a second row the place where they differ most, enlarged."""
    figures = comparison.figures[number]
    pictures = [footage.frame(number) for footage in (a, b)]
    rows = row(number, pictures, judged.view, amplify)
    x0, y0, x1, y1 = place = most_different(pictures[0], pictures[1], judged.rect(number))
    if 2 * (x1 - x0) < judged.view[2] - judged.view[0] and 2 * (y1 - y0) < judged.view[3] - judged.view[1]:
        rows += f'<p class="soft">Where they differ most, x {x0} to {x1}, y {y0} to {y1}:</p>'
        rows += row(number, pictures, place, amplify, enlarged=ENLARGED)
    heading = f"frame {number}: PSNR {decibels(figures.psnr_db)}, SSIM {figures.ssim:.5f}, MSE {figures.mse:.4f}"
    return f"<h3>{heading}</h3>{rows}"


def row(number: int, pictures: list[Tensor], view: Rect, amplify: float, enlarged: int = 1) -> str:
    x0, y0, x1, y1 = view
    a, b = (picture[:, y0:y1, x0:x1] for picture in pictures)
    titles = (f"A, frame {number}", f"B, frame {number}", f"difference × {amplify:g}")
    kind = ' class="pixels"' if enlarged > 1 else ""
    figures = "".join(
        f'<figure><img{kind} alt="{title}" src="{embedded(pixels, exact=enlarged > 1)}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, pixels in zip(titles, (a, b, difference(a, b, amplify)), strict=True)
    )
    return f'<div class="row">{figures}</div>'


def most_different(a: Tensor, b: Tensor, rect: Rect) -> Rect:
    """The square of the part where the two pictures (3,H,W) differ most, or the part itself if that is smaller."""
    x0, y0, x1, y1 = rect
    side = min(DETAIL, x1 - x0, y1 - y0)
    error = (a[:, y0:y1, x0:x1].float() - b[:, y0:y1, x0:x1].float()).square().mean(0)
    means = F.avg_pool2d(error[None, None], side, stride=max(side // 8, 1))[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    left, top = x0 + column * max(side // 8, 1), y0 + row * max(side // 8, 1)
    return left, top, left + side, top + side


def embedded(pixels: Tensor, exact: bool) -> str:
    """A picture (3,H,W) uint8 as a data URL: PNG where it is to be exact, else JPEG of high quality."""
    stream = io.BytesIO()
    picture: Image.Image = as_picture(pixels, (pixels.shape[2], pixels.shape[1]))
    if exact or pixels[0].numel() <= 512 * 512:
        picture.save(stream, "png")
        kind = "png"
    else:
        picture.save(stream, "jpeg", quality=95, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
