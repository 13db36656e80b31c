"""A network's forward pass, written down as an ONNX graph.

The network is called with `Recorded` values in the place of tensors, and each of torch's functions that it calls adds a
node. It must be made of what SyncTalk_2D's networks are made of, without batch normalisations. torch's own exporter
takes any network, but five to ten seconds for it, and leaves 0.3 GB behind in a program that is about to render.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET, IR_VERSION = 18, 10  # which TensorRT 10, OpenVINO and ONNX Runtime of those days read
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


class Graph:
    """Nodes in the order in which they are computed, none twice, and their constants."""

    def __init__(self, network: nn.Module) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._known: dict[str, Recorded] = {}

    def node(self, kind: str, inputs: Sequence["Recorded | str"], **attributes: Any) -> "Recorded":
        names = [value.name if isinstance(value, Recorded) else value for value in inputs]
        told = repr((kind, names, attributes))
        if told not in self._known:
            name = f"{kind.lower()}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(kind, names, [name], name, **attributes))
            self._known[told] = Recorded(self, name)
        return self._known[told]

    def parameter(self, tensor: Tensor) -> str:
        return self.constant(self._names[id(tensor)], tensor.detach().numpy())

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name


class Recorded:
    """A value of a graph. torch calls `__torch_function__` of what stands for a tensor instead of the function itself:
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-python-api
    """

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph = graph
        self.name = name

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        given: tuple[Any, ...],
        named: dict[str, Any] | None = None,
    ) -> "Recorded":
        return WRITTEN[function](*given, **(named or {}))

    def __add__(self, other: "Recorded") -> "Recorded":
        return self.graph.node("Add", [self, other])

    def flatten(self, start_dim: int) -> "Recorded":
        assert start_dim == 1
        return self.graph.node("Flatten", [self], axis=1)


def onnx_graph(network: nn.Module, inputs: Mapping[str, tuple[int, ...]], output: str, batch: int | str) -> ModelProto:
    """Write a network down, with the shapes of all values.

    Args:
        network: see above; float32 or float16, on the CPU. Its parameters' names are the constants'.
        inputs: what the network's arguments shall be called, and their shapes behind the batch.
        output: what its result shall be called; it is no argument.
        batch: a number, or the name of a batch that may be any.
    """
    graph = Graph(network)
    network(*(Recorded(graph, name) for name in inputs))
    graph.nodes[-1].output[0] = output
    kind = TYPES[next(network.parameters()).dtype]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            type(network).__name__,
            [helper.make_tensor_value_info(name, kind, [batch, *shape]) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(output, kind, None)],
            [*graph.constants.values()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    if isinstance(batch, str):
        for value in (*model.graph.value_info, *model.graph.output):  # what resizes forgets the batch's name
            value.type.tensor_type.shape.dim[0].dim_param = batch
    return model


def convolution(
    value: Recorded,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Recorded:
    return value.graph.node(
        "Conv",
        [value, *(value.graph.parameter(tensor) for tensor in (weight, bias) if tensor is not None)],
        kernel_shape=tuple(weight.shape[2:]),
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=groups,
    )


def relu(value: Recorded, inplace: bool = False) -> Recorded:
    return value.graph.node("Relu", [value])


def sigmoid(value: Recorded) -> Recorded:
    return value.graph.node("Sigmoid", [value])


def concatenation(values: Sequence[Recorded], dim: int) -> Recorded:
    return values[0].graph.node("Concat", values, axis=dim)


def interpolation(
    value: Recorded, *, scale_factor: float, mode: str, align_corners: bool, **others: object
) -> Recorded:
    assert (mode, align_corners, any(others.values())) == ("bilinear", True, False)  # nothing else is written here
    scales = value.graph.constant(f"scales_{scale_factor}", np.array([1, 1, scale_factor, scale_factor], np.float32))
    corners = "align_corners"
    return value.graph.node("Resize", [value, "", scales], mode="linear", coordinate_transformation_mode=corners)


WRITTEN: dict[Callable[..., Any], Callable[..., Recorded]] = {
    torch.conv2d: convolution,
    F.relu: relu,
    torch.sigmoid: sigmoid,
    torch.cat: concatenation,
    F.interpolate: interpolation,
}
"""What the functions that the networks call are in ONNX."""
