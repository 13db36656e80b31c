"""ONNX networks made for a test."""

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import ModelProto, TensorProto, helper


def network_of(*nodes: onnx.NodeProto, batch: int | str, **weights: np.ndarray) -> ModelProto:
    """Of `face` and `audio` to `picture`."""
    shapes = {"face": (6, 320, 320), "audio": (32, 16, 16), "picture": (3, 320, 320)}
    face, audio, picture = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape]) for name, shape in shapes.items()
    )
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "network", [face, audio], [picture], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
