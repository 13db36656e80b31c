"""`gpurender bench`: real runs on a tiny template with a tiny network, and its parts with known numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import MakeTemplate, landmarks, parsing_mask, picture, tones
from hypothesis import example, given
from hypothesis import strategies as st
from pages import Page
from PIL import Image
from schema import SCHEMA, follows
from torch.utils.flop_counter import FlopCounterMode

import gpurender
from gpurender.bench.limits import Count, least_ms, onnx_work
from gpurender.bench.measured import OTHERS, Measured, Record, as_json, compared, find, read_record, record
from gpurender.bench.page import page
from gpurender.bench.plots import round_ticks
from gpurender.bench.run import limits_and_counts, measure_limits
from gpurender.bench.stages import STAGES, copied_bytes
from gpurender.bench.subject import Loaded, Subject, enlarged, sound_of
from gpurender.bench.table import comparison_table, number, table, written
from gpurender.bench.watch import OtherWork, watch_make
from gpurender.cli import main
from gpurender.engine import Precision
from gpurender.network import load_unet
from gpurender.openvino_engine import faster_on_cpu
from gpurender.sound import decode_sound

# --- one real run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Five frames of 160×120 with parsing masks, and an audio encoder."""
    path = tmp_path_factory.mktemp("templates") / "anna"
    for folder in ("full_body_img", "landmarks", "parsing"):
        (path / folder).mkdir(parents=True)
    for i in range(5):
        Image.fromarray(picture(160, 120, i)).save(path / "full_body_img" / f"{i}.jpg")
        (path / "landmarks" / f"{i}.lms").write_text(landmarks(40 + i, 20, 110 + i))
        Image.fromarray(parsing_mask(160, 120)).save(path / "parsing" / f"{i}.png")
    shutil.copy(tiny_encoder, path / "audio_encoder.pth")
    return path


@pytest.fixture(scope="module")
def old() -> Record:
    """An impossibly slow crop and an impossibly quick render, long ago."""
    size, runs = {"width": 160, "height": 120}, [1e6, 1.1e6]
    slow, quick = Measured("crop", size, "ms a frame", runs), Measured("rendering", size, "frames a second", runs)
    return record("bench", [slow, quick], command=["by hand"])


@pytest.fixture(scope="module")
def ran(anna: Path, tiny_unet: Path, old: Record, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "old.json").write_text(as_json(old))
    words = ["bench", "--template", anna, "--model", tiny_unet, "--seconds", 0.6, "--repeats", 2, "--device", "cpu"]
    words += ["--precision", "fp32", "--json", folder / "new.json", "--html", folder / "new.html"]
    words += ["--compare", folder / "old.json"]
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False), folder


@pytest.fixture(scope="module")
def made(ran: tuple[Result, Path]) -> Record:
    return read_record(ran[1] / "new.json")


def test_a_run_ends_well_and_shows_its_progress(ran: tuple[Result, Path]) -> None:
    result, _ = ran
    assert result.exit_code == 0, result.output
    steps = [re.match(r"\[(\d+)/(\d+)\] ", line) for line in result.stderr.splitlines()]
    numbers = [(int(step[1]), int(step[2])) for step in steps if step]
    assert numbers == [(k, len(numbers)) for k in range(1, len(numbers) + 1)]


def test_the_table_fits_80_columns_and_has_every_stage(ran: tuple[Result, Path]) -> None:
    shown = ran[0].stdout.splitlines()
    assert max(map(len, shown)) <= 80
    for stage in STAGES:
        assert stage == "template again" or any(re.match(rf"{stage}( \*)? +[0-9.e-]+ ", line) for line in shown), stage
    assert any(line.startswith("to and from a device") and line.endswith("none") for line in shown)


