"""8-bit integers in the network's second half: the ranges that they come from, what they draw, when they are taken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import tones
from materials import widened_networks

import gpurender.openvino_engine as openvino_engine
from gpurender import load_audio_engine, load_engine, load_features, load_unet, make, open_template, predict
from gpurender.crop import crop_and_mask
from gpurender.engine import LEAST_INT8_DB, Probe, least_psnr
from gpurender.errors import DeviceError, InputError
from gpurender.export import cached_onnx, example_input
from gpurender.find import BUNDLED
from gpurender.jit import this_processor
from gpurender.network import Mode
from gpurender.openvino_engine import OpenVinoEngine, pays
from gpurender.openvino_network import cached_network, make_ready
from gpurender.openvino_requests import has_bfloat16
from gpurender.private_openvino import openvino, opset
from gpurender.ranges import MARGIN, in_bytes, measured_ranges
from gpurender.render import probe_inputs
from gpurender.up_decoder import UpDecoder

AVATAR = BUNDLED / "avatar"


@pytest.fixture
def _bytes() -> None:
    if not this_processor().bytes:
        pytest.skip("this processor does not multiply bytes (VNNI): NO int8 RUNS HERE")


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_torchs_layers(tiny_unet: Path, tiny_onnx: Path) -> None:
    """Of the inputs of the last block's second half, which rewriting the network leaves as they are."""
    faces, audio = example_input(3, "ave")
    network = make_ready(tiny_onnx, None)
    encoded = OpenVinoEngine(network, "fp32").encode(faces)
    items = [(*levels, heard) for levels, heard in zip(encoded, audio, strict=True)]
    found = list(measured_ranges(network.decoder, items).values())
    unet = load_unet(tiny_unet)
    given: list[torch.Tensor] = []
    for name in (0, 3, 6):
        layer = unet.get_submodule(f"up5.conv.double_conv.1.conv.{name}")
        layer.register_forward_hook(lambda layer, inputs, output: given.append(inputs[0]))
    with torch.inference_mode():
        unet(faces, audio)
    for tensor in given:
        expected = MARGIN * torch.stack(tensor.aminmax())
        most = (0.02 if has_bfloat16() else 1e-4) * expected.abs().max()  # of the wider end
        assert any((torch.tensor(one) - expected).abs().max() <= most for one in found)


