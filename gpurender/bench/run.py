"""START HERE for `gpurender bench`: what a render costs on this machine, stage by stage and as a whole.

subject  a template in one or two sizes, sound, networks            subject.py
watch    whole programs: wall clock, starts, memory                 watch.py
stages   each stage alone; batch sizes; bytes to and from a GPU     stages.py
limits   what the machine could do at best                          limits.py
record   every figure with its birth certificate                    measured.py
shown    as a table of 80 columns, or as a page with plots          table.py, page.py
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ..cuda import resolve_device
from ..encode import EncoderName, write_frames
from ..engine import EngineName, Precision
from ..errors import InputError
from ..find import AVATAR, find_sound, find_template
from ..render import render
from ..template import open_template
from .limits import counts, least_ms, measured_limits
from .measured import OTHERS, QUIET_PERCENT, Measured, Record, record
from .stages import RENDERED, STAGES, SWEEPS, Alone, transferred
from .subject import Loaded, Subject, chosen_networks, enlarged, sound_of
from .watch import OtherWork, Watched, watch_make

LARGER = (1920, 1080)
SHORTEST_SECONDS, LONGEST_SECONDS = 0.5, 3600.0
SECONDS = {"cpu": 5.0, "cuda": 60.0}
CACHES = ("GPURENDER_CACHE", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR")

Step = tuple[str, Callable[[], Iterable[Measured]]]
"""What is measured, and how."""


def bench(
    template: str | Path = AVATAR,
    audio: str | Path = "hello",
    *,
    model: str | Path | None = None,
    device: str = "auto",
    engine: EngineName = "auto",
    precision: Precision = "auto",
    encoder: EncoderName = "auto",
    batch: int | None = None,
    seconds: float | None = None,
    repeats: int = 3,
    command: Sequence[str] = ("gpurender.bench.run",),
    notify: Callable[[str], None] = lambda text: None,
) -> Record:
    """Measure everything that `gpurender bench` does.

    Args:
        template: see `open_template`; `avatar`, the bundled one, is measured at 1920×1080 too, enlarged.
        audio: sound; its first `seconds` are used, over and over where it is shorter.
        model: the network; None is the full-width network with seeded weights.
        device, engine, precision, encoder, batch: see `make`.
        seconds: of video in each measured render; None is 5 on a CPU, 60 on a GPU.
        repeats: how often each figure is measured.
        command: the words that asked for it, for the record.
        notify: is told what is being measured.

    Returns:
        a record, see `measured.record`.

    Raises:
        InputError, DeviceError: as `make`, with what to do about it.
    """
    if repeats < 1:
        raise InputError(f"{repeats} repeats measure nothing; give at least 1.")
    place = resolve_device(device)
    if seconds is None:
        seconds = SECONDS[place.type]
    if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:
        raise InputError(f"{seconds:g} s of video: give {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g} seconds.")
    original = find_template(template)
    open_template(original)  # what is wrong with it should show before the wait
    results: list[Measured] = []
    others = OtherWork()
    with tempfile.TemporaryDirectory(prefix="gpurender-bench-") as name, own_caches(Path(name) / "cache"):
        folder = Path(name)
        sound = sound_of(find_sound(audio), seconds, folder / "speech.wav")
        network, listener = chosen_networks(original, None if model is None else Path(model), folder)
        first = Subject(original, sound, network, listener, str(place), engine, precision, encoder, batch)
        subjects = [first]
        if str(template) == AVATAR:
            notify(f"enlarging the avatar to {LARGER[0]}×{LARGER[1]}")
            subjects.append(replace(first, template=enlarged(original, LARGER, folder / "larger")))
        loaded = [Loaded(subject) for subject in subjects]
        steps = all_steps(loaded, repeats)
        for number, (what, measure) in enumerate(steps, 1):
            notify(f"[{number}/{len(steps)}] {what}")
            results += measure()
        notes = [*loaded[0].engine.notes, *loaded[0].template.notes]
    if (share := others.percent()) is not None:
        results.append(Measured(OTHERS, {}, "%", [share]))
        if share > QUIET_PERCENT:
            notes.append(
                f"other programs took {share:.0f} % of the processors meanwhile: measure again when it is quiet"
            )
    return record("bench", results, command=command, device=str(place), notes=notes)


@contextmanager
def own_caches(path: Path) -> Iterator[None]:
    """Empty caches of exports, plans and compiled kernels for as long as this lasts, here and in programs that are
    started; the user's stay as they are."""
    before = {variable: os.environ.get(variable) for variable in CACHES}
    path.mkdir(mode=0o700)
    os.environ.update(dict.fromkeys(CACHES, str(path)))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


# --- what is measured ------------------------------------------------------------------------------------------------


def all_steps(loaded: list[Loaded], repeats: int) -> list[Step]:
    steps: list[Step] = [("a cold start", lambda: cold_start(loaded[0].subject))]
    for one in loaded:
        if one is not loaded[0]:
            steps.append((f"{one.name}: a whole render, to fill the caches", lambda one=one: unmeasured(one.subject)))
        steps += whole_programs(one, repeats)
    machine: list[Measured] = []
    steps.append(("the machine's limits", lambda: measure_limits(loaded[0], machine, repeats)))
    alone = [Alone(one, repeats) for one in loaded]
    for one, its_stages in zip(loaded, alone, strict=True):
        steps += stages(one, its_stages)
    for k in SWEEPS[loaded[0].device.type]:
        steps.append((f"{loaded[0].name}: rendering {k} frames at a time", lambda k=k: alone[0].sweep(k)))
    steps.append(("the machine's limits again", lambda: measure_limits(loaded[0], machine, repeats)))
    return [*steps, ("counting", lambda: limits_and_counts(loaded, machine))]


