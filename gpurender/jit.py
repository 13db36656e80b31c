"""Kernels for this processor: compiled by LLVM where they are first needed, and kept in the user's cache."""

import ctypes
import functools
import hashlib
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import llvmlite
from llvmlite import binding, ir

from .errors import OutputError
from .plans import keep, kept_file, read_kept

LOADING = threading.Lock()
SOURCES = Path(__file__).parent / "kernels"


class Processor(NamedTuple):
    """What LLVM knows of this processor.

    Attributes:
        lanes: float32 values in the vectors that it multiplies and adds at once; 0 if it has none that pay.
        bfloat16: whether it multiplies pairs of bfloat16 as vectors.
        bytes: whether it multiplies bytes as vectors (VNNI).
        tiles: whether it multiplies matrices of bfloat16 and of bytes (AMX), and this process may. Such processors
            also multiply vectors of float16.
    """

    name: str
    features: str
    lanes: int
    bfloat16: bool
    bytes: bool
    tiles: bool

    @property
    def vectors(self) -> str:
        """What tells how fast it is, by the names that its makers give; nothing for one without any of them."""
        if not self.lanes:
            return ""
        if self.tiles:
            return "AMX"
        types = [name for name, has in (("bfloat16", self.bfloat16), ("VNNI", self.bytes)) if has]
        return ", ".join(["AVX-512" if self.lanes == 16 else "AVX2", *types])


@functools.cache
def this_processor() -> Processor:
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell, as on some processors that are none of Intel's or AMD's
        return Processor(binding.get_host_cpu_name(), "", 0, False, False, False)
    has = lambda *names: all(features.get(name, False) for name in names)  # noqa: E731
    lanes = 16 if has("avx512f") else 8 if has("avx2", "fma") else 0
    # LLVM would rather split vectors in two on processors that once were slower with whole ones.
    written = f"{features.flatten()},-prefer-256-bit"
    return Processor(
        binding.get_host_cpu_name(),
        written,
        lanes,
        bfloat16=has("avx512bf16"),
        bytes=has("avx512vnni", "avx512bw") if lanes == 16 else has("avxvnni"),
        tiles=lanes == 16 and has("amx-bf16", "amx-int8", "amx-tile", "avx512fp16") and may_use_tiles(),
    )


def may_use_tiles() -> bool:
    """Ask Linux to let this process use AMX: threads that do get 8 KB more to save. Other systems have another way."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # on x86-64
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def compiled(name: str, write: Callable[[ir.Module], None], pointers: int) -> Callable[..., None]:
    """The function `name` that `write` adds to a module, compiled or from the user's cache. It takes so many pointers,
    and releases the GIL while it runs. The name has to tell all that the code depends on, but for its sources."""
    processor = this_processor()
    key = {
        "function": name,
        "processor": f"{processor.name} {processor.features}",
        "llvmlite": f"{llvmlite.__version__} {binding.llvm_version_info}",
        "sources": hash_of_sources(),
    }
    file = code = None
    with suppress(OutputError):
        file = kept_file(key, "o")
        code = read_kept(file, key)
    if code is None:
        code = object_code(write, processor)
        if file is not None:
            keep(file, key, code, notify=lambda text: None)
    with LOADING:
        engine = loaded(code)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers)(engine.get_function_address(name))
    function.engine = engine  # pyright: ignore[reportAttributeAccessIssue]  # whose memory the code is in
    return function


@functools.cache
def hash_of_sources() -> str:
    files = [Path(__file__), *sorted(SOURCES.glob("*.py"))]  # Triton's as well: none is forgotten
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()


def target_machine(processor: Processor) -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=processor.name, features=processor.features, opt=3, jit=True)


def object_code(write: Callable[[ir.Module], None], processor: Processor) -> bytes:
    machine = target_machine(processor)
    module = ir.Module()
    module.triple = machine.triple
    write(module)
    parsed = binding.parse_assembly(str(module))
    options = binding.create_pipeline_tuning_options(speed_level=2)
    # The code is in vectors and unrolled as it should be.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_object(parsed)


@functools.cache
def loaded(code: bytes) -> binding.ExecutionEngine:
    """The code, ready to be called; it stays for as long as the process."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine(this_processor()))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
