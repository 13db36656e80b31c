"""A record of `gpurender bench` as one HTML file: figures, plots drawn as SVG, and every number's origin."""

import html
import shlex
from collections.abc import Iterable, Iterator

from .measured import Record, compared, find, size_of, sizes
from .plots import Point, bars, curve, roofline
from .stages import STAGES, SWEEP
from .table import WHOLE, number, path_taken, spread, starred, what_is_compared, written

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --ink: #1b1f24; --soft: #5c6670;
  --line: #d9dde2; --main: #2a6fb8; --other: #c46210; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #9aa4af;
  --line: #343b44; --main: #6cb0f5; --other: #f0a35e; --good: #5fcf95; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; } .tile small { color: var(--soft); }
figure { margin: 1rem 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
figcaption { color: var(--soft); font-size: .87rem; margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .main { fill: var(--main); } svg .other { fill: var(--other); }
svg .roof { stroke: var(--ink); stroke-width: 2; fill: none; }
svg .path { stroke: var(--main); stroke-width: 2; fill: none; }
svg .range { stroke: var(--ink); stroke-width: 1.5; } svg .drop { stroke: var(--soft); stroke-dasharray: 3 3; }
.wide, figure { overflow-x: auto; } svg { min-width: 36rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
.better { color: var(--good); } .worse { color: var(--bad); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; } code { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { .wide, figure { overflow: visible; } svg { min-width: 0; }
  table { font-size: .75rem; } th, td { padding: .2rem .3rem; } }
"""


def page(made: Record, old: Record | None = None) -> str:
    """A whole HTML document that needs no other file.

    Args:
        made: of `bench`.
        old: an older record to compare it with.
    """
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>gpurender bench, {text(made['date'])}</title><style>{STYLE}</style></head><body>",
            *body(made, old),
            "</body></html>\n",
        ]
    )


def body(made: Record, old: Record | None) -> Iterator[str]:
    machine, version = made["machine"], made["gpurender"]
    yield "<header><h1>What a render costs</h1>"
    place = f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    yield f'<p class="soft">gpurender {text(version["version"])} on {text(place)}; {text(made["date"])}</p></header>'
    for size in sizes(made):
        yield f"<section><h2>{size}</h2><p>{text(path_taken(made, size))}</p>"
        yield from whole(made, size)
        yield from stage_plot(made, size)
        yield from stage_table(made, size)
        yield "</section>"
    yield from sweep(made)
    yield from roof(made)
    if old is not None:
        yield from comparison(old, made)
    yield from every_figure(made)
    yield from origin(made)


def whole(made: Record, size: str) -> Iterator[str]:
    yield '<div class="tiles">'
    for name, comment in WHOLE:
        if (result := find(made, name, size)) is not None:
            value = written(result["median"], result["unit"]).replace(" /s", " frames/s")
            below = f"{name}{f', {comment}' if comment else ''}<br>{text(spread(result))}"
            yield f'<div class="tile"><b>{text(value)}</b><small>{below}</small></div>'
    yield "</div>"


def stage_plot(made: Record, size: str) -> Iterator[str]:
    rows = []
    for stage in STAGES:
        if (result := find(made, stage, size)) is not None:
            least = find(made, f"{stage}: least", size)
            name = starred(stage, result)
            rows.append((name, result["median"], result["min"], result["max"], least and least["median"]))
    yield f"<figure>{bars(rows, 'milliseconds a frame')}"
    yield "<figcaption>Each stage alone: the median; thin line: smallest to largest run; orange: the least that the "
    yield "machine's limits allow. * once a template frame, as long as memory keeps it.</figcaption></figure>"


def stage_table(made: Record, size: str) -> Iterator[str]:
    rows = []
    for stage in STAGES:
        result, least = find(made, stage, size), find(made, f"{stage}: least", size)
        if result is None:
            continue
        bytes_, flops = find(made, f"{stage}: bytes", size), find(made, f"{stage}: arithmetic", size)
        median = result["median"]
        rows.append(
            (
                starred(stage, result),
                number(median),
                f"{number(result['min'])} – {number(result['max'])}",
                f"{1000 / median:.0f}" if median else "",
                written(bytes_["median"], "bytes") if bytes_ else "not counted",
                written(flops["median"], "FLOP a frame") if flops else "not counted",
                f"{100 * least['median'] / median:.0f} %" if least and median else "",
            )
        )
    yield from shown_table(
        ("stage, alone", "ms a frame", "spread", "frames/s", "bytes a frame", "arithmetic", "of the limit"), rows
    )


def sweep(made: Record) -> Iterator[str]:
    size = next(iter(sizes(made)), "")
    found = [(batch, find(made, f"render, batch {batch}", size)) for batch in SWEEP]
    points = [(batch, r["median"], r["min"], r["max"]) for batch, r in found if r is not None]
    if points:
        yield f"<section><h2>Frames at a time</h2><figure>{curve(points, 'frames at a time', 'frames a second')}"
        yield f"<figcaption>Rendering {size} up to finished pixels, without encoding. Thin lines: smallest to largest "
        yield "run.</figcaption></figure></section>"


def roof(made: Record) -> Iterator[str]:
    bandwidth = find(made, "copy bandwidth")
    rates = {r["parameters"]["precision"]: r["max"] for r in made["results"] if r["name"].startswith("matrix product")}
    if bandwidth is None:
        return
    yield "<section><h2>How near the machine's limits</h2>"
    for size in sizes(made):
        points = []
        for stage in STAGES:
            result, bytes_ = find(made, stage, size), find(made, f"{stage}: bytes", size)
            flops = find(made, f"{stage}: arithmetic", size)
            if result and bytes_ and flops and result["median"] and flops["median"]:
                rate = flops["median"] / (result["median"] / 1000)
                intensity = flops["median"] / bytes_["median"]
                points.append(Point(stage, intensity, rate, flops["parameters"]["precision"]))
        if not points:
            continue
        yield f"<figure>{roofline(points, bandwidth['max'], rates)}<figcaption>{size}. A stage can at best lie on the "
        yield "roof: left of its bend, the measured bandwidth of a copy limits it, right of it, the measured rate of "
        yield "a large matrix product. Above it, a runtime multiplies better than torch's matrix product. Bytes are "
        yield "those that go in and out of a stage, arithmetic is that of its convolutions, products or sums; both are "
        yield "counted, not measured. Decoding and encoding video have no count of arithmetic and are not shown."
        yield "</figcaption></figure>"
    yield "</section>"


def comparison(old: Record, made: Record) -> Iterator[str]:
    yield "<section><h2>Against the older record</h2>"
    yield from (f"<p>{text(words)}</p>" for words in what_is_compared(old, made))
    rows = [
        (
            f"{pair.name} {pair.size}",
            written(pair.old, pair.unit),
            written(pair.new, pair.unit),
            f"{pair.ratio:.2f}",
            f'<span class="{pair.verdict.split()[0]}">{pair.verdict}</span>',
        )
        for pair in compared(old, made)
    ]
    yield from shown_table(("figure", "then", "now", "now/then", "verdict"), rows, raw_last=True)
    yield "</section>"


def every_figure(made: Record) -> Iterator[str]:
    yield "<details><summary><h2 style='display:inline'>Every figure</h2></summary>"
    rows = []
    for r in made["results"]:
        rows.append((r["name"], size_of(r), written(r["median"], r["unit"]), spread(r), str(len(r["runs"]))))
    yield from shown_table(("figure", "size", "median", "spread", "runs"), rows)
    yield "</details>"


def origin(made: Record) -> Iterator[str]:
    machine = made["machine"]
    facts = {
        "date": made["date"],
        "gpurender": f"{made['gpurender']['version']}, commit {made['gpurender']['commit'] or 'unknown'}",
        "command": shlex.join(made["command"]),
        "system": machine["system"],
        "processor": f"{machine['processor']}, {machine['cores']} cores",
        "memory": written(machine["memory_bytes"] or 0, "bytes"),
        "GPU": machine["gpu"] or "none",
        "driver": machine["driver"] or "none",
        "packages": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "notes": "; ".join(made["notes"]) or "none",
    }
    yield "<section><h2>Where these numbers are from</h2><dl>"
    yield from (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    yield "</dl></section>"


def shown_table(head: Iterable[str], rows: Iterable[tuple[str, ...]], raw_last: bool = False) -> Iterator[str]:
    yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{text(h)}</th>" for h in head) + "</tr></thead><tbody>"
    for *cells, last in rows:
        shown = [*map(text, cells), last if raw_last else text(last)]
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>"
    yield "</tbody></table></div>"


def text(words: str) -> str:
    return html.escape(words)
