"""What all batched ops share: which implementation runs, and tensors of other libraries."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.library import Library, infer_schema

Impl = Literal["reference", "kernel"]
"""Kornia and torch on any device, or the Triton kernel."""

TRITON_IS_HERE = find_spec("triton") is not None


LIBRARY = Library("gpurender", "FRAGMENT")


def custom_op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.gpurender.<name>`, opaque to torch.compile.

    `torch.library.custom_op` does it likewise, but has the first call load TorchDynamo: 110 MB and a second.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = infer_schema(function, mutates_args=mutates)
        torch.library.define(f"gpurender::{name}", schema, lib=LIBRARY, tags=torch.Tag.pt2_compliant_tag)
        for devices in ("CPU", "CUDA", "MPS", "XPU"):
            LIBRARY.impl(name, function, devices)
        return getattr(torch.ops.gpurender, name).default

    return register


def fake_of(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register what an op gives, but for the values."""
    return torch.library.register_fake(f"gpurender::{name}", lib=LIBRARY)


def gradient_of(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"gpurender::{name}", backward, setup_context=save, lib=LIBRARY)


class DLPack(Protocol):
    """A tensor of another library (DALI, CuPy, PyNvVideoCodec, NumPy, ...), which is taken as it lies in memory."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


def as_tensor(data: Tensor | DLPack) -> Tensor:
    """The same memory as a torch tensor."""
    return data if isinstance(data, Tensor) else torch.from_dlpack(data)


def chosen(impl: Impl | None, device: torch.device) -> Impl:
    """The implementation that was asked for; if none was, the kernel on a GPU.

    Raises:
        ValueError: there is no such implementation.
    """
    if impl is None:
        return "kernel" if device.type == "cuda" and TRITON_IS_HERE else "reference"
    if impl not in ("reference", "kernel"):
        raise ValueError(f"impl is None, 'reference' or 'kernel', given {impl!r}")
    return impl


def check_kernels_run(device: torch.device) -> None:
    """
    Raises:
        ValueError: kernels do not run on this device.
    """
    if not TRITON_IS_HERE:
        raise ValueError("impl='kernel' needs Triton; pip install triton, or give impl='reference'")
    from .kernels.cubic import INTERPRETED

    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl='kernel' runs on CUDA, given tensors on {device}; give impl='reference', "
            "or set TRITON_INTERPRET=1 before Python starts to have kernels interpreted, slowly"
        )
