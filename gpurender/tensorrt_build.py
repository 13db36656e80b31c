"""Finds TensorRT or TensorRT-RTX, and has it build plans.

The two have nearly the same API; a plan is what they make of an ONNX network for one version and one kind of GPU.
TensorRT times its kernels on the GPU, for minutes; TensorRT-RTX needs no GPU to build, and compiles when it runs.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from onnx import ModelProto

from .errors import DeviceError, first_line

Capability = tuple[int, int]
INSTALL = "pip install 'gpurender[gpu]' for TensorRT, or 'gpurender[rtx]' for TensorRT-RTX on GeForce and RTX GPUs"


class TensorRt(NamedTuple):
    """An installed TensorRT; as text, its flavour and version."""

    api: ModuleType
    version: str

    @property
    def rtx(self) -> bool:
        return self.api.__name__ == "tensorrt_rtx"

    def __str__(self) -> str:
        return f"TensorRT{'-RTX' if self.rtx else ''} {self.version}"


class PlanError(DeviceError):
    """TensorRT can make nothing of this network here."""


class PlanMemoryError(PlanError):
    """The GPU has too little memory for it."""


def find_tensorrt() -> TensorRt:
    """TensorRT, else TensorRT-RTX.

    Raises:
        DeviceError: neither is installed, or what is does not import; the message says why and what to do.
    """
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            api = importlib.import_module(name)
            return TensorRt(api, api.__version__)
        except ModuleNotFoundError as error:
            if error.name != name:
                reasons.append(f"{name} is installed but lacks {error.name}")
        except AttributeError:
            reasons.append(f"{name} is not NVIDIA's package")
        except Exception as error:  # libraries that are not there show as ImportError, OSError and FileNotFoundError
            reasons.append(f"{name} is installed but does not import ({first_line(error)})")
    if reasons:
        raise DeviceError(f"{'; '.join(reasons)}. Install it again: {INSTALL}.")
    raise DeviceError(f"TensorRT is not installed: {INSTALL}.")


def check_capability(tensorrt: TensorRt, capability: Capability, gpu: str) -> None:
    """Raise DeviceError if this flavour does not know the GPU's kind."""
    if tensorrt.rtx and target_name(capability) not in tensorrt.api.ComputeCapability.__members__:
        raise DeviceError(
            f"{tensorrt} does not run on {gpu} (compute capability {capability[0]}.{capability[1]}); "
            "pip install 'gpurender[gpu]' for TensorRT, or give --engine torch."
        )


def target_name(capability: Capability) -> str:
    return f"SM{capability[0]}{capability[1]}"


class Built(NamedTuple):
    plan: bytes
    timings: bytes  # of kernels, which make the next build faster


