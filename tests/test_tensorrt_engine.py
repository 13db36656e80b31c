"""The TensorRT engine, on a stand-in for a GPU's contexts and, where there is one, on a GPU."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import run_whole
from tensorrt_stand_in import Precision, StandInStream, expected_pictures, halves_of, stand_in_engine, with_batch
from torch import Tensor

import gpurender.tensorrt_engine as tensorrt_module
from gpurender import load_engine, predict
from gpurender.cuda_graphs import CaptureError
from gpurender.engine import least_psnr
from gpurender.export import example_input
from gpurender.find import BUNDLED
from gpurender.halves import cut, read_halves, read_network
from gpurender.tensorrt_build import PlanError, PlanMemoryError, find_tensorrt
from gpurender.tensorrt_engine import TensorRtEngine
from gpurender.tensorrt_plan import PlanLoader


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


@pytest.mark.parametrize("kind", [RuntimeError, PlanError])
def test_without_cuda_graphs_it_runs_on_and_says_so(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    engine, plans = stand_in_engine(read_halves(tiny_onnx))
    graphs_on_the_host(engine, monkeypatch)

    def failing(*rest: Any) -> Callable[[], None]:
        raise kind("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(tensorrt_module, "captured", failing)
    inputs, expected = expected_pictures(tiny_onnx, 3)
    for _ in range(4):
        assert (predict(engine, *inputs) - expected).abs().max() < 1e-5
    assert engine.notes == [
        "TensorRT's launches could not be captured in a CUDA graph (operation not permitted when stream is capturing)"
    ]
    assert plans["decoder"].contexts[0][1].batches == [3] * 4


def test_where_torch_cannot_go_on_after_a_capture_it_does_not(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = stand_in_engine(read_halves(tiny_onnx))
    graphs_on_the_host(engine, monkeypatch)

    def failing(*rest: Any) -> Callable[[], None]:
        raise CaptureError("update torch")

    monkeypatch.setattr(tensorrt_module, "captured", failing)
    inputs, _ = expected_pictures(tiny_onnx, 3)
    predict(engine, *inputs)  # a graph is captured once a full batch has run without
    with pytest.raises(CaptureError, match="update torch"):
        predict(engine, *inputs)


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
    runner._stream, runner._turns._done = streams["own"], StandInEvent(log)
    context = plans["decoder"].contexts[0][1]
    execute = context.execute_async_v3
    monkeypatch.setattr(context, "execute_async_v3", lambda handle: log.append(f"run on {handle}") or execute(handle))
    predict(engine, *example_input(3, "ave"))
    if current == "default":
        run = ["own waits for default", "on own", "run on 7", "off own", "default waits for own"]
    else:
        run = ["run on 9"]
    assert log == ["wait for the last call", *run, "record"]


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


def test_engines_of_a_caller_in_inference_mode_are_for_other_threads_too(tiny_onnx: Path) -> None:
    """What an engine keeps is ordinary memory, which threads that are not in that mode may write to."""
    inputs = example_input(3, "ave")
    with torch.inference_mode():
        engine, _ = stand_in_engine(read_halves(tiny_onnx))
        expected = predict(engine, *inputs)
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(predict, engine, *inputs).result(), expected)
