"""What a benchmark begins and ends with, and where results are kept: results/<version>/<suite>--<machine>.json, of the
form that schema.json describes."""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from gpurender.bench.measured import QUIET_PERCENT, Measured, Record, as_json, read_record, record
from gpurender.bench.run import own_caches
from gpurender.bench.table import spread, written
from gpurender.bench.watch import OtherWork
from gpurender.cuda import resolve_device
from gpurender.errors import DeviceError, InputError, OutputError

OTHERS = "meanwhile, other programs' share of the processors"
RESULTS = Path(__file__).resolve().parent / "results"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record goes [benchmarks/results]")
    return parser


def count(text: str) -> int:
    """The type of options that count something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give at least 1")
    return number


def measure_and_keep(
    suite: str,
    given: argparse.Namespace,
    measure: Callable[[Path, str], Sequence[Measured]],
    notes: Sequence[str] = (),
) -> None:
    """Measure, print and keep a record; an error ends the program with its one line.

    Args:
        suite: what the record is called.
        given: see `options`.
        measure: given an empty folder and the device; caches of exports and kernels are empty, too.
        notes: of what was unusual; read when all is measured.
    """
    try:
        device = str(resolve_device(given.device))
        others = OtherWork()
        with ExitStack() as around:
            if device.startswith("cuda"):  # Triton's clock and graphs of our own are the current device's
                around.enter_context(torch.cuda.device(device))
            name = around.enter_context(tempfile.TemporaryDirectory(prefix=f"gpurender-{suite}-"))
            around.enter_context(own_caches(Path(name) / "cache"))
            results = [*measure(Path(name), device)]
            if (share := others.percent()) is not None:
                results.append(Measured(OTHERS, {}, "%", [share]))
    except (InputError, DeviceError, OutputError) as error:
        sys.exit(f"Error: {error}")
    made = record(suite, results, command=["python", *sys.argv], device=device, notes=notes)
    print_results(made)
    print(f"wrote {save(made, given.results)}")
    noise = max((max(result.runs) for result in results if result.name == OTHERS), default=0.0)
    if noise > QUIET_PERCENT:
        tell(f"OTHER PROGRAMS TOOK UP TO {noise:.0f} % of the processors: these figures are not to be published")


def tell(words: str) -> None:
    print(f"{words} …", file=sys.stderr, flush=True)


# --- records and their files -----------------------------------------------------------------------------------------


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
        keys = ("asked", "frames", "height", "face", "impl", "launch", "layout", "precision", "at_once")
        of = " ".join(f"{key} {result['parameters'][key]}" for key in keys if key in result["parameters"])
        print(f"{result['name']} ({of}): {written(result['median'], result['unit'])}, {spread(result)}")


def saved(folder: Path = RESULTS) -> Iterator[Record]:
    """All records of the newest version that there is, in their files' order."""
    versions = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    newest = max(versions, key=lambda path: [int(n) for n in re.findall(r"[0-9]+", path.name)], default=None)
    for file in sorted(newest.glob("*.json")) if newest else []:
        yield read_record(file)
