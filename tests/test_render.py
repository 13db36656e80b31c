import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import av
import numpy as np
import onnx
import pytest
import soundfile
import torch
from conftest import MakeTemplate, tones
from networks import network_of
from onnx import helper
from PIL import Image

import gpurender
from gpurender import (
    DeviceError,
    Engine,
    InputError,
    OutputError,
    crop_faces,
    face_input,
    frame_order,
    load_audio_engine,
    load_engine,
    load_features,
    open_template,
    paste_faces,
    probe_inputs,
    render,
    write_frames,
)
from gpurender.engine import NO_FIRST_HALF, EngineName
from gpurender.faces import Faces, alone
from gpurender.network import Encoded
from gpurender.render import Pixels
from gpurender.report import Summary
from gpurender.template import Order


@pytest.fixture
def features_file(tmp_path: Path) -> Path:
    path = tmp_path / "features.npy"
    np.save(path, np.random.RandomState(3).uniform(0, 2, (11, 512)).astype(np.float32))
    return path


def all_frames(template: Path, features: Path, unet: Path, device: torch.device, **options) -> torch.Tensor:
    budget = options.pop("memory_budget", None)
    opened = open_template(template, device=device, memory_budget=budget)
    engine = load_engine(unet, device=device, engine="torch", precision="fp32")
    batches = list(render(opened, load_features(features, device=device), engine, **options))
    assert all(batch.device.type == device.type and batch.dtype == torch.uint8 for batch in batches)
    return torch.cat(batches).cpu()


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_is_at_least_one(make_template: MakeTemplate, features_file: Path, tiny_unet: Path, batch: int) -> None:
    with pytest.raises(InputError, match=f"a batch of {batch} frames cannot be rendered"):
        all_frames(make_template(), features_file, tiny_unet, torch.device("cpu"), batch=batch)


