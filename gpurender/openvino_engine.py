"""OpenVINO: runs ONNX networks on CPUs, in two halves; the largest layers are tiled."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import openvino
import openvino.opset13 as opset
import torch
from onnx import ModelProto
from openvino import passes, preprocess
from torch import Tensor

from .audio import AudioEncoderLike
from .errors import InputError
from .halves import read_halves
from .network import Encoded, Mode

TILED_BYTES = 16 * 2**20  # of a tensor that does not stay in the cache
BANDS = 16  # measured: 8 to 40 are alike, and 1.1 times as fast as the whole network untiled


def fast_cpu_types() -> list[str]:
    """Types that this processor computes faster than float32."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["bf16"] if "BF16" in capabilities else []


class OpenVinoEngine:
    """OpenVINO on the CPU: a frame a request, as many requests at once as keep the cores busy."""

    name = "openvino"

    def __init__(self, network: "OnnxNetwork", precision: str) -> None:
        self.precision = precision
        self.measured_psnr_db: dict[str, float] = {}
        self.notes: list[str] = []
        self.mode: Mode = network.mode
        self.device = torch.device("cpu")
        self._again = network.again
        # The encoder works now and then, with all cores on one frame: that takes less memory.
        self._encoder = Requests(network.encoder, precision, "LATENCY") if network.encoder else None
        self._decoder = Requests(network.decoder, precision, "THROUGHPUT")
        self.batch = 2 * len(self._decoder)  # more would only wait in memory

    def encode(self, faces: Tensor) -> list[Encoded]:
        levels = self._encoder([(face,) for face in faces]) if self._encoder else []
        return list(zip(*([faces] if self._again else []), *levels, strict=True))

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        return self._decoder([(*seen, heard) for seen, heard in zip(encoded, audio, strict=True)])[0]


class Requests:
    """A compiled OpenVINO model with a batch of one, and its inference requests."""

    def __init__(self, model: openvino.Model, precision: str, hint: Literal["LATENCY", "THROUGHPUT"]) -> None:
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "PERFORMANCE_HINT": hint},
        )
        self._output_shapes = [tuple(port.shape)[1:] for port in compiled.outputs]
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._requests = [compiled.create_infer_request() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._requests)

    def __call__(self, items: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """Each item's float32 inputs, without the batch axis, to the outputs of all, stacked. Contiguous inputs are not
        copied."""
        items = [tuple(tensor.contiguous() for tensor in item) for item in items]  # alive until all requests end
        outputs = [torch.empty(len(items), *shape) for shape in self._output_shapes]
        for i, request in zip(range(len(items)), itertools.cycle(self._requests)):
            request.wait()
            for k, tensor in enumerate(items[i]):
                request.set_input_tensor(k, shared(tensor))
            for k, output in enumerate(outputs):
                request.set_output_tensor(k, shared(output[i]))
            request.start_async()
        for request in self._requests:
            request.wait()
        return outputs


def shared(tensor: Tensor) -> openvino.Tensor:
    return openvino.Tensor(tensor[None].numpy(), shared_memory=True)


class OnnxNetwork:
    """A network's halves for OpenVINO: float32 outside and a batch of one whatever they had, large layers tiled.

    Attributes:
        mode, encoder, decoder, again: see `Halves`.
    """

    def __init__(self, path: Path, mode: Mode | None) -> None:
        halves = read_halves(path, mode)
        self.mode: Mode = halves.mode
        self.again = halves.again
        try:
            self.encoder = one_frame(halves.encoder) if halves.encoder else None
            self.decoder = one_frame(halves.decoder)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1]
            raise InputError(f"{path} is not an ONNX network that can be read: {reason}") from None
        tile(self.decoder)


def one_frame(half: ModelProto) -> openvino.Model:
    """The half with a batch of one and float32 inputs and outputs, all shapes known."""
    model = openvino.Core().read_model(half.SerializeToString())
    model.reshape({i: [1, *list(port.partial_shape)[1:]] for i, port in enumerate(model.inputs)})
    types = preprocess.PrePostProcessor(model)
    for i in range(len(model.inputs)):
        types.input(i).tensor().set_element_type(openvino.Type.f32)
    for i in range(len(model.outputs)):
        types.output(i).tensor().set_element_type(openvino.Type.f32)
    model = types.build()
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())  # shapes are fixed now: what computes them goes away
    manager.run_passes(model)
    return model


