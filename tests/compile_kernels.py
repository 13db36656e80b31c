"""Compiles every kernel for a GPU of the compute capability that is given, as its launcher would have it compiled."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gpurender.color import BETWEEN, chroma_weights, equations
from gpurender.kernels import color, crop, paste

POINTERS = {
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
OPTIONS = ("num_warps", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_instead(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of `JITFunction.run`: what a launch would compile, specialised as Triton specialises arguments."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i64" if "int64" in str(parameter.annotation) else "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert numbers, used
    types = [str(value.dtype).removeprefix("torch.") for value in args if isinstance(value, torch.Tensor)]
    flags = [name for name, value in kwargs.items() if value is True]
    name = " ".join([kernel.__name__, *types, *flags, *(["ACROSS"] if kwargs.get("ACROSS") else [])])
    results[name] = [int(number) for number in numbers.groups()]


results: dict[str, list[int]] = {}
JITFunction.run = compile_instead  # pyright: ignore[reportAttributeAccessIssue]

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
        odd = frames[:, :, 1:, 1:]
        paste.paste(odd, crops, predictions, rects, None, surfaces, bt709)
        color.rgb_to_nv12(odd, surfaces, bt709)
        color.nv12_to_rgb(surfaces, frames, bt709, None, None)
        for across, down in BETWEEN.values():
            color.nv12_to_rgb(surfaces, frames, bt709, chroma_weights(across), chroma_weights(down))
print(json.dumps(results))
