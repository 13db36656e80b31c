"""Where results are kept: results/<version>/<suite>--<machine>.json, of the form that schema.json describes."""

import re
from collections.abc import Iterator
from pathlib import Path

from gpurender.bench.measured import Record, as_json, read_record
from gpurender.bench.table import spread, written

OTHERS = "meanwhile, other programs' share of the processors"
RESULTS = Path(__file__).resolve().parent / "results"


def place(made: Record, folder: Path = RESULTS) -> Path:
    """The file of a record, by its version, suite and machine."""
    return folder / made["gpurender"]["version"] / f"{made['suite']}--{machine_name(made)}.json"


def machine_name(made: Record) -> str:
    """Short and fit for a file name: the GPU if one was used, else the processor and its cores."""
    machine = made["machine"]
    name = machine["gpu"] or f"{machine['processor']} {machine['cores']} cores"
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm|c)\)", "", name.lower()))
    return "-".join(word for word in words if word not in ("cpu", "processor"))


def save(made: Record, folder: Path = RESULTS) -> Path:
    """Write a record to its place, over an older one of the same version, suite and machine."""
    file = place(made, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_json(made), encoding="utf-8")
    return file


def print_results(made: Record) -> None:
    for result in made["results"]:
        of = " ".join(
            f"{key} {result['parameters'][key]}" for key in ("asked", "frames") if key in result["parameters"]
        )
        print(f"{result['name']} ({of}): {written(result['median'], result['unit'])}, {spread(result)}")


def saved(folder: Path = RESULTS) -> Iterator[Record]:
    """All records of the newest version that there is, in their files' order."""
    versions = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    newest = max(versions, key=lambda path: [int(n) for n in re.findall(r"[0-9]+", path.name)], default=None)
    for file in sorted(newest.glob("*.json")) if newest else []:
        yield read_record(file)
