"""What runs the network: torch on any device, OpenVINO on CPUs.

An engine takes and gives torch tensors on its device; which runtime is behind it shows in its attributes alone.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .audio import AudioEncoderLike
from .errors import DeviceError, InputError
from .export import cached_onnx
from .network import Encoded, Mode, UNet, load_audio_encoder, load_unet
from .openvino_engine import OnnxNetwork, OpenVinoEngine, fast_cpu_types, load_onnx_encoder

EngineName = Literal["auto", "openvino", "torch"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
LEAST_PSNR_DB = 40.0  # of a fast type against fp32, in the worst of the probed frames

Probe = tuple[Tensor, Tensor]
"""Network inputs of a few typical frames, (B,6,320,320) and (B,*window), on which a fast type is held against fp32."""


class Engine(Protocol):
    """Runs one network, in two halves: `encode` sees the template alone, `decode` also hears the audio.

    Attributes:
        name: the runtime.
        precision: the type that it computes in, `fp32`, `fp16` or `bf16`.
        measured_psnr_db: of types against fp32, the worst frame of the probe; empty where none was measured.
        mode: the kind of audio features it takes.
        device: where its inputs and outputs are.
        batch: the batch that suits it.
    """

    name: str
    precision: str
    measured_psnr_db: dict[str, float]
    mode: Mode
    device: torch.device
    batch: int

    def encode(self, faces: Tensor) -> list[Encoded]:
        """(B,6,320,320) float32 in 0..1 to B encodings; any B ≥ 1."""
        ...

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        """B encodings and (B,*WINDOW_SHAPES[mode]) float32 to (B,3,320,320) float32 BGR in 0..1."""
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
        raise DeviceError(f"{device}: torch finds no CUDA GPU on this machine; use --device cpu.")
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
    probe: Probe | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load a network and the engine that runs it best here.

    Args:
        path: `.pth` checkpoint or `.onnx` export.
        mode: the kind of features that it will get; a network for another kind is refused.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        engine: `auto` is OpenVINO on a CPU (a checkpoint is exported to ONNX once, and cached) and torch on a GPU.
        precision: `fp32` is exact. `auto` takes the device's fast type if, on `probe`, every frame is within 40 dB PSNR
            of fp32; without `probe` it is fp32.
        probe: see `Probe`.
        notify: is told when something begins that takes a while.

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
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" else "torch"
    if engine == "openvino":
        if device.type != "cpu":
            raise DeviceError(f"the openvino engine runs on CPUs, not on {device}; use --device cpu or --engine torch.")
        network = OnnxNetwork(path if path.suffix == ".onnx" else cached_onnx(path, mode, notify), mode)
        fast = fast_cpu_types()
        allowed = ["fp32", *fast]
    else:
        if path.suffix == ".onnx":
            raise DeviceError(
                f"{path}: the torch engine runs .pth checkpoints, not ONNX; give the checkpoint, or --device cpu for "
                "the openvino engine."
            )
        network = load_unet(path, mode)
        fast = ["fp16"] if device.type == "cuda" else []
        allowed = ["fp32", "fp16", "bf16"]

    def build(precision: str) -> Engine:
        if isinstance(network, UNet):
            return TorchEngine(network, device, precision)
        return OpenVinoEngine(network, precision)

    if precision != "auto":
        if precision not in allowed:
            raise DeviceError(f"the {engine} engine has no {precision} on this processor; it has {', '.join(allowed)}.")
        return build(precision)
    exact = build("fp32")
    if probe is not None and fast:
        expected = predict(exact, *probe)
        for kind in fast:
            candidate = build(kind)
            psnr_db = least_psnr(predict(candidate, *probe), expected)
            candidate.measured_psnr_db[kind] = exact.measured_psnr_db[kind] = psnr_db
            if psnr_db >= LEAST_PSNR_DB:
                return candidate
    return exact


def least_psnr(pictures: Tensor, expected: Tensor) -> float:
    """The worst picture's PSNR in decibels, both cut to 8 bits as frames are."""
    difference = (pictures.float() * 255).floor() - (expected.float() * 255).floor()
    error = difference.square().flatten(1).mean(1).max().item()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


class TorchEngine:
    """The torch module itself, channels-last."""

    name = "torch"

    def __init__(self, network: UNet, device: torch.device, precision: str) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.mode: Mode = network.mode
        self.device = device
        self.batch = 16 if device.type == "cuda" else 1  # on a CPU a batch only leaves the cache
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._network = copy.deepcopy(network).to(device, self._dtype)
        self._network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @torch.inference_mode()
    def encode(self, faces: Tensor) -> list[Encoded]:
        faces = faces.to(self._dtype, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False):  # fp32 means fp32
            return list(zip(faces, *self._network.encode(faces), strict=True))

    @torch.inference_mode()
    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        face, *levels = (torch.stack(level) for level in zip(*encoded, strict=True))
        with torch.backends.cudnn.flags(allow_tf32=False):
            return self._network.decode(face, tuple(levels), audio.to(self._dtype)).float()


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
