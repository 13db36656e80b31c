"""Which engine runs a network here: torch on any device, OpenVINO on CPUs, TensorRT on NVIDIA GPUs."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Literal, get_args

import torch

from .cuda import resolve_device, without_autocast
from .engine import Choice, Engine, EngineName, Precision, Probe, fastest_that_agrees
from .errors import DeviceError, InputError, check_choice
from .export import cached_onnx
from .find import check_network_file, find_network
from .network import Mode
from .openvino_engine import OpenVinoEngine, faster_on_cpu, pays
from .openvino_network import cached_network, return_free_memory
from .private_openvino import PREPARING
from .ranges import measured_ranges
from .tensorrt_choice import tensorrt_choice, usable_tensorrt
from .torch_engine import TorchEngine, torch_network


def network_for(template: Path, given: str | Path | None, engine: EngineName, device: torch.device) -> Path:
    """The network that is given, else the template's, of which a checkpoint comes first where torch may run it.

    Raises:
        InputError: there is no such file, or the template has none, see `find_network`.
    """
    if given is not None:
        check_network_file(Path(given))
        return Path(given)
    return find_network(template, ".pth" if engine == "torch" or device.type == "cuda" else ".onnx")


@without_autocast()
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
    check_network_file(path)
    if path.suffix.lower() not in (".onnx", ".pth"):
        raise InputError(f"{path}: a network is an .onnx export or a .pth checkpoint.")
    check_choice("engine", engine, get_args(EngineName))
    check_choice("precision", precision, get_args(Precision))
    if mode is not None:
        check_choice("kind of features", mode, get_args(Mode))
    device = resolve_device(device)
    notes: list[str] = []
    asked = engine
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" else gpu_engine(device, notes)
    with PREPARING if engine == "openvino" else nullcontext():
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
            raise DeviceError(
                "int8 needs a probe: a few of the network's inputs, to measure the ranges of its numbers on."
            )
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


def gpu_engine(device: torch.device, notes: list[str]) -> Literal["tensorrt", "torch"]:
    try:
        usable_tensorrt(device)
    except DeviceError as error:
        notes.append(f"runs on torch: {error}")
        return "torch"
    return "tensorrt"


def openvino_choice(
    path: Path, mode: Mode | None, device: torch.device, probe: Probe | None, notify: Callable[[str], None]
) -> Choice:
    if device.type != "cpu":
        raise DeviceError(f"the openvino engine runs on CPUs, not on {device}; use --device cpu or --engine torch.")
    onnx = path if path.suffix.lower() == ".onnx" else cached_onnx(path, mode, notify)
    network = cached_network(onnx, mode, notify)
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
    faster = ["fp16"] if device.type == "cuda" else []
    return Choice(["fp32", "fp16", "bf16"], faster, build, lambda: build("fp32"), "at all")
