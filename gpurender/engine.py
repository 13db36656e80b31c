"""What runs the network: torch on any device, OpenVINO on CPUs, TensorRT on NVIDIA GPUs.

An engine takes and gives torch tensors on its device; which runtime is behind it shows in its attributes alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .audio import AudioEncoderLike
from .cuda import why_no_cuda
from .errors import DeviceError, InputError
from .export import cached_onnx
from .half import cached_half
from .halves import Halves, read_halves
from .network import Encoded, Mode, UNet, load_audio_encoder, load_unet
from .onnx_unet import unet_of_onnx
from .openvino_engine import OpenVinoEngine, faster_on_cpu, load_onnx_encoder, pays
from .openvino_network import cached_network, return_free_memory
from .ranges import measured_ranges
from .tensorrt_build import PlanError, PlanMemoryError, TensorRt, check_capability, find_tensorrt
from .tensorrt_engine import BATCH, TensorRtEngine
from .tensorrt_plan import PlanLoader
from .torch_engine import TorchEngine

EngineName = Literal["auto", "tensorrt", "openvino", "torch"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "mixed", "int8"]
LEAST_PSNR_DB = 40.0  # of a fast type against fp32, in the worst of the probed frames
LEAST_INT8_DB = 43.0  # of int8, which loses more where a sound goes beyond the ranges: 3 dB in the worst of 300 frames
PROBED: tuple[Precision, ...] = ("auto", "int8")
"""What needs a probe."""


class Probe(NamedTuple):
    """Network inputs of a few typical frames, on which a fast type is held against fp32.

    Attributes:
        faces: (B,6,320,320).
        audio: (B,*window), what is heard with these faces.
        others: (N,*window), more sounds: `int8` takes the ranges of its numbers from them, and the faces in turn; None
            is `audio`.
        frames: how many will be rendered: on a CPU, `auto` tries what pays for so many; for few, which 0 are, `bf16`.
    """

    faces: Tensor
    audio: Tensor
    others: Tensor | None = None
    frames: int = 0


class Engine(Protocol):
    """Runs one network, in two halves: `encode` sees the template alone, `decode` also hears the audio.

    Attributes:
        name: the runtime.
        precision: the type that it computes in: `fp32`, `fp16`, `bf16`; `mixed`, bf16 in the largest layers alone;
            `int8`, 8-bit integers in the second half's convolutions.
        measured_psnr_db: of types against fp32, the worst frame of the probe; empty where none was measured.
        notes: what it does otherwise than was asked for, and why.
        mode: the kind of audio features it takes.
        device: where its inputs and outputs are.
        batch: the batch that suits it.
    """

    name: str
    precision: str
    measured_psnr_db: dict[str, float]
    notes: list[str]
    mode: Mode
    device: torch.device
    batch: int

    def encode(self, faces: Tensor) -> list[Encoded]:
        """(B,6,320,320) float32 in 0..1 to B encodings; any B ≥ 1."""
        ...

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        """B encodings and (B,*WINDOW_SHAPES[mode]) float32 to (B,3,320,320) float32 BGR in 0..1."""
        ...

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        """`decode`, which need not be over when this returns: what it returns waits for the pictures and gives them."""
        ...


def predict(engine: Engine, faces: Tensor, audio: Tensor) -> Tensor:
    """The whole network: (B,6,320,320) and (B,*WINDOW_SHAPES[mode]) to (B,3,320,320), as `Engine` has them."""
    return engine.decode(engine.encode(faces), audio)


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


def load_engine(
    path: str | Path,
    *,
    mode: Mode | None = None,
    device: str | torch.device = "auto",
    engine: EngineName = "auto",
    precision: Precision = "auto",
    batch: int | None = None,
    probe: Probe | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load a network and the engine that runs it best here.

    Args:
        path: `.pth` checkpoint or `.onnx` export.
        mode: the kind of features that it will get; a network for another kind is refused.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        engine: `auto` is OpenVINO on a CPU (a checkpoint is exported to ONNX once, and cached); on a GPU, TensorRT
            where it is installed and knows the GPU (plans are built once, and cached), else torch, which runs ONNX
            exports of SyncTalk_2D's own architecture.
        precision: `fp32` is exact. `auto` takes the first of the device's faster ones (half precision on GPUs; on CPUs
            those of `int8`, `bf16` and `mixed` that they have) with which, on `probe`, every frame is within 40 dB PSNR
            of fp32, or 43 with `int8`; if there is none, or no `probe`, it is fp32. `int8` needs a `probe`. A precision
            that is asked for is not replaced by another, nor is an engine.
        batch: the most frames at a time that TensorRT prepares for; None is 16.
        probe: see `Probe`.
        notify: is told when something begins that takes a while, and what does not work out.

    Raises:
        InputError: the network cannot be used: another architecture, other inputs, another kind of features.
        DeviceError: the device, engine or precision is not there, or they do not go together.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such network file.")
    if path.suffix not in (".onnx", ".pth"):
        raise InputError(f"{path}: a network is an .onnx export or a .pth checkpoint.")
    device = resolve_device(device)
    notes: list[str] = []
    asked = engine
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" else gpu_engine(device, notes)
    if engine == "openvino":
        choice = openvino_choice(path, mode, device, probe, notify)
    elif engine == "tensorrt":
        choice = tensorrt_choice(path, mode, device, batch, notify, asked == "auto", precision == "auto")
    else:
        choice = torch_choice(path, mode, device, notify)
    if precision not in ("auto", *choice.precisions):
        raise DeviceError(
            f"the {engine} engine has no {precision} {choice.where}; it has {', '.join(choice.precisions)}."
        )
    if precision == "int8" and probe is None:
        raise DeviceError("int8 needs a probe: a few of the network's inputs, to measure the ranges of its numbers on.")
    if precision != "auto":
        chosen = choice.build(precision)
    elif probe is None or not choice.faster:
        chosen = choice.build(choice.precisions[0])
    else:
        chosen = fastest_that_agrees(choice, probe)
    chosen.notes[:0] = notes
    del choice  # and what was tried
    return_free_memory()
    return chosen


class Choice(NamedTuple):
    """What an engine offers for a network on a device."""

    precisions: list[str]
    """the exact one first"""
    faster: list[str]
    """those that are worth a try instead, the fastest first"""
    build: Callable[[str], Engine]
    """the engine in a precision"""
    exact: Callable[[], Engine]
    """whose pictures a faster one is held against; not always the engine itself, whose exact one may take minutes"""
    where: str = "on this processor"


def fastest_that_agrees(choice: Choice, probe: Probe) -> Engine:
    """The engine in the first of the faster precisions that is close enough to the exact one, else in that."""
    exact = choice.exact()
    # cuDNN would choose an algorithm for each layer first, which takes longer than a few frames do without it.
    with torch.backends.cudnn.flags(enabled=False):
        expected = predict_probe(exact, probe)
    measured: dict[str, float] = {}
    for precision in choice.faster:
        candidate = choice.build(precision)
        candidate.measured_psnr_db = measured
        if candidate.precision != precision:  # it took refuge in the exact one
            return candidate
        measured[precision] = least_psnr(predict_probe(candidate, probe), expected)
        if measured[precision] >= (LEAST_INT8_DB if precision == "int8" else LEAST_PSNR_DB):
            return candidate
        del candidate  # its memory, before another is built
    chosen = choice.build(choice.precisions[0])
    chosen.measured_psnr_db = measured
    return chosen


def predict_probe(engine: Engine, probe: Probe) -> Tensor:
    faces, audio = (tensor.to(engine.device) for tensor in (probe.faces, probe.audio))
    return predict(engine, faces, audio).cpu()


def openvino_choice(
    path: Path, mode: Mode | None, device: torch.device, probe: Probe | None, notify: Callable[[str], None]
) -> Choice:
    if device.type != "cpu":
        raise DeviceError(f"the openvino engine runs on CPUs, not on {device}; use --device cpu or --engine torch.")
    network = cached_network(path if path.suffix == ".onnx" else cached_onnx(path, mode, notify), mode)
    exact = functools.cache(lambda: OpenVinoEngine(network, "fp32"))

    def build(precision: str) -> Engine:
        if precision == "fp32":
            return exact()
        ranges = None
        if precision == "int8":
            assert probe is not None
            seen, heard = exact().encode(probe.faces), probe.audio if probe.others is None else probe.others
            items = [(*levels, window) for levels, window in zip(cycle(seen), heard, strict=False)]
            ranges = measured_ranges(network.decoder, items)
        return OpenVinoEngine(network, precision, ranges)

    available = faster_on_cpu()
    faster = [precision for precision in available if probe and pays(precision, network.decoder, probe.frames)]
    return Choice(["fp32", *available], faster, build, exact)


def torch_choice(path: Path, mode: Mode | None, device: torch.device, notify: Callable[[str], None]) -> Choice:
    network = torch_network(path, mode)
    build = functools.cache(lambda precision: TorchEngine(network, device, precision, notify))
    return Choice(["fp32", "fp16", "bf16"], ["fp16"] if device.type == "cuda" else [], build, lambda: build("fp32"))


def torch_network(path: Path, mode: Mode | None) -> UNet:
    return unet_of_onnx(path, mode) if path.suffix == ".onnx" else load_unet(path, mode)


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
        or_torch: torch may run it, if TensorRT cannot.
        or_fp32: fp32 will do where fp16 was tried.
    """
    if device.type != "cuda":
        raise DeviceError(f"the tensorrt engine runs on NVIDIA GPUs, not on {device}; use --engine openvino or torch.")
    tensorrt = usable_tensorrt(device)
    onnx = path if path.suffix == ".onnx" else cached_onnx(path, mode, notify)
    halves = read_halves(onnx, mode)
    by_torch = path if or_torch else None

    def build(precision: str) -> Engine:
        attempts = tensorrt_attempts(tensorrt, onnx, halves, by_torch, device, precision, batch, notify, or_fp32)
        return first_that_works(attempts, f"{onnx.name} on {device}", notify, "" if or_torch else TORCH_WOULD)

    def exact() -> Engine:
        notify("drawing a few frames in fp32 on the CPU, to hold half precision against")
        return OpenVinoEngine(cached_network(onnx, mode), "fp32")

    if halves.half:
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
        or_fp32: whether fp32 will do where fp16 was tried.
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
        half = halves if halves.half else read_halves(cached_half(onnx, notify), halves.mode)
        yield f"{tensorrt} in fp16", lambda: with_plans(half)
        # TensorRT 11.2 is reported to find no kernel for grouped convolutions in half precision.
        yield f"{tensorrt} in fp16 with depthwise convolutions in fp32", lambda: with_plans(half, mixed=True)
    elif precision == "fp32":
        yield f"{tensorrt} in fp32", lambda: with_plans(halves)
    if by_torch is not None:
        yield f"torch in {precision}", lambda: with_torch(by_torch)
    if precision == "fp16" and or_fp32 and not halves.half:
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


