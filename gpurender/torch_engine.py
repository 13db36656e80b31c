"""torch: runs checkpoints on any device."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .network import Encoded, Mode, UNet


class TorchEngine:
    """The torch module itself, channels-last."""

    name = "torch"

    def __init__(self, network: UNet, device: torch.device, precision: str) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = []
        self.mode: Mode = network.mode
        self.device = device
        self.batch = 16 if device.type == "cuda" else 1  # on a CPU a batch only leaves the cache
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._network = copy.deepcopy(network).to(device, self._dtype)
        self._network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @torch.inference_mode()
    def encode(self, faces: Tensor) -> list[Encoded]:
        faces = faces.to(self._dtype, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32
            return list(zip(faces, *self._network.encode(faces), strict=True))

    @torch.inference_mode()
    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        face, *levels = (torch.stack(level) for level in zip(*encoded, strict=True))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._network.decode(face, tuple(levels), audio.to(self._dtype)).float()

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        pictures = self.decode(encoded, audio)  # a GPU works on; whoever reads them waits on its stream
        return lambda: pictures
