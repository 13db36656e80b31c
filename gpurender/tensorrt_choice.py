"""What TensorRT offers for a network on a GPU, and what to try where a way to run it does not work."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .engine import Choice, Engine
from .errors import DeviceError, InputError
from .export import cached_onnx
from .half import cached_half
from .halves import Halves, read_halves
from .network import Mode
from .openvino_engine import OpenVinoEngine
from .openvino_network import cached_network
from .tensorrt_build import PlanError, PlanMemoryError, TensorRt, check_capability, find_tensorrt
from .tensorrt_engine import BATCH, TensorRtEngine
from .tensorrt_plan import PlanLoader
from .torch_engine import TorchEngine, torch_network


def tensorrt_choice(
    path: Path,
    mode: Mode | None,
    device: torch.device,
    batch: int | None,
    notify: Callable[[str], None],
    or_torch: bool,
    or_fp32: bool,
) -> Choice:
    """
    Args:
        or_torch: fall back to torch if TensorRT cannot run it.
        or_fp32: fall back to fp32 if fp16 does not work.
    """
    if device.type != "cuda":
        raise DeviceError(f"the tensorrt engine runs on NVIDIA GPUs, not on {device}; use --engine openvino or torch.")
    tensorrt = usable_tensorrt(device)
    onnx = path if path.suffix.lower() == ".onnx" else cached_onnx(path, mode, notify)
    halves = read_halves(onnx, mode)
    by_torch = path if or_torch else None

    def build(precision: str) -> Engine:
        attempts = tensorrt_attempts(tensorrt, onnx, halves, by_torch, device, precision, batch, notify, or_fp32)
        return first_that_works(attempts, f"{onnx.name} on {device}", notify, "" if or_torch else TORCH_WOULD)

    def exact() -> Engine:
        notify("drawing a few frames in fp32 on the CPU, to hold half precision against")
        return OpenVinoEngine(cached_network(onnx, mode), "fp32")

    if halves.float16:
        where = f"for {path}, which is in half precision: give the float32 export or the checkpoint"
        return Choice(["fp16"], [], build, exact, where)
    return Choice(["fp32", "fp16"], ["fp16"], build, exact, "here")


Attempt = tuple[str, Callable[[], Engine]]
TORCH_WOULD = " --engine auto goes on with torch, where TensorRT does not work."


def tensorrt_attempts(
    tensorrt: TensorRt,
    onnx: Path,
    halves: Halves,
    by_torch: Path | None,
    device: torch.device,
    precision: str,
    batch: int | None,
    notify: Callable[[str], None],
    or_fp32: bool = True,
) -> Iterator[Attempt]:
    """What to try, one after another, until something works.

    Args:
        by_torch: the file for torch to load; None if it is not to.
        or_fp32: whether to fall back to fp32 if fp16 does not work.
    """

    def with_plans(halves: Halves, mixed: bool = False) -> Engine:
        wanted = rows = halves.batch or batch or BATCH
        while True:
            try:
                loader = PlanLoader(tensorrt, device, rows, mixed=mixed, notify=notify)
                engine = TensorRtEngine(halves, loader, device, rows)
            except PlanMemoryError:
                if rows == 1 or halves.batch is not None:
                    raise
                rows //= 2
                notify(f"{device} has too little free memory; trying {rows} frames at a time")
                continue
            if rows < wanted:
                engine.notes.append(f"too little memory on {device} for {wanted} frames at a time: it does {rows}")
            return engine

    def with_torch(path: Path) -> Engine:
        try:
            network = torch_network(path, halves.mode)
        except InputError as error:  # another architecture, which TensorRT might have run
            raise PlanError(str(error).rstrip(".")) from None
        return TorchEngine(network, device, precision, notify)

    if precision == "fp16":
        half = halves if halves.float16 else read_halves(cached_half(onnx, notify), halves.mode)
        yield f"{tensorrt} in fp16", lambda: with_plans(half)
        # TensorRT 11.2 is reported to find no kernel for grouped convolutions in half precision.
        yield f"{tensorrt} in fp16 with depthwise convolutions in fp32", lambda: with_plans(half, mixed=True)
    elif precision == "fp32":
        yield f"{tensorrt} in fp32", lambda: with_plans(halves)
    if by_torch is not None:
        yield f"torch in {precision}", lambda: with_torch(by_torch)
    if precision == "fp16" and or_fp32 and not halves.float16:
        yield f"{tensorrt} in fp32", lambda: with_plans(halves)


def first_that_works(attempts: Iterator[Attempt], what: str, notify: Callable[[str], None], advice: str = "") -> Engine:
    """The first engine that can be built, with a note on what failed before it.

    Raises:
        PlanError: none can; what was wrong with the first is in it, and the advice, if it is not short of memory.
    """
    failures: list[PlanError] = []
    for name, make in attempts:
        if failures:
            notify(f"trying {name} instead")
        try:
            engine = make()
        except PlanError as error:
            failures.append(error.with_traceback(None))  # it would keep what was built of the engine
            notify(f"{name} does not work: {error}")
            continue
        if failures:
            engine.notes.append(f"runs on {name}, because {failures[0]}")
        return engine
    first = failures[0]
    raise type(first)(f"{what}: {first}.{'' if isinstance(first, PlanMemoryError) else advice}")


def usable_tensorrt(device: torch.device) -> TensorRt:
    tensorrt = find_tensorrt()
    check_capability(tensorrt, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    return tensorrt
