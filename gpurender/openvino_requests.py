"""OpenVINO's compiled models and their requests, on torch's memory."""

import functools
import itertools
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .host import check_threads, cores_to_run_on, usable_cores
from .private_openvino import openvino


def compiled_model(model: openvino.Model, precision: str) -> openvino.CompiledModel:
    """The model for the CPU, for as many requests at once as OpenVINO finds best: on few cores, one on each.

    In `bf16` OpenVINO computes in bfloat16; so it does in `int8`, where the processor has bfloat16, with all that is
    not of bytes. In other precisions it computes in the types that the model has.
    """
    types = {"INFERENCE_PRECISION_HINT": "bf16" if uses_bfloat16(precision) else "f32"}
    return compiled_on_cpu(model, {**types, "PERFORMANCE_HINT": "THROUGHPUT"})


def compiled_on_cpu(model: openvino.Model, settings: dict[str, str]) -> openvino.CompiledModel:
    """The model for the CPU; RuntimeError if the system gives this process too few threads."""
    check_threads()  # it starts a few; where it cannot, it may wait for ever, and hear no interrupt
    return openvino.Core().compile_model(model, "CPU", {**settings, **own_threads()})


def own_threads() -> dict[str, int | bool]:
    """OpenVINO's settings where control groups allow this process fewer cores than it sees: by itself it would take as
    many threads as it sees cores, and memory for each (openvino #37838). And it would bind fewer of them to the first
    cores, where every other limited process has its own, while the rest of the cores are idle (measured)."""
    cores = usable_cores()
    return {"INFERENCE_NUM_THREADS": cores, "ENABLE_CPU_PINNING": False} if cores < cores_to_run_on() else {}


def uses_bfloat16(precision: str) -> bool:
    """Whether OpenVINO computes what is not of bytes in bfloat16."""
    return precision == "bf16" or (precision == "int8" and has_bfloat16())


@functools.cache
def has_bfloat16() -> bool:
    """Whether OpenVINO computes faster in bfloat16 here."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Requests:
    """A compiled OpenVINO model with a batch of one, and its inference requests.

    Attributes:
        output_shapes: without the batch axis.
        at_once: how many requests keep the cores busy.
    """

    def __init__(self, model: openvino.Model, precision: str) -> None:
        ready = compiled_model(model, precision)
        self.output_shapes = [tuple(port.shape)[1:] for port in ready.outputs]
        self.at_once: int = ready.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # Two batches: while one is finished and pasted, the next is under way.
        self._requests = itertools.cycle([ready.create_infer_request() for _ in range(4 * self.at_once)])
        self._lock = threading.Lock()  # renders may share the engine

    def start(self, items: Sequence[tuple[Tensor, ...]], outputs: Sequence[tuple[Tensor, ...]]) -> "UnderWay":
        """Each item's inputs to its outputs, without the batch axis. Contiguous inputs are not copied."""
        items = [tuple(tensor.contiguous() for tensor in item) for item in items]
        under_way = UnderWay(items, outputs)
        with self._lock:
            for item, output, request in zip(items, outputs, self._requests, strict=False):
                request.wait()
                for k, tensor in enumerate(item):
                    request.set_input_tensor(k, shared(tensor))
                for k, tensor in enumerate(output):
                    request.set_output_tensor(k, shared(tensor))
                request.start_async()
                under_way.requests.append(request)
        return under_way


class UnderWay:
    """Requests that were started, and the memory that they read and write."""

    def __init__(self, *memory: Sequence[tuple[Tensor, ...]]) -> None:
        self.requests: list[openvino.InferRequest] = []
        self._memory = memory

    def wait(self) -> None:
        errors: list[Exception] = []
        for request in self.requests:
            try:
                request.wait()
            except RuntimeError as error:  # the others work on, and need their memory
                errors.append(error)
        self._memory = ()
        if errors:
            raise errors[0]

    def __del__(self) -> None:
        with suppress(RuntimeError):
            self.wait()  # before their memory goes away


def shared(tensor: Tensor) -> openvino.Tensor:
    tensor = tensor[None]
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)
