"""A record of `gpurender bench` as text of at most 80 columns."""

import textwrap
from collections.abc import Iterable, Iterator

from .measured import OTHERS, QUIET_PERCENT, Record, compared, find, other_settings, sizes
from .stages import STAGES, SWEEP, is_once

COLUMNS = 80
WHOLE = (
    ("whole program", "start, sound and all"),
    ("rendering", "without the start"),
    ("first frame, cold start", "nothing cached"),
    ("first frame, warm start", ""),
    ("peak resident memory", ""),
    ("peak device memory", ""),
    ("host to device", "a frame, at first"),
    ("device to host", "a frame, at first"),
)


def table(made: Record) -> str:
    """The figures that one reads first: by size the whole and the stages, then batch sizes and limits."""
    return "\n".join(line.rstrip() for line in lines(made))


def lines(made: Record) -> Iterator[str]:
    yield from header(made)
    for size in sizes(made):
        yield ""
        yield from wrapped(f"{size}: {path_taken(made, size)}")
        yield ""
        yield f"{'':<25}{'median':>13}  {'smallest to largest':<20}"
        for name, comment in WHOLE:
            if (result := find(made, name, size)) is not None:
                yield f"{name:<25}{written(result['median'], result['unit']):>13}  {spread(result):<20}{comment}"
        if find(made, "host to device", size) is None and "on cpu" in path_taken(made, size):
            yield f"{'to and from a device':<25}{'none':>13}"
        yield ""
        yield f"{'stage, alone':<18}{'ms a frame':>11}  {'spread':<15}{'frames a s':>11}{'least ms':>10}{'of limit':>9}"
        for stage in STAGES:
            if (result := find(made, stage, size)) is not None:
                yield stage_line(made, stage, size, result)
    yield "* once a template frame, as long as memory keeps it"
    yield ""
    yield from sweep_lines(made)
    yield from limit_lines(made)
    for note in made["notes"]:
        yield from wrapped(f"note: {note}")


def header(made: Record) -> Iterator[str]:
    machine, version = made["machine"], made["gpurender"]
    commit = f" ({version['commit']})" if version["commit"] else ""
    gpu = machine["gpu"] or "no GPU"
    yield from wrapped(
        f"gpurender {version['version']}{commit} on {machine['processor']}, {machine['cores']} cores, {gpu}; "
        f"{made['date']}"
    )


def path_taken(made: Record, size: str) -> str:
    result = find(made, "whole program", size)
    if result is None:
        return ""
    p = result["parameters"]
    stage = find(made, STAGES[0], size)
    of_template = f" from a template of {stage['parameters']['template_frames']}" if stage else ""
    frames = f"{p['frames']} frames{of_template}, {p['batch']} at a time"
    used = f"{p['engine']} {p['precision']} on {p['device']}, decoder {p['decoder']}, encoder {p['encoder']}"
    return f"{frames}, {used}"


def stage_line(made: Record, stage: str, size: str, result: dict) -> str:
    least = find(made, f"{stage}: least", size)
    milliseconds = result["median"]
    rate = f"{1000 / milliseconds:.0f}" if milliseconds else ""
    range_ = f"{number(result['min'])} – {number(result['max'])}"
    shown = f"{starred(stage, result):<18}{number(milliseconds):>11}  {range_:<15}{rate:>11}"
    if least is None or not milliseconds:
        return shown
    return f"{shown}{number(least['median']):>10}{100 * least['median'] / milliseconds:>7.0f} %"


def starred(stage: str, result: dict) -> str:
    return f"{stage} *" if is_once(stage, result["parameters"]["device"]) else stage


def sweep_lines(made: Record) -> Iterator[str]:
    found = [(batch, find(made, f"render, batch {batch}", size)) for size in sizes(made)[:1] for batch in SWEEP]
    there = [(batch, result) for batch, result in found if result is not None]
    if there:
        yield f"rendering, {sizes(made)[0]}, to finished pixels, by frames at a time:"
        yield f"{'frames at a time':<18}" + "".join(f"{batch:>9}" for batch, _ in there)
        yield f"{'frames a second':<18}" + "".join(f"{number(result['median']):>9}" for _, result in there)
        yield ""


