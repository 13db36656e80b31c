"""Which device, NVIDIA's driver, and why CUDA cannot be used; errors that mean no memory; float32 without TF32."""

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import DeviceError

OK = 0  # as CUDA's driver says it
CONTAINER = "a container gets the host's with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility,video."
NO_DRIVER = f"there is no NVIDIA driver here (libcuda.so.1 is missing); {CONTAINER}"


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU that torch sees, else the CPU.

    Raises:
        DeviceError: there is no such device here.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"{device!r} is not a device; choose auto, cpu, cuda or cuda:N.") from None
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"{device} cannot render; choose auto, cpu, cuda or cuda:N.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"{device}: torch finds no CUDA GPU on this machine; use --device cpu. Why: {why_no_cuda()}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{device}: there are {torch.cuda.device_count()} GPUs here, numbered from 0.")
    return resolved


def why_no_cuda() -> str:
    """Why torch finds no GPU here, and what to do, in one line; asked only where it finds none."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install PyPI's plain torch to use a GPU."
    if not driver_is_here():
        return NO_DRIVER
    driver = ctypes.CDLL("libcuda.so.1")
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) == OK and version.value:
        major, minor = version.value // 1000, version.value % 1000 // 10
        if major < int(torch.version.cuda.split(".")[0]):
            return (
                f"the NVIDIA driver is too old: it does CUDA {major}.{minor}, and this torch needs "
                f"{torch.version.cuda.split('.')[0]}.0; update the driver, or install torch for CUDA {major}."
            )
    status = driver.cuInit(0)
    if status != OK:
        return f"the NVIDIA driver finds no GPU that it can use (cuInit gives {status})."
    return "torch cannot use the GPU; python -c 'import torch; torch.cuda.init()' says why."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device has too little memory: torch's own, DALI's (a MemoryError), or that of CUDA,
    its libraries or Triton."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    told = ("out of memory", "can't alloc", "failed to allocate", "bad_alloc", "alloc_failed")
    return isinstance(error, RuntimeError) and any(some in words for some in told)


@contextmanager
def without_autocast() -> Iterator[None]:
    """A caller may be in `torch.autocast`, which is for networks that are written for it."""
    with ExitStack() as plain:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                plain.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No gradients are kept, and tensors are ordinary ones, though a caller be in `torch.inference_mode`: what an
    engine keeps is written to by threads that are not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def on_the_host() -> Iterator[None]:
    """Tensors that are made without a device are on the host, whatever the program's default device is."""
    with torch.device("cpu"):
        yield


EXACT = threading.Lock()
exact_now: list[ExitStack] = []
"""One for each that computes exactly at the moment; the first has the setting of before."""


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 means float32: not TF32 in cuDNN's convolutions, which is the process's setting and as it was before once
    the last of several threads is done; nor what `torch.autocast` makes of it, in which a caller may be."""
    with EXACT:
        exact_now.append(ExitStack() if exact_now else without_tf32())
    try:
        with without_autocast():
            yield
    finally:
        with EXACT:
            if len(exact_now) == 1:
                exact_now[0].close()
            exact_now.pop()


def without_tf32() -> ExitStack:
    """Forbid it; closing what is returned sets everything as it was.

    torch has two switches, and the older one raises an error where somebody has used the newer one.
    """
    cudnn: Any = torch.backends.cudnn
    before = ExitStack()
    try:
        before.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        cudnn.allow_tf32 = False
    except RuntimeError:
        before.pop_all()
    if cudnn.conv.fp32_precision == "tf32":  # still: by the newer switch, for all of torch or for this
        before.callback(setattr, cudnn.conv, "fp32_precision", "tf32")
        cudnn.conv.fp32_precision = "ieee"
    return before


def driver_is_here() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@contextmanager
def context_kept() -> Iterator[None]:
    """Whatever this does, the thread's current context is afterwards what it was.

    On an H200, torch's events were invalid handles after PyNvVideoCodec had been asked for NVENC, which is not there:
    they are so in another context than their own.
    """
    if not driver_is_here():
        yield
        return
    driver = ctypes.CDLL("libcuda.so.1")
    before = ctypes.c_void_p()
    known = driver.cuCtxGetCurrent(ctypes.byref(before)) == OK
    try:
        yield
    finally:
        if known:
            driver.cuCtxSetCurrent(before)


def driver_version() -> str | None:
    """The NVIDIA driver's version, as the kernel tells it."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text()) if file.is_file() else None
    return found.group(1) if found else None
