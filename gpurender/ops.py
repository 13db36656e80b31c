"""What all batched ops share: which implementation runs, and tensors of other libraries."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, infer_schema

from .errors import first_line

Impl = Literal["reference", "kernel"]
"""Kornia and torch on any device, or the Triton kernel; where neither is asked for, see each op."""

LIBRARY = Library("gpurender", "FRAGMENT")


def custom_op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.gpurender.<name>`, opaque to torch.compile.

    `torch.library.custom_op` does it likewise, but has the first call load TorchDynamo: 110 MB and a second.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = infer_schema(function, mutates_args=mutates)
        # Not in a CUDA graph: rectangles are read on the host, and a replay would have those of the capture.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
        torch.library.define(f"gpurender::{name}", schema, lib=LIBRARY, tags=tags)
        for devices in ("CPU", "CUDA", "MPS", "XPU"):
            LIBRARY.impl(name, function, devices)
        return getattr(torch.ops.gpurender, name).default

    return register


def fake_of(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register an op's fake: its result's shape, dtype and device, without values."""
    return torch.library.register_fake(f"gpurender::{name}", lib=LIBRARY)


def gradient_of(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"gpurender::{name}", backward, setup_context=save, lib=LIBRARY)


class DLPack(Protocol):
    """A tensor of another library (DALI, CuPy, PyNvVideoCodec, NumPy, ...), which is taken as it lies in memory."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


def as_tensor(data: Tensor | DLPack, written: bool = False) -> Tensor:
    """The same memory as a torch tensor, which is `written` to or not."""
    if isinstance(data, Tensor):
        return data
    if written and not getattr(getattr(data, "flags", None), "writeable", True):  # NumPy's; torch would not ask
        raise ValueError("the array is read-only: leave out inplace=True, or copy() it")
    if any(step < 0 for step in getattr(data, "strides", None) or ()):
        raise ValueError("torch has no negative strides, as of a NumPy array that is reversed: copy() it")
    if not hasattr(data, "__dlpack__"):
        raise ValueError(f"frames are a tensor or an array with DLPack, given {type(data).__name__}")
    return torch.from_dlpack(data)


def check_no_tangents(*tensors: Tensor) -> None:
    """Raise ValueError for forward-mode derivatives: the ops have none, and torch would take them for zero."""
    if torch.compiler.is_compiling():  # which has no tangents to look at; torch has no public name for the level
        forward = forward_ad._current_level >= 0
    else:
        forward = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if forward:
        raise ValueError(
            "there are no forward-mode derivatives (torch.func.jvp, jacfwd) of this; take those of torch.autograd "
            "(backward, grad), which are by reverse mode"
        )


def check_impl(impl: Impl | None) -> None:
    if impl not in (None, "reference", "kernel"):
        raise ValueError(f"impl is None, 'reference' or 'kernel', given {impl!r}")


def runs_kernel(impl: str | None, device: torch.device) -> bool:
    """Whether the kernel is to run: if it was asked for, or nothing was and this is a GPU on which it can.

    Raises:
        ValueError: it was asked for, and cannot run.
    """
    if impl == "reference" or (impl is None and device.type != "cuda"):
        return False
    why = why_no_kernels(device.type)
    if why is not None and impl == "kernel":
        raise ValueError(f"impl='kernel' {why}; or give impl='reference'")
    return why is None


@cache
def why_no_kernels(device_type: str) -> str | None:
    """What kernels lack on a kind of device, and what to do; None if they run there."""
    if find_spec("triton") is None:
        return "needs Triton; pip install triton"
    from .kernels.cubic import INTERPRETED

    if device_type != "cuda":
        how = "set TRITON_INTERPRET=1 before Python starts to have kernels interpreted, slowly"
        return None if INTERPRETED else f"runs on CUDA, not on {device_type}; {how}"
    try:
        import triton

        driver: Any = triton.runtime.driver.active
        assert driver.utils  # which Triton compiles when it is first used
    except Exception as error:  # of the compiler, the linker, the driver
        return (
            f"does not start ({first_line(error)}); Triton needs gcc and Python's headers: apt install gcc python3-dev"
        )
    return None
