"""README's tables and those of benchmarks/README.md, from the committed results of the newest version.

python benchmarks/table.py            prints them
python benchmarks/table.py --write    puts them between the pages' markers
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from records import saved

from gpurender.bench.measured import Record, find, sizes
from gpurender.bench.table import spread, written

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TITLES = {
    "baseline": "The reference's sequential loop and gpurender, full-width network with seeded weights",
    "baseline-widened": "The reference's sequential loop and gpurender, the avatar's network widened to full width",
    "baseline-avatar": "The reference's sequential loop and gpurender, the avatar's network",
    "bench": "`gpurender bench`",
    "memory": "Memory",
    "network": "The U-Net alone in torch, full width",
    "network-compiled": "The same by `torch.compile`",
    "ops": "Operations alone",
    "scaling": "Cost by length",
}
COLUMNS = (
    *("width", "height", "face", "frames", "minutes", "asked", "precision", "layout", "launch", "at_once", "impl"),
    *("engine", "memory_GiB", "pictures", "networks"),
)
SHOWN_OF_BENCH = ("whole program", "rendering", "first frame", "peak", "host to device", "device to host")
SHARE = "of copy bandwidth"
STAGES_SHOWN = ("network encode", "network decode", "encode")
NETWORKS = {
    "baseline": "full width, weights by rule",
    "baseline-widened": "full width, the avatar's widened",
    "baseline-avatar": "the avatar's, narrow",
}


# --- README: what one wants to know first ----------------------------------------------------------------------------


def summary(records: Sequence[Record]) -> str:
    """Frames a second against the reference's loop, and whole renders, each machine and network on a line."""
    return f"{against_the_loop(records)}\n\n{whole_renders(records)}"


def against_the_loop(records: Sequence[Record]) -> str:
    head = ["frames a second", "network", "frames", "loop", "loop, memory kept", "gpurender, fp32", "gpurender, auto"]
    rows = [
        [
            machine(made),
            f"{network}{memory_given(made)}",
            str(made["results"][0]["parameters"]["frames"]),
            figure(made, "reference loop", "frames a second"),
            figure(made, "reference loop, memory kept", "frames a second"),
            ours(made, "fp32"),
            ours(made, "auto"),
        ]
        for suite, network in NETWORKS.items()
        for made in records
        if made["suite"] == suite
    ]
    return as_table(head, rows)


def ours(made: Record, asked: str) -> str:
    """Frames a second, the type that was taken if that was left open, and how many times each loop's that is."""
    taken = {result["parameters"]["precision"] for result in made["results"] if asked_for(result) == asked}
    if not taken:
        return ""
    times = [
        figure(made, f"gpurender against the loop{kept}", "times as fast", asked) for kept in ("", ", memory kept")
    ]
    in_type = f" in {', '.join(sorted(taken))}" if asked == "auto" else ""
    return f"**{figure(made, 'gpurender', 'frames a second', asked)}**{in_type} ({', '.join(filter(None, times))})"


def memory_given(made: Record) -> str:
    given = {result["parameters"].get("memory_GiB") for result in made["results"]} - {None}
    return "".join(f"; --memory {gib * 1024:.0f}" for gib in given)


def asked_for(result: dict[str, Any]) -> str | None:
    return result["parameters"].get("asked")


def figure(made: Record, name: str, unit: str, asked: str | None = None) -> str:
    for result in made["results"]:
        if (result["name"], result["unit"], asked_for(result)) == (name, unit, asked):
            return written(result["median"], unit).removesuffix(" /s")
    return ""


def whole_renders(records: Sequence[Record]) -> str:
    columns = "a whole render, picture, by, frames, frames a second, first frame, nothing cached, most memory"
    rows = [whole_render(made, size) for made in records if made["suite"] == "bench" for size in sizes(made)]
    return as_table(columns.split(", "), rows)