# --- graph surgery ---------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """1×1 convolution, bias, ReLU, 3×3 depthwise convolution, bias, ReLU, 1×1 convolution: an inverted residual."""

    source: openvino.Output
    expand: openvino.Node
    expand_bias: openvino.Node
    depthwise: openvino.Node
    depthwise_bias: openvino.Node
    project: openvino.Node


def tile(model: openvino.Model) -> None:
    """Compute large inverted residuals band by band of rows, so that what lies between their layers stays in the cache.

    The same arithmetic, but for one row at each band's edge that two bands compute. Where the block's input is a
    concatenation, its parts are cut into bands instead of being joined as a whole.
    """
    for block in list(find_blocks(model)):
        parts = [block.source]
        joined = block.source.get_node()
        if joined.get_type_name() == "Concat" and joined.get_attributes()["axis"] == 1:
            parts = joined.input_values()
        rows = block.source.get_shape()[2]
        bands = []
        for k in range(BANDS):
            first, last = rows * k // BANDS, rows * (k + 1) // BANDS
            top, bottom = min(first, 1), min(rows - last, 1)  # rows of the neighbours that the 3×3 window reaches
            window = [opset.constant([n]) for n in (first - top, last + bottom, 1, 2)]
            slices = [opset.slice(part, *window) for part in parts]
            x = opset.concat(slices, 1) if len(slices) > 1 else slices[0]
            x = opset.convolution(x, block.expand.input_value(1), [1, 1], [0, 0], [0, 0], [1, 1])
            x = opset.relu(opset.add(x, copied(block.expand_bias.input_value(1))))
            edges = [1 - top, 1], [1 - bottom, 1]
            x = opset.group_convolution(x, block.depthwise.input_value(1), [1, 1], *edges, [1, 1])
            x = opset.relu(opset.add(x, copied(block.depthwise_bias.input_value(1))))
            bands.append(opset.convolution(x, block.project.input_value(1), [1, 1], [0, 0], [0, 0], [1, 1]))
        whole = opset.concat(bands, 2).output(0)
        for port in block.project.output(0).get_target_inputs():
            port.replace_source_output(whole)
    model.validate_nodes_and_infer_types()


def find_blocks(model: openvino.Model) -> Iterator[Block]:
    """Inverted residuals of stride 1 whose inner tensors are larger than `TILED_BYTES`."""
    for depthwise in model.get_ordered_ops():
        if depthwise.get_type_name() != "GroupConvolution" or prod(depthwise.get_output_shape(0)) * 4 < TILED_BYTES:
            continue
        up = follow(depthwise, ("Relu", "Add", "Convolution"), lambda node: node.input_value(0).get_node())
        down = follow(depthwise, ("Add", "Relu", "Convolution"), only_consumer)
        if up is None or down is None:
            continue
        block = Block(up[2].input_value(0), up[2], up[1], depthwise, down[0], down[2])
        plain = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [0, 0], "pads_end": [0, 0]}
        padded = plain | {"pads_begin": [1, 1], "pads_end": [1, 1]}
        if (
            all(only_consumer(node) for node in up)
            and all(matches(node, plain, 1) for node in (block.expand, block.project))
            and matches(depthwise, padded, 3)
            and all(constant(node.input_value(1)) for node in block[1:])
        ):
            yield block


def follow(
    node: openvino.Node, kinds: tuple[str, ...], step: Callable[[openvino.Node], openvino.Node | None]
) -> list[openvino.Node] | None:
    """The nodes that `step` reaches one after another, if they are of these kinds."""
    path = []
    for kind in kinds:
        reached = step(path[-1] if path else node)
        if reached is None or reached.get_type_name() != kind:
            return None
        path.append(reached)
    return path


def only_consumer(node: openvino.Node) -> openvino.Node | None:
    consumers = list(node.output(0).get_target_inputs())
    return consumers[0].get_node() if len(consumers) == 1 else None


def matches(convolution: openvino.Node, attributes: dict[str, list[int]], kernel: int) -> bool:
    given = convolution.get_attributes()
    return (
        all(list(given[name]) == value for name, value in attributes.items())
        and list(convolution.input_value(1).get_shape())[-2:] == [kernel, kernel]
        and given["auto_pad"] == "explicit"
    )


def copied(value: openvino.Output) -> openvino.Node:
    """A bias of its own for each band: OpenVINO does not fuse one that is shared."""
    return opset.constant(value.get_node().get_data())


def constant(value: openvino.Output) -> bool:
    return value.get_node().get_type_name() == "Constant"


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
