"""OpenVINO: runs ONNX networks on CPUs, in two halves."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import openvino
import torch
from torch import Tensor

from .audio import AudioEncoderLike
from .errors import InputError
from .network import Encoded, Mode
from .openvino_graph import in_bfloat16, lower_large, without_empty_windows
from .openvino_network import OnnxNetwork


def faster_on_cpu() -> list[str]:
    """Precisions that this processor computes faster than float32, the fastest first.

    `mixed` is bfloat16 in the layers of the picture's size, float32 in the others. float16 is none of them: OpenVINO
    computes it by way of float32 (measured with AVX512-FP16: 1.2 times the time).
    """
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["bf16", "mixed"] if "BF16" in capabilities else []


class OpenVinoEngine:
    """OpenVINO on the CPU: a frame a request, as many requests at once as keep the cores busy."""

    name = "openvino"

    def __init__(self, network: OnnxNetwork, precision: str) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = []
        self.mode: Mode = network.mode
        self.device = torch.device("cpu")
        self._again = network.again
        encoder, decoder = network.encoder, network.decoder
        if precision == "mixed":
            decoder = lower_large(decoder)
        self._kept = torch.bfloat16 if precision == "bf16" else torch.float32
        if precision == "bf16" and encoder:  # what is kept between the halves would be rounded to it anyhow
            levels = range(len(encoder.outputs))
            encoder = in_bfloat16(encoder, [0], levels)
            decoder = in_bfloat16(without_empty_windows(decoder), range(len(levels) + self._again), [])
        # The encoder works now and then, with all cores on one frame: that takes less memory.
        self._encoder = Requests(encoder, precision, "LATENCY") if encoder else None
        self._decoder = Requests(decoder, precision, "THROUGHPUT")
        self.batch = 2 * self._decoder.at_once  # while it sees a new frame, with all cores, that many are heard

    def encode(self, faces: Tensor) -> list[Encoded]:
        seen = [face.to(self._kept) for face in faces]
        encoded: list[Encoded] = [()] * len(faces)
        if self._encoder:  # each into memory of its own, which can be kept as it is
            shapes = self._encoder.output_shapes
            encoded = [tuple(torch.empty(shape, dtype=self._kept) for shape in shapes) for _ in seen]
            self._encoder.start([(face,) for face in seen], encoded).wait()
        return [(face, *levels) for face, levels in zip(seen, encoded, strict=True)] if self._again else encoded

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        pictures = torch.empty(len(encoded), *self._decoder.output_shapes[0])
        seen_and_heard = [(*seen, heard) for seen, heard in zip(encoded, audio, strict=True)]
        under_way = self._decoder.start(seen_and_heard, [(picture,) for picture in pictures])

        def finish() -> Tensor:
            under_way.wait()
            return pictures

        return finish

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        return self.begin(encoded, audio)()


class Requests:
    """A compiled OpenVINO model with a batch of one, and its inference requests.

    Attributes:
        output_shapes: without the batch axis.
        at_once: how many requests keep the cores busy.
    """

    def __init__(self, model: openvino.Model, precision: str, hint: Literal["LATENCY", "THROUGHPUT"]) -> None:
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "PERFORMANCE_HINT": hint},
        )
        self.output_shapes = [tuple(port.shape)[1:] for port in compiled.outputs]
        self.at_once: int = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # Two batches: while one is finished and pasted, the next is under way.
        self._requests = itertools.cycle([compiled.create_infer_request() for _ in range(4 * self.at_once)])

    def start(self, items: Sequence[tuple[Tensor, ...]], outputs: Sequence[tuple[Tensor, ...]]) -> "UnderWay":
        """Each item's inputs to its outputs, without the batch axis. Contiguous inputs are not copied."""
        items = [tuple(tensor.contiguous() for tensor in item) for item in items]
        under_way = UnderWay(items, outputs)
        for item, output, request in zip(items, outputs, self._requests, strict=False):
            request.wait()
            for k, tensor in enumerate(item):
                request.set_input_tensor(k, shared(tensor))
            for k, tensor in enumerate(output):
                request.set_output_tensor(k, shared(tensor))
            request.start_async()
            under_way.requests.append(request)
        return under_way


class UnderWay:
    """Requests that were started, and the memory that they read and write."""

    def __init__(self, *memory: Sequence[tuple[Tensor, ...]]) -> None:
        self.requests: list[openvino.InferRequest] = []
        self._memory = memory

    def wait(self) -> None:
        for request in self.requests:
            request.wait()
        self._memory = ()

    def __del__(self) -> None:
        self.wait()  # before their memory goes away


def shared(tensor: Tensor) -> openvino.Tensor:
    tensor = tensor[None]
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


# --- the audio encoder -----------------------------------------------------------------------------------------------


def load_onnx_encoder(path: Path, device: torch.device) -> AudioEncoderLike:
    try:
        model = openvino.Core().read_model(path)
    except RuntimeError:
        raise InputError(f"{path} is not an ONNX network that can be read.") from None
    shapes = [port.partial_shape for port in (*model.inputs, *model.outputs)]
    wanted = [openvino.PartialShape([-1, 1, 80, 16]), openvino.PartialShape([-1, 512])]
    if len(shapes) != 2 or not all(shape.compatible(other) for shape, other in zip(shapes, wanted, strict=True)):
        given = " and ".join(str(shape) for shape in shapes)
        raise InputError(f"{path} has {given}; an audio encoder takes a batch of (1, 80, 16) and gives one of (512,).")
    model.reshape([1, 1, 80, 16])
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def encode(mel: Tensor) -> Tensor:
        rows = [compiled(row[None])[0].copy() for row in mel.cpu().numpy()]
        return torch.from_numpy(np.concatenate(rows)).to(device)

    return encode