@pytest.mark.parametrize(("precision", "second"), [("mixed", "bf16"), ("int8", "int8")])
def test_a_precision_that_is_two_types(
    anna: Path, tiny_unet: Path, speech: Path, precision: Precision, second: str
) -> None:
    if precision not in faster_on_cpu():
        pytest.skip(f"this processor has no {precision}")
    loaded = Loaded(
        Subject(anna, speech, tiny_unet, anna / "audio_encoder.pth", "cpu", "auto", precision, "auto", None)
    )
    machine: list[Measured] = []
    measure_limits(loaded, machine, 1)
    figures = {figure.name: figure for figure in limits_and_counts([loaded], machine)}
    assert {"matrix product fp32", f"matrix product {second}"} <= figures.keys()
    first = "bf16" if precision == "int8" and "bf16" in faster_on_cpu() else "fp32"
    assert figures["network encode: arithmetic"].parameters["precision"] == first
    assert figures["network decode: arithmetic"].parameters["precision"] == second
    bandwidth = max(figures["copy bandwidth"].runs)
    for stage in ("crop", "network encode", "network decode", "paste", "encode", "audio", "colour"):
        of_memory = figures[f"{stage}: bytes"].runs[0] / bandwidth
        arithmetic = figures.get(f"{stage}: arithmetic")
        rate = max(figures[f"matrix product {arithmetic.parameters['precision']}"].runs) if arithmetic else 1.0
        least = max(of_memory, arithmetic.runs[0] / rate if arithmetic else 0.0)
        assert figures[f"{stage}: least"].runs == pytest.approx([1000 * least])
    pixels = 160 * 120
    assert figures["template decode: bytes"].runs == [4 * pixels]  # RGB and a mask
    assert figures["colour: bytes"].runs == [4.5 * pixels]
    assert figures["encode: bytes"].runs == [1.5 * pixels]


def test_a_record_follows_the_schema(made: Record) -> None:
    follows(made, SCHEMA)
    assert made["suite"] == "bench"
    assert made["command"] == ["gpurender", *sys.argv[1:]]
    assert made["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_record_without_a_figures_unit_does_not_follow_it(made: Record) -> None:
    damaged = json.loads(as_json(made))
    del damaged["results"][0]["unit"]
    with pytest.raises(AssertionError):
        follows(damaged, SCHEMA)


def test_the_figures_are_there_and_possible(made: Record) -> None:
    size = "160×120"
    here = [stage for stage in STAGES if stage != "template again"]
    for name in (*here, "whole program", "rendering", "first frame, warm start", "peak resident memory"):
        figure = find(made, name, size)
        assert figure is not None, name
        assert len(figure["runs"]) == 2
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    median = {name: find(made, name, size)["median"] for name in ("whole program", "rendering")}  # pyright: ignore
    assert median["rendering"] > median["whole program"], "a program's start takes time"
    cold, warm = (find(made, f"first frame, {kind} start", size) for kind in ("cold", "warm"))
    assert min(cold["median"], warm["median"]) > 0  # pyright: ignore
    memory = find(made, "peak resident memory", size)
    assert memory is not None
    assert 1e8 < memory["median"] < 3e9
    assert find(made, "render, batch 8", size) is not None
    assert find(made, "host to device", size) is None
    copied, product = find(made, "copy bandwidth"), find(made, "matrix product fp32")
    assert copied is not None
    assert product is not None
    assert copied["min"] > 1e8
    assert len(product["runs"]) == 4, "measured before and after"


def test_what_a_run_compares(ran: tuple[Result, Path]) -> None:
    shown = ran[0].stdout
    assert re.search(r"^  crop .* better$", shown, re.MULTILINE)
    assert re.search(r"^  rendering .* worse$", shown, re.MULTILINE)
    assert "figures are not in the old record" in shown


def test_the_page_is_whole_and_needs_no_other_file(ran: tuple[Result, Path], made: Record) -> None:
    document = (ran[1] / "new.html").read_text()
    shown = Page(document)
    assert shown.links == []
    words = "\n".join(shown.words)
    for result in made["results"]:
        assert result["name"] in words
        assert written(result["median"], result["unit"]) in words
    assert made["machine"]["processor"] in words
    drawings = re.findall(r"<svg.*?</svg>", document, re.DOTALL)
    titles = [xml.etree.ElementTree.fromstring(drawing)[0].text for drawing in drawings]
    assert titles == ["milliseconds a frame by stage", "frames a second by frames at a time", "roofline"]


def test_a_page_escapes_what_it_is_told(made: Record) -> None:
    strange = {**made, "command": ["<script>alert(1)</script>"], "notes": ["a & b"]}
    document = page(strange)
    assert "<script" not in document
    assert "a &amp; b" in document


# --- known numbers ---------------------------------------------------------------------------------------------------


def figures(name: str, unit: str, runs: list[float]) -> Record:
    return record("bench", [Measured(name, {"width": 2, "height": 2}, unit, runs)], command=["by hand"])


@pytest.mark.parametrize(
    ("unit", "then", "now", "verdict"),
    [
        ("ms a frame", [10, 11, 12], [12, 13, 14], "within noise"),
        ("ms a frame", [10, 11, 12], [12.9, 13, 14], "within noise"),
        ("ms a frame", [10, 11, 12], [13.1, 14, 15], "worse"),
        ("ms a frame", [10, 11, 12], [8, 8.5, 8.9], "better"),
        ("ms a frame", [10, 10], [10.1, 10.1], "worse"),
        ("ms a frame", [10, 14], [11, 12], "within noise"),
        ("frames a second", [10, 11], [14, 15], "within noise"),
        ("frames a second", [10, 11], [14.1, 15], "better"),
        ("frames a second", [10, 11, 11], [8, 9, 9], "worse"),
        ("bytes", [10, 11, 11], [12, 13, 13], "worse"),
        ("dB", [40, 41, 41], [42, 43, 43], "better"),
        ("times as fast", [8, 9, 9], [10, 11, 11], "better"),
        ("of copy bandwidth", [0.5, 0.6, 0.6], [0.3, 0.4, 0.4], "worse"),
        ("s", [10], [2], "one run"),
        ("s", [10, 11], [2], "one run"),
    ],
)
def test_verdicts(unit: str, then: list[float], now: list[float], verdict: str) -> None:
    (pair,) = compared(figures("x", unit, then), figures("x", unit, now))
    assert pair.verdict == verdict
    assert pair.ratio == pytest.approx(float(np.median(now) / np.median(then)))


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=5))
def test_nothing_is_better_than_itself(runs: list[float]) -> None:
    (pair,) = compared(figures("x", "s", runs), figures("x", "s", runs))
    assert (pair.ratio, pair.verdict) == (1.0, "within noise")