def build_plan(
    tensorrt: TensorRt,
    network: ModelProto,
    rows: int,
    *,
    targets: Sequence[Capability] = (),
    timings: bytes = b"",
    progress: Callable[[float], None] = lambda done: None,
) -> Built:
    """Have TensorRT build a plan, in the precision that the network itself has.

    Args:
        network: its inputs' batch is a symbol (1 to `rows` frames, `rows` best) or the number `rows`.
        targets: compute capabilities to build for (TensorRT-RTX alone; it needs no such GPU here).
        timings: of an earlier build; b"" if there was none.
        progress: is told the share that is done, 0 to 1, from TensorRT's threads.

    Raises:
        PlanError: with TensorRT's own words; PlanMemoryError where they are about memory.
    """
    api: Any = tensorrt.api
    log = log_of(api)
    log.errors.clear()
    builder = started(tensorrt, api.Builder)
    flags = named(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # later versions may know nothing else
    definition = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = api.OnnxParser(definition, log)
    if not parser.parse(network.SerializeToString()):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        words = [f"{error.desc()} (at {error.node_operator()} {error.node_name()})" for error in found]
        raise plan_error(tensorrt, "cannot read the network", words or log.errors)
    config = builder.create_builder_config()
    for flag in named(api.BuilderFlag, "TF32"):
        config.clear_flag(flag)  # fp32 means fp32
    for flag in named(api.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(flag)  # a run that allocates cannot be captured in a CUDA graph
    if targets:
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(api.ComputeCapability, target_name(target)), i)
    config.add_optimization_profile(batch_profile(builder, network, rows))
    kernels = None if tensorrt.rtx else config.create_timing_cache(timings) or config.create_timing_cache(b"")
    if kernels is not None:
        config.set_timing_cache(kernels, False)
    log.errors.clear()  # a cache that it refuses is no reason for what fails later
    monitor = monitor_of(api, progress)
    config.progress_monitor = monitor
    plan = built_aside(lambda: builder.build_serialized_network(definition, config), monitor)
    if plan is None:
        raise plan_error(tensorrt, "cannot build the network", log.errors)
    return Built(bytes(plan), b"" if kernels is None else bytes(kernels.serialize()))


def started(tensorrt: TensorRt, kind: Any) -> Any:
    """A `Builder` or a `Runtime`; without a driver that it can use, there is none."""
    try:
        return kind(log_of(tensorrt.api))
    except TypeError:
        raise plan_error(tensorrt, "does not start", log_of(tensorrt.api).errors) from None


def named(flags: Any, name: str) -> list[Any]:
    """The flag of this name, in versions that have it."""
    return [flags.__members__[name]] if name in flags.__members__ else []


def batch_profile(builder: Any, network: ModelProto, rows: int) -> Any:
    profile = builder.create_optimization_profile()
    for value in network.graph.input:
        first, *rest = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
        profile.set_shape(value.name, (first or 1, *rest), (rows, *rest), (rows, *rest))
    return profile


def plan_error(tensorrt: TensorRt, what: str, words: Sequence[str]) -> PlanError:
    """TensorRT's own words in one line, the first ones: later ones are often about what follows from them."""
    text = "; ".join(dict.fromkeys(" ".join(line.split()) for line in words[:3])) or "it gives no reason"
    if "out of memory" in text.lower() or "outofmemory" in text.lower():
        return PlanMemoryError(
            f"{tensorrt} {what}: the GPU has too little free memory. End other programs on it, give a smaller --batch, "
            f"or --engine torch. It said: {text}"
        )
    return PlanError(f"{tensorrt} {what}: {text}")


@functools.cache
def log_of(api: Any) -> Any:
    """The one logger of this flavour: TensorRT keeps the first that it is given for the whole process."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.INTERNAL_ERROR, api.ILogger.ERROR):
                self.errors.append(message)

    return Log()


def built_aside(build: Callable[[], Any], monitor: Any) -> Any:
    """What `build` returns, on a thread of its own. An interrupt comes to the main thread, in whatever Python runs
    there; were that TensorRT's logger, as it mostly would be, its bindings would print the interrupt and forget it."""
    device = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_initialized() else nullcontext()

    def on_the_same_gpu() -> Any:
        with device:
            return build()

    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(on_the_same_gpu)
        try:
            plan = building.result()
        except BaseException as error:
            monitor.stopped = error  # the build ends at its next step
            raise
    if monitor.stopped is not None:
        raise monitor.stopped
    return plan


def monitor_of(api: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._phases: dict[str, list[Any]] = {}  # name: parent, steps, steps done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, num_steps, 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            # An exception must not pass through TensorRT.
            try:
                self._phases[phase_name][2] = step + 1
                roots = [name for name, (parent, _, _) in self._phases.items() if not parent]
                progress(max((self._share(name) for name in roots), default=0.0))
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _share(self, phase: str) -> float:
            _, steps, done = self._phases[phase]
            inner = [self._share(name) for name, (parent, _, _) in self._phases.items() if parent == phase]
            return min((done + max(inner, default=0.0)) / max(steps, 1), 1.0)

    return Monitor()
