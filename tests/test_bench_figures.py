"""What `gpurender bench` and the benchmarks make of times that are known: a clock that moves as it is told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import memory
import ops
import pytest
import scaling
import torch

from gpurender.bench import limits, run, stages
from gpurender.bench.limits import COPIED_BYTES, copy_bandwidth, onnx_work, product_rate, unet_work
from gpurender.bench.measured import Measured, record
from gpurender.bench.plots import bars
from gpurender.bench.stages import Alone, timed
from gpurender.bench.subject import Loaded
from gpurender.bench.table import table
from gpurender.bench.watch import Watched
from gpurender.halves import read_halves

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass as work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (stages, limits):
        monkeypatch.setattr(module, "time", made)
    return made


def nothing(*given: object) -> None:
    pass


# --- stages alone ----------------------------------------------------------------------------------------------------


def test_quick_work_is_repeated_and_slow_work_is_not(clock: Clock) -> None:
    for seconds, calls in ((0.001, 2 + 250 * 3), (0.5, 2 + 1 * 3)):
        done: list[float] = []

        def work(seconds: float = seconds, done: list[float] = done) -> None:
            done.append(seconds)
            clock.passes(seconds)

        assert timed(work, 3, nothing) == pytest.approx([seconds] * 3)
        assert len(done) == pytest.approx(calls, abs=3)


@pytest.fixture
def alone(clock: Clock) -> Alone:
    """A subject of 6 template frames, 10 output frames and batches of 4: each stage takes known seconds a frame."""
    template = SimpleNamespace(frames=lambda part: clock.passes(0.010 * len(part)))
    features = SimpleNamespace(windows=lambda start, stop: clock.passes(0.002 * (stop - start)))
    loaded = SimpleNamespace(
        device=CPU,
        batch=4,
        parameters={},
        on_backdrops=False,
        pixels="nv12",
        template=range(6),
        features=range(10),
        open=lambda: template,
        hear=lambda: features,
        engine=SimpleNamespace(name="torch", encode=lambda faces: clock.passes(0.2)),
    )
    made = Alone(cast(Loaded, loaded), repeats=3)
    made.__dict__.update(_shown=(None, None), _cropped=(None, None))
    made.__dict__.update(_draw=lambda: clock.passes(0.4), _paste=lambda: clock.passes(0.08))
    return made


@pytest.mark.parametrize(
    ("stage", "milliseconds"),
    [
        ("template decode", {"template decode": 10, "template again": 10}),
        ("audio", {"audio": 2}),
        ("network encode", {"network encode": 50}),
        ("network decode", {"network decode": 100}),
        ("paste", {"paste": 20}),
    ],
)
def test_milliseconds_are_of_a_frame(alone: Alone, stage: str, milliseconds: dict[str, float]) -> None:
    measured = alone.measure(stage)
    assert {figure.name: figure.unit for figure in measured} == dict.fromkeys(milliseconds, "ms a frame")
    for figure in measured:
        assert figure.runs == pytest.approx([milliseconds[figure.name]] * 3)


def test_encoding_is_told_by_the_frame(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve frames, four times over; the first time does not count."""
    given: list[int] = []

    def encode(loaded: object, batches: list[torch.Tensor], timings: Any) -> tuple[str, float, float]:
        given.append(sum(map(len, batches)))
        timings.device_seconds["colour"] = 0.24
        return "an encoder", 4.8 if len(given) > 1 else 99.0, 0.48

    alone.__dict__["_rendered"] = [torch.empty(4, 1), torch.empty(8, 1)]
    monkeypatch.setattr(stages, "encode_once", encode)
    figures = {figure.name: figure.runs for figure in alone.measure("encode")}
    assert given == [48] * 4
    assert figures["encode"] == pytest.approx([100.0] * 3)
    assert figures["mux"] == pytest.approx([10.0] * 3)
    assert figures["colour"] == pytest.approx([5.0] * 3)


def test_batch_sizes_are_told_in_frames_a_second(alone: Alone, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(template: object, features: Any, engine: object, batch: int, pixels: str) -> Iterator[None]:
        for _ in range(0, len(features), batch):
            clock.passes(batch / 2)
            yield

    monkeypatch.setattr(stages, "render", render)
    (figure,) = alone.sweep(8)
    assert (figure.unit, figure.parameters["batch"]) == ("frames a second", 8)
    assert figure.runs == pytest.approx([2.0] * 3)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_limit_is_what_the_quickest_of_five_reaches(clock: Clock) -> None:
    taken = iter([0.1, 3, 2, 5, 4, 6] * 2)  # the first call is not counted
    assert limits.clocked(lambda: clock.passes(next(taken)), CPU, 2) == pytest.approx([2.0, 2.0])


def test_rates_count_reading_and_writing_sums_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "clocked", lambda work, device, repeats: [0.5] * repeats)
    monkeypatch.setitem(limits.SQUARE, "cpu", 64)
    assert copy_bandwidth(CPU, 2) == [4 * COPIED_BYTES] * 2
    assert product_rate(CPU, "fp32", 1) == [4 * 64**3]


def test_arithmetic_is_that_of_the_network_as_it_is_run(tiny_onnx: Path) -> None:
    """Its 1×1 convolutions before the upsampling, where they cost a quarter."""
    file = read_halves(tiny_onnx)
    assert file.encoder is not None
    seen, heard = unet_work(tiny_onnx)
    assert 0.5 < heard.flops / onnx_work(file.decoder).flops < 0.95
    assert seen.flops + heard.flops < onnx_work(file.encoder).flops + onnx_work(file.decoder).flops
    assert heard.inputs >= seen.outputs


# --- programs --------------------------------------------------------------------------------------------------------


