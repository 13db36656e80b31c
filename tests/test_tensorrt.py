"""TensorRT. Where there is no GPU, TensorRT-RTX still builds plans, and a stand-in for the contexts that would run them
computes the same network with ONNX Runtime on the memory that it is given addresses of."""

import ctypes
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import run_whole
from onnx import ModelProto, TensorProto
from torch import Tensor

import gpurender.engine as engine_module
import gpurender.tensorrt_engine as tensorrt_module
from gpurender import DeviceError, Engine, UNet, load_engine, predict
from gpurender.engine import Choice, fastest_that_agrees, first_that_works, least_psnr, tensorrt_attempts
from gpurender.export import example_input
from gpurender.find import BUNDLED
from gpurender.half import folded, to_half, widen_depthwise
from gpurender.halves import Halves, cut, read_halves, read_network
from gpurender.plans import kept_file
from gpurender.tensorrt_build import (
    PlanError,
    PlanMemoryError,
    TensorRt,
    build_plan,
    check_capability,
    find_tensorrt,
    plan_error,
)
from gpurender.tensorrt_engine import TensorRtEngine
from gpurender.tensorrt_plan import PlanLoader, plan_key
from gpurender.torch_engine import TorchEngine

Precision = str
CPU = torch.device("cpu")


def in_precision(path: Path, precision: Precision) -> ModelProto:
    """The network of a float32 file in `fp32`, `fp16` or `mixed`."""
    if precision == "fp32":
        return onnx.load(path)
    half = to_half(folded(path))
    return widen_depthwise(half) if precision == "mixed" else half


def halves_of(path: Path, precision: Precision, tmp_path: Path) -> Halves:
    onnx.save(in_precision(path, precision), tmp_path / f"{precision}.onnx")
    return read_halves(tmp_path / f"{precision}.onnx")


# --- real builds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rtx() -> TensorRt:
    api = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installable here: NO PLAN IS BUILT")
    return TensorRt(api, api.__version__)


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


def with_batch(path: Path, batch: int, tmp_path: Path) -> Halves:
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, tmp_path / "fixed.onnx")
    return read_halves(tmp_path / "fixed.onnx")


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


def test_a_plan_is_not_loaded_without_a_gpu(rtx: TensorRt, tiny_onnx: Path) -> None:
    """What a plan from elsewhere is taken for: None, and TensorRT's reason kept."""
    from gpurender.tensorrt_build import log_of

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    half = read_halves(tiny_onnx).encoder
    assert half is not None
    plan = build_plan(rtx, half, 2, targets=[(8, 9)]).plan
    assert rtx.api.Runtime(log_of(rtx.api)).deserialize_cuda_engine(plan) is None
    assert "CUDA" in str(plan_error(rtx, "cannot load the plan", log_of(rtx.api).errors))


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


# --- the engine, on a stand-in for a GPU's contexts ------------------------------------------------------------------


class StandInContext:
    """Does what an `IExecutionContext` does, on the host's memory and at once."""

    def __init__(self, half: ModelProto, rows: int) -> None:
        self.rows = rows
        self.session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.batches: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return 1 <= shape[0] <= self.rows

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        feed = {}
        for port in self.session.get_inputs():
            kind = np.dtype(np.float16 if port.type == "tensor(float16)" else np.float32)
            content = ctypes.string_at(self.addresses[port.name], int(np.prod(self.shapes[port.name])) * kind.itemsize)
            feed[port.name] = np.frombuffer(content, kind).reshape(self.shapes[port.name])
        outputs = [np.ascontiguousarray(output) for output in self.session.run(None, feed)]
        for port, output in zip(self.session.get_outputs(), outputs, strict=True):
            ctypes.memmove(self.addresses[port.name], output.tobytes(), output.nbytes)
        self.batches.append(outputs[0].shape[0])
        return True


class StandInPlan:
    def __init__(self, half: ModelProto, rows: int, contexts: int = 2) -> None:
        self.half, self.rows, self.left = half, rows, contexts
        self.contexts: list[tuple[bool, StandInContext]] = []
        self.warm = 0

    def context(self, often: bool) -> StandInContext | None:
        if len(self.contexts) == self.left:
            return None
        self.contexts.append((often, StandInContext(self.half, self.rows)))
        return self.contexts[-1][1]

    def warmed(self) -> None:
        self.warm += 1

    def error(self) -> Exception:
        return PlanMemoryError("the stand-in has no memory left")


