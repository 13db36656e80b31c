"""Measured figures with their birth certificate: the machine, the versions, the command and every run.

`gpurender bench` and everything in `benchmarks/` write this one kind of record; `benchmarks/schema.json` describes it.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch

from ..cuda import driver_version
from ..errors import InputError
from ..host import usable_cores
from ..report import installed, processor

SCHEMA_VERSION = 1
Record = dict[str, Any]

OTHERS = "other programs' share of the processors"
QUIET_PERCENT = 5.0
LARGEST = sys.float_info.max
HIGHER_IS_BETTER = {"frames a second", "bytes a second", "FLOP a second", "dB", "times as fast", "of copy bandwidth"}
"""Units of which more is better; of all others, less is."""


@dataclass(frozen=True)
class Measured:
    """One figure, measured several times.

    Attributes:
        name: what was measured; with the picture's size it says which figure this is.
        parameters: shapes, and whatever else the figure depends on: numbers, text, true or false, None.
        unit: of all runs.
        runs: each run's value, in the order in which they were made.
    """

    name: str
    parameters: dict[str, Any]
    unit: str
    runs: list[float]

    def as_dict(self) -> dict[str, Any]:
        spread = {"median": statistics.median(self.runs), "min": min(self.runs), "max": max(self.runs)}
        return {**asdict(self), **spread}


def record(
    suite: str, results: Iterable[Measured], *, command: Sequence[str], device: str = "cpu", notes: Sequence[str] = ()
) -> Record:
    """Figures with everything that one must know to judge or repeat them; JSON can hold it.

    Args:
        suite: what kind of measurement this is, such as `bench`.
        results: the figures.
        command: the words that made them.
        device: `cpu`, `cuda` or `cuda:N`: which GPU is named.
        notes: what was unusual.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpurender": {"version": installed().get("gpurender", "not installed"), "commit": commit()},
        "machine": machine(device),
        "command": list(command),
        "notes": list(notes),
        "results": [result.as_dict() for result in results],
    }


def machine(device: str) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    on_gpu = device.startswith("cuda")
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "driver": driver_version(),
        "versions": {"python": platform.python_version(), **installed()},
    }


def commit() -> str | None:
    """The commit that the package is from, with a `+` if it was changed since; None where neither Git nor pip knows."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        try:
            words = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
            return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    try:
        origin = importlib.metadata.distribution("gpurender").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")


def as_json(made: Record) -> str:
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def read_record(file: str | Path) -> Record:
    """A record from its file.

    Raises:
        InputError: there is none, or it is no such record, or one of another version.
    """
    file = Path(file)
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not JSON; give what gpurender bench --json wrote.") from None
    if not isinstance(made, dict) or made.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{file} is no record of measurements of version {SCHEMA_VERSION}; make it anew with --json.")
    numbers = ("median", "min", "max")
    for result in made["results"] if isinstance(made.get("results"), list) else [None]:
        if (
            not isinstance(result, dict)
            or not isinstance(result.get("parameters"), dict)
            or not all(isinstance(value, str | int | float | None) for value in result["parameters"].values())
            or not all(isinstance(result.get(key), str) for key in ("name", "unit"))
            or not all(isinstance(result.get(key), int | float) and abs(result[key]) <= LARGEST for key in numbers)
            or not isinstance(result.get("runs"), list)
        ):
            raise InputError(f"{file} is damaged: a result lacks its name, parameters, unit, numbers or runs.")
    told = {"gpurender": ("version", "commit"), "machine": ("processor", "cores", "gpu")}
    if (
        not all(isinstance(made.get(part), str) for part in ("suite", "date"))
        or not all(isinstance(made.get(part), dict) and made[part].keys() >= set(keys) for part, keys in told.items())
        or not isinstance(made["machine"].get("versions", {}), dict)
    ):
        raise InputError(f"{file} is damaged: it lacks its suite, its date, or which gpurender or machine it is of.")
    return made


# --- one record against another --------------------------------------------------------------------------------------

Verdict = Literal["better", "worse", "within noise", "one run"]


@dataclass(frozen=True)
class Change:
    """A figure then and now."""

    name: str
    size: str
    unit: str
    old: float
    new: float
    verdict: Verdict
    """`within noise` where between the two ranges, smallest to largest run, there is no more than half the larger:
    three runs and three more of the same lie apart in a tenth of all cases, by so much in a fiftieth (simulated). Where
    there are two runs only, it is no more than three times the larger, which is as rare; `one run` where there is no
    range"""

    @property
    def ratio(self) -> float:
        """New through old, of the medians; both 0 is 1."""
        return self.new / self.old if self.old else (1.0 if self.new == 0 else inf)


def compared(old: Record, new: Record) -> list[Change]:
    """The figures that are in both records, by their names and picture sizes."""
    before = {(result["name"], size_of(result)): result for result in old["results"]}
    pairs = [(before.get((result["name"], size_of(result))), result) for result in new["results"]]
    return [
        Change(now["name"], size_of(now), now["unit"], then["median"], now["median"], verdict(then, now))
        for then, now in pairs
        if then is not None and then["unit"] == now["unit"]
    ]


def other_settings(old: Record, new: Record) -> list[tuple[str, Any, Any]]:
    """What figures of both records depend on and is not alike: its name, then and now."""
    before = {(result["name"], size_of(result)): result["parameters"] for result in old["results"]}
    found = [
        (key, then[key], now[key])
        for result in new["results"]
        if (then := before.get((result["name"], size_of(result)))) is not None
        for now in [result["parameters"]]
        for key in now
        if key in then and then[key] != now[key]
    ]
    return list(dict.fromkeys(found))


def verdict(then: dict[str, Any], now: dict[str, Any]) -> Verdict:
    runs = min(len(then["runs"]), len(now["runs"]))
    if runs < 2:
        return "one run"
    gap = max(now["min"] - then["max"], then["min"] - now["max"])
    if gap <= (3 if runs == 2 else 0.5) * max(then["max"] - then["min"], now["max"] - now["min"]):
        return "within noise"
    more = now["min"] > then["max"]
    return "better" if more == (now["unit"] in HIGHER_IS_BETTER) else "worse"


def size_of(result: dict[str, Any]) -> str:
    """The picture's size of a figure, such as 1280×720; nothing for figures of the machine."""
    parameters = result["parameters"]
    return f"{parameters['width']}×{parameters['height']}" if parameters.keys() >= {"width", "height"} else ""


def find(made: Record, name: str, size: str = "") -> dict[str, Any] | None:
    """The figure of this name and size."""
    return next((r for r in made["results"] if r["name"] == name and size_of(r) == size), None)


def sizes(made: Record) -> list[str]:
    """The picture sizes of a record, in its order."""
    return list(dict.fromkeys(size for result in made["results"] if (size := size_of(result))))