def test_ratios_of_nothing() -> None:
    for now, ratio in (([0.0, 0.0], 1), ([1.0, 2.0], float("inf"))):
        (pair,) = compared(figures("x", "bytes", [0.0, 0.0]), figures("x", "bytes", now))
        assert pair.ratio == ratio


def test_only_figures_of_both_records_are_compared() -> None:
    assert compared(figures("a", "s", [1.0]), figures("b", "s", [1.0])) == []
    assert compared(figures("a", "s", [1.0]), figures("a", "ms a frame", [1.0])) == []


def test_another_machine_is_named() -> None:
    then, now = figures("x", "s", [1.0, 2.0]), figures("x", "s", [1.0, 2.0])
    then["machine"]["processor"] = "Abacus"
    shown = comparison_table(then, now)
    assert "ANOTHER MACHINE then: processor Abacus" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_other_settings_are_named() -> None:
    then, now = figures("x", "FLOP a second", [1.11e12, 2.22e12]), figures("x", "FLOP a second", [1.11e12, 2.22e12])
    then["results"][0]["parameters"] |= {"frames": 1499, "precision": "int8", "gone": 1}
    now["results"][0]["parameters"] |= {"frames": 124, "precision": "int8", "new": 2}
    shown = comparison_table(then, now).splitlines()
    assert [line for line in shown if "OTHER" in line] == [
        "OTHER SETTINGS then: frames 1499, now 124: figures of unlike work"
    ]
    assert "1.67 TFLOP/s 1.67 TFLOP/s" in shown[-1]
    assert max(map(len, shown)) <= 80


def test_busy_machines_are_named() -> None:
    then, now = figures("x", "s", [1.0, 2.0]), figures("x", "s", [1.0, 2.0])
    for made, share in ((then, 4.9), (now, 62.0)):
        made["results"].append(Measured(OTHERS, {}, "%", [share]).as_dict())
    shown = comparison_table(then, now).splitlines()
    assert [line for line in shown if "NOT QUIET" in line] == [
        "NOT QUIET now: other programs took 62 % of the processors"
    ]


