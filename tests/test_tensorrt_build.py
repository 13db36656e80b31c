"""TensorRT's plans: what builds them, and the cache. Where there is no GPU, TensorRT-RTX still builds real ones."""

import importlib
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from tensorrt_stand_in import (
    CPU,
    Precision,
    StandInContext,
    StandInStream,
    halves_of,
    pretend_gpu,
    with_batch,
)
from torch import Tensor

import gpurender.tensorrt_engine as tensorrt_module
from gpurender import DeviceError
from gpurender.export import example_input
from gpurender.half import widen_depthwise
from gpurender.halves import read_halves
from gpurender.plans import kept_file
from gpurender.tensorrt_build import (
    PlanError,
    TensorRt,
    build_plan,
    check_capability,
    find_tensorrt,
    log_of,
    plan_error,
)
from gpurender.tensorrt_plan import PlanLoader, plan_key


@pytest.mark.parametrize("target", [(8, 9), (12, 0)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
def test_both_halves_build(
    rtx: TensorRt, tmp_path: Path, tiny_onnx: Path, precision: Precision, target: tuple[int, int]
) -> None:
    halves = halves_of(tiny_onnx, precision, tmp_path)
    told: list[float] = []
    for half in (halves.encoder, halves.decoder):
        assert half is not None
        assert len(build_plan(rtx, half, 16, targets=[target], progress=told.append).plan) > 10_000
    assert told
    assert all(0 <= share <= 1 for share in told)


def test_the_full_width_builds(rtx: TensorRt, tmp_path: Path, seeded_onnx: Path) -> None:
    for precision, least in (("fp32", 40e6), ("fp16", 20e6), ("mixed", 20e6)):
        halves = halves_of(seeded_onnx, precision, tmp_path)
        plans = [build_plan(rtx, half, 16, targets=[(8, 9)]).plan for half in (halves.encoder, halves.decoder) if half]
        assert len(plans) == 2
        assert sum(map(len, plans)) > least


def test_a_fixed_batch_builds(rtx: TensorRt, tmp_path: Path, tiny_onnx: Path) -> None:
    halves = with_batch(tiny_onnx, 3, tmp_path)
    assert len(build_plan(rtx, halves.decoder, 3, targets=[(8, 9)]).plan) > 10_000


def test_what_tensorrt_says_is_passed_on(rtx: TensorRt, tiny_onnx: Path) -> None:
    halves = read_halves(tiny_onnx)
    odd = ModelProto.FromString(halves.decoder.SerializeToString())
    odd.graph.node[5].op_type = "Frobnicate"
    with pytest.raises(PlanError, match=r"TensorRT-RTX .* cannot read the network: .*Frobnicate"):
        build_plan(rtx, odd, 2, targets=[(8, 9)])
    with pytest.raises(PlanError, match=r"cannot build the network: \S+"):
        build_plan(rtx, halves.decoder, 0, targets=[(8, 9)])  # no batch fits


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_build_can_be_stopped(rtx: TensorRt, tiny_onnx: Path, stop: type[BaseException]) -> None:
    def progress(done: float) -> None:
        raise stop

    with pytest.raises(stop):
        build_plan(rtx, read_halves(tiny_onnx).decoder, 2, targets=[(8, 9)], progress=progress)


def test_an_interrupt_stops_a_build(rtx: TensorRt, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT calls Python all the time, mostly to log, and its bindings swallow what is raised there."""
    told: list[float] = []
    sent: list[None] = []

    def interrupted_once(log: object, severity: object, message: str) -> None:
        if told and not sent:
            sent.append(None)
            signal.raise_signal(signal.SIGINT)

    def progress(done: float) -> None:
        told.append(done)

    monkeypatch.setattr(type(log_of(rtx.api)), "log", interrupted_once)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            build_plan(rtx, read_halves(tiny_onnx).decoder, 2, targets=[(8, 9)], progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told[-1] < 1  # it did not go on to the end


def test_a_plan_is_not_loaded_without_a_gpu(rtx: TensorRt, tiny_onnx: Path) -> None:
    """What a plan from elsewhere is taken for: None, and TensorRT's reason kept."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    half = read_halves(tiny_onnx).encoder
    assert half is not None
    plan = build_plan(rtx, half, 2, targets=[(8, 9)]).plan
    assert rtx.api.Runtime(log_of(rtx.api)).deserialize_cuda_engine(plan) is None
    assert "cuda" in str(plan_error(rtx, "cannot load the plan", log_of(rtx.api).errors)).lower()


# --- kept plans ------------------------------------------------------------------------------------------------------


def test_a_plan_depends_on_all_that_it_is_built_for(tmp_path: Path, tiny_onnx: Path) -> None:
    full, half = (halves_of(tiny_onnx, precision, tmp_path).decoder for precision in ("fp32", "fp16"))
    installed = TensorRt(ModuleType("tensorrt"), "11.2")
    keys = [
        plan_key(installed, full, 16, "L4", (8, 9)),
        plan_key(installed, half, 16, "L4", (8, 9)),
        plan_key(installed, widen_depthwise(half), 16, "L4", (8, 9)),
        plan_key(installed, full, 8, "L4", (8, 9)),
        plan_key(installed, full, 16, "L40S", (8, 9)),
        plan_key(installed._replace(version="11.3"), full, 16, "L4", (8, 9)),
        plan_key(installed._replace(api=ModuleType("tensorrt_rtx")), full, 16, "L4", (8, 9)),
    ]
    assert len({kept_file(key, "plan") for key in keys}) == len(keys)


class StandInRuntime:
    """Loads real plans of TensorRT-RTX as far as that goes without a GPU: their contexts are stand-ins."""

    def __init__(self, half: ModelProto, accepts: Callable[[bytes], bool]) -> None:
        self.half, self.accepts = half, accepts
        self.strategies: list[Any] = []
        self.kernels = b""

    def deserialize_cuda_engine(self, plan: bytes) -> "StandInRuntime | None":
        return self if self.accepts(plan) else None

    def create_runtime_config(self) -> Any:
        return StandInConfig(self)

    def create_execution_context(self, config: "StandInConfig") -> StandInContext:
        assert config.cache is not None
        self.strategies.append(config.dynamic_shapes_kernel_specialization_strategy)
        return StandInContext(self.half, 3)


class StandInConfig:
    def __init__(self, runtime: StandInRuntime) -> None:
        self.runtime = runtime
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cache: Any = None

    def create_runtime_cache(self) -> "StandInConfig":
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True

    def deserialize(self, kernels: bytes) -> bool:
        self.runtime.kernels = kernels
        return True

    def serialize(self) -> bytes:
        return b"kernels"


def test_plans_of_tensorrt_rtx_are_built_kept_and_loaded(
    rtx: TensorRt, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the way but for the GPU: real builds, the cache, the kernels that RTX compiles at the first run."""
    import gpurender.tensorrt_plan as module

    pretend_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: StandInStream([], "own"))
    half = read_halves(tiny_onnx).encoder
    assert half is not None
    runtime = StandInRuntime(half, accepts=lambda plan: len(plan) > 10_000)
    monkeypatch.setattr(module, "started", lambda *rest: runtime)
    told: list[str] = []
    faces = example_input(3, "ave")[0]
    expected = run_plan(half, faces)
    for _ in range(2):
        loader = PlanLoader(rtx, torch.device("cuda", 0), 3, notify=told.append)
        runner = tensorrt_module.Runner(loader("encoder", half), half, CPU, 3, False, [])
        for frames in (3, 2):
            torch.testing.assert_close(runner(frames, faces[:frames])[0], expected[:frames])
    assert told == ["building the encoder's TensorRT plan, once for this GPU (some seconds)"]
    assert runtime.kernels == b"kernels"  # the second program found the first one's
    eager = rtx.api.DynamicShapesKernelSpecializationStrategy.EAGER
    assert runtime.strategies == [eager, None] * 2
    runtime.accepts = lambda plan: False
    with pytest.raises(PlanError, match="cannot load the plan"):
        PlanLoader(rtx, torch.device("cuda", 0), 3, notify=told.append)("encoder", half)
    assert len(told) == 2  # it was built again before


def run_plan(half: ModelProto, faces: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"input": faces.numpy()})[0]))


# --- what is installed -----------------------------------------------------------------------------------------------


def importing(monkeypatch: pytest.MonkeyPatch, **modules: ModuleType | Exception) -> None:
    def import_module(name: str) -> ModuleType:
        found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    full, small = ModuleType("tensorrt"), ModuleType("tensorrt_rtx")
    full.__version__, small.__version__ = "11.2.0", "1.7.1"  # pyright: ignore[reportAttributeAccessIssue]
    importing(monkeypatch, tensorrt=full, tensorrt_rtx=small)
    assert str(find_tensorrt()) == "TensorRT 11.2.0"
    importing(monkeypatch, tensorrt_rtx=small)
    assert str(find_tensorrt()) == "TensorRT-RTX 1.7.1"
    importing(monkeypatch)
    with pytest.raises(DeviceError, match=r"TensorRT is not installed: pip install 'gpurender\[gpu\]'"):
        find_tensorrt()
    importing(monkeypatch, tensorrt=OSError("libnvinfer.so.11: cannot open shared object file"))
    with pytest.raises(DeviceError, match=r"tensorrt is installed but does not import \(libnvinfer.so.11: cannot"):
        find_tensorrt()
    importing(
        monkeypatch, tensorrt=ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings")
    )
    with pytest.raises(DeviceError, match=r"tensorrt is installed but lacks tensorrt_bindings. Install it again"):
        find_tensorrt()
    importing(monkeypatch, tensorrt=ModuleType("tensorrt"))  # a directory of that name
    with pytest.raises(DeviceError, match="tensorrt is not NVIDIA's package"):
        find_tensorrt()


def test_gpus_that_rtx_does_not_know(rtx: TensorRt) -> None:
    check_capability(rtx, (8, 9), "NVIDIA L4")
    with pytest.raises(DeviceError, match=r"TensorRT-RTX .* not run on NVIDIA H100 \(compute capability 9.0\); pip"):
        check_capability(rtx, (9, 0), "NVIDIA H100")
    check_capability(TensorRt(ModuleType("tensorrt"), "11.2"), (9, 0), "NVIDIA H100")
