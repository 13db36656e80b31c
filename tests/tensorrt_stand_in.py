"""A stand-in for TensorRT on a GPU: contexts that compute the same network with ONNX Runtime, on the memory that they
are given addresses of."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import run_whole
from onnx import ModelProto
from torch import Tensor

from gpurender.export import example_input
from gpurender.half import folded, to_half, widen_depthwise
from gpurender.halves import Halves, read_halves
from gpurender.tensorrt_build import PlanMemoryError
from gpurender.tensorrt_engine import TensorRtEngine

Precision = str
CPU = torch.device("cpu")


def in_precision(path: Path, precision: Precision) -> ModelProto:
    """The network of a float32 file in `fp32`, `fp16` or `mixed`."""
    if precision == "fp32":
        return onnx.load(path)
    half = to_half(folded(path, onnx.load(path)))
    return widen_depthwise(half) if precision == "mixed" else half


def halves_of(path: Path, precision: Precision, tmp_path: Path) -> Halves:
    onnx.save(in_precision(path, precision), tmp_path / f"{precision}.onnx")
    return read_halves(tmp_path / f"{precision}.onnx")


def with_batch(path: Path, batch: int, tmp_path: Path) -> Halves:
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, tmp_path / "fixed.onnx")
    return read_halves(tmp_path / "fixed.onnx")


def expected_pictures(path: Path, batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    inputs = example_input(batch, "ave")
    return inputs, run_whole(onnx.load(path), *inputs)


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


def stand_in_engine(halves: Halves, batch: int = 3, contexts: int = 2) -> tuple[Any, dict[str, StandInPlan]]:
    plans: dict[str, StandInPlan] = {}

    def load(name: str, half: ModelProto) -> StandInPlan:
        plans[name] = StandInPlan(half, halves.batch or batch, contexts)
        return plans[name]

    return TensorRtEngine(halves, load, CPU, batch), plans


class StandInStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.cuda_stream = log, name, {"default": 0, "own": 7, "callers": 9}[name]

    def wait_stream(self, other: "StandInStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *rest: object) -> None:
        self.log.append(f"off {self.name}")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