def test_a_page_says_what_it_compares() -> None:
    then, now = figures("x", "s", [1.0, 2.0]), figures("x", "s", [1.0, 2.0])
    then["machine"]["processor"] = "Abacus & sons"
    document = page(now, then)
    assert f"against gpurender {then['gpurender']['version']}" in document
    assert "ANOTHER MACHINE then: processor Abacus &amp; sons" in document
    assert "against gpurender" not in page(now)


def test_a_record_has_median_and_spread() -> None:
    result = Measured("x", {}, "s", [3.0, 1.0, 2.0, 10.0]).as_dict()
    assert (result["median"], result["min"], result["max"]) == (2.5, 1.0, 10.0)
    assert result["runs"] == [3.0, 1.0, 2.0, 10.0]


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(1.53e9, "bytes", "1.53 GB"), (18.94, "frames a second", "18.9 /s"), (0.0, "s", "0 s"), (999.6, "s", "1000 s")],
)
def test_figures_for_a_person(value: float, unit: str, words: str) -> None:
    assert written(value, unit) == words


@given(st.floats(1e-6, 1e6))
@example(0.00167)
def test_numbers_keep_two_digits_at_least(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.05)
    assert len(number(value)) <= 8


@given(st.floats(1e-3, 1e9))
def test_ticks_are_few_and_within(most: float) -> None:
    ticks = round_ticks(most)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] == 0
    assert ticks[-1] <= most * 1.0001


def test_least_time_is_the_slower_of_both_limits() -> None:
    rates = {"fp32": 100e9, "bf16": 1e12}
    assert least_ms(Count(10e6, 1e9), 10e9, rates) == pytest.approx(10)
    assert least_ms(Count(10e6, 1e9, "bf16"), 10e9, rates) == pytest.approx(1)
    assert least_ms(Count(30e6, None), 10e9, rates) == pytest.approx(3)


def test_flops_of_onnx_and_of_torch_agree(tiny_unet: Path, tiny_onnx: Path) -> None:
    import onnx
    from reference_loop import forward

    network = load_unet(tiny_unet).to("meta")
    with FlopCounterMode(display=False) as counter:
        forward(network, torch.empty(1, 6, 320, 320, device="meta"), torch.empty(1, 32, 16, 16, device="meta"))
    whole = counter.get_total_flops()
    assert onnx_work(onnx.load(tiny_onnx)).flops == whole


