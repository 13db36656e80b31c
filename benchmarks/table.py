"""README's tables, from the committed results of the newest version.

python benchmarks/table.py            prints them
python benchmarks/table.py --write    puts them between README's markers
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import saved

from gpurender.bench.measured import Record
from gpurender.bench.table import spread, written

README = Path(__file__).resolve().parents[1] / "README.md"
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
    *("engine", "memory_GiB"),
)
SHOWN_OF_BENCH = ("whole program", "rendering", "first frame", "peak", "host to device", "device to host")
STAGES_SHOWN = ("network encode", "network decode", "encode")


def tables(records: Iterator[Record]) -> str:
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
    head = ["", *(key.replace("_", " ") for key in varying), "median", "smallest to largest", "runs"]
    rows = [
        [
            result["name"],
            *(shown(result["parameters"].get(key)) for key in varying),
            written(result["median"], result["unit"]),
            spread(result) if len(result["runs"]) > 1 else "",
            str(len(result["runs"])),
        ]
        for result in results
    ]
    lines = [f"**{TITLES.get(made['suite'], made['suite'])}** ({place}; {described(common)}):", "", row(head)]
    lines += [row(["---"] * len(head)), *map(row, rows)]
    notes = [f"\nNote: {note}" for note in made["notes"]]
    return "\n".join(lines + notes)


def of_interest(suite: str, result: dict[str, Any]) -> bool:
    """Whether README has it; the records have everything."""
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


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_tables(readme: str, text: str) -> str:
    """README with the tables between its markers.

    Raises:
        ValueError: it has no such markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} … {END}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    given = parser.parse_args()
    text = tables(saved())
    if given.write:
        README.write_text(with_tables(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
