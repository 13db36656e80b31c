"""Linear steps of an ONNX network, moved to where they cost least: the same function, with fewer multiplications."""

from collections.abc import Iterable
from math import prod

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, TensorProto
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .halves import KEPT_BYTES, has_branches

Part = tuple[ir.Value, np.ndarray]
"""Some of a 1×1 convolution's input channels, and the weights (out, in) for them."""


def ease(model: ModelProto) -> ModelProto:
    """Rewrite 1×1 convolutions that follow a concatenation, as each `up` block of the U-Net begins, or each other.

    Convolution, upsampling and concatenation are linear, so with `up` for the upsampling and `,` for the concatenation

        conv(up(x), skip) = up(conv_x(x)) + conv_skip(skip)

    The first term is computed before the upsampling, at a quarter of the pixels. The second one, with the bias, depends
    on the face alone: it ends up in the first half of `cut`. That is done where the result is small enough to be kept
    between the halves (`KEPT_BYTES`). Elsewhere, two 1×1 convolutions in a row become one, if what is between them has
    more channels than what goes in, depends on the face alone, and would not be kept: `inc` ends with such a one, and
    `down1` and the skip of `up5` begin with another.

    Rounding differs, the function does not. Networks without such places, those with branches and those in half
    precision stay as they are.

    Args:
        model: a network as `read_network` gives it.
    """
    if has_branches(model) or model.graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        return model
    network = ir.from_proto(model)
    if any(node.op_type == "BatchNormalization" for node in network.graph):
        network = with_norms_folded(network)
    RemoveUnusedNodesPass()(network)  # a use that leads nowhere would keep a value where it is
    graph = network.graph
    heard = reached(graph, graph.inputs[1])
    seen = reached(graph, graph.inputs[0]) - heard
    for convolution in [node for node in graph if is_pointwise(node) and not node.outputs[0].is_graph_output()]:
        parts = parts_of(convolution)
        mixed = any(value in seen for value, _ in parts) and any(value in heard for value, _ in parts)
        if mixed and is_kept(convolution.outputs[0]):
            split(graph, convolution, parts, seen)
        else:
            merge(graph, convolution, parts, seen)
    RemoveUnusedNodesPass()(network)
    eased = ir.to_proto(network)
    for value in graph.initializers.values():
        value.const_value = None  # onnxscript's rules keep the graph that they rewrote last: free at least its weights
    return eased


def with_norms_folded(network: ir.Model) -> ir.Model:
    """The same with batch normalisations as part of the convolutions before them."""
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    return rewrite(network, [fuse_batchnorm_into_conv_rule])


def reached(graph: ir.Graph, start: ir.Value) -> set[ir.Value]:
    """The values that depend on this one, itself included."""
    found = {start}
    for node in graph:  # in an order in which they can be computed
        if found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def is_pointwise(node: ir.Node | None) -> bool:
    """Whether this is a 1×1 convolution of stride 1 with constant float32 weights."""
    if node is None or node.op_type != "Conv" or any(constant(value) is None for value in node.inputs[1:]):
        return False
    weights = constant(node.inputs[1])
    assert weights is not None
    given = node.attributes
    return (
        weights.dtype == np.float32
        and weights.shape[2:] == (1, 1)
        and given.get_int("group", 1) == 1
        and not any(given.get_ints("pads", ()))
        and set(given.get_ints("strides", ())) <= {1}
        and given.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)  # an initializer's, or a node's
    return None if tensor is None else tensor.numpy()


def parts_of(convolution: ir.Node) -> list[Part]:
    """What is concatenated before a 1×1 convolution, each with its weights; its input, if nothing is."""
    source, weights = convolution.inputs[0], matrix(convolution)
    assert source is not None
    whole = [(source, weights)]
    joined = source.producer()
    if joined is None or joined.op_type != "Concat" or joined.attributes.get_int("axis", 0) != 1:
        return whole
    parts: list[Part] = []
    for value in joined.inputs:
        channels = value.shape[1] if value is not None and value.shape else None
        if value is None or not isinstance(channels, int):
            return whole
        parts.append((value, weights[:, :channels]))
        weights = weights[:, channels:]
    return parts


def matrix(convolution: ir.Node) -> np.ndarray:
    """A 1×1 convolution's weights (out, in)."""
    weights = constant(convolution.inputs[1])
    assert weights is not None
    return weights[:, :, 0, 0]


