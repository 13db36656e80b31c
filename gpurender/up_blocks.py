"""The `up` blocks with which a network ends, found in OpenVINO's graph."""

from typing import NamedTuple

import numpy as np

from .kernels.up_weights import PICTURE, UpWeights
from .openvino_graph import Block, constant, find_blocks, matches, only_consumer
from .private_openvino import openvino


class UpBlock(NamedTuple):
    """One block of a network.

    Attributes:
        y: what it resizes; of the network's first block, an output of the head.
        skip: which of the decoder's inputs it reads: the face, or N,H,W,C.
        height, width: of its output.
        below, face: channels of y, and of the face if the skip is computed from that, else 0.
        multiplied: the operations whose results are multiplied, as `UpLevels` has them.
    """

    y: openvino.Output
    skip: int
    height: int
    width: int
    below: int
    face: int
    weights: UpWeights
    multiplied: list[str]


def find_up_blocks(decoder: openvino.Model) -> list[UpBlock]:
    """The blocks with which a decoder ends, in the order of the network; none if it ends otherwise."""
    blocks = {block.project_bias.get_friendly_name(): block for block in find_blocks(decoder, 0)}
    inputs = {parameter.get_friendly_name(): i for i, parameter in enumerate(decoder.get_parameters())}
    sigmoid = decoder.output(0).get_node().input_value(0).get_node()
    bias = sigmoid.input_value(0).get_node()
    if sigmoid.get_type_name() != "Sigmoid" or not is_biased(bias, "Convolution", 1):
        return []
    picture = bias.input_value(0).get_node()
    value: openvino.Output = picture.input_value(0)
    last: openvino.Node | None = picture
    found: list[UpBlock] = []
    while block := up_block(value, last, blocks, inputs):
        found.append(block)
        value, last = block.y, None
    return found[::-1]


def up_block(
    value: openvino.Output, last: openvino.Node | None, blocks: dict[str, Block], inputs: dict[str, int]
) -> UpBlock | None:
    """The block whose output this value is, if it is one's; `last` is the convolution to the picture."""
    total = value.get_node()
    if total.get_type_name() != "Add":
        return None
    terms = [term.get_node().get_friendly_name() for term in total.input_values()]
    for first, second in (terms, terms[::-1]):
        one, two = blocks.get(first), blocks.get(second)
        if one and two and two.source.get_node() == one.project_bias:
            break
    else:
        return None
    joined = one.source.get_node()
    if joined.get_type_name() != "Concat" or joined.get_attributes()["axis"] != 1 or joined.get_input_size() != 2:
        return None
    resize, skip = joined.input_value(0).get_node(), joined.input_value(1)
    _, _, height, width = list(joined.get_output_shape(0))
    if (
        not doubles(resize)
        or min(height, width) < 4
        or (last and width % 16)
        or len(one.project_bias.output(0).get_target_inputs()) != 2
        or any(only_consumer(node) is None for node in (joined, resize))
    ):
        return None
    if not all(is_depthwise(block.depthwise) for block in (one, two)):
        return None
    stem = stem_of(skip)
    source = stem[0] if stem else transposed(skip)
    if source is None or source.get_node().get_friendly_name() not in inputs:
        return None
    ends = stem[1] if stem else None, convolution_of(last) if last else None
    of_blocks = [*weights_of(one), *weights_of(two)]
    arrays = [*of_blocks, *(ends[0] or ()), *(ends[1] or ())]  # each followed by its bias
    unequal = any(len(array) != len(bias) for array, bias in zip(arrays[::2], arrays[1::2], strict=True))
    if unequal or (ends[1] and len(ends[1][0]) != PICTURE):
        return None
    inner, filtered, inner2, filtered2 = (
        convolution.input_value(0) for block in (one, two) for convolution in (block.depthwise, block.project)
    )
    multiplied = (resize.input_value(0), skip, inner, filtered, two.source, inner2, filtered2)
    return UpBlock(
        y=resize.input_value(0),
        skip=inputs[source.get_node().get_friendly_name()],
        height=height,
        width=width,
        below=resize.input_value(0).get_shape()[1],
        face=source.get_shape()[1] if stem else 0,
        weights=UpWeights._make([*of_blocks, *ends]),
        multiplied=[value.get_node().get_friendly_name() for value in multiplied],
    )


