"""Compiles every kernel for a GPU of the compute capability that is given, as its launcher has it compiled on one."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpurender.color import BETWEEN, chroma_weights, equations
from gpurender.kernels import color, crop, paste, residual

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """What Triton asks of a GPU's driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_


launch = JITFunction.run
results: dict[str, dict[str, int]] = {}


def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    compiled: Any = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert numbers, used
    of = [str(value.dtype).removeprefix("torch.") for value in args if isinstance(value, torch.Tensor)]
    of += [name for name, value in kwargs.items() if value is True] + (["ACROSS"] if kwargs.get("ACROSS") else [])
    of += [f"{kwargs[name]}" for name in ("ROWS", "COLUMNS", "BLOCK_P", "BLOCK_M", "BLOCK_C") if name in kwargs]
    results[" ".join([kernel.__name__, *of])] = {
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "byte loads": len(re.findall(r"ld\.global\.b8", compiled.asm["ptx"])),
        "byte stores": len(re.findall(r"st\.global\.b8", compiled.asm["ptx"])),
    }


def main() -> None:
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    bt709 = equations("bt709", False)
    rects = torch.tensor([[10, 20, 200, 210]])
    keep = torch.zeros(1, 720, 1280, dtype=torch.bool)
    surfaces = torch.empty(1, 1080, 1280, dtype=torch.uint8)
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        frames, crops = (torch.empty(1, 3, *size, dtype=dtype) for size in ((720, 1280), (328, 328)))
        half = torch.float16 if dtype == torch.uint8 else dtype
        crop.crop(frames, rects, crops, torch.empty(1, 6, 320, 320, dtype=half), bt709)
        predictions = torch.empty(1, 3, 320, 320, dtype=half)
        paste.paste(frames, crops, predictions, rects, keep)
        if dtype == torch.uint8:
            crop.crop(surfaces, rects, crops, None, bt709)
            paste.paste(frames, crops, predictions, rects, None, surfaces, bt709)
            paste.paste(frames[..., 1:, 1:], crops, predictions, rects, keep[..., 1:, 1:], surfaces, bt709)
            color.rgb_to_nv12(frames, surfaces, bt709)
            color.rgb_to_nv12(frames[..., 1:, 1:], surfaces, bt709)
            color.nv12_to_rgb(surfaces, frames, bt709, None, None)
            for across, down in BETWEEN.values():
                color.nv12_to_rgb(surfaces, frames, bt709, chroma_weights(across), chroma_weights(down))
    network_layers()
    print(json.dumps(results))


def network_layers() -> None:
    """Of the full-width network, a layer for each way that a kernel is launched."""

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float16)

    def weights(inputs: int, made: int) -> tuple[torch.Tensor, torch.Tensor]:
        return half(inputs, made), torch.empty(made)

    for size, channels, made in ((320, 12, 128), (160, 32, 128), (80, 64, 256), (20, 256, 1024)):
        x, below, out = half(1, size, size, channels), half(1, size // 2, size // 2, made), half(1, size, size, made)
        residual.pointwise(x, *weights(channels, made), out, "relu", below)
    x = half(1, 10, 10, 1024)
    residual.pointwise(x, *weights(1024, 512), half(1, 10, 10, 512), "none", added=half(1, 10, 10, 512))
    residual.pointwise(half(1, 320, 320, 16), *weights(16, 3), torch.empty(1, 3, 320, 320), "sigmoid", planes=True)
    for size, channels, made in ((320, 128, 16), (160, 64, 32), (320, 32, 16)):
        x, out = half(1, size, size, channels), half(1, size, size, made)
        residual.depthwise(x, torch.empty(9, channels), torch.empty(channels), out, weights(channels, made), out)
    for size, channels in ((320, 12), (80, 256), (20, 1024), (10, 1024)):
        x = half(1, size, size, channels)
        residual.depthwise(x, torch.empty(9, channels), torch.empty(channels), x)
    x, out = half(1, 320, 320, 64), half(1, 160, 160, 32)
    residual.depthwise_halving(x, torch.empty(9, 64), torch.empty(64), out, weights(64, 32))


if __name__ == "__main__":
    main()