def test_what_is_asked_for_is_looked_at_before_anything_is_loaded(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, tmp_path: Path
) -> None:
    wrong: Any = "yuv420p"
    with pytest.raises(InputError, match="'yuv420p' is no kind of pixels; choose rgb, nv12"):
        all_frames(make_template(), features_file, tiny_unet, torch.device("cpu"), pixels=wrong)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("a.mp4", {"batch": 0}, "a batch of 0 frames"),
        ("%d.png", {"sound": "s.wav"}, r"numbered pictures have no sound; leave out s\.wav"),
        ("a.mp4", {"sound": "absent.wav"}, r"absent\.wav: there is no such sound file"),
    ]
    for out, options, words in cases:
        with pytest.raises(InputError, match=words):
            gpurender.make(tmp_path / "no template", features_file, tmp_path / out, **options)


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_torchs_default_type_is_not_the_renders(
    make_template: MakeTemplate, tmp_path: Path, tiny_unet: Path, tiny_encoder: Path, engine: EngineName
) -> None:
    """The program around a render may have set it."""
    speech = tmp_path / "speech.wav"
    soundfile.write(speech, tones(0.5, 16000), 16000)

    def rendered() -> torch.Tensor:
        features = load_features(speech, encoder=load_audio_engine(tiny_encoder))
        runtime = load_engine(tiny_unet, device="cpu", engine=engine, precision="fp32")
        return torch.cat(list(render(open_template(template), features, runtime)))

    template = make_template()
    expected = rendered()
    assert len(expected) > 8
    try:
        for default in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(default)
            assert torch.equal(rendered(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_render_is_the_steps_one_after_another(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, device: torch.device
) -> None:
    path = make_template(parsing=True)
    frames = all_frames(path, features_file, tiny_unet, device, batch=4)
    template, features = open_template(path), load_features(features_file)
    network = gpurender.load_unet(tiny_unet)
    assert len(frames) == len(features) == 11
    for i, shown in enumerate(frame_order(len(template), range(11))):
        original, keep = template.frames([shown])
        rects = template.rects[[shown]]
        crops = crop_faces(original, rects)
        with torch.inference_mode():
            prediction = network(face_input(crops), features.windows(i, i + 1))
        expected = paste_faces(original, crops, prediction, rects, keep)[0]
        assert (frames[i].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("batch", [1, 3, 11, 64])
def test_batch_size_does_not_matter(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, device: torch.device, batch: int
) -> None:
    path = make_template()
    one = all_frames(path, features_file, tiny_unet, device, batch=2)
    other = all_frames(path, features_file, tiny_unet, device, batch=batch)
    assert (one.int() - other.int()).abs().max() <= 1  # a batch may be summed in another order


@pytest.mark.parametrize("megabytes", [0, 1, 3])
def test_memory_budget_does_not_matter(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, megabytes: int
) -> None:
    path = make_template()
    plenty = all_frames(path, features_file, tiny_unet, torch.device("cpu"), batch=4)
    scarce = all_frames(
        path, features_file, tiny_unet, torch.device("cpu"), batch=4, memory_budget=megabytes * 1_000_000
    )
    assert torch.equal(plenty, scarce)


@pytest.mark.parametrize("pixels", ["nv12", "rgb"])
@pytest.mark.parametrize("opened", ["make_template", "make_package"])
def test_where_memory_is_short_a_note_says_how_much_would_do(
    request: pytest.FixtureRequest,
    features_file: Path,
    tiny_unet: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: str,
    pixels: Pixels,
) -> None:
    path = request.getfixturevalue(opened)(frames=4, parsing=True)
    features, engine = load_features(features_file), load_engine(tiny_unet, device="cpu", engine="torch")

    def notes(memory: int) -> list[str]:
        template = open_template(path, memory_budget=memory, keep_frames=pixels == "rgb")
        told: list[str] = []
        for _ in render(template, features, engine, batch=1, pixels=pixels, notes=told):
            pass
        return told

    (note,) = notes(0)
    said = re.fullmatch(
        r"the network's first half ran 11 times for 4 template frames: with --memory (\d+) it would run once for each",
        note,
    )
    assert said is not None
    enough = int(said[1])
    assert notes(enough * 2**20) == []
    assert len(notes((enough - 2) * 2**20)) == 1
    monkeypatch.setattr(sys.modules["gpurender.render"], "free_memory", lambda: (enough - 1) * 2**20)
    (note,) = notes(0)
    assert note.endswith(f": keeping what it makes would take {enough} MiB, more than is free")


@pytest.mark.gpu
def test_windows_on_the_host_go_to_the_gpu(make_template: MakeTemplate, features_file: Path, tiny_unet: Path) -> None:
    template, engine = open_template(make_template(), device="cuda"), load_engine(tiny_unet, device="cuda")
    ours, theirs = (
        torch.cat([*render(template, load_features(features_file, device=device), engine)])
        for device in ("cpu", "cuda")
    )
    assert torch.equal(ours, theirs)


def test_the_bundled_recording_goes_with_any_features(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.mp4"
    gpurender.make(make_template(), features_file, out, model=tiny_unet, device="cpu", engine="torch", sound="hello")
    with av.open(str(out)) as container:
        assert len(container.streams.audio) == 1


def test_a_network_that_hears_from_its_first_layer_on_has_no_first_half(
    make_template: MakeTemplate, features_file: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    network = network_of(
        helper.make_node("Conv", ["audio", "heard"], ["told"], kernel_shape=[1, 1]),
        helper.make_node("Resize", ["told", "", "twenty"], ["spread"], mode="nearest"),
        helper.make_node("Add", ["face", "spread"], ["both"]),
        helper.make_node("Conv", ["both", "mixed"], ["drawn"], kernel_shape=[1, 1]),
        helper.make_node("Sigmoid", ["drawn"], ["picture"]),
        batch="n",
        twenty=np.array([1, 1, 20, 20], np.float32),
        heard=random.normal(size=(6, 32, 1, 1)).astype(np.float32),
        mixed=random.normal(size=(3, 6, 1, 1)).astype(np.float32),
    )
    onnx.save(network, tmp_path / "early.onnx")
    template = make_template(frames=4)
    for memory in (None, 0):
        made = gpurender.make(
            template,
            features_file,
            tmp_path / "a.mp4",
            model=tmp_path / "early.onnx",
            device="cpu",
            memory_budget=memory,
            overwrite=True,
        )
        assert made.faces_encoded == 0
        assert NO_FIRST_HALF in made.notes
        assert not any("--memory" in note for note in made.notes)


def test_the_network_hears_the_audio(make_template: MakeTemplate, tmp_path: Path, tiny_unet: Path) -> None:
    path = make_template(frames=1)
    np.save(tmp_path / "quiet.npy", np.zeros((3, 512), np.float32))
    np.save(tmp_path / "loud.npy", np.full((3, 512), 3, np.float32))
    quiet, loud = (
        all_frames(path, tmp_path / name, tiny_unet, torch.device("cpu")) for name in ("quiet.npy", "loud.npy")
    )
    assert (quiet != loud).any(1)[:, 60:180, 90:210].double().mean() > 0.1


@pytest.mark.parametrize("order", ["bounce", "loop", "mirror"])
def test_orders_and_start(make_template: MakeTemplate, features_file: Path, tiny_unet: Path, order: Order) -> None:
    path = make_template(frames=4)
    frames = all_frames(path, features_file, tiny_unet, torch.device("cpu"), order=order, start_frame=2)
    template = open_template(path)
    for i, shown in enumerate(frame_order(4, range(11), order, 2)):
        original, _ = template.frames([shown])
        assert torch.equal(frames[i, :, :, :60], original[0, :, :, :60])  # left of the face


def test_an_error_in_the_middle_ends_the_threads(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path
) -> None:
    path = make_template(frames=5)
    (path / "full_body_img" / "4.jpg").write_bytes((path / "full_body_img" / "4.jpg").read_bytes()[:3000])
    with pytest.raises(gpurender.InputError, match="4.jpg is corrupt or truncated"):
        all_frames(path, features_file, tiny_unet, torch.device("cpu"), batch=1)


def test_python_api_of_the_readme(
    make_template: MakeTemplate, speech: Path, tiny_unet: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    template = gpurender.open_template(make_template())
    encoder = gpurender.load_audio_engine(tiny_encoder, torch.device("cpu"))
    features = gpurender.load_features(speech, encoder=encoder)
    engine = gpurender.load_engine(tiny_unet, mode=features.mode, device="cpu", engine="torch")
    frames = gpurender.render(template, features, engine)
    assert gpurender.write_frames(frames, tmp_path / "a.mp4", fps=features.fps, sound=speech).frames == len(features)


def test_pictures_of_the_template_are_exact_outside_the_face(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, tmp_path: Path
) -> None:
    path = make_template(suffix=".png")
    out = tmp_path / "frames" / "%03d.png"
    gpurender.make(path, features_file, out, model=tiny_unet, engine="torch", precision="fp32")
    template = open_template(path)
    for i, shown in enumerate(frame_order(5, range(11))):
        written = np.asarray(Image.open(tmp_path / "frames" / f"{i + 1:03d}.png"))
        original = np.asarray(Image.open(path / "full_body_img" / f"{shown}.png"))
        x0, y0, x1, y1 = template.rects[shown].tolist()
        same = (written == original).all(2)
        same[y0:y1, x0:x1] = True
        assert same.all()


def test_the_programs_default_device_does_not_matter(
    make_template: MakeTemplate, features_file: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """`meta` stands for a GPU: what is meant for the host would be lost there."""

    path = make_template()

    def rendered() -> list[torch.Tensor]:
        template, features = open_template(path), load_features(features_file)
        engine = load_engine(tiny_onnx, device="cpu", precision="fp32", probe=probe_inputs(template, features))
        frames = [list(render(template, features, engine, pixels=pixels)) for pixels in get_args(Pixels)]
        for kind, pictures in enumerate(frames):
            write_frames(pictures, tmp_path / f"{kind}.mkv", fps=25, overwrite=True)
        return [batch for kind in frames for batch in kind]

    expected = rendered()
    with torch.device("meta"):
        found = rendered()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_programs_default_device_does_not_matter_for_checkpoints(
    make_template: MakeTemplate, tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, tiny_encoder: Path
) -> None:
    speech, template = tmp_path / "speech.wav", make_template()
    soundfile.write(speech, tones(0.5, 16000), 16000)

    def rendered(network: Path, engine: EngineName) -> list[torch.Tensor]:
        features = load_features(speech, encoder=load_audio_engine(tiny_encoder))
        runtime = load_engine(network, device="cpu", engine=engine, precision="fp32")
        return list(render(open_template(template), features, runtime))

    cases: list[tuple[Path, EngineName]] = [(tiny_unet, "torch"), (tiny_unet, "openvino"), (tiny_onnx, "torch")]
    for network, engine in cases:
        expected = rendered(network, engine)
        with torch.device("meta"):
            found = rendered(network, engine)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Drawing:
    """A caller's own engine."""

    name, precision, mode, batch = "own", "fp32", "ave", 2
    device = torch.device("cpu")

    def __init__(self, picture: torch.Tensor) -> None:
        self.picture = picture
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = []

    def encode(self, faces: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return [(face,) for face in faces]

    def begin(self, encoded: Sequence[Any], audio: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: self.decode(encoded, audio)

    def decode(self, encoded: Sequence[Any], audio: torch.Tensor) -> torch.Tensor:
        return self.picture.expand(len(encoded), -1, -1, -1)


@pytest.mark.parametrize("pixels", get_args(Pixels))
def test_what_an_engine_draws_is_looked_at(make_template: MakeTemplate, features_file: Path, pixels: Pixels) -> None:
    template, features = open_template(make_template()), load_features(features_file)

    def rendered(picture: torch.Tensor) -> list[torch.Tensor]:
        return list(render(template, features, cast(Engine, Drawing(picture)), pixels=pixels))

    good = torch.full((1, 3, 320, 320), 0.5)
    expected = rendered(good)
    assert all(torch.equal(a, b) for a, b in zip(expected, rendered(good.clone().requires_grad_()), strict=True))
    for picture in (good[..., :16, :16], good.to(torch.uint8), good.to("meta")):
        with pytest.raises(ValueError, match="predictions are"):
            rendered(picture)


def test_what_does_not_go_together_is_told(make_template: MakeTemplate, features_file: Path, tmp_path: Path) -> None:
    template, engine = open_template(make_template()), Drawing(torch.full((1, 3, 320, 320), 0.5))
    np.save(tmp_path / "wenet.npy", np.zeros((9, 16, 512), np.float32))
    with pytest.raises(InputError, match="the features are wenet's, but the engine takes ave's"):
        next(render(template, load_features(tmp_path / "wenet.npy"), cast(Engine, engine)))
    engine.device = torch.device("cuda", 1)
    with pytest.raises(InputError, match="the engine is on cuda:1, but the template on cpu"):
        next(render(template, load_features(features_file), cast(Engine, engine)))


def test_places_are_told_as_everywhere(make_template: MakeTemplate, features_file: Path) -> None:
    path = make_template()
    for place in ("tpu", "cuda:99"):
        with pytest.raises(DeviceError):
            open_template(path, device=place)
        with pytest.raises(DeviceError):
            load_features(features_file, device=place)
    assert open_template("avatar").path.name == "avatar"


def test_a_report_that_cannot_be_written_does_not_hide_the_video(
    make_template: MakeTemplate, features_file: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OutputError("the disk is full.")

    monkeypatch.setattr(Summary, "write", full)
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    with pytest.raises(OutputError, match=r"the disk is full\. .*a\.mp4 is complete"):
        gpurender.make(make_template(), features_file, out, model=tiny_onnx, device="cpu", report=report)
    assert out.is_file()


def test_a_face_that_is_kept_does_not_hold_its_batch() -> None:
    batch = torch.arange(24.0).reshape(4, 6)
    (kept,) = alone((batch[2],))
    assert torch.equal(kept, batch[2])
    assert kept.untyped_storage().nbytes() == 6 * 4
    assert alone((kept,))[0] is kept


class Counted:
    """An engine whose encodings take as many bytes as what they are of."""

    def encode(self, faces: torch.Tensor) -> list[Encoded]:
        return [(face.clone(),) for face in faces]


@pytest.mark.parametrize(("fit", "again"), [(0, 16), (1, 16), (2, 14), (2.9, 14), (7, 9), (16, 0), (100, 0)])
def test_faces_are_encoded_again_where_they_do_not_fit(fit: float, again: int) -> None:
    """Where fewer than an eighth would fit, none is kept."""
    pictures = torch.arange(17, dtype=torch.uint8)[:, None].repeat(1, 50)
    size = 2 * pictures[0].nbytes
    faces = Faces(range(16), cast(Engine, Counted()), int(fit * size))  # the last is not shown again
    for shown in (range(17), range(16), [16]):

        def crop(which: list[int], shown: Sequence[int] = shown) -> tuple[torch.Tensor, torch.Tensor]:
            cut = pictures[[shown[k] for k in which]]
            return cut, cut

        crops, encoded = faces(shown, crop)
        assert torch.equal(crops, pictures[list(shown)])
        assert all(torch.equal(encoding, pictures[i]) for i, (encoding,) in zip(shown, encoded, strict=True))
    assert faces.encoded == 17 + again + 1
    assert faces.memory_for_all == 16 * size


class Scarce:
    """An engine on a device whose memory does for a few frames at a time."""

    def __init__(self, engine: Engine, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self._engine, self._most, self._error = engine, most, error
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def begin(self, encoded: Sequence[Encoded], audio: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.asked.append(len(encoded))
        if len(encoded) > self._most:
            raise self._error("CUDA out of memory.")
        return self._engine.begin(encoded, audio)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_batch_and_goes_on(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, error: type[Exception]
) -> None:
    """As torch says it of its own tensors, CUDA of what it takes itself, and Triton."""
    template, features = open_template(make_template()), load_features(features_file)
    engine = load_engine(tiny_unet, device="cpu", engine="torch", precision="fp32")
    expected = torch.cat(list(render(template, features, engine, batch=2)))
    scarce, notes = Scarce(engine, most=2, error=error), []
    frames = list(render(template, features, cast(Engine, scarce), batch=8, notes=notes))
    assert (torch.cat(frames).int() - expected.int()).abs().max() <= 1
    assert [len(batch) for batch in frames] == [2, 2, 2, 2, 2, 1]
    assert scarce.asked[:3] == [8, 4, 2]
    assert notes == [f"cpu ran out of memory: rendered {size} frames at a time from frame 0" for size in (4, 2)]


def test_no_memory_for_a_single_frame(make_template: MakeTemplate, features_file: Path, tiny_unet: Path) -> None:
    template, features = open_template(make_template()), load_features(features_file)
    engine = load_engine(tiny_unet, device="cpu", engine="torch", precision="fp32")
    with pytest.raises(DeviceError, match=r"cpu has too little free memory for a frame of \d+×\d+; end other"):
        list(render(template, features, cast(Engine, Scarce(engine, most=0)), batch=4))


def test_the_report_says_what_was_used_and_what_it_cost(
    make_template: MakeTemplate, features_file: Path, tiny_unet: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    template = make_template()
    summary = gpurender.make(
        template, features_file, tmp_path / "a.mp4", model=tiny_unet, engine="torch", batch=4, report=report
    )
    told = json.loads(report.read_text())
    assert told == json.loads(json.dumps(summary.as_dict()))
    assert (told["engine"], told["precision"], told["decoder"], told["encoder"]) == (
        "torch",
        "fp32",
        "pillow",
        "libx264",
    )
    assert (told["frames"], told["batch"]) == (11, 4)
    assert set(told["stage_seconds"]) == {"template", "network", "paste", "encode"}
    assert 0 < told["prepare_seconds"] < told["first_frame_seconds"] < told["seconds"]
    assert told["versions"]["torch"]
    equal = dataclasses.replace(summary, measured_psnr_db={"bf16": math.inf, "int8": 51.0})
    equal.write(report, overwrite=True)
    assert json.loads(report.read_text(), parse_constant=pytest.fail)["measured_psnr_db"] == {"bf16": None, "int8": 51}
    with pytest.raises(gpurender.OutputError, match=r"report.json exists; give --overwrite"):
        gpurender.make(template, features_file, tmp_path / "b.mp4", model=tiny_unet, report=report)
    assert not (tmp_path / "b.mp4").exists()
