"""Runs gpurender as a program of its own and watches it: wall clock, memory, when its first frame came."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

EVERY_SECONDS = 0.02


class OtherWork:
    """How much of the processors is taken by other programs than this one and those that it ran, from now on.

    A busy machine makes programs whose threads wait for each other by spinning many times slower, others a little:
    figures from it cannot be compared.
    """

    def __init__(self) -> None:
        self._before = processor_seconds()

    def percent(self) -> float | None:
        """Of all processors' time since this was made; None where the system does not say."""
        if self._before is None or (now := processor_seconds()) is None:
            return None
        all_, busy, ours = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, 100 * (busy - ours) / all_) if all_ else 0.0


def processor_seconds() -> tuple[float, float, float] | None:
    """Of all processors together since the start: all, those that somebody used, those that we did."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    ticks = [int(number) for number in file.read_text().split("\n", 1)[0].split()[1:9]]  # user … steal
    idle = ticks[3] + ticks[4]
    second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / second, (sum(ticks) - idle) / second, sum(os.times()[:4])


@dataclass
class Watched:
    """What a program cost.

    Attributes:
        seconds: wall clock, from its start to its end.
        report: what it wrote with `--report`.
        first_frame_seconds: from its start to its first rendered frames: Python's start and all imports are in it.
        peak_resident_bytes: of main memory; 0 where the system does not say.
        peak_device_bytes: of the GPU's memory, its driver's context and all libraries' included, taken to be what other
            programs did not have before; 0 on a CPU.
        resident: (seconds since its start, resident bytes) now and then.
    """

    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    first_frame_seconds: float = 0.0
    peak_resident_bytes: int = 0
    peak_device_bytes: int = 0
    resident: list[tuple[float, int]] = field(default_factory=list, repr=False)

    @property
    def rendering_seconds(self) -> tuple[float, float]:
        """When it began to render and when it ended, in seconds since its start."""
        began = self.first_frame_seconds - self.report["first_frame_seconds"] + self.report["prepare_seconds"]
        return began, began + self.report["render_seconds"]


def watch_make(words: Sequence[object], *, device: str = "cpu") -> Watched:
    """Run `gpurender make` with some words; its video goes where nobody looks.

    Args:
        words: options, but for `--out` and `--report`.
        device: whose memory is watched, `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: it ended with an error, which this repeats.
    """
    watched = Watched()
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="gpurender-") as folder:
        report = Path(folder) / "report.json"
        # -P: not another gpurender that lies in the working directory
        command = [sys.executable, "-P", "-m", "gpurender.cli", "make", *map(str, words), "--quiet"]
        command += ["--out", str(Path(folder) / "out.mp4"), "--report", str(report)]
        free = free_device_bytes(device)
        began, clock = time.perf_counter(), time.time()
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        ended = threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, device, free, began, ended, watched))
        sampler.start()
        try:
            _, errors = process.communicate()
        finally:
            process.kill()  # where we were interrupted
            process.wait()
            watched.seconds = time.perf_counter() - began
            ended.set()
            sampler.join()
        if process.returncode:
            lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
            raise InputError(f"the render that is to be measured fails: {lines[-1].removeprefix('Error: ')}")
        watched.report = json.loads(report.read_text())
        # The report is written when the render has ended; its own clock begins after Python's start and the imports.
        since_first_frame = watched.report["seconds"] - watched.report["first_frame_seconds"]
        watched.first_frame_seconds = report.stat().st_mtime - clock - since_first_frame
    return watched


def sample(pid: int, device: str, free_before: int, began: float, ended: threading.Event, watched: Watched) -> None:
    """Read a program's memory until it has ended."""
    while not ended.wait(EVERY_SECONDS):
        now, peak = resident_bytes(pid)
        watched.peak_resident_bytes = max(watched.peak_resident_bytes, peak)
        watched.peak_device_bytes = max(watched.peak_device_bytes, free_before - free_device_bytes(device))
        elapsed = time.perf_counter() - began
        if now and (not watched.resident or elapsed - watched.resident[-1][0] > 0.25):
            watched.resident.append((elapsed, now))


def resident_bytes(pid: int) -> tuple[int, int]:
    """A program's resident memory, and the most that it has been.

    Not `getrusage`: on Linux, its maximum counts what the parent had when it started the program.
    """
    found = {"VmRSS": 0, "VmHWM": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def free_device_bytes(device: str) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