def gpu_engine(device: torch.device, notes: list[str]) -> Literal["tensorrt", "torch"]:
    try:
        usable_tensorrt(device)
    except DeviceError as error:
        notes.append(f"runs on torch: {error}")
        return "torch"
    return "tensorrt"


def usable_tensorrt(device: torch.device) -> TensorRt:
    tensorrt = find_tensorrt()
    check_capability(tensorrt, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    return tensorrt


def least_psnr(pictures: Tensor, expected: Tensor) -> float:
    """The worst picture's PSNR in decibels, both cut to 8 bits as frames are."""
    difference = (pictures.float() * 255).floor() - (expected.float() * 255).floor()
    error = difference.square().flatten(1).mean(1).max().item()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def load_audio_engine(path: str | Path, device: str | torch.device = "cpu") -> AudioEncoderLike:
    """The audio encoder as a function of (B,1,80,16) mel windows: torch on the device for a `.pth` checkpoint, OpenVINO
    on the CPU for `.onnx` (what goes in and out is small: 5 KB and 2 KB a frame).

    Raises:
        InputError: the file is no audio encoder.
        DeviceError: there is no such device here.
    """
    path = Path(path)
    device = resolve_device(device)
    if not path.is_file():
        raise InputError(f"{path}: there is no such audio encoder.")
    if path.suffix == ".pth":
        return load_audio_encoder(path).to(device)
    if path.suffix == ".onnx":
        return load_onnx_encoder(path, device)
    raise InputError(f"{path}: an audio encoder is an .onnx export or a .pth checkpoint.")
