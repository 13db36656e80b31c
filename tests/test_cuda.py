"""Why there is no GPU, asked of a machine without a driver and of one with a stub of it."""

import os

import pytest
import torch
from driver_stub import driver_stub_fixture as driver_stub_fixture
from driver_stub import run_python

from gpurender import DeviceError
from gpurender.cuda import (
    driver_is_here,
    exact_products,
    is_out_of_memory,
    resolve_device,
    why_no_cuda,
)

ASK = "from gpurender.cuda import why_no_cuda; print(why_no_cuda())"


@pytest.mark.skipif(driver_is_here(), reason="there is a driver")
def test_no_driver() -> None:
    if torch.version.cuda is None:
        assert "this torch is built without CUDA" in why_no_cuda()
    else:
        assert "there is no NVIDIA driver here (libcuda.so.1 is missing)" in why_no_cuda()
    with pytest.raises(
        DeviceError, match=r"torch finds no CUDA GPU on this machine; use --device cpu. Why: "
    ) as raised:
        resolve_device("cuda")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_driver_without_a_gpu_and_one_that_is_too_old(driver_stub: dict[str, str]) -> None:
    assert "finds no GPU that it can use (cuInit gives 100)" in run_python(ASK, driver_stub).stdout
    old = run_python(ASK, {**driver_stub, "STUB_CUDA_VERSION": "11040"})
    assert "the NVIDIA driver is too old: it does CUDA 11.4, and this torch needs" in old.stdout
    assert "update the driver, or install torch for CUDA 11" in old.stdout


def test_products_are_exact_until_the_last_of_several_threads_is_done() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            one, other = exact_products(), exact_products()
            one.__enter__()
            other.__enter__()
            one.__exit__(None, None, None)  # the first that came is the first that goes
            assert not torch.backends.cudnn.allow_tf32
            other.__exit__(None, None, None)
            assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


NEWER_SWITCH = """
import torch
from gpurender.cuda import exact_products

cudnn = torch.backends.cudnn
if {global_switch}:
    torch.backends.fp32_precision = "tf32"
cudnn.conv.fp32_precision = {of_convolutions!r}
before = cudnn.conv.fp32_precision
for _ in range(2):
    with exact_products():
        print(cudnn.conv.fp32_precision in ("ieee", "none"))
    print(cudnn.conv.fp32_precision == before)
"""


@pytest.mark.parametrize("global_switch", [False, True])
@pytest.mark.parametrize("of_convolutions", ["ieee", "tf32", "none"])
def test_products_are_exact_where_the_newer_switch_is_used(global_switch: bool, of_convolutions: str) -> None:
    """In a program of its own: the older switch raises errors once somebody has used the newer one."""
    code = NEWER_SWITCH.format(global_switch=global_switch, of_convolutions=of_convolutions)
    done = run_python(code, dict(os.environ))
    assert done.stdout.split() == ["True"] * 4, done.stderr


def test_what_is_too_little_memory() -> None:
    for error in (
        torch.OutOfMemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("Failed to allocate 3276800 bytes of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("CUDA error: misaligned address"), ValueError("out of memory")):
        assert not is_out_of_memory(error)


CONTEXTS = """
import ctypes, PyNvVideoCodec
from gpurender.cuda import context_kept

driver = ctypes.CDLL("libcuda.so.1")

def current():
    context = ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(context))
    return context.value

driver.cuCtxSetCurrent(ctypes.c_void_p(328))
with context_kept():
    try:
        PyNvVideoCodec.GetEncoderCaps(gpuid=0, codec="h264")
    except Exception as error:
        print("refused" if current() else "?")
    driver.cuCtxSetCurrent(ctypes.c_void_p(77))
print(current())
"""


def test_the_current_context_is_kept(driver_stub: dict[str, str]) -> None:
    """Around PyNvVideoCodec, which on an H200 left another one behind."""
    done = run_python(CONTEXTS, driver_stub, gpus=1)
    assert done.stdout.split() == ["refused", "328"], done.stderr
