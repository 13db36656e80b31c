"""OpenVINO's graphs of networks, rewritten for speed: bands of rows, types, the order of memory."""

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from .network import FACE_SHAPE
from .private_openvino import openvino, opset, passes, preprocess

FLOAT_MAX = float(np.finfo(np.float32).max)
TILED_BYTES = 16 * 2**20  # of a tensor that does not stay in the cache
BANDS = 8  # measured: 8 to 40 are alike, and 1.1 times as fast as the whole network untiled
LOWERED = ("Convolution", "GroupConvolution", "Add", "Relu", "Concat", "Slice")  # in mixed precision


def channels_last(model: openvino.Model, inputs: Iterable[int], outputs: Iterable[int]) -> openvino.Model:
    """The model with some inputs and outputs, if they are 4-D, as convolutions have them in memory: N,H,W,C.

    What one model gives and another takes in this order is not reordered in between. OpenVINO would reorder an output
    that is also used within the model, and back: of that, a copy is given.
    """
    outputs = list(outputs)
    for i in outputs:
        given = model.outputs[i].get_node().input(0)
        value = given.get_source_output()
        if len(value.get_target_inputs()) > 1 and value.get_element_type() == openvino.Type.f32:
            given.replace_source_output(opset.clamp(value, -FLOAT_MAX, FLOAT_MAX).output(0))
    types = preprocess.PrePostProcessor(model)
    for ports, given, numbers in ((model.inputs, types.input, inputs), (model.outputs, types.output, outputs)):
        for i in numbers:
            if ports[i].partial_shape.rank == 4:
                given(i).model().set_layout(openvino.Layout("NCHW"))
                given(i).tensor().set_layout(openvino.Layout("NHWC"))
    return types.build()


def in_bfloat16(model: openvino.Model, inputs: Iterable[int], outputs: Iterable[int]) -> openvino.Model:
    """A copy that takes and gives some of its inputs and outputs as bfloat16."""
    types = preprocess.PrePostProcessor(model.clone())
    for given, numbers in ((types.input, inputs), (types.output, outputs)):
        for i in numbers:
            given(i).tensor().set_element_type(openvino.Type.bf16)
    return types.build()


def without_empty_windows(model: openvino.Model) -> openvino.Model:
    """A copy in which no convolution looks at windows that lie in its padding alone: what they give is 0, and is put
    before the others.

    OpenVINO has fast convolutions in bfloat16 only for padding narrower than the kernel, which that of the audio's
    conv5 is not: this gains a millisecond of a core a frame, and nothing in float32.
    """
    trimmed = model.clone()
    for node in trimmed.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        source, kernels, given = node.input_value(0), node.input_value(1), node.get_attributes()
        before, stride = np.array(given["pads_begin"]), np.array(given["strides"])
        size, windows, reach = (np.array(list(value.get_shape())[2:]) for value in (source, node.output(0), kernels))
        empty = np.clip((before - reach) // stride + 1, 0, np.minimum(before // stride, windows - 1))
        if not empty.any() or set(given["dilations"]) != {1} or given["auto_pad"] != "explicit":
            continue
        before -= empty * stride
        after = np.maximum((windows - empty - 1) * stride + reach - size - before, 0)
        rest = opset.convolution(source, kernels, stride, before, after, [1, 1])
        whole = opset.pad(rest, [0, 0, *empty], [0, 0, 0, 0], "constant", opset.constant(np.float32(0)))
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(whole.output(0))
    trimmed.validate_nodes_and_infer_types()
    return trimmed


# --- mixed precision -------------------------------------------------------------------------------------------------


def lower_large(model: openvino.Model) -> openvino.Model:
    """A copy whose layers of the picture's size compute in bfloat16, but for upsampling, the last convolution and what
    follows that.

    There most of the memory traffic is, and little of the error: what rounding does to small layers spreads over the
    picture, and rounding the picture itself costs half a level.
    """
    lowered = model.clone()
    nodes = {node.get_friendly_name(): node for node in lowered.get_ordered_ops() if is_large(node)}
    last = max((i for i, node in enumerate(nodes.values()) if node.get_type_name() == "Convolution"), default=0)
    nodes = dict(list(nodes.items())[:last])
    narrow: dict[tuple[str, int], openvino.Output] = {}
    for node in nodes.values():
        for port in node.inputs():
            source = port.get_source_output()
            whose = source.get_node().get_friendly_name()
            if source.get_element_type() != openvino.Type.f32 or whose in nodes:
                continue
            key = whose, source.get_index()
            if key not in narrow or constant(source):  # OpenVINO does not fuse a bias that is shared
                narrow[key] = opset.convert(nearest(source) if constant(source) else source, "bf16").output(0)
            port.replace_source_output(narrow[key])
    for node in nodes.values():
        ports = [
            port for port in node.output(0).get_target_inputs() if port.get_node().get_friendly_name() not in nodes
        ]
        if ports:
            wide = opset.convert(node.output(0), "f32").output(0)
            for port in ports:
                port.replace_source_output(wide)
    lowered.validate_nodes_and_infer_types()
    fold(lowered)
    return lowered


def nearest(weights: openvino.Output) -> openvino.Node:
    """The nearest bfloat16 values, in float32: OpenVINO's own conversion of constants cuts off the digits."""
    return opset.constant(torch.tensor(weights.get_node().get_data()).bfloat16().float().numpy())


def is_large(node: openvino.Node) -> bool:
    return (
        node.get_type_name() in LOWERED
        and node.get_output_element_type(0) == openvino.Type.f32
        and len(node.get_output_shape(0)) == 4
        and node.get_output_shape(0)[3] >= FACE_SHAPE[2]  # not its height, which bands divide
    )


def fold(model: openvino.Model) -> None:
    """Compute what depends on constants alone."""
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)


