"""Which engine runs a network where TensorRT is installed, and what is tried next if it does not work."""

from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from tensorrt_stand_in import CPU, StandInPlan, expected_pictures, in_precision, pretend_gpu, stand_in_engine

from gpurender import DeviceError, Engine, UNet, choose_engine, load_engine, load_unet, predict, tensorrt_choice
from gpurender.engine import Choice, EngineName, Precision, Probe, fastest_that_agrees, least_psnr
from gpurender.export import example_input
from gpurender.half import widen_depthwise
from gpurender.halves import read_halves
from gpurender.tensorrt_build import PlanError, PlanMemoryError, TensorRt, check_capability, find_tensorrt
from gpurender.tensorrt_choice import first_that_works, tensorrt_attempts
from gpurender.tensorrt_engine import TensorRtEngine
from gpurender.torch_engine import TorchEngine


def test_auto_goes_on_with_torch_and_says_why(
    rtx: TensorRt, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(tensorrt_choice, "find_tensorrt", lambda: rtx)
    monkeypatch.setattr(choose_engine, "TorchEngine", lambda network, *rest: TorchEngine(network, CPU, "fp32"))
    engine = load_engine(tiny_unet, device="cuda")
    assert engine.name == "torch"
    assert len(engine.notes) == 1
    assert "runs on torch: TensorRT-RTX" in engine.notes[0]
    assert "does not run on NVIDIA H100" in engine.notes[0]
    with pytest.raises(DeviceError, match="does not run on NVIDIA H100"):
        load_engine(tiny_unet, device="cuda", engine="tensorrt")
    with pytest.raises(DeviceError, match="the tensorrt engine runs on NVIDIA GPUs, not on cpu"):
        load_engine(tiny_onnx, device="cpu", engine="tensorrt")


def test_fp32_of_a_half_precision_network(
    rtx: TensorRt, tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(tensorrt_choice, "find_tensorrt", lambda: rtx)
    onnx.save(in_precision(tiny_onnx, "fp16"), tmp_path / "half.onnx")
    with pytest.raises(DeviceError, match=r"no fp32 for .*half.onnx, .* give the float32 export or the check"):
        load_engine(tmp_path / "half.onnx", device="cuda", engine="tensorrt", precision="fp32")


class Loader:
    """`PlanLoader`'s stand-in: fails for what `refused` names."""

    refused: tuple[str, ...] = ()

    def __init__(self, tensorrt: TensorRt, device: torch.device, rows: int, *, mixed: bool, notify: Any) -> None:
        self.mixed, self.rows = mixed, rows

    def __call__(self, name: str, half: ModelProto) -> StandInPlan:
        is_half = half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
        if ("mixed" if self.mixed else "fp16" if is_half else "fp32") in self.refused:
            raise PlanError("TensorRT 11.2 cannot build the network: No low-precision conv kernel")
        return StandInPlan(widen_depthwise(half) if self.mixed else half, self.rows)


@pytest.mark.parametrize(
    ("asked", "refused", "checkpoint", "taken"),
    [
        ("fp16", "", True, ("tensorrt", "fp16", "")),
        (
            "fp16",
            "fp16",
            True,
            ("tensorrt", "fp16", "with depthwise convolutions in fp32, because TensorRT 11.2"),
        ),
        ("fp16", "fp16 mixed", True, ("torch", "fp16", "runs on torch in fp16, because TensorRT 11.2 cannot build")),
        ("fp16", "fp16 mixed", False, ("tensorrt", "fp32", "runs on TensorRT 11.2 in fp32, because")),
        ("fp32", "fp32", True, ("torch", "fp32", "runs on torch in fp32, because")),
    ],
)
def test_what_is_tried_next(
    tiny_unet: Path,
    tiny_onnx: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    refused: str,
    checkpoint: bool,
    taken: tuple[str, str, str],
) -> None:
    monkeypatch.setattr(tensorrt_choice, "PlanLoader", Loader)
    monkeypatch.setattr(Loader, "refused", tuple(refused.split()))
    told: list[str] = []
    installed = TensorRt(ModuleType("tensorrt"), "11.2")
    attempts = tensorrt_attempts(
        installed, tiny_onnx, read_halves(tiny_onnx), tiny_unet if checkpoint else None, CPU, asked, 2, told.append
    )
    engine = first_that_works(attempts, "tiny", told.append)
    name, precision, note = taken
    assert (engine.name, engine.precision) == (name, precision)
    assert len(engine.notes) == (1 if note else 0)
    assert note in "".join(engine.notes)
    assert sum("does not work: TensorRT 11.2 cannot build" in text for text in told) == len(refused.split())
    inputs, expected = expected_pictures(tiny_onnx, 2)
    assert (predict(engine, *inputs) - expected).abs().max() < (1e-4 if precision == "fp32" else 0.02)


def test_nothing_works(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_choice, "PlanLoader", Loader)
    monkeypatch.setattr(Loader, "refused", ("fp16", "mixed", "fp32"))
    installed = TensorRt(ModuleType("tensorrt"), "11.2")
    attempts = tensorrt_attempts(installed, tiny_onnx, read_halves(tiny_onnx), None, CPU, "fp16", 2, print)
    with pytest.raises(DeviceError, match=r"tiny: TensorRT 11.2 cannot build .*conv kernel. Do something else.$"):
        first_that_works(attempts, "tiny", print, " Do something else.")


@pytest.mark.parametrize(
    ("engine", "precision", "taken"),
    [
        ("auto", "auto", "torch fp16"),
        ("auto", "fp16", "torch fp16"),
        ("tensorrt", "auto", "tensorrt fp32"),
        ("tensorrt", "fp16", None),
        ("tensorrt", "fp32", "tensorrt fp32"),
    ],
)
def test_what_is_asked_for_is_not_replaced(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, engine: EngineName, precision: Precision, taken: str | None
) -> None:
    """TensorRT can build fp32 only here."""
    pretend_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(tensorrt_choice, "find_tensorrt", lambda: TensorRt(ModuleType("tensorrt"), "11.2"))
    monkeypatch.setattr(tensorrt_choice, "PlanLoader", Loader)
    monkeypatch.setattr(Loader, "refused", ("fp16", "mixed"))
    monkeypatch.setattr(
        tensorrt_choice, "TorchEngine", lambda network, device, precision, notify: TorchEngine(network, CPU, precision)
    )
    monkeypatch.setattr(
        tensorrt_choice,
        "TensorRtEngine",
        lambda halves, loader, device, rows: TensorRtEngine(halves, loader, CPU, rows),
    )
    asked = {"device": "cuda", "engine": engine, "precision": precision, "probe": Probe(*example_input(2, "ave"))}
    if taken is None:
        with pytest.raises(DeviceError, match=r"cannot build .* conv kernel\. --engine auto goes on with torch"):
            load_engine(tiny_onnx, **asked)
        return
    loaded = load_engine(tiny_onnx, **asked)
    assert f"{loaded.name} {loaded.precision}" == taken


@pytest.mark.parametrize(("most", "asked"), [(4, 16), (1, 2), (3, None)])
def test_without_memory_for_the_batch_it_is_halved(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, most: int, asked: int | None
) -> None:
    class Scarce(Loader):
        def __init__(self, tensorrt: TensorRt, device: torch.device, rows: int, **options: Any) -> None:
            if rows > most:
                raise PlanMemoryError("TensorRT 11.2 finds too little memory")
            super().__init__(tensorrt, device, rows, **options)

    monkeypatch.setattr(tensorrt_choice, "PlanLoader", Scarce)
    monkeypatch.setattr(Loader, "refused", ())
    installed = TensorRt(ModuleType("tensorrt"), "11.2")
    attempts = tensorrt_attempts(installed, tiny_onnx, read_halves(tiny_onnx), None, CPU, "fp32", asked, print)
    engine = first_that_works(attempts, "tiny", print)
    rows = {4: 4, 1: 1, 3: 2}[most]
    assert engine.batch == rows
    assert engine.notes == [f"too little memory on cpu for {asked or 16} frames at a time: it does {rows}"]
    inputs, expected = expected_pictures(tiny_onnx, 5)
    assert (predict(engine, *inputs) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("noise", "taken"), [(0.0, "fp16"), (0.1, "fp32")])
def test_auto_holds_half_precision_against_the_exact_engine(tiny_onnx: Path, noise: float, taken: str) -> None:
    built: list[str] = []

    def build(precision: str) -> Engine:
        built.append(precision)
        engine, _ = stand_in_engine(read_halves(tiny_onnx))
        engine.precision = precision
        exact = engine.decode
        engine.decode = lambda encoded, audio: exact(encoded, audio) + noise
        return engine

    probe = Probe(*example_input(2, "ave"))
    choice = Choice(["fp32", "fp16"], ["fp16"], build, lambda: load_engine(tiny_onnx, device="cpu", precision="fp32"))
    engine = fastest_that_agrees(choice, probe)
    assert engine.precision == taken
    assert (engine.measured_psnr_db["fp16"] >= 40) == (taken == "fp16")
    assert built == (["fp16"] if taken == "fp16" else ["fp16", "fp32"])  # no plan is built to be measured against


@pytest.mark.gpu
def test_auto_takes_tensorrt_on_a_gpu(tiny_unet: Path) -> None:
    try:
        check_capability(find_tensorrt(), torch.cuda.get_device_capability(0), "")
    except DeviceError as error:
        pytest.skip(str(error))
    inputs = example_input(3, "ave")
    engine = load_engine(tiny_unet, device="cuda", probe=Probe(*inputs))
    assert engine.name == "tensorrt"
    assert "fp16" in engine.measured_psnr_db
    with torch.inference_mode():
        expected = UNet.forward(load_unet(tiny_unet), *inputs)
    assert least_psnr(predict(engine, *(tensor.cuda() for tensor in inputs)).cpu(), expected) >= 40
