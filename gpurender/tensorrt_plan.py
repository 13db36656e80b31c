"""A TensorRT plan from the cache, built where there is none, and the contexts that run it."""

import hashlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from onnx import ModelProto, TensorProto

from .half import widen_depthwise
from .plans import Key, cached_plan, keep, kept_file, read_kept
from .tensorrt_build import Capability, TensorRt, build_plan, log_of, plan_error, started

TELL_SECONDS = 10.0


class Context(Protocol):
    """What is used of an `IExecutionContext`."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Plan(Protocol):
    """A plan that is loaded."""

    def context(self, often: bool) -> Context | None:
        """What runs it, with memory of its own; `often`: it will run one batch size only, often. None if there is
        too little memory."""
        ...

    def warmed(self) -> None:
        """Called once a context has run `often`."""
        ...

    def error(self) -> Exception:
        """Why a run failed."""
        ...


class PlanLoader:
    """Loads kept plans, and builds those that there are none of."""

    def __init__(
        self,
        tensorrt: TensorRt,
        device: torch.device,
        rows: int,
        *,
        mixed: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            rows: frames at most.
            mixed: compute a half-precision network's depthwise convolutions in float32.
            notify: is told of builds.
        """
        self._tensorrt = tensorrt
        self._device = device
        self._rows = rows
        self._mixed = mixed
        self._notify = notify

    def __call__(self, name: str, half: ModelProto) -> Plan:
        """
        Raises:
            PlanError: TensorRT cannot build it, or cannot run what it built.
        """
        network = widen_depthwise(half) if self._mixed else half
        gpu, capability = torch.cuda.get_device_name(self._device), torch.cuda.get_device_capability(self._device)
        key = plan_key(self._tensorrt, network, self._rows, gpu, capability)
        timings_key = {"what": "timings", "tensorrt": str(self._tensorrt), "gpu": gpu}
        with torch.cuda.device(self._device):
            runtime = started(self._tensorrt, self._tensorrt.api.Runtime)

            def build() -> bytes:
                torch.cuda.empty_cache()  # TensorRT takes its memory beside torch
                file = kept_file(timings_key, "timings")
                self._notify(f"building the {name}'s TensorRT plan, once for this GPU ({self._usual_wait})")
                built = build_plan(
                    self._tensorrt,
                    network,
                    self._rows,
                    targets=[capability] if self._tensorrt.rtx else [],
                    timings=read_kept(file, timings_key) or b"",
                    progress=now_and_then(lambda done: self._notify(f"building the {name}'s plan: {done:.0%}")),
                )
                if built.timings:
                    keep(file, timings_key, built.timings, self._notify)
                return built.plan

            log_of(self._tensorrt.api).errors.clear()
            engine = cached_plan(key, build, runtime.deserialize_cuda_engine, self._notify)
        if engine is None:
            raise plan_error(self._tensorrt, "cannot load the plan", log_of(self._tensorrt.api).errors)
        return LoadedPlan(self._tensorrt, engine, runtime, key, self._device, self._notify)

    @property
    def _usual_wait(self) -> str:
        return "some seconds" if self._tensorrt.rtx else "some minutes"


def plan_key(tensorrt: TensorRt, network: ModelProto, rows: int, gpu: str, capability: Capability) -> dict[str, str]:
    """All that a plan depends on; the precision is the network's own, and named for whoever looks into the file."""
    return {
        "network": hashlib.sha256(network.SerializeToString(deterministic=True)).hexdigest(),
        "tensorrt": str(tensorrt),
        "gpu": f"{gpu} {capability[0]}.{capability[1]}",
        "precision": "fp16" if network.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16 else "fp32",
        "batch": f"1..{rows}",
    }


def now_and_then(tell: Callable[[float], None]) -> Callable[[float], None]:
    told = time.monotonic()

    def progress(done: float) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            tell(done)

    return progress


class LoadedPlan:
    """A deserialised plan on a GPU, see `Plan`."""

    def __init__(
        self,
        tensorrt: TensorRt,
        engine: Any,
        runtime: Any,
        key: Key,
        device: torch.device,
        notify: Callable[[str], None],
    ) -> None:
        self._tensorrt = tensorrt
        self._engine = engine
        self._runtime = runtime  # must outlive the engine
        self._key = key
        self._device = device
        self._notify = notify
        self._kernels: Any = None
        self._kept = b""

    def context(self, often: bool) -> Context | None:
        log_of(self._tensorrt.api).errors.clear()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()  # as for a build
            return self._engine.create_execution_context(*self._how_to_run(often))

    def _how_to_run(self, often: bool) -> list[Any]:
        """TensorRT-RTX compiles kernels when it first runs a shape: at once for one that comes often, so that a CUDA
        graph has the fast ones, and kept for the next program. TensorRT has them in the plan."""
        if not self._tensorrt.rtx:
            return []
        api: Any = self._tensorrt.api
        config = self._engine.create_runtime_config()
        if often:
            config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
            self._kept = read_kept(kept_file(self._key, "kernels"), self._key) or b""
            if self._kept and not self._kernels.deserialize(self._kept):
                self._kept = b""  # of another driver
        config.set_runtime_cache(self._kernels)
        return [config]

    def warmed(self) -> None:
        if self._kernels is not None:
            kernels = bytes(self._kernels.serialize())
            if kernels != self._kept:
                keep(kept_file(self._key, "kernels"), self._key, kernels, self._notify)

    def error(self) -> Exception:
        return plan_error(self._tensorrt, "cannot run the plan", log_of(self._tensorrt.api).errors)