@pytest.mark.usefixtures("_bytes")
def test_convolutions_in_bytes_are_torchs() -> None:
    """A 1×1 convolution and a depthwise one with a bias in between, against torch's own 8 bits."""
    random = np.random.default_rng(1)
    dense, deep = (random.standard_normal(size, np.float32) for size in ((24, 16, 1, 1), (24, 1, 1, 3, 3)))
    bias = random.standard_normal((1, 24, 1, 1), np.float32)
    x = opset.parameter([1, 16, 12, 20], np.float32)
    inner = opset.relu(opset.add(opset.convolution(x, dense, [1, 1], [0, 0], [0, 0], [1, 1]), bias))
    last = opset.group_convolution(inner, deep, [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([last], [x])  # pyright: ignore  # its own annotations contradict each other
    pixels = torch.from_numpy(random.standard_normal((1, 16, 12, 20), np.float32))
    low, high = (MARGIN * end.item() for end in pixels.aminmax())
    exact_inner = (F.conv2d(pixels, torch.from_numpy(dense)) + torch.from_numpy(bias)).relu()
    most = MARGIN * exact_inner.max().item()
    lowered = in_bytes(model, {x.get_friendly_name(): (low, high), inner.get_friendly_name(): (0.0, most)})
    compiled = openvino.Core().compile_model(lowered, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled([pixels.numpy()])[0])

    def quantised(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
        step = (high - low) / 255
        return torch.fake_quantize_per_tensor_affine(value, step, round(-low / step), 0, 255)

    def whole(weights: np.ndarray) -> torch.Tensor:
        kernel = torch.from_numpy(weights)
        steps = kernel.abs().flatten(1).amax(1) / 127
        return torch.fake_quantize_per_channel_affine(kernel, steps, torch.zeros(24, dtype=torch.int32), 0, -127, 127)

    inner = (F.conv2d(quantised(pixels, low, high), whole(dense)) + torch.from_numpy(bias)).relu()
    expected = F.conv2d(quantised(inner, 0, most), whole(deep[:, 0]), padding=1, groups=24)
    exact = F.conv2d(exact_inner, torch.from_numpy(deep[:, 0]), padding=1, groups=24)
    lost = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.2 * lost
    assert (found - expected).abs().mean() < 0.5 * lost  # the zero lies elsewhere, by less than a step


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_among_the_bytes_of_inputs_that_are_all_positive_or_negative(sign: int) -> None:
    """Padding is zeros: a range without it would have OpenVINO compute in float32 instead."""
    x = opset.parameter([1, 4, 6, 6], np.float32)
    weights = np.ones((8, 4, 3, 3), np.float32)
    model = openvino.Model([opset.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])], [x])  # pyright: ignore
    low, high = sorted((2.0 * sign, 3.0 * sign))
    lowered = in_bytes(model, {x.get_friendly_name(): (low, high)})
    compiled = openvino.Core().compile_model(lowered, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = torch.linspace(low, high, 144).reshape(1, 4, 6, 6)
    found = torch.from_numpy(compiled([pixels.numpy()])[0])
    expected = F.conv2d(pixels, torch.from_numpy(weights), padding=1)
    assert (found - expected).abs().max() < 36 * 3 / 255
    run = [
        op
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert [op.get_rt_info()["runtimePrecision"].astype(str) for op in run] == ["u8"]


def test_numbers_that_are_not_finite_are_refused() -> None:
    x = opset.parameter([1, 2, 4, 4], np.float32)
    weights = np.ones((2, 2, 1, 1), np.float32)
    model = openvino.Model([opset.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1])], [x])  # pyright: ignore
    with pytest.raises(InputError, match="not finite"):
        measured_ranges(model, [(torch.full((2, 4, 4), torch.inf),)])


@pytest.mark.usefixtures("_bytes")
def test_encodings_of_another_precision_are_refused(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel sees their address alone, and would read beyond them."""
    network = make_ready(tiny_onnx, None)
    faces, audio = example_input(2, "ave")
    exact = OpenVinoEngine(network, "fp32")
    encoded = exact.encode(faces)
    ranges = measured_ranges(network.decoder, [(*levels, heard) for levels, heard in zip(encoded, audio, strict=True)])
    engines = [exact, OpenVinoEngine(network, "bf16"), OpenVinoEngine(network, "int8", ranges)]
    for engine in engines:
        if not isinstance(engine._decoder, UpDecoder):
            pytest.skip("these blocks are not the kernels' here")
        for other in engines:
            if other is not engine:
                with pytest.raises((ValueError, RuntimeError)):
                    engine.decode(other.encode(faces), audio)


# --- a network of full width that was trained ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The avatar's network widened to full width."""
    return widened_networks(tmp_path_factory.mktemp("widened"))[0]


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Of the avatar that says hello."""
    features = load_features(
        BUNDLED / "hello.flac", encoder=load_audio_engine(AVATAR / "models" / "audio_encoder.pth"), device="cpu"
    )
    return probe_inputs(open_template(AVATAR, device="cpu"), features)


@pytest.mark.usefixtures("_bytes")
def test_int8_draws_frames_that_it_has_not_seen(wide: Path, probe: Probe) -> None:
    exact = load_engine(wide, device="cpu", precision="fp32")
    engine = load_engine(wide, device="cpu", precision="int8", probe=probe)
    assert engine.precision == "int8"
    template = open_template(AVATAR, device="cpu")
    shown = list(range(5, 160, 13))
    faces = crop_and_mask(template.frames(shown)[0], template.rects[shown])[1]
    audio = probe.audio[torch.arange(len(shown)) % len(probe.audio)]
    assert least_psnr(predict(engine, faces, audio), predict(exact, faces, audio)) > 43  # 46.5 measured


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize(("half", "tiles", "least"), [(False, False, 100), (True, False, 500), (True, True, 3000)])
def test_int8_is_tried_where_it_saves_more_than_it_costs(
    wide: Path, half: bool, tiles: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = this_processor()
    decoder = cached_network(cached_onnx(wide, None, print), None).decoder
    monkeypatch.setattr(openvino_engine, "this_processor", lambda: here._replace(tiles=tiles))
    monkeypatch.setattr(openvino_engine, "has_bfloat16", lambda: half)
    assert pays("int8", decoder, least)
    assert not pays("int8", decoder, least - 1)


@pytest.mark.usefixtures("_bytes")
def test_auto_takes_int8_where_it_pays(wide: Path, probe: Probe, tiny_onnx: Path) -> None:
    taken = load_engine(wide, device="cpu", probe=probe._replace(frames=5000))
    assert taken.precision == "int8"
    assert list(taken.measured_psnr_db) == ["int8"]
    assert taken.measured_psnr_db["int8"] >= LEAST_INT8_DB
    assert load_engine(wide, device="cpu", probe=probe._replace(frames=90)).precision != "int8"
    narrow = load_engine(tiny_onnx, device="cpu", probe=probe._replace(frames=5000))
    assert "int8" not in narrow.measured_psnr_db


@pytest.mark.usefixtures("_bytes")
def test_auto_refuses_int8_where_it_is_too_far_away(seeded_onnx: Path, probe: Probe) -> None:
    engine = load_engine(seeded_onnx, device="cpu", probe=probe._replace(frames=5000))
    assert engine.precision != "int8"
    assert engine.measured_psnr_db["int8"] < LEAST_INT8_DB


@pytest.mark.usefixtures("_bytes")
def test_int8_where_openvino_computes_all_of_it(wide: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "up_decoder", lambda *given: None)
    exact = load_engine(wide, device="cpu", precision="fp32")
    engine = load_engine(wide, device="cpu", precision="int8", probe=probe)
    assert isinstance(engine, OpenVinoEngine)
    assert not isinstance(engine._decoder, UpDecoder)
    assert least_psnr(*(predict(one, probe.faces, probe.audio) for one in (engine, exact))) > 35  # 40 measured


@pytest.mark.usefixtures("_bytes")
@pytest.mark.parametrize("mode", ["ave", "hubert", "wenet"])
def test_int8_of_narrow_networks_of_any_mode(tiny_of: Callable[[Mode], Path], mode: Mode) -> None:
    inputs = example_input(2, mode)
    exact, engine = (
        load_engine(tiny_of(mode), mode=mode, device="cpu", precision=precision, probe=Probe(*inputs))
        for precision in ("fp32", "int8")
    )
    assert least_psnr(predict(engine, *inputs), predict(exact, *inputs)) > 30


@pytest.mark.usefixtures("_bytes")
def test_int8_needs_frames_to_measure_on(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="int8 needs a probe"):
        load_engine(tiny_onnx, device="cpu", precision="int8")
    soundfile.write(tmp_path / "speech.wav", tones(1, 16000), 16000)
    summary = make("avatar", tmp_path / "speech.wav", tmp_path / "out.mp4", device="cpu", precision="int8")
    assert (summary.precision, summary.frames) == ("int8", 24)


def test_int8_where_the_processor_has_none(tiny_onnx: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    here = this_processor()
    monkeypatch.setattr(openvino_engine, "this_processor", lambda: here._replace(bytes=False))
    with pytest.raises(DeviceError, match="the openvino engine has no int8 on this processor; it has fp32"):
        load_engine(tiny_onnx, device="cpu", precision="int8", probe=probe)