# --- bands of rows ---------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """1×1 convolution, bias, ReLU, 3×3 depthwise convolution, bias, ReLU, 1×1 convolution, bias: an inverted residual,
    but for the sum with its input."""

    source: openvino.Output
    expand: openvino.Node
    expand_bias: openvino.Node
    depthwise: openvino.Node
    depthwise_bias: openvino.Node
    project: openvino.Node
    project_bias: openvino.Node


def tile(model: openvino.Model) -> openvino.Model:
    """A copy that computes large inverted residuals band by band of rows, so that what lies between their layers stays
    in the cache.

    The same arithmetic, but for a row or two at each band's edge that two bands compute. Where the block's input is a
    concatenation, its parts are cut into bands instead of being joined as a whole.
    """
    model = model.clone()
    # The last one first: what it reads is not replaced under it.
    for block in reversed(list(find_blocks(model, TILED_BYTES))):
        parts = [block.source]
        joined = block.source.get_node()
        if joined.get_type_name() == "Concat" and joined.get_attributes()["axis"] == 1:
            parts = joined.input_values()
        height, rows = block.source.get_shape()[2], block.project.get_output_shape(0)[2]
        stride = block.depthwise.get_attributes()["strides"]
        bands = []
        for k in range(BANDS):
            first, last = rows * k // BANDS, rows * (k + 1) // BANDS
            above, below = stride[0] * first - 1, stride[0] * (last - 1) + 2  # what the 3×3 windows reach
            top, bottom = max(above, 0), min(below, height)
            window = [opset.constant([n]) for n in (top, bottom, 1, 2)]
            slices = [opset.slice(part, *window) for part in parts]
            x = opset.concat(slices, 1) if len(slices) > 1 else slices[0]
            x = opset.convolution(x, block.expand.input_value(1), [1, 1], [0, 0], [0, 0], [1, 1])
            x = opset.relu(opset.add(x, copied(block.expand_bias.input_value(1))))
            edges = [top - above, 1], [below - bottom, 1]
            x = opset.group_convolution(x, block.depthwise.input_value(1), stride, *edges, [1, 1])
            x = opset.relu(opset.add(x, copied(block.depthwise_bias.input_value(1))))
            x = opset.convolution(x, block.project.input_value(1), [1, 1], [0, 0], [0, 0], [1, 1])
            bands.append(opset.add(x, copied(block.project_bias.input_value(1))))
        whole = opset.concat(bands, 2).output(0)
        for port in block.project_bias.output(0).get_target_inputs():
            port.replace_source_output(whole)
    model.validate_nodes_and_infer_types()
    return model


def find_blocks(model: openvino.Model, least_bytes: int) -> Iterator[Block]:
    """Inverted residuals whose inner tensors are at least so large."""
    for depthwise in model.get_ordered_ops():
        if depthwise.get_type_name() != "GroupConvolution" or prod(depthwise.get_input_shape(0)) * 4 < least_bytes:
            continue
        up = follow(depthwise, ("Relu", "Add", "Convolution"), lambda node: node.input_value(0).get_node())
        down = follow(depthwise, ("Add", "Relu", "Convolution", "Add"), only_consumer)
        if up is None or down is None:
            continue
        block = Block(up[2].input_value(0), up[2], up[1], depthwise, down[0], down[2], down[3])
        plain = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [0, 0], "pads_end": [0, 0]}
        padded = {"dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
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
