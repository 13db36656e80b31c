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
from gpurender.kernels import color, crop, paste

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
    print(json.dumps(results))


if __name__ == "__main__":
    main()