def doubles(resize: openvino.Node) -> bool:
    """Whether it doubles height and width bilinearly, corners on corners."""
    if resize.get_type_name() != "Interpolate":
        return False
    given, before, after = resize.get_attributes(), resize.get_input_shape(0), resize.get_output_shape(0)
    return (
        given["mode"] in ("linear", "linear_onnx")
        and given["coordinate_transformation_mode"] == "align_corners"
        and list(after) == [*list(before)[:2], *(2 * size for size in list(before)[2:])]
        and not any([*given["pads_begin"], *given["pads_end"]])
        and not given["antialias"]
    )


def stem_of(skip: openvino.Output) -> tuple[openvino.Output, tuple[np.ndarray, ...]] | None:
    """The face and the weights, if this is a 1×1 and a 3×3 depthwise convolution of it, each with bias and ReLU."""
    value, weights = skip, []
    for kind, kernel in (("GroupConvolution", 3), ("Convolution", 1)):
        relu = value.get_node()
        if relu.get_type_name() != "Relu" or not is_biased(relu.input_value(0).get_node(), kind, kernel):
            return None
        bias = relu.input_value(0).get_node()
        weights[:0] = convolution_of(bias.input_value(0).get_node())
        value = bias.input_value(0).get_node().input_value(0)
    return (value, tuple(weights)) if value.get_node().get_type_name() == "Parameter" else None


def is_biased(bias: openvino.Node, kind: str, kernel: int) -> bool:
    """Whether it adds the bias to such a convolution of stride 1, to the same size."""
    if bias.get_type_name() != "Add" or bias.input_value(0).get_node().get_type_name() != kind:
        return False
    convolution, around = bias.input_value(0).get_node(), [kernel // 2] * 2
    same = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": around, "pads_end": around}
    return (
        (is_depthwise(convolution) if kind == "GroupConvolution" else matches(convolution, same, kernel))
        and constant(convolution.input_value(1))
        and constant(bias.input_value(1))
        and only_consumer(convolution) is not None
    )


def is_depthwise(convolution: openvino.Node) -> bool:
    """Whether it is one of stride 1 with a kernel for each channel."""
    same = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
    return matches(convolution, same, 3) and list(convolution.get_input_shape(1))[1:3] == [1, 1]


def transposed(value: openvino.Output) -> openvino.Output | None:
    """The value in N,H,W,C of which `channels_last` makes this one."""
    node = value.get_node()
    if node.get_type_name() != "Transpose" or not constant(node.input_value(1)):
        return None
    return node.input_value(0) if node.input_value(1).get_node().get_data().tolist() == [0, 3, 1, 2] else None


def weights_of(block: Block) -> tuple[np.ndarray, ...]:
    convolutions = (block.expand, block.depthwise, block.project)
    return tuple(array for convolution in convolutions for array in convolution_of(convolution))


def convolution_of(convolution: openvino.Node) -> tuple[np.ndarray, np.ndarray]:
    """Weights, (out,in) or depthwise (channels,3,3), and bias (out,), float32."""
    bias = only_consumer(convolution)
    assert bias is not None
    weights = np.array(convolution.input_value(1).get_node().get_data(), np.float32)
    values = np.array(bias.input_value(1).get_node().get_data(), np.float32)
    bias_values = values.reshape(-1) if values.shape[-2:] == (1, 1) else values[:0]  # not a number for each channel
    depthwise = convolution.get_type_name() == "GroupConvolution"
    return weights.reshape(-1, 3, 3) if depthwise else weights.reshape(len(weights), -1), bias_values
