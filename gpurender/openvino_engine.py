"""OpenVINO: runs ONNX networks on CPUs, in two halves."""

import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .engine import NO_FIRST_HALF
from .host import check_process, refuse_to_travel
from .jit import this_processor
from .network import Encoded, Mode
from .openvino_graph import in_bfloat16, lower_large, tile, without_empty_windows
from .openvino_network import OnnxNetwork
from .openvino_requests import Requests, has_bfloat16, uses_bfloat16
from .private_openvino import openvino
from .ranges import Ranges, in_bytes
from .up_decoder import UpDecoder, bytes_pay, up_decoder


def faster_on_cpu() -> list[str]:
    """Precisions that this processor computes faster than float32, the fastest first.

    `mixed` is bfloat16 in the layers of the picture's size, float32 in the others. float16 is none of them: OpenVINO
    computes it by way of float32 (measured with AVX512-FP16: 1.2 times the time).
    """
    return ["int8"] * this_processor().bytes + ["bf16", "mixed"] * has_bfloat16()


def pays(precision: str, decoder: openvino.Model, frames: int) -> bool:
    """Whether one of those saves more time in so many frames than it takes `auto` to try it.

    `mixed` takes half a second and saves two milliseconds a frame (measured). `int8` measures ranges, which takes one
    or two seconds (measured: 374 frames take as long as in bfloat16, 499 a tenth less; with AMX, 1,499 as long, 7,499 a
    fourteenth less); a frame of a narrow network takes as long as in bfloat16 (measured).
    """
    if precision == "mixed":
        return frames >= 400
    if precision == "int8":
        least = 100 if not has_bfloat16() else 3000 if this_processor().tiles else 500
        return frames >= least and bytes_pay(decoder)
    return True


class OpenVinoEngine:
    """OpenVINO on the CPU: a frame a request, as many requests at once as keep the cores busy."""

    name = "openvino"

    def __init__(self, network: OnnxNetwork, precision: str, ranges: Ranges | None = None) -> None:
        """
        Args:
            ranges: for `int8`, `measured_ranges` of the network's decoder.
        """
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = [] if network.encoder else [NO_FIRST_HALF]
        self.mode: Mode = network.mode
        self.device = torch.device("cpu")
        self._process = os.getpid()
        self._again = network.again
        encoder = network.encoder
        # What is kept between the halves would be rounded to it anyhow, or to less.
        bf16 = uses_bfloat16(precision)
        self._kept = torch.bfloat16 if bf16 and encoder else torch.float32
        self._decoder = self._load_decoder(network.decoder, ranges)
        if encoder and bf16:
            encoder = in_bfloat16(encoder, [0], range(len(encoder.outputs)))
        self._encoder = Requests(encoder, precision) if encoder else None
        self.batch = 2 * self._decoder.at_once  # it has work while new frames are encoded

    def _load_decoder(self, decoder: openvino.Model, ranges: Ranges | None) -> Requests | UpDecoder:
        if self.precision == "bf16":
            decoder = without_empty_windows(decoder)
        if fast := up_decoder(decoder, self.precision, self._kept, ranges):
            return fast
        decoder = in_bytes(decoder, ranges) if ranges else tile(decoder)
        if self.precision == "mixed":
            decoder = lower_large(decoder)
        if self._kept == torch.bfloat16:
            decoder = in_bfloat16(decoder, range(len(decoder.inputs) - 1), [])
        return Requests(decoder, self.precision)

    def __reduce__(self) -> NoReturn:
        refuse_to_travel(self)

    def encode(self, faces: Tensor) -> list[Encoded]:
        check_process(self._process, "engine")
        seen = [face.to(self._kept) for face in faces.detach()]
        encoded: list[Encoded] = [()] * len(faces)
        if self._encoder:  # each into memory of its own, which can be kept as it is
            shapes = self._encoder.output_shapes
            encoded = [tuple(torch.empty(shape, dtype=self._kept, device="cpu") for shape in shapes) for _ in seen]
            self._encoder.start([(face,) for face in seen], encoded).wait()
        if self._again:
            encoded = [(face, *levels) for face, levels in zip(seen, encoded, strict=True)]
        return self._decoder.kept(encoded) if isinstance(self._decoder, UpDecoder) else encoded

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        check_process(self._process, "engine")
        pictures = torch.empty(len(encoded), *self._decoder.output_shapes[0], dtype=torch.float32, device="cpu")
        seen_and_heard = [(*seen, heard) for seen, heard in zip(encoded, audio.detach(), strict=True)]
        under_way = self._decoder.start(seen_and_heard, [(picture,) for picture in pictures])

        def finish() -> Tensor:
            under_way.wait()
            return pictures

        return finish

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        return self.begin(encoded, audio)()
