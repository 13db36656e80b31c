"""torch: runs SyncTalk_2D's U-Net on any device."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from .cuda import exact_products, is_out_of_memory, ordinary_tensors
from .cuda_graphs import CaptureError, Turns, captured
from .errors import first_line
from .export import example_input
from .fused_network import FusedUNet
from .host import refuse_to_travel
from .network import Encoded, Mode, UNet, load_unet
from .onnx_unet import unet_of_onnx
from .ops import why_no_kernels

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TENSOR_CORES = 8, 0  # the compute capability from which Triton multiplies matrices by them
BATCH = {"cuda": 32, "cpu": 1}  # launches keep a GPU waiting; on a CPU a batch only leaves the cache


def torch_network(path: Path, mode: Mode | None) -> UNet:
    return unet_of_onnx(path, mode) if path.suffix.lower() == ".onnx" else load_unet(path, mode)


class TorchEngine:
    """torch's own layers, channels-last; in half precision on a GPU, Triton kernels in their place.

    On a GPU, batches of a size that comes again are replayed from a CUDA graph.
    """

    name = "torch"

    def __init__(
        self,
        network: UNet,
        device: torch.device,
        precision: str,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = []
        self.mode: Mode = network.mode
        self.device = device
        self.batch = BATCH[device.type]
        self._network = self._fused(network, notify) or PlainUNet(network, device, TYPES[precision])
        self._replays = Replays(self._network.decode, device, self.notes) if device.type == "cuda" else None

    def _fused(self, network: UNet, notify: Callable[[str], None]) -> FusedUNet | None:
        """The network by kernels, where they run; tried with a frame, which compiles them."""
        if self.device.type != "cuda" or self.precision == "fp32" or why_no_kernels("cuda") is not None:
            return None  # `make` notes why kernels are missing
        if torch.cuda.get_device_capability(self.device) < TENSOR_CORES:
            self.notes.append("torch's layers run the network: its kernels are for compute capability 8.0 and newer")
            return None
        notify(f"preparing the network's kernels on {self.device}; half a minute the first time")
        try:
            fused = FusedUNet(network, self.device, TYPES[self.precision])
            faces, audio = (tensor.to(self.device) for tensor in example_input(1, network.mode))
            with ordinary_tensors():
                fused.decode(fused.encode(faces), audio)
        except Exception as error:  # of the compiler, the assembler, the driver
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            self.notes.append(f"torch's layers run the network, not kernels, which do not start ({reason})")
            return None
        return fused

    def __reduce__(self) -> NoReturn:
        refuse_to_travel(self)

    @ordinary_tensors()
    def encode(self, faces: Tensor) -> list[Encoded]:
        return list(zip(*self._network.encode(faces), strict=True))

    @ordinary_tensors()
    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        if self._replays is not None:
            return self._replays(encoded, audio)
        return self._network.decode(stacked(encoded), audio)

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        pictures = self.decode(encoded, audio)  # a GPU works on; whoever reads them waits on its stream
        return lambda: pictures


class PlainUNet:
    """The module itself."""

    def __init__(self, network: UNet, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._network = copy.deepcopy(network).to(device, dtype)
        self._network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def encode(self, faces: Tensor) -> tuple[Tensor, ...]:
        faces = faces.to(self._dtype, memory_format=torch.channels_last)
        with exact_products():
            return faces, *self._network.encode(faces)

    def decode(self, levels: tuple[Tensor, ...], audio: Tensor) -> Tensor:
        face, *rest = levels
        with exact_products():
            return self._network.decode(face, tuple(rest), audio.to(self._dtype)).float()


class Replays:
    """A network's second half, replayed from a CUDA graph, for any thread and stream, one call after another."""

    def __init__(
        self, decode: Callable[[tuple[Tensor, ...], Tensor], Tensor], device: torch.device, notes: list[str]
    ) -> None:
        """
        Args:
            notes: is told of what does not work.
        """
        self._decode = decode
        self._device = device
        self._notes = notes
        self._turns = Turns(device)
        self._works = True
        self._tried = False  # to capture a graph for the current batch size
        self._frames = 0
        self._forget()

    def _forget(self) -> None:
        self._replay: Callable[[], None] | None = None
        self._levels: tuple[Tensor, ...] = ()
        self._audio = self._pictures = torch.empty(0)

    def __call__(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        with self._turns.taken():
            if len(encoded) != self._frames:  # a size that comes once, as a last batch does, is not worth a graph
                self._frames, self._tried = len(encoded), False
                self._forget()
                return self._decode(stacked(encoded), audio)
            if self._works and not self._tried:
                self._capture(encoded, audio)
            if self._replay is None:
                return self._decode(stacked(encoded), audio)
            for memory in (*self._levels, self._audio):
                if memory.is_cuda:  # it is of the stream that captured, and may be freed while this one reads it
                    memory.record_stream(torch.cuda.current_stream(memory.device))
            for memory, level in zip(self._levels, zip(*encoded, strict=True), strict=True):
                torch.stack(level, out=memory)
            self._audio.copy_(audio)
            self._replay()
            return self._pictures.clone()

    def _capture(self, encoded: Sequence[Encoded], audio: Tensor) -> None:
        def launch(stream: int) -> None:
            self._pictures = self._decode(self._levels, self._audio)

        self._tried = True
        try:
            self._levels, self._audio = stacked(encoded), audio.clone()
            self._replay = captured(launch, self._device)
        except CaptureError:
            raise
        except RuntimeError as error:
            self._forget()
            if is_out_of_memory(error):
                return  # a smaller batch may fit
            self._works = False
            reason = first_line(error)
            self._notes.append(f"torch's launches could not be captured in a CUDA graph ({reason})")


def stacked(encoded: Sequence[Encoded]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(level) for level in zip(*encoded, strict=True))
