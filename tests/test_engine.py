import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf, log10
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from onnx import TensorProto, helper

from gpurender import (
    DeviceError,
    InputError,
    UNet,
    load_audio_encoder,
    load_audio_engine,
    load_engine,
    load_unet,
    openvino_requests,
    predict,
)
from gpurender.cuda import resolve_device
from gpurender.engine import Choice, EngineName, Precision, Probe, fastest_that_agrees, least_psnr
from gpurender.export import example_input, export_onnx
from gpurender.half import to_half
from gpurender.network import WINDOW_SHAPES
from gpurender.openvino_engine import OpenVinoEngine, faster_on_cpu
from gpurender.openvino_network import OnnxNetwork, make_ready


def torch_picture(path: Path, batch: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    inputs = example_input(batch, "ave")
    with torch.inference_mode():
        return inputs, load_unet(path)(*inputs)


def test_openvino_draws_what_torch_draws(seeded_unet: Path, seeded_onnx: Path) -> None:
    inputs, expected = torch_picture(seeded_unet, 3)
    picture = predict(load_engine(seeded_onnx, device="cpu", precision="fp32"), *inputs)
    assert picture.dtype == torch.float32
    assert (picture - expected).abs().max() < 2e-4
    assert least_psnr(picture, expected) > 60


def test_halves_change_nothing_and_tiles_no_more_than_rounding(
    seeded_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, cutting the eased network gives the same bits as running it whole.

    So does tiling it with AVX-512; with AVX2 alone, OpenVINO adds in another order where tensors have another height.
    """
    import gpurender.halves
    import gpurender.openvino_engine
    import gpurender.openvino_graph

    monkeypatch.setattr(gpurender.openvino_engine, "up_decoder", lambda *given: None)

    def bands(network: OnnxNetwork) -> int:
        return sum(op.get_type_name() == "Slice" for op in gpurender.openvino_graph.tile(network.decoder).get_ops())

    inputs = example_input(2, "ave")
    network = make_ready(seeded_onnx, None)
    assert bands(network) > 0
    tiled = predict(OpenVinoEngine(network, "fp32"), *inputs)
    monkeypatch.setattr(gpurender.openvino_graph, "TILED_BYTES", 1e12)
    network = make_ready(seeded_onnx, None)
    assert network.encoder is not None
    assert bands(network) == 0
    halves = predict(OpenVinoEngine(network, "fp32"), *inputs)
    monkeypatch.setattr(gpurender.halves, "KEPT_BYTES", 0)
    network = make_ready(seeded_onnx, None)
    assert network.encoder is None
    assert torch.equal(halves, predict(OpenVinoEngine(network, "fp32"), *inputs))
    assert (tiled - halves).abs().max() < 2e-4


def test_memory_layout_does_not_matter(tiny_onnx: Path) -> None:
    faces, audio = example_input(3, "ave")
    engine = load_engine(tiny_onnx, device="cpu", precision="fp32")
    strided = audio.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(
        predict(engine, faces.to(memory_format=torch.channels_last), strided), predict(engine, faces, audio)
    )


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_inputs_that_are_no_pictures_and_sounds(tiny_unet: Path, engine: EngineName) -> None:
    runtime = load_engine(tiny_unet, device="cpu", engine=engine, precision="fp32")
    faces, audio = example_input(2, "ave")
    expected = predict(runtime, faces, audio)
    for kind in (torch.float64, torch.float16):
        assert (predict(runtime, faces.to(kind), audio.to(kind)) - expected).abs().max() < 0.05
    for bad_faces, bad_audio, words in (
        (faces.byte(), audio, "floating point, given torch.uint8"),
        (faces[:1], audio, r"given \(1, 6, 320, 320\) and \(2, 32, 16, 16\)"),
        (faces[:0], audio[:0], "B at least 1"),
        (faces[:, :3], audio, r"\(B,6,320,320\)"),
    ):
        with pytest.raises(ValueError, match=words):
            predict(runtime, bad_faces, bad_audio)


def test_torch_engine_is_the_module(tiny_unet: Path, device: torch.device) -> None:
    inputs, expected = torch_picture(tiny_unet, 3)
    engine = load_engine(tiny_unet, device=device, engine="torch", precision="fp32")
    picture = predict(engine, *(x.to(device) for x in inputs))
    assert engine.device == device
    assert (picture.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_torch_engine_in_half_precision(tiny_unet: Path, device: torch.device, precision: str) -> None:
    inputs, expected = torch_picture(tiny_unet, 2)
    engine = load_engine(tiny_unet, device=device, engine="torch", precision=precision)  # pyright: ignore
    picture = predict(engine, *(x.to(device) for x in inputs))
    assert engine.precision == precision
    assert picture.dtype == torch.float32
    assert least_psnr(picture.cpu(), expected) > 30


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_pictures_are_ordinary_tensors(tiny_onnx: Path, engine: EngineName) -> None:
    """A caller may change them, take gradients of what comes after, and give what has some."""
    runtime = load_engine(tiny_onnx, device="cpu", engine=engine, precision="fp32")
    faces, audio = (tensor.requires_grad_() for tensor in example_input(2, "ave"))
    gain = torch.ones(1, requires_grad=True)
    picture = predict(runtime, faces, audio).mul_(0.5)
    (picture * gain).sum().backward()
    assert gain.grad is not None
    assert gain.grad > 0


def test_a_checkpoint_on_a_cpu_runs_through_a_cached_export(tiny_unet: Path) -> None:
    told: list[str] = []
    inputs, expected = torch_picture(tiny_unet, 2)
    for _ in range(2):
        engine = load_engine(tiny_unet, device="cpu", precision="fp32", notify=told.append)
        assert engine.name == "openvino"
        assert (predict(engine, *inputs) - expected).abs().max() < 1e-4
    assert len(told) <= 1  # exported once, said once


@pytest.mark.parametrize(("frames", "slow_to_try"), [(399, ["int8", "mixed"]), (400, ["int8"])])
def test_auto_precision_takes_the_fastest_that_agrees(
    tiny_onnx: Path, seeded_onnx: Path, frames: int, slow_to_try: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurender.openvino_engine.bytes_pay", lambda decoder: False)
    assert load_engine(tiny_onnx, device="cpu").precision == "fp32"  # nothing to measure on
    faster = [kind for kind in faster_on_cpu() if kind not in slow_to_try]
    for network in (tiny_onnx, seeded_onnx):
        probe = example_input(2, "ave")
        engine = load_engine(network, device="cpu", probe=Probe(*probe, frames=frames))
        tried = list(engine.measured_psnr_db)
        assert tried == faster[: len(tried)]
        taken = [kind for kind, psnr in engine.measured_psnr_db.items() if psnr >= 40]
        assert taken == ([] if engine.precision == "fp32" else tried[-1:])
        assert engine.precision == (taken[0] if taken else "fp32")
        assert taken or tried == faster
        exact = predict(load_engine(network, device="cpu", precision="fp32"), *probe)
        assert least_psnr(predict(engine, *probe), exact) >= 40


def test_the_worst_picture_counts_as_8_bits_show_it() -> None:
    grey = torch.full((3, 3, 8, 8), 0.5)  # 127.5 levels
    worse = grey + torch.tensor([0, 3, 1])[:, None, None, None] / 255
    assert least_psnr(worse, grey) == pytest.approx(20 * log10(255 / 3))
    assert least_psnr(grey + 0.4 / 255, grey) == inf


class Apart:
    """An engine whose second picture is so many levels from the exact one."""

    device = torch.device("cpu")

    def __init__(self, precision: str, levels: int) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self._levels = levels

    def encode(self, faces: torch.Tensor) -> list[Any]:
        return [()] * len(faces)

    def decode(self, encoded: Sequence[Any], audio: torch.Tensor) -> torch.Tensor:
        pictures = torch.full((len(encoded), 3, 320, 320), 0.5)
        pictures[1] += self._levels / 255
        return pictures


@pytest.mark.parametrize(("int8", "bf16", "taken"), [(1, 0, "int8"), (2, 2, "bf16"), (3, 3, "fp32")])  # 48, 42, 39 dB
def test_int8_is_held_to_more_than_other_types(int8: int, bf16: int, taken: str) -> None:
    levels = {"int8": int8, "bf16": bf16, "fp32": 0}
    build = cast(Any, lambda precision: Apart(precision, levels[precision]))
    choice = Choice(["fp32", "int8", "bf16"], ["int8", "bf16"], build, lambda: build("fp32"))
    chosen = fastest_that_agrees(choice, Probe(*example_input(3, "ave")))
    assert chosen.precision == taken
    assert list(chosen.measured_psnr_db) == (["int8"] if taken == "int8" else ["int8", "bf16"])


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_batches_that_are_begun_before_the_last_one_ends(tiny_unet: Path, engine: EngineName) -> None:
    loaded = load_engine(tiny_unet, device="cpu", engine=engine, precision="fp32")
    half = 10 if engine == "openvino" else 2  # both together are more than there are requests
    faces, audio = example_input(2 * half, "ave")
    encoded = loaded.encode(faces)
    expected = loaded.decode(encoded, audio)
    begun = [loaded.begin(encoded[k : k + half], audio[k : k + half]) for k in (0, half)]
    loaded.begin(encoded, audio)  # that nobody waits for
    assert torch.equal(torch.cat([wait() for wait in begun]), expected)


def test_mixed_precision_is_closer_than_bfloat16(seeded_onnx: Path) -> None:
    if "bf16" not in faster_on_cpu():
        pytest.skip("this processor has no bfloat16")
    inputs = example_input(2, "ave")
    exact, mixed, bf16 = (
        predict(load_engine(seeded_onnx, device="cpu", precision=precision), *inputs)
        for precision in ("fp32", "mixed", "bf16")
    )
    assert least_psnr(mixed, exact) > least_psnr(bf16, exact) + 6
    assert 0 < (mixed - exact).abs().max() < 0.2


def test_what_is_kept_for_bfloat16_is_bfloat16(tiny_onnx: Path) -> None:
    if "bf16" not in faster_on_cpu():
        pytest.skip("this processor has no bfloat16")
    faces, _ = example_input(2, "ave")
    half, single = torch.bfloat16, torch.float32
    expected: dict[Precision, set[torch.dtype]] = {"bf16": {half}, "mixed": {half, single}, "fp32": {single}}
    for precision, kept in expected.items():
        encoded = load_engine(tiny_onnx, device="cpu", precision=precision).encode(faces)
        assert {tensor.dtype for levels in encoded for tensor in levels} == kept


def test_other_engines_are_refused(tiny_onnx: Path) -> None:
    wrong: Any = "onnxruntime"
    with pytest.raises(InputError, match="'mel' is no kind of features; choose ave, "):
        load_engine(tiny_onnx, mode=cast(Any, "mel"))
    with pytest.raises(InputError, match="'onnxruntime' is no engine; choose auto, "):
        load_engine(tiny_onnx, device="cpu", engine=wrong)


def test_threads_may_share_an_engine_and_an_encoder(tmp_path: Path, tiny_unet: Path, tiny_encoder: Path) -> None:
    export_onnx(tiny_encoder, tmp_path / "encoder.onnx")
    encoder = load_audio_engine(tmp_path / "encoder.onnx")
    engine = load_engine(tiny_unet, device="cpu", engine="openvino", precision="fp32")
    faces, audio = example_input(4, "ave")
    mels = torch.rand(8, 3, 1, 80, 16, generator=torch.Generator().manual_seed(1))
    expected = [encoder(mel) for mel in mels], [predict(engine, faces[k : k + 1], audio[k : k + 1]) for k in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            heard = list(threads.map(encoder, mels))
            drawn = list(threads.map(lambda k: predict(engine, faces[k : k + 1], audio[k : k + 1]), range(4)))
            assert all(map(torch.equal, heard, expected[0]))
            assert all(map(torch.equal, drawn, expected[1]))


def test_a_type_that_this_processor_lacks(tiny_onnx: Path) -> None:
    with pytest.raises(DeviceError, match="openvino engine has no fp16 on this processor; it has fp32"):
        load_engine(tiny_onnx, device="cpu", precision="fp16")


# --- ONNX files from elsewhere ---------------------------------------------------------------------------------------


def export_plain(path: Path, names: tuple[str, str], fixed: bool, swapped: bool, dtype: torch.dtype) -> UNet:
    """An export as somebody else might make it: by torch's older exporter, with other names, a fixed batch, the inputs
    the other way round."""

    class Swapped(torch.nn.Module):
        def __init__(self, network: UNet) -> None:
            super().__init__()
            self.network = network

        def forward(self, audio: torch.Tensor, face: torch.Tensor) -> torch.Tensor:
            return self.network(face, audio)

    network = UNet(**TINY).eval()
    faces, audio = (x.to(dtype) for x in example_input(1 if fixed else 2, "ave"))
    torch.onnx.export(
        Swapped(network).to(dtype).eval() if swapped else network.to(dtype),
        (audio, faces) if swapped else (faces, audio),
        path,
        dynamo=False,
        dynamic_axes=None if fixed else {name: {0: "n"} for name in (*names, "picture")},
        input_names=list(names),
        output_names=["picture"],
    )
    return network.float()


@pytest.mark.parametrize(
    ("names", "fixed", "swapped", "dtype"),
    [
        (("x.1", "input.7"), True, False, torch.float32),
        (("audio", "input"), False, True, torch.float32),
        (("image", "mel"), True, True, torch.float16),
    ],
)
def test_any_input_names_order_batch_and_type(
    tmp_path: Path, names: tuple[str, str], fixed: bool, swapped: bool, dtype: torch.dtype
) -> None:
    network = export_plain(tmp_path / "a.onnx", names, fixed, swapped, dtype)
    inputs = example_input(3, "ave")
    with torch.inference_mode():
        expected = network(*inputs)
    engine = load_engine(tmp_path / "a.onnx", device="cpu", precision="fp32")
    assert engine.mode == "ave"
    assert (predict(engine, *inputs) - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.02)


def test_every_precision_takes_a_network_in_half_precision(tiny_onnx: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    onnx.save(to_half(onnx.load(tiny_onnx)), half)
    faces, audio = example_input(4, "ave")
    expected = predict(load_engine(tiny_onnx, device="cpu", precision="fp32"), faces, audio)
    for precision in ("fp32", "auto", *faster_on_cpu()):
        probe = Probe(faces, audio, frames=1000)
        engine = load_engine(half, device="cpu", precision=cast(Precision, precision), probe=probe)
        promised = 40 if precision in ("fp32", "auto") else 10  # the weights are by rule, and sensitive to rounding
        assert least_psnr(predict(engine, faces, audio), expected) >= promised, precision


def onnx_of(path: Path, inputs: dict[str, list[int]], output: list[int]) -> None:
    first = next(iter(inputs))
    node = helper.make_node("Identity", [first], ["out"])
    shaped = helper.make_node("Reshape", ["out", "shape"], ["y"])
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(output)], output)
    graph = helper.make_graph(
        [node, shaped],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [shape],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_onnx_with_other_inputs_or_outputs(tmp_path: Path, tiny_onnx: Path) -> None:
    onnx_of(tmp_path / "classifier.onnx", {"pixels": [1, 3, 100, 1024]}, [1, 3, 320, 320])
    with pytest.raises(InputError, match=r"takes pixels \[1,3,100,1024\]; a lip-sync network takes batches of"):
        load_engine(tmp_path / "classifier.onnx", device="cpu")
    onnx_of(tmp_path / "other.onnx", {"a": [1, 6, 320, 320], "b": [1, 32, 16, 16]}, [1, 614400])
    with pytest.raises(InputError, match=r"gives \[1,614400\]; a lip-sync network gives one batch of \(3, 320, 320\)"):
        load_engine(tmp_path / "other.onnx", device="cpu")
    with pytest.raises(InputError, match=r"takes .*; a lip-sync network takes .* \(256, 16, 32\) \(wenet\)"):
        load_engine(tiny_onnx, mode="wenet", device="cpu")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="not an ONNX network that can be read"):
        load_engine(tmp_path / "text.onnx", device="cpu")
    with pytest.raises(InputError, match="no such network file"):
        load_engine(tmp_path / "absent.onnx", device="cpu")
    (tmp_path / "unet.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.onnx export or a \.pth checkpoint"):
        load_engine(tmp_path / "unet.bin", device="cpu")


# --- devices ---------------------------------------------------------------------------------------------------------


def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    with pytest.raises(DeviceError, match="'gpu' is not a device; choose auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(DeviceError, match="mps cannot render"):
        resolve_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="finds no CUDA GPU on this machine; use --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="cuda:3: there are 1 GPUs here"):
        resolve_device("cuda:3")
    with pytest.raises(DeviceError, match="openvino engine runs on CPUs"):
        load_engine(tiny_onnx, device="cuda", engine="openvino")


# --- the audio encoder -----------------------------------------------------------------------------------------------


def test_audio_encoder_from_onnx_is_the_torch_one(tmp_path: Path, tiny_encoder: Path, device: torch.device) -> None:
    encoder = load_audio_encoder(tiny_encoder)
    mel = torch.randn(5, 1, 80, 16)
    exported = tmp_path / "encoder.onnx"
    torch.onnx.export(encoder, (mel[:1],), exported, dynamo=True, external_data=False, verbose=False)
    with torch.inference_mode():
        expected = encoder(mel)
        for path in (exported, tiny_encoder):
            features = load_audio_engine(path, device)(mel.to(device))
            assert features.device == device
            np.testing.assert_allclose(features.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_the_audio_encoder_takes_no_more_cores_than_control_groups_allow(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_audio_encoder(tiny_encoder)
    torch.onnx.export(
        encoder, (torch.zeros(1, 1, 80, 16),), tmp_path / "a.onnx", dynamo=True, external_data=False, verbose=False
    )
    monkeypatch.setattr(openvino_requests, "own_threads", lambda: {"INFERENCE_NUM_THREADS": "two"})
    with pytest.raises(RuntimeError, match="INFERENCE_NUM_THREADS"):
        load_audio_engine(tmp_path / "a.onnx", torch.device("cpu"))


def with_function(calls: str) -> onnx.ModelProto:
    """An audio encoder with a function of its own, which may call itself."""
    node, value, opsets = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.helper.make_opsetid
    versions = [opsets("", 18), opsets("own", 1)]
    step = node(calls, ["a"], ["b"], domain="own" if calls == "Step" else "")
    function = onnx.helper.make_function("own", "Step", ["a"], ["b"], [step], versions)
    nodes = [node("Reshape", ["mel", "s"], ["f"]), node("Step", ["f"], ["r"], domain="own")]
    nodes.append(node("MatMul", ["r", "w"], ["y"]))
    sizes = onnx.numpy_helper.from_array(np.array([-1, 1280]), "s")
    weights = onnx.numpy_helper.from_array(np.ones((1280, 512), np.float32), "w")
    inputs, outputs = ([value(name, 1, shape)] for name, shape in (("mel", ["n", 1, 80, 16]), ("y", ["n", 512])))
    graph = onnx.helper.make_graph(nodes, "encoder", inputs, outputs, [sizes, weights])
    return onnx.helper.make_model(graph, functions=[function], opset_imports=versions, ir_version=9)


def test_an_audio_encoder_may_have_functions_of_its_own(tmp_path: Path) -> None:
    mel = torch.ones(2, 1, 80, 16)
    for calls in ("Relu", "Step"):
        onnx.save(with_function(calls), tmp_path / f"{calls}.onnx")
    assert torch.equal(load_audio_engine(tmp_path / "Relu.onnx", "cpu")(mel), torch.full((2, 512), 1280.0))
    with pytest.raises(InputError, match="not an ONNX network that can be read"):
        load_audio_engine(tmp_path / "Step.onnx", "cpu")  # which it calls itself


def test_bad_audio_encoders(tmp_path: Path, tiny_onnx: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="no such audio encoder"):
        load_audio_engine(tmp_path / "absent.pth", cpu)
    with pytest.raises(InputError, match=r"an audio encoder takes a batch of \(1, 80, 16\)"):
        load_audio_engine(tiny_onnx, cpu)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"\.onnx export or a \.pth checkpoint"):
        load_audio_engine(tmp_path / "a.txt", cpu)
    circle = onnx.load(tiny_onnx)
    circle.graph.node[3].input[0] = circle.graph.node[9].output[0]
    misspelt = tiny_onnx.read_bytes().replace(b"Relu", b"\xc3elu")  # no UTF-8
    for content, reason in (
        (b"", "not an ONNX network"),
        (b"ONNX", "not an ONNX network that can be read ("),
        (b"\x08\x07\x12\x02hi", "not an ONNX network"),
        (circle.SerializeToString(), "run in a circle"),
        (misspelt, "not an ONNX network that can be read"),
    ):
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(InputError, match=re.escape(reason)):
            load_audio_engine(tmp_path / "a.onnx", cpu)
    assert capfd.readouterr() == ("", "")


def test_window_shapes_tell_the_modes_apart() -> None:
    assert len(set(WINDOW_SHAPES.values())) == len(WINDOW_SHAPES)