def test_copies_are_told_from_a_trace() -> None:
    events = [
        {"name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 100}},
        {"name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 11}},
        {"name": "Memcpy DtoH (Device -> Pinned)", "args": {"bytes": 7}},
        {"name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 5000}},
        {"ph": "M"},
    ]
    assert copied_bytes(json.dumps({"traceEvents": events})) == {"host to device": 111, "device to host": 7}


# --- what is measured ------------------------------------------------------------------------------------------------


def test_an_enlarged_template(make_template: MakeTemplate, tmp_path: Path) -> None:
    small = gpurender.open_template(make_template(frames=3, parsing=True))
    large = gpurender.open_template(enlarged(small.path, (640, 480), tmp_path / "large"))
    assert (len(large), large.width, large.height, large.parsing) == (3, 640, 480, True)
    assert torch.equal(large.rects, 2 * small.rects)
    frames, keep = large.frames([2])
    original, original_keep = small.frames([2])
    assert keep is not None
    assert original_keep is not None
    assert torch.equal(keep[:, ::2, ::2], original_keep)
    halved = torch.nn.functional.avg_pool2d(frames.float(), 2)
    assert (halved - original.float()).abs().mean() < 8  # noisy pictures, through H.264


def test_a_sound_is_cut_or_repeated(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "second.wav", tones(1.0, 16000), 16000)
    for seconds in (0.5, 2.5):
        file = sound_of(tmp_path / "second.wav", seconds, tmp_path / f"{seconds}.wav")
        with wave.open(str(file)) as opened:
            assert (opened.getframerate(), opened.getnframes()) == (16000, round(16000 * seconds))
    samples = np.concatenate(list(decode_sound(tmp_path / "2.5.wav")))
    np.testing.assert_allclose(samples[16000:32000], samples[:16000], atol=1e-4)
    np.testing.assert_allclose(samples[:16000], tones(1.0, 16000)[:, 0], atol=1e-3)


def test_other_programs_work_is_told() -> None:
    before = OtherWork()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        pass
    ours = before.percent()
    before = OtherWork()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.7)
    theirs = before.percent()
    busy.kill()
    busy.wait()
    assert ours is not None
    assert theirs is not None
    assert 0 <= ours <= 100
    assert theirs >= 50 / (os.cpu_count() or 1)


def test_a_watched_program(anna: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same gpurender, whatever lies in the working directory."""
    (tmp_path / "gpurender").mkdir()
    (tmp_path / "gpurender" / "__init__.py").write_text("raise ImportError('another one')")
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "aud.npy", np.zeros((40, 512), np.float32))
    words = ["--template", anna, "--audio", tmp_path / "aud.npy", "--model", tiny_onnx, "--precision", "fp32"]
    watched = watch_make(words)
    assert watched.report["frames"] == 40
    began, ended = watched.rendering_seconds
    assert 0 < began < watched.first_frame_seconds < ended < watched.seconds
    assert watched.peak_device_bytes == 0
    largest = max(resident for _, resident in watched.resident)
    assert 5e7 < largest <= watched.peak_resident_bytes


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "nobody"], "nobody: there is no such template directory"),
        (["--audio", "none.wav"], "none.wav: there is no such sound file"),
        (["--audio", "aud.npy"], "aud.npy holds features, but sound is measured too"),
        (["--model", "none.pth"], "none.pth: there is no such network file"),
        (["--seconds", "0.1"], "0.1 s of video: give 0.5 to 3600 seconds"),
        (["--seconds", "nan"], "nan s of video"),
        (["--repeats", "0"], "0 repeats measure nothing"),
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--compare", "none.json"], "none.json cannot be read"),
        (["--compare", "text.json"], "text.json is not JSON"),
        (["--compare", "other.json"], "other.json is no record of measurements of version 1"),
        (["--compare", "damaged.json"], "damaged.json is damaged"),
        (["--compare", "undated.json"], "undated.json is damaged: it lacks its suite, its date"),
        (["--compare", "unversioned.json"], "unversioned.json is damaged"),
        (["--compare", "memory.json"], "memory.json is no record of gpurender bench"),
        (["--compare", "unknown.json"], "unknown.json is damaged: a result lacks its name"),
        (["--json", "no/where.json"], "no is not a directory"),
        (["--html", "text.json"], "text.json exists; give --overwrite"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("aud.npy", np.zeros((7, 512), np.float32))
    Path("text.json").write_text("hello")
    Path("other.json").write_text("[]")
    undated, unknown = record("bench", [], command=[]), figures("x", "s", [float("nan")])
    del undated["date"]
    Path("undated.json").write_text(as_json(undated))
    unversioned = record("bench", [], command=[])
    unversioned["machine"]["versions"] = None
    Path("unversioned.json").write_text(as_json(unversioned))
    Path("memory.json").write_text(as_json(record("memory", [], command=[])))
    Path("unknown.json").write_text(as_json(unknown))
    Path("damaged.json").write_text('{"schema_version": 1, "results": [{"name": "crop"}]}')
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(main, ["bench", *words], catch_exceptions=False)
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ") and message in line]
    assert "Traceback" not in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_an_engine_that_does_not_go_with_the_device(anna: Path, tiny_onnx: Path) -> None:
    words = ["bench", "--template", anna, "--model", tiny_onnx, "--device", "cpu", "--engine", "tensorrt"]
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 2
    assert "the render that is to be measured fails: " in result.stderr
    assert "the tensorrt engine runs on NVIDIA GPUs, not on cpu" in result.stderr


def test_help_teaches() -> None:
    shown = CliRunner().invoke(main, ["bench", "--help"]).output
    assert "gpurender bench --compare yesterday.json" in shown
    names = [option for parameter in main.commands["bench"].params for option in parameter.opts]
    assert all(name in shown for name in names)


def test_a_table_of_nothing_measured() -> None:
    shown = table(record("bench", [], command=["by hand"])).splitlines()
    assert shown[0].startswith("gpurender ")
    assert not any("ms a frame" in line or "frames at a time" in line or "median" in line for line in shown)