def whole_render(made: Record, size: str) -> list[str]:
    names = ("rendering", "first frame, warm start", "first frame, cold start", "peak resident memory")
    found = [find(made, name, size) for name in (*names, "peak device memory")]
    rate, warm, cold, *memory = [written(result["median"], result["unit"]) if result else "" for result in found]
    assert found[0] is not None
    of = found[0]["parameters"]
    in_memory = " + ".join(filter(None, memory))
    speed = f"**{rate.removesuffix(' /s')}**"
    return [machine(made), size, f"{of['engine']}, {of['precision']}", str(of["frames"]), speed, warm, cold, in_memory]


def machine(made: Record) -> str:
    of = made["machine"]
    return of["gpu"] or f"{of['processor'].replace('(R)', '').replace(' Processor', '')}, {of['cores']} cores"


# --- benchmarks/README.md: every record ------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> str:
    """All records as Markdown, one table each."""
    blocks = [block(made) for made in records]
    return "\n\n".join(blocks) if blocks else "No results are committed yet."


def block(made: Record) -> str:
    """One record: what all its figures have in common above a table of the rest."""
    results = [result for result in made["results"] if of_interest(made["suite"], result)]
    common = {
        key: value
        for key, value in results[0]["parameters"].items()
        if all(result["parameters"].get(key, value) == value for result in results)
    }
    varying = [
        key
        for key in COLUMNS
        if key not in common and any(result["parameters"].get(key) is not None for result in results)
    ]
    machine = made["machine"]
    place = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {made['date'][:10]}"
    shares = {of_op(result): f"{result['median']:.0%}" for result in made["results"] if result["unit"] == SHARE}
    head = ["", *(key.replace("_", " ") for key in varying), "median", *([SHARE] if shares else [])]
    head += ["smallest to largest", "runs"]
    rows = [
        [
            result["name"],
            *(shown(result["parameters"].get(key)) for key in varying),
            f"{written(result['median'], result['unit'])}{' a frame' * result['unit'].endswith(' a frame')}",
            *([shares.get(of_op(result), "")] if shares else []),
            spread(result) if len(result["runs"]) > 1 else "",
            str(len(result["runs"])),
        ]
        for result in results
    ]
    title = f"**{TITLES.get(made['suite'], made['suite'])}** ({place}; {described(common)}):"
    notes = [f"Note: {note}" for note in made["notes"]]
    return "\n\n".join([title, as_table(head, rows), *notes])


def of_op(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["name"], *sorted(result["parameters"].items())


def of_interest(suite: str, result: dict[str, Any]) -> bool:
    """Whether the page has it; the records have everything."""
    name, unit, of = result["name"], result["unit"], result["parameters"]
    if name.startswith("meanwhile"):
        return False
    if suite == "bench":
        return name.startswith(SHOWN_OF_BENCH) or name in STAGES_SHOWN
    if suite.startswith("baseline"):
        return unit != "s" and not name.startswith("decoded")
    if suite == "network":
        return unit != "s"
    if suite == "ops":
        return unit == "ms a frame" and (of["height"], of["face"]) == (720, 480)
    return True


def described(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in parameters.items())


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_tables(page: str, text: str) -> str:
    """The page with the tables between its markers.

    Raises:
        ValueError: it has no such markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{begin}\n{text}\n{end}{after}"


BENCHMARKS = Path(__file__).resolve().parent
PAGES: dict[Path, Callable[[Sequence[Record]], str]] = {
    BENCHMARKS.parent / "README.md": summary,
    BENCHMARKS / "README.md": tables,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    given = parser.parse_args()
    records = list(saved())
    for page, made_of in PAGES.items():
        if given.write:
            page.write_text(with_tables(page.read_text(encoding="utf-8"), made_of(records)), encoding="utf-8")
        else:
            print(f"{page.relative_to(BENCHMARKS.parent)}\n\n{made_of(records)}\n")


if __name__ == "__main__":
    main()