def watched(**told: Any) -> Watched:
    report = {
        **dict.fromkeys(("device", "engine", "precision", "batch", "decoder", "encoder"), "x"),
        "width": 4,
        "height": 2,
        "frames": 10,
        "render_seconds": 1.0,
        "stage_seconds": {"network": 0.5},
        "stage_device_seconds": {"network": 0.25},
    }
    made = Watched(seconds=2.0, report=report, first_frame_seconds=0.7, peak_resident_bytes=1000, peak_device_bytes=70)
    for name, value in told.items():
        (made.report if name in report else made.__dict__)[name] = value
    return made


def test_figures_of_whole_programs() -> None:
    found = {figure.name: (figure.runs, figure.unit) for figure in run.program_figures([watched(), watched()])}
    assert found == {
        "whole program": ([5.0, 5.0], "frames a second"),
        "rendering": ([10.0, 10.0], "frames a second"),
        "first frame, warm start": ([0.7, 0.7], "s"),
        "peak resident memory": ([1000.0, 1000.0], "bytes"),
        "peak device memory": ([70.0, 70.0], "bytes"),
        "busy in a render: network, host": ([50.0, 50.0], "ms a frame"),
        "busy in a render: network, device": ([25.0, 25.0], "ms a frame"),
    }


def test_the_table_says_how_near_a_stage_comes() -> None:
    of = {"width": 2, "height": 2, "device": "cpu", "template_frames": 3}
    figures = [Measured("crop", of, "ms a frame", [10.0]), Measured("crop: least", of, "ms a frame", [2.5])]
    (line,) = (line for line in table(record("bench", figures, command=[])).splitlines() if line.startswith("crop *"))
    assert line.split() == ["crop", "*", "10.0", "10.0", "–", "10.0", "100", "2.50", "25", "%"]


def test_bars_end_within_the_plot() -> None:
    drawn = bars([("crop", 2.0, 1.0, 3.0, 9.0), ("paste", 1.0, 1.0, 1.0, None)], "ms")
    widths = [float(part.split('"')[0]) for part in drawn.split('width="')[1:]]
    assert max(widths) < 860 - 150


# --- benchmarks ------------------------------------------------------------------------------------------------------


def test_figures_of_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four frames of 100 bytes in half a second, where a copy does 1,600 bytes a second."""

    def cases(*given: object) -> Iterator[tuple[str, int, Callable[[object], None]]]:
        yield "an op", 100, nothing

    monkeypatch.setattr(ops, "cases", cases)
    monkeypatch.setattr(ops, "seconds", lambda work, device: 0.5)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda device, repeats: [1600.0] * repeats)
    found = {(figure.name, figure.unit): figure.runs for figure in ops.measure(CPU, 4, 2)}
    assert found["an op", "ms a frame"] == [125.0, 125.0]
    assert found["an op", "bytes a second"] == [800.0, 800.0]
    assert found["an op", "of copy bandwidth"] == [0.5, 0.5]


def test_an_op_that_takes_a_known_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(ops, "time", clock)
    assert ops.seconds(lambda: clock.passes(0.02), CPU) == pytest.approx(0.02)


def test_bytes_of_ops() -> None:
    """What each reads and writes of one frame of 64×48 with a face of 20×20, counted by hand."""
    counted = {name: moved for name, moved, _ in ops.cases(64, 48, 20, 1, CPU)}
    assert counted["crop_faces"] == 3 * 20 * 20 + 3 * 328 * 328
    assert counted["rgb_to_nv12"] == counted["nv12_to_rgb"] == 3 * 64 * 48 + 64 * 72
    assert counted["crop_and_mask"] == counted["crop_faces"] + 4 * 6 * 320 * 320


def test_figures_of_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second before the first frame, and 20 ms for each; the first program warms up."""

    def make(words: list[object], device: str) -> Watched:
        sound = Path(str(words[-1])).stem
        frames = 100 if sound == "short" else int(sound)
        return watched(frames=frames, seconds=99.0 if sound == "short" else 1 + 0.02 * frames)

    monkeypatch.setattr(scaling, "watch_make", make)
    monkeypatch.setattr(scaling, "avatar_pictures", lambda to, frames: to)
    monkeypatch.setattr(scaling, "sound_of", lambda sound, seconds, to: to)
    figures = {
        (figure.name, figure.parameters.get("frames")): (figure.unit, figure.runs)
        for figure in scaling.measure(tmp_path, [100, 1000, 5000], 2, "cpu")
    }
    assert figures["whole program", 1000] == ("s", [21.0, 21.0])
    unit, runs = figures["a frame, by the fitted line", None]
    assert (unit, runs) == ("ms a frame", pytest.approx([20.0]))
    assert figures["before the first frame, by the fitted line", None][1] == pytest.approx([1.0])


def test_two_lengths_are_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py", "--frames", "100", "1000", "100"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "give three or more" in capsys.readouterr().err


def test_the_program_that_exports_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = iter([9000, 1000, 1001])
    monkeypatch.setattr(memory, "watch_make", lambda words, device: watched(peak_resident_bytes=next(peaks)))
    monkeypatch.setattr(memory, "avatar_pictures", lambda to, frames: to)
    monkeypatch.setattr(memory, "seeded_networks", lambda folder: (folder, folder))
    monkeypatch.setattr(memory, "sound_of", lambda sound, seconds, to: to)
    first, later = memory.peak(tmp_path, 7, 2, "cpu")
    assert (first.name, first.runs, first.unit) == ("peak resident memory, nothing cached", [9000.0], "bytes")
    assert (later.name, later.runs, later.unit) == ("peak resident memory", [1000.0, 1001.0], "bytes")