def limit_lines(made: Record) -> Iterator[str]:
    for result in made["results"]:
        if result["name"] == "copy bandwidth" or result["name"].startswith("matrix product"):
            yield f"{result['name']:<25}{written(result['median'], result['unit']):>13}  {spread(result)}"


def comparison_table(old: Record, new: Record) -> str:
    """Ratios of a record to an older one, figure by figure."""
    return "\n".join(line.rstrip() for line in comparison_lines(old, new))


def comparison_lines(old: Record, new: Record) -> Iterator[str]:
    pairs = compared(old, new)
    for words in what_is_compared(old, new):
        yield from wrapped(words)
    yield f"{'':<30}{'then':>13}{'now':>13}{'ratio':>8}  verdict"
    for size in dict.fromkeys(pair.size for pair in pairs):
        yield size or "machine"
        for pair in (pair for pair in pairs if pair.size == size and is_shown(pair.name)):
            then, now = written(pair.old, pair.unit), written(pair.new, pair.unit)
            yield f"  {shortened(pair.name, 28):<28}{then:>13}{now:>13}{pair.ratio:>8.2f}  {pair.verdict}"


def what_is_compared(old: Record, new: Record) -> Iterator[str]:
    """The older record, and what else than gpurender may make a difference."""
    then = old["gpurender"]
    yield f"against gpurender {then['version']} ({then['commit'] or 'no commit'}) of {old['date']}"
    for key in ("processor", "cores", "gpu"):
        if old["machine"][key] != new["machine"][key]:
            yield f"ANOTHER MACHINE then: {key} {old['machine'][key]}, now {new['machine'][key]}"
    then_has, now_has = (made["machine"].get("versions", {}) for made in (old, new))
    for package in sorted({*then_has, *now_has} - {"gpurender"}):
        if then_has.get(package) != now_has.get(package):
            yield f"OTHER VERSION then: {package} {then_has.get(package, 'none')}, now {now_has.get(package, 'none')}"
    for key, before, now in other_settings(old, new):
        yield f"OTHER SETTINGS then: {key} {before}, now {now}: figures of unlike work"
    for made, when in ((old, "then"), (new, "now")):
        others = find(made, OTHERS)
        if others is not None and others["median"] > QUIET_PERCENT:
            yield f"NOT QUIET {when}: other programs took {others['median']:.0f} % of the processors"
    missing = len(new["results"]) - len(compared(old, new))
    if missing:
        yield f"{missing} of {len(new['results'])} figures are not in the old record"


def is_shown(name: str) -> bool:
    return name != OTHERS and (": " not in name or "busy" in name)


def shortened(name: str, width: int) -> str:
    name = name.replace("busy in a render", "busy")
    return name if len(name) <= width else name[: width - 1] + "…"


def wrapped(text: str) -> Iterable[str]:
    return textwrap.wrap(text, COLUMNS, break_long_words=True)


def spread(result: dict) -> str:
    if result["min"] == result["max"]:
        return "one run" if len(result["runs"]) == 1 else "all alike"
    unit = result["unit"]
    return f"{written(result['min'], unit)} – {written(result['max'], unit)}"


SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
SHORT = {
    "bytes": "B",
    "bytes a frame": "B",
    "bytes a second": "B/s",
    "FLOP a second": "FLOP/s",
    "FLOP a frame": "FLOP",
    "frames a second": "/s",
    "ms a frame": "ms",
    "times as fast": "×",
}


def written(value: float, unit: str) -> str:
    """A figure for a person: `1.53 GB`, `18.9 /s`."""
    short = SHORT.get(unit, unit)
    if unit.startswith(("bytes", "FLOP")):
        scale, prefix = next((s for s in SCALES if abs(value) >= s[0]), SCALES[-1])
        return f"{number(value / scale)} {prefix}{short}"
    return f"{number(value)} {short}"


def number(value: float) -> str:
    """Three digits that count, more where there are more before the point, but two below 0.1."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    places = next((places for places, least in enumerate((100, 10, 1, 0.01)) if magnitude >= least), 4)
    return f"{value:.{places}f}" if magnitude >= 0.001 else f"{value:.1e}"