def cold_start(subject: Subject) -> list[Measured]:
    """The first frame of a program that finds nothing cached: no export, no plan, no compiled kernel."""
    run = watch_make(subject.words, device=subject.device)
    return [Measured("first frame, cold start", program_parameters([run]), "s", [run.first_frame_seconds])]


def unmeasured(subject: Subject) -> list[Measured]:
    watch_make(subject.words, device=subject.device)
    return []


def whole_programs(loaded: Loaded, repeats: int) -> list[Step]:
    """Whole renders as the command makes them, each a program of its own, all caches warm."""
    subject = loaded.subject
    runs: list[Watched] = []

    def run() -> list[Measured]:
        runs.append(watch_make(subject.words, device=subject.device))
        return program_figures(runs) if len(runs) == repeats else []

    return [(f"{loaded.name}: a whole render, {k} of {repeats}", run) for k in range(1, repeats + 1)]


def program_parameters(runs: list[Watched]) -> dict[str, object]:
    keys = ("width", "height", "device", "engine", "precision", "batch", "decoder", "encoder", "frames")
    return {key: runs[0].report[key] for key in keys}


def program_figures(runs: list[Watched]) -> list[Measured]:
    parameters = program_parameters(runs)
    frames = runs[0].report["frames"]
    figures = [
        ("whole program", "frames a second", [frames / run.seconds for run in runs]),
        ("rendering", "frames a second", [frames / run.report["render_seconds"] for run in runs]),
        ("first frame, warm start", "s", [run.first_frame_seconds for run in runs]),
    ]
    peaks = {
        "peak resident memory": [float(run.peak_resident_bytes) for run in runs],
        "peak device memory": [float(run.peak_device_bytes) for run in runs],
    }
    figures += [(name, "bytes", peak) for name, peak in peaks.items() if min(peak) > 0]  # 0: the system does not say
    for kind, where in (("stage_seconds", "host"), ("stage_device_seconds", "device")):
        for stage in runs[0].report[kind]:
            busy = [1000 * run.report[kind][stage] / frames for run in runs]
            figures.append((f"busy in a render: {stage}, {where}", "ms a frame", busy))
    return [Measured(name, parameters, unit, values) for name, unit, values in figures]


def stages(loaded: Loaded, alone: Alone) -> list[Step]:
    """Each stage alone, then what goes between host and device as a render begins."""
    with_others = ("template again", "mux") if loaded.on_backdrops else ("template again", "mux", "colour")
    steps: list[Step] = [
        (f"{loaded.name}: {stage} alone", lambda stage=stage: alone.measure(stage))
        for stage in STAGES
        if stage not in with_others
    ]
    if loaded.device.type == "cuda":
        steps.append(
            (f"{loaded.name}: copies between host and GPU", lambda: transferred(loaded, lambda: short_video(loaded)))
        )
    return steps


def short_video(loaded: Loaded) -> int:
    """Render and write a moment, nothing decoded before; how many frames."""

    def frames() -> Iterator[torch.Tensor]:
        count = 0
        pixels = loaded.pixels
        for batch in render(loaded.open(), loaded.features, loaded.engine, batch=loaded.batch, pixels=pixels):
            yield batch
            count += len(batch)
            if count >= RENDERED[loaded.device.type]:
                return

    with tempfile.TemporaryDirectory(prefix="gpurender-") as folder:
        subject = loaded.subject
        written = write_frames(
            frames(), Path(folder) / "out.mp4", fps=loaded.features.fps, sound=subject.sound, encoder=subject.encoder
        )
    return written.frames


def measure_limits(loaded: Loaded, machine: list[Measured], repeats: int) -> list[Measured]:
    machine += measured_limits(loaded.device, loaded.engine.precision, repeats)
    return []


def limits_and_counts(loaded: list[Loaded], machine: list[Measured]) -> Iterator[Measured]:
    """The machine's limits, of both times that they were measured; what the stages have to do at least, and how long
    that takes at the limits."""
    limits = joined(machine)
    yield from limits
    best = {figure.name: max(figure.runs) for figure in limits}
    rates = {name.removeprefix("matrix product "): rate for name, rate in best.items() if "product" in name}
    for one in loaded:
        for stage, count in counts(one).items():
            yield Measured(f"{stage}: bytes", one.parameters, "bytes a frame", [count.bytes])
            if count.flops is not None:
                kind = {**one.parameters, "precision": count.precision}
                yield Measured(f"{stage}: arithmetic", kind, "FLOP a frame", [count.flops])
            least = least_ms(count, best["copy bandwidth"], rates)
            yield Measured(f"{stage}: least", one.parameters, "ms a frame", [least])


def joined(figures: list[Measured]) -> list[Measured]:
    """Figures of the same name as one, with the runs of all."""
    names = dict.fromkeys(figure.name for figure in figures)
    alike = [[figure for figure in figures if figure.name == name] for name in names]
    return [replace(same[0], runs=[run for figure in same for run in figure.runs]) for same in alike]