def stand_in_engine(halves: Halves, batch: int | None = 3, contexts: int = 2) -> tuple[Any, dict[str, StandInPlan]]:
    plans: dict[str, StandInPlan] = {}

    def load(name: str, half: ModelProto) -> StandInPlan:
        plans[name] = StandInPlan(half, halves.batch or batch or 16, contexts)
        return plans[name]

    return TensorRtEngine(halves, load, CPU, batch), plans


def expected_pictures(path: Path, batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    inputs = example_input(batch, "ave")
    return inputs, run_whole(onnx.load(path), *inputs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_any_number_of_frames(tmp_path: Path, tiny_onnx: Path, precision: Precision, batch: int) -> None:
    engine, plans = stand_in_engine(halves_of(tiny_onnx, precision, tmp_path))
    assert (engine.name, engine.mode, engine.batch, engine.notes) == ("tensorrt", "ave", 3, [])
    assert engine.precision == ("fp32" if precision == "fp32" else "fp16")
    inputs, expected = expected_pictures(tiny_onnx, batch)
    pictures = predict(engine, *inputs)
    assert pictures.dtype == torch.float32
    assert (pictures - expected).abs().max() < (1e-5 if precision == "fp32" else 0.02)
    ran = [n for _, context in plans["decoder"].contexts for n in context.batches]
    assert sorted(ran) == sorted([3] * (batch // 3) + [batch % 3] * (batch % 3 > 0))


def test_memory_layout_does_not_matter(tmp_path: Path, tiny_onnx: Path) -> None:
    engine, _ = stand_in_engine(halves_of(tiny_onnx, "fp16", tmp_path))
    faces, audio = example_input(3, "ave")
    strided = audio.transpose(2, 3).contiguous().transpose(2, 3)
    lasting = faces.to(memory_format=torch.channels_last)
    assert torch.equal(predict(engine, lasting, strided), predict(engine, faces, audio))


def test_what_is_returned_stays(tiny_onnx: Path) -> None:
    """Encodings and pictures are not the static memory: later calls leave them alone."""
    engine, _ = stand_in_engine(read_halves(tiny_onnx))
    faces, audio = example_input(6, "ave")
    first = engine.encode(faces[:3])
    kept = [[tensor.clone() for tensor in frame] for frame in first]
    pictures = engine.decode(first, audio[:3])
    copy = pictures.clone()
    engine.decode(engine.encode(faces[3:]), audio[3:])
    assert torch.equal(pictures, copy)
    assert all(
        torch.equal(a, b) for frame, old in zip(first, kept, strict=True) for a, b in zip(frame, old, strict=True)
    )


def test_ragged_batches_have_a_context_of_their_own(tiny_onnx: Path) -> None:
    engine, plans = stand_in_engine(read_halves(tiny_onnx))
    for batch in (3, 2, 2, 1, 3):
        inputs, expected = expected_pictures(tiny_onnx, batch)
        assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
    (often, full), (seldom, ragged) = plans["decoder"].contexts
    assert (often, seldom) == (True, False)
    assert (full.batches, ragged.batches) == ([3, 3], [2, 2, 1])
    assert full.addresses == ragged.addresses
    assert plans["decoder"].warm == 1


def test_without_memory_for_a_second_context_ragged_batches_are_padded(tiny_onnx: Path) -> None:
    engine, plans = stand_in_engine(read_halves(tiny_onnx), contexts=1)
    for batch in (2, 3, 1):
        inputs, expected = expected_pictures(tiny_onnx, batch)
        pictures = predict(engine, *inputs)
        assert pictures.shape[0] == batch
        assert (pictures - expected).abs().max() < 1e-5
    assert plans["decoder"].contexts[0][1].batches == [3, 3, 3]
    with pytest.raises(PlanMemoryError):
        stand_in_engine(read_halves(tiny_onnx), contexts=0)


def test_a_fixed_batch_is_padded(tmp_path: Path, tiny_onnx: Path) -> None:
    engine, plans = stand_in_engine(with_batch(tiny_onnx, 4, tmp_path), batch=16)
    assert engine.batch == 4
    inputs, expected = expected_pictures(tiny_onnx, 5)
    assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
    assert plans["decoder"].contexts[0][1].batches == [4, 4]


def test_a_network_that_cannot_be_cut(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpurender.halves

    monkeypatch.setattr(gpurender.halves, "KEPT_BYTES", 0)
    halves = cut(*read_network(tiny_onnx))
    assert halves.encoder is None
    engine, plans = stand_in_engine(halves)
    inputs, expected = expected_pictures(tiny_onnx, 4)
    assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
    assert list(plans) == ["decoder"]


def graphs_on_the_host(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA graphs' stand-in: a capture notes the launch without running it, a replay runs it as it was captured."""
    log: list[str] = []

    def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
        log.append("capture")

        def replay() -> None:
            log.append("replay")
            launch(0)

        return replay

    monkeypatch.setattr(tensorrt_module, "captured", captured)
    engine._decoder._graphs = True
    return log


def test_full_batches_are_replayed(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plans = stand_in_engine(read_halves(tiny_onnx))
    log = graphs_on_the_host(engine, monkeypatch)
    logged = []
    for batch in (2, 3, 3, 1, 3):
        inputs, expected = expected_pictures(tiny_onnx, batch)
        assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
        logged.append(len(log))
    assert log == ["capture", "replay", "replay"]  # once a full batch has run without
    assert logged == [0, 0, 2, 2, 3]
    assert plans["decoder"].contexts[0][1].shapes["audio"][0] == 3


def test_without_cuda_graphs_it_runs_on_and_says_so(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plans = stand_in_engine(read_halves(tiny_onnx))
    graphs_on_the_host(engine, monkeypatch)

    def failing(*rest: Any) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(tensorrt_module, "captured", failing)
    inputs, expected = expected_pictures(tiny_onnx, 3)
    for _ in range(4):
        assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
    assert engine.notes == [
        "TensorRT's launches could not be captured in a CUDA graph (operation not permitted when stream is capturing)"
    ]
    assert plans["decoder"].contexts[0][1].batches == [3] * 4


def test_two_threads(tiny_onnx: Path) -> None:
    engine, _ = stand_in_engine(read_halves(tiny_onnx))
    faces, audio = example_input(4, "ave")
    expected = run_whole(onnx.load(tiny_onnx), faces, audio)
    wrong: list[float] = []

    def work(first: int) -> None:
        for _ in range(4):
            some = slice(first, first + 2)
            pictures = predict(engine, faces[some], audio[some])
            wrong.append((pictures - expected[some]).abs().max().item())

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 8
    assert max(wrong) < 1e-5


class StandInStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.cuda_stream = log, name, {"default": 0, "own": 7, "callers": 9}[name]

    def wait_stream(self, other: "StandInStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *rest: object) -> None:
        self.log.append(f"off {self.name}")


class StandInEvent:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait(self) -> None:
        self.log.append("wait for the last call")

    def record(self) -> None:
        self.log.append("record")


@pytest.mark.parametrize("current", ["default", "callers"])
def test_streams(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, current: str) -> None:
    """Never on the default stream; each call after the last one, whatever stream that was on."""
    engine, plans = stand_in_engine(read_halves(tiny_onnx))
    log: list[str] = []
    streams = {name: StandInStream(log, name) for name in ("default", "own", "callers")}
    monkeypatch.setattr(torch.cuda, "device", lambda device: StandInStream([], "own"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[current])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["default"])
    runner = engine._decoder
    runner._stream, runner._done = streams["own"], StandInEvent(log)
    context = plans["decoder"].contexts[0][1]
    execute = context.execute_async_v3
    monkeypatch.setattr(context, "execute_async_v3", lambda handle: log.append(f"run on {handle}") or execute(handle))
    predict(engine, *example_input(3, "ave"))
    if current == "default":
        run = ["own waits for default", "on own", "run on 7", "off own", "default waits for own"]
    else:
        run = ["run on 9"]
    assert log == ["wait for the last call", *run, "record"]


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
    rtx: TensorRt, cache: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
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


# --- which engine is taken -------------------------------------------------------------------------------------------


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


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_auto_goes_on_with_torch_and_says_why(
    rtx: TensorRt, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(engine_module, "find_tensorrt", lambda: rtx)
    monkeypatch.setattr(
        engine_module, "TorchEngine", lambda network, device, precision: TorchEngine(network, CPU, "fp32")
    )
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
    monkeypatch.setattr(engine_module, "find_tensorrt", lambda: rtx)
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
    monkeypatch.setattr(engine_module, "PlanLoader", Loader)
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
    monkeypatch.setattr(engine_module, "PlanLoader", Loader)
    monkeypatch.setattr(Loader, "refused", ("fp16", "mixed", "fp32"))
    installed = TensorRt(ModuleType("tensorrt"), "11.2")
    attempts = tensorrt_attempts(installed, tiny_onnx, read_halves(tiny_onnx), None, CPU, "fp16", 2, print)
    with pytest.raises(DeviceError, match=r"tiny: TensorRT 11.2 cannot build .*conv kernel. Give the .pth checkpoint"):
        first_that_works(attempts, "tiny", print)


@pytest.mark.parametrize(("most", "asked"), [(4, 16), (1, 2), (3, None)])
def test_without_memory_for_the_batch_it_is_halved(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, most: int, asked: int | None
) -> None:
    class Scarce(Loader):
        def __init__(self, tensorrt: TensorRt, device: torch.device, rows: int, **options: Any) -> None:
            if rows > most:
                raise PlanMemoryError("TensorRT 11.2 finds too little memory")
            super().__init__(tensorrt, device, rows, **options)

    monkeypatch.setattr(engine_module, "PlanLoader", Scarce)
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

    probe = example_input(2, "ave")
    choice = Choice(["fp32", "fp16"], ["fp16"], build, lambda: load_engine(tiny_onnx, device="cpu", precision="fp32"))
    engine = fastest_that_agrees(choice, probe)
    assert engine.precision == taken
    assert (engine.measured_psnr_db["fp16"] >= 40) == (taken == "fp16")
    assert built == ["fp16"] if taken == "fp16" else ["fp16", "fp32"]  # no plan is built to be measured against


# --- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_loader(rows: int) -> PlanLoader:
    return PlanLoader(find_tensorrt(), torch.device("cuda", 0), rows)


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 60), ("fp16", 40), ("mixed", 40)])
def test_plans_draw_what_torch_draws(tmp_path: Path, precision: Precision, least_db: float) -> None:
    path = BUNDLED / "avatar/models/generator.onnx"
    halves = halves_of(path, precision, tmp_path)
    engine = TensorRtEngine(halves, gpu_loader(4), torch.device("cuda", 0), 4)
    exact = load_engine(path.with_suffix(".pth"), device="cuda", engine="torch", precision="fp32")
    for batch in (4, 4, 3, 1, 4, 9):  # plain, captured, ragged, ragged, replayed, all of them
        inputs = on_gpu(*example_input(batch, "ave"))
        assert least_psnr(predict(engine, *inputs), predict(exact, *inputs)) >= least_db
    assert engine.notes == []


@pytest.mark.gpu
def test_replays_equal_plain_runs(tiny_onnx: Path) -> None:
    engine = TensorRtEngine(read_halves(tiny_onnx), gpu_loader(4), torch.device("cuda", 0), 4)
    inputs = on_gpu(*example_input(4, "ave"))
    plain = predict(engine, *inputs)
    for _ in range(3):
        assert torch.equal(predict(engine, *inputs), plain)
    assert engine.notes == []
    assert engine._decoder._replay is not None


@pytest.mark.gpu
@pytest.mark.parametrize("own_streams", [False, True])
def test_two_threads_on_a_gpu(tiny_onnx: Path, own_streams: bool) -> None:
    engine = TensorRtEngine(read_halves(tiny_onnx), gpu_loader(4), torch.device("cuda", 0), 4)
    inputs = [on_gpu(*(x.flip(0) for x in example_input(4, "ave")) if k else example_input(4, "ave")) for k in (0, 1)]
    expected = [predict(engine, *given) for given in inputs]
    torch.cuda.synchronize()
    wrong: list[float] = []

    def work(k: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                pictures = [predict(engine, *inputs[k]) for _ in range(4)]
                wrong.append(max((p - expected[k]).abs().max().item() for p in pictures))

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 40
    assert max(wrong) < 1e-5


@pytest.mark.gpu
def test_the_second_program_builds_nothing(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = read_halves(tiny_onnx)
    TensorRtEngine(halves, gpu_loader(5), torch.device("cuda", 0), 5)

    def build(*rest: Any, **options: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("gpurender.tensorrt_plan.build_plan", build)
    TensorRtEngine(halves, gpu_loader(5), torch.device("cuda", 0), 5)


@pytest.mark.gpu
def test_auto_takes_tensorrt_on_a_gpu(tiny_unet: Path) -> None:
    try:
        check_capability(find_tensorrt(), torch.cuda.get_device_capability(0), "")
    except DeviceError as error:
        pytest.skip(str(error))
    inputs = example_input(3, "ave")
    engine = load_engine(tiny_unet, device="cuda", probe=inputs)
    assert engine.name == "tensorrt"
    assert "fp16" in engine.measured_psnr_db
    with torch.inference_mode():
        expected = UNet.forward(engine_module.load_unet(tiny_unet), *inputs)
    assert least_psnr(predict(engine, *on_gpu(*inputs)).cpu(), expected) >= 40