def bias_of(convolution: ir.Node) -> np.ndarray:
    bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else None
    return np.zeros(len(matrix(convolution)), np.float32) if bias is None else bias


def is_kept(value: ir.Value) -> bool:
    """Whether it will be kept between the halves, if it depends on the face alone."""
    sizes = list(value.shape)[1:] if value.shape else []
    known = [size for size in sizes if isinstance(size, int)]
    return bool(sizes) and len(known) == len(sizes) and 4 * prod(known) <= KEPT_BYTES


def split(graph: ir.Graph, convolution: ir.Node, parts: list[Part], seen: set[ir.Value]) -> None:
    """One convolution of what is seen, with the bias; one for each part that is heard, before it is resized."""
    new = Replacement(graph, convolution)
    early = [part for part in parts if part[0] in seen]
    total = new.convolution(early, bias_of(convolution))
    total.shape = convolution.outputs[0].shape  # by which `cut` knows what can be kept
    for value, weights in parts:
        if value in seen:
            continue
        resize = value.producer()
        if resize and resize.inputs[0] and is_channelwise(resize) and len(value.uses()) == 1:
            narrow = new.convolution([(resize.inputs[0], weights)])
            late = new.node("Resize", [narrow, *resize.inputs[1:]], resize.attributes.values())
        else:
            late = new.convolution([(value, weights)])
        total = new.node("Add", [late, total])
    new.finish(total)


def is_channelwise(resize: ir.Node) -> bool:
    """Whether it resizes height and width by constant factors."""
    scales = constant(resize.inputs[2]) if resize.op_type == "Resize" and len(resize.inputs) == 3 else None
    return (
        scales is not None
        and len(scales) == 4
        and not np.any(scales[:2] != 1)
        and "axes" not in resize.attributes
        and resize.attributes.get_string("coordinate_transformation_mode", "") != "tf_crop_and_resize"
    )


def merge(graph: ir.Graph, convolution: ir.Node, parts: list[Part], seen: set[ir.Value]) -> None:
    """Take the inputs of 1×1 convolutions instead of their outputs, where they are seen alone, large and fewer."""
    bias = bias_of(convolution)
    merged: list[Part] = []
    for value, weights in parts:
        inner = value.producer()
        if inner and value in seen and not is_kept(value) and is_pointwise(inner) and np.greater(*matrix(inner).shape):
            assert inner.inputs[0] is not None
            bias = bias + weights @ bias_of(inner)
            merged.append((inner.inputs[0], weights @ matrix(inner)))
        else:
            merged.append((value, weights))
    if [value for value, _ in merged] != [value for value, _ in parts]:
        new = Replacement(graph, convolution)
        new.finish(new.convolution(merged, bias))


class Replacement:
    """New nodes in the place of a convolution, named after it."""

    def __init__(self, graph: ir.Graph, old: ir.Node) -> None:
        self._graph = graph
        self._old = old
        self._count = 0

    def node(self, kind: str, inputs: Iterable[ir.Value | None], attributes: Iterable[ir.Attr] = ()) -> ir.Value:
        output = ir.Value(name=self._name(), type=self._old.outputs[0].type)
        node = ir.Node("", kind, list(inputs), list(attributes), outputs=[output], name=output.name)
        self._graph.insert_before(self._old, node)
        return output

    def convolution(self, parts: list[Part], bias: np.ndarray | None = None) -> ir.Value:
        """A 1×1 convolution of concatenated parts."""
        values = [value for value, _ in parts]
        weights = np.concatenate([weights for _, weights in parts], axis=1)[:, :, None, None]
        joined = values[0] if len(values) == 1 else self.node("Concat", values, [ir.AttrInt64("axis", 1)])
        arrays = [weights] if bias is None else [weights, bias]
        return self.node("Conv", [joined, *map(self._weights, arrays)])

    def finish(self, value: ir.Value) -> None:
        """This is what the old convolution gave."""
        old = self._old.outputs[0]
        value.shape = old.shape
        ir.convenience.replace_all_uses_with(old, value)
        self._graph.remove(self._old, safe=True)

    def _weights(self, array: np.ndarray) -> ir.Value:
        name = self._name()
        tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self._graph.initializers[name] = value
        return value

    def _name(self) -> str:
        self._count += 1
        return f"{self._old.outputs[0].name}.eased{self._count}"
