"""What is in `benchmarks/`: the restated loop against the reference's own frames, records, tables, whole small runs."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import baseline
import cv2
import materials
import memory
import network
import numpy as np
import pytest
import reference_loop
import scaling
import table
import torch
from conftest import TINY, MakeTemplate
from records import OTHERS, machine_name, measure_and_keep, options, place, save, saved
from schema import SCHEMA, follows

from gpurender import (
    AudioEncoder,
    InputError,
    UNet,
    find_sound,
    find_template,
    load_audio_encoder,
    load_features,
    load_unet,
    open_template,
)
from gpurender.bench.measured import Measured, Record, record
from gpurender.jit import Processor
from gpurender.openvino_requests import has_bfloat16
from gpurender.render import probe_inputs
from gpurender.template import frame_order

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the loop needs the ffmpeg program")


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "parsing"])
def test_the_loops_frames_are_the_references(shared: Path, seeded_unet: Path, kind: str) -> None:
    golden = {f["frame"]: f for f in json.loads((shared / "golden" / "frames.json").read_text())["frames"]}
    features = np.load(shared / "golden" / "speech.npz")["features"]
    network = load_unet(seeded_unet)
    template = shared / "sample" / "template"
    checked = 0
    for number, frame in enumerate(
        reference_loop.frames(template, features, network, "cpu", parsing=kind == "parsing")
    ):
        if number in golden:
            x0, y0, x1, y1 = golden[number]["rect_xyxy"]
            face = cv2.imread(str(shared / "golden" / "frames" / f"{kind}_{number:03d}.png"))
            assert face is not None
            assert baseline.psnr_db(frame[y0:y1, x0:x1], face) >= 60
            checked += 1
        if number == 8:
            break
    assert checked >= 2


def test_the_loop_hears_what_the_reference_heard(shared: Path, seeded_encoder: Path) -> None:
    golden = np.load(shared / "golden" / "speech.npz")
    features = reference_loop.hear(shared / "sample" / "speech.wav", load_audio_encoder(seeded_encoder), "cpu")
    np.testing.assert_allclose(features, golden["features"], atol=2e-3)
    windows = np.stack([reference_loop.window(features, i) for i in range(len(features))])
    kept = golden["windows"]
    np.testing.assert_allclose(windows[golden["window_index"]].reshape(kept.shape), kept, atol=2e-3)


def test_the_loops_network_is_the_network(tiny_unet: Path) -> None:
    network = load_unet(tiny_unet)
    face, audio = torch.rand(1, 6, 320, 320), torch.rand(1, 32, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(reference_loop.forward(network, face, audio), network(face, audio))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_loops_order_is_the_bounce(make_template: MakeTemplate, tiny_unet: Path, count: int) -> None:
    template = make_template(frames=count)
    originals = [cv2.imread(str(template / "full_body_img" / f"{i}.jpg")) for i in range(count)]
    features = np.zeros((2 * count + 1, 512), np.float32)
    frames = reference_loop.frames(template, features, load_unet(tiny_unet), "cpu")
    order = [next(k for k, o in enumerate(originals) if (o[:, :60] == f[:, :60]).all()) for f in frames]  # pyright: ignore
    assert order == frame_order(count, range(2 * count + 1))


# --- whole runs, small -----------------------------------------------------------------------------------------------


@needs_ffmpeg
def test_the_baseline_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(baseline, "TEMPLATE_FRAMES", 3)
    notes: list[str] = []
    results = baseline.measure(
        *(tmp_path, "cpu"),
        networks="avatar",
        precisions=["fp32"],
        seconds=[0.6],
        pairs=1,
        checked=2,
        memory_gib=0.25,
        notes=notes,
    )
    made = record("baseline-avatar", results, command=["by hand"], notes=notes)
    follows(made, SCHEMA)
    by_name = {(result["name"], result["unit"]): result for result in made["results"]}
    ratio = by_name["gpurender against the loop", "times as fast"]
    seconds = [by_name[name, "s"]["runs"] for name in ("reference loop", "gpurender")]
    assert ratio["runs"] == pytest.approx([loop / ours for loop, ours in zip(*seconds, strict=True)])
    assert len(ratio["runs"]) == 1
    if sys.platform == "linux":
        kept = by_name["gpurender against the loop, memory kept", "times as fast"]["runs"]
        loop = by_name["reference loop, memory kept", "s"]["runs"]
        assert kept == pytest.approx([theirs / ours for theirs, ours in zip(loop, seconds[1], strict=True)])
    assert by_name["faces before encoding, against the loop's", "dB"]["min"] >= 60
    assert by_name["decoded files, against the loop's", "dB"]["min"] >= baseline.LEAST_FILES_DB
    assert ratio["parameters"]["memory_GiB"] == 0.25
    assert "| memory GiB |" in table.block(made)


@needs_ffmpeg
def test_videos_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    words = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i"]
    sound = ["-f", "lavfi", "-i", "sine=d=0.8", "-c:v", "libx264", "-c:a", "aac"]
    for name, source in (("a", "testsrc=d=0.8:s=64x64"), ("b", "color=red:d=0.8:s=64x64")):
        subprocess.run([*words, source, *sound, str(tmp_path / f"{name}.mp4")], check=True)
    assert baseline.files_alike(tmp_path / "a.mp4", tmp_path / "a.mp4", 20) == 100
    with pytest.raises(InputError, match="not alike"):
        baseline.files_alike(tmp_path / "a.mp4", tmp_path / "b.mp4", 20)
    with pytest.raises(InputError, match="not of 40 frames"):
        baseline.files_alike(tmp_path / "a.mp4", tmp_path / "a.mp4", 40)


def test_memory_by_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Run:
        report = {  # noqa: RUF012
            **dict.fromkeys(("device", "engine", "precision", "decoder", "encoder"), "x"),
            **dict.fromkeys(("width", "height", "frames"), 2),
        }
        rendering_seconds = (2.0, 12.0)
        resident = [(t / 4, 1000 + 10 * t) for t in range(60)]  # noqa: RUF012

    monkeypatch.setattr(memory, "watch_make", lambda *words, **options: Run())
    monkeypatch.setattr(memory, "avatar_pictures", lambda to, frames: to)
    by_minute, growth = memory.flatness(tmp_path, 2, "cpu")
    assert by_minute.runs == [1000 + 10 * 28, 1000 + 10 * 48]  # after 7 and 12 seconds
    assert growth.runs == [200]
    Run.resident = [*Run.resident[:48], (12.05, 1.0)]  # read as the program ended
    assert memory.flatness(tmp_path, 2, "cpu")[0].runs[-1] == 1000 + 10 * 47


def test_the_line_through_lengths() -> None:
    slope, start, residuals = scaling.fitted({100: [3.0, 3.0], 1000: [21.0], 10_000: [201.0]})
    assert (slope, start) == pytest.approx((0.02, 1.0))
    assert max(residuals) < 1e-9
    assert max(scaling.fitted({100: [3.0], 1000: [21.0], 10_000: [250.0]})[2]) > 1


def test_ways_to_run_the_network(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu" and not has_bfloat16():  # imitated, many times slower
        monkeypatch.setattr(network, "PRECISIONS", {"cpu": ["fp32"]})
    launches = network.LAUNCHES[device.type]
    precisions = network.PRECISIONS[device.type]
    with torch.no_grad():
        figures, notes = network.measure(UNet(**TINY).eval(), device, [2], launches, repeats=1)
        some, said = network.measure(UNet(**TINY).eval(), device, [2], launches[:1], repeats=1, limit=0)
    assert notes == []
    assert {figure.parameters["precision"] for figure in some} == {"fp32"}
    assert [note[:46] for note in said] == ["after 0 s no further way was begun; the first "]
    speeds = {tuple(figure.parameters.values()): figure.runs for figure in figures if figure.name == "second half"}
    assert all(figure.runs[0] > 0 for figure in figures)
    assert {(2, *way) for way in network.ways(device, launches)} == speeds.keys()
    likeness = {figure.parameters["precision"]: figure.runs[0] for figure in figures if figure.unit == "dB"}
    assert {kind for kind in precisions if kind != "fp32"} <= likeness.keys()
    assert all(db > (60 if kind == "fp32" else 15) for kind, db in likeness.items())


def test_float32_is_float32_in_both_halves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: UNet, faces: torch.Tensor) -> tuple[torch.Tensor, ...]:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return whole(self, faces)

    allowed, whole = [], UNet.encode
    monkeypatch.setattr(UNet, "encode", encode)
    monkeypatch.setattr(network, "PRECISIONS", {device.type: ["fp32"]})
    with torch.no_grad():
        network.measure(UNet(**TINY).eval(), device, [1], ["eager"], repeats=1)
    assert len(allowed) > 2
    assert not any(allowed)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LAYOUTS", {"channels last": torch.channels_last})
    if device.type == "cpu":  # each way takes most of a minute
        monkeypatch.setattr(network, "PRECISIONS", {"cpu": ["fp32"]})
    with torch.no_grad():
        figures, notes = network.measure(UNet(**TINY).eval(), device, [2], ["compiled"], repeats=1)
    assert notes == []
    assert {figure.name for figure in figures} >= {"first half", "second half"}
    assert {figure.parameters["launch"] for figure in figures} == {"compiled"}
    assert all(figure.runs[0] > 0 for figure in figures)


@pytest.mark.parametrize("name", ["baseline", "memory", "network", "ops", "scaling", "table"])
def test_the_programs_explain_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_what_is_counted_is_at_least_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", "--repeats", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "memory.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "--repeats: 0 is too few; give at least 1" in capsys.readouterr().err


# --- the widened networks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return materials.widened_networks(tmp_path_factory.mktemp("widened"))


def test_the_widened_networks_are_the_avatars_at_full_width(widened: tuple[Path, Path]) -> None:
    unet, encoder = materials.avatar_networks()
    pairs = [
        (load_unet(unet), load_unet(widened[0]), UNet()),
        (load_audio_encoder(encoder), load_audio_encoder(widened[1]), AudioEncoder()),
    ]
    for _, wide, full in pairs:
        shapes = [
            {name: (tuple(v.shape), v.dtype) for name, v in network.state_dict().items()} for network in (wide, full)
        ]
        assert shapes[0] == shapes[1]
    avatar = open_template(find_template("avatar"))
    features, same = (load_features(find_sound("hello"), encoder=pair) for pair in pairs[1][:2])
    windows = features.windows(0, len(features))
    assert windows.abs().max() > 1
    torch.testing.assert_close(same.windows(0, len(same)), windows, atol=1e-4, rtol=0)
    faces, heard = (inputs[1:3] for inputs in probe_inputs(avatar, features)[:2])
    with torch.inference_mode():
        narrow, wide = (network(faces, heard) for network in pairs[0][:2])
    assert narrow.std() > 0.1
    torch.testing.assert_close(wide, narrow, atol=1e-4, rtol=0)


def test_no_two_channels_of_the_widened_networks_have_the_same_weights(widened: tuple[Path, Path]) -> None:
    for wide in (load_unet(widened[0]), load_audio_encoder(widened[1])):
        convolutions = [layer for layer in wide.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert len(convolutions) in (93, 13)
        for layer in convolutions:
            made, taken = layer.weight.flatten(1), layer.weight.transpose(0, 1).flatten(1)
            assert len(made.unique(dim=0)) == len(made)
            assert len(taken.unique(dim=0)) == len(taken)


# --- records and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").rglob("*.json")), ids=lambda file: file.name)
def test_committed_results_follow_the_schema(file: Path) -> None:
    made = json.loads(file.read_text())
    follows(made, SCHEMA)
    assert file == place(made)
    for result in made["results"]:
        assert result["median"] == pytest.approx(float(np.median(result["runs"])))
        assert (result["min"], result["max"]) == (min(result["runs"]), max(result["runs"]))


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_tables_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tables = table.PAGES[page](list(saved()))
    assert table.with_tables(text, tables) == text, "run python benchmarks/table.py --write"


def test_a_benchmark_ends_with_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(None).parse_args(["--device", "cpu", "--results", str(tmp_path)])

    def measure(folder: Path, device: str) -> list[Measured]:
        assert not [*(folder / "cache").iterdir()]
        notes.append("as it was")
        return [Measured("peak", {"device": device}, "bytes", [1e9, 3e9])]

    notes: list[str] = []
    measure_and_keep("memory", given, measure, notes)
    (made,) = saved(tmp_path)
    follows(made, SCHEMA)
    assert made["notes"] == ["as it was"]
    assert [result["name"] for result in made["results"]] == ["peak", OTHERS]
    assert f"wrote {place(made, tmp_path)}" in capsys.readouterr().out


def test_a_benchmark_that_fails_says_so_in_a_line(tmp_path: Path) -> None:
    def measure(folder: Path, device: str) -> list[Measured]:
        raise InputError("there is no such thing.")

    for device, says in (("cpu", "Error: there is no such thing."), ("tpu", "Error: 'tpu' is not a device")):
        given = options(None).parse_args(["--device", device, "--results", str(tmp_path)])
        with pytest.raises(SystemExit, match=says):
            measure_and_keep("memory", given, measure)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_benchmark_makes_its_gpu_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    current = [0]

    def exchange(other: int) -> int:
        before, current[0] = current[0], other
        return before

    def measure(folder: Path, device: str) -> list[Measured]:
        raise InputError(f"on GPU {current[0]}.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    for exchanging in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, exchanging, exchange)
    given = options(None).parse_args(["--device", device, "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"on GPU {index}"):
        measure_and_keep("memory", given, measure)
    assert current == [0]


def by_hand(suite: str = "memory", version: str = "1.2") -> Record:
    results = [
        Measured("peak", {"width": 4, "precision": "fp32"}, "bytes", [2e9, 1e9, 3e9]),
        Measured("peak", {"width": 4, "precision": "bf16"}, "bytes", [1e9]),
    ]
    made = record(suite, results, command=["by hand"])
    made["gpurender"] = {"version": version, "commit": None}
    made["notes"] = ["as it was"]
    made["machine"] |= {"processor": "Intel(R) Xeon(R) Processor @ 2.60GHz", "cores": 2, "gpu": None}
    return made


def test_a_tables_columns_are_what_differs() -> None:
    shown = table.block(by_hand())
    assert "**Memory** (Intel(R) Xeon(R) Processor @ 2.60GHz, 2 cores" in shown
    assert "width 4" in shown.splitlines()[0]
    assert shown.splitlines()[2:] == [
        "|  | precision | median | smallest to largest | runs |",
        "| --- | --- | --- | --- | --- |",
        "| peak | fp32 | 2.00 GB | 1.00 GB – 3.00 GB | 3 |",
        "| peak | bf16 | 1.00 GB |  | 1 |",
        "",
        "Note: as it was",
    ]


def test_tables_go_between_the_markers() -> None:
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.with_tables(readme, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- benchmarks: begin -->"):
        table.with_tables("nothing", "new")


def test_records_have_their_places(tmp_path: Path) -> None:
    made = by_hand()
    assert machine_name(made) == "intel-xeon-2.60ghz-2-cores"
    assert save(made, tmp_path) == tmp_path / "1.2" / "memory--intel-xeon-2.60ghz-2-cores.json"
    save(by_hand(version="1.10"), tmp_path)
    assert [kept["gpurender"]["version"] for kept in saved(tmp_path)] == ["1.10"]
    made["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
    assert machine_name(made) == "nvidia-h100-80gb-hbm3"
    assert re.fullmatch(r"[a-z0-9.-]+", machine_name(made))


def test_processors_are_named_with_what_tells_their_speed() -> None:
    """The committed records' files have these names."""
    zen4 = Processor("znver4", "", 16, bfloat16=True, bytes=True, tiles=False)
    assert zen4.vectors == "AVX-512, bfloat16, VNNI"
    assert zen4._replace(tiles=True).vectors == "AMX"
    assert zen4._replace(lanes=8, bfloat16=False, bytes=False).vectors == "AVX2"
    assert zen4._replace(lanes=0).vectors == ""
