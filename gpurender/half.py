"""A float32 ONNX network -> half precision, for runtimes that take the precision from the file (TensorRT); and back."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .cache import cache_directory, hash_of_network, is_whole, seal
from .errors import InputError, first_line
from .halves import load_onnx
from .output import complete_or_absent

HALF_VERSION = 1  # part of the cache key: raise it when what is made here changes
LARGEST_HALF = float(np.finfo(np.float16).max)
FLOAT32_INPUTS = {"Resize": (1, 2)}  # which inputs of an operator stay float32 whatever its first is


def cached_half(path: Path, notify: Callable[[str], None] = lambda text: None) -> Path:
    """The network in half precision, in the user's cache, made there if need be (a second).

    Raises:
        InputError: the file is not ONNX, ONNX Runtime cannot load the network, or it was replaced meanwhile.
    """
    content = hash_of_network(path)[:32]
    half = cache_directory() / f"{content}-fp16-v{HALF_VERSION}.onnx"
    sums = half.with_name(half.name + ".sha256")
    if not is_whole(sums, [half]):
        notify(f"converting {path.name} to half precision, once")
        model = to_half(folded(path, load_onnx(path)))
        if hash_of_network(path)[:32] != content:  # it would be kept as that of the one before
            raise InputError(f"{path} was replaced while it was read; try again.")
        with complete_or_absent(half, overwrite=True) as name:  # another program may be at it: either's will do
            Path(name).write_bytes(model.SerializeToString())
        seal(sums, [half])
    return half


def folded(path: Path, model: ModelProto) -> ModelProto:
    """The network of a file after ONNX Runtime's basic optimisations: the same arithmetic with its constants computed.

    Above all, batch normalisations become part of the convolutions before them: their variances in half precision
    would be far from the truth.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as directory:
        options.optimized_model_filepath = f"{directory}/folded.onnx"
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise InputError(f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}") from None
        model = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def to_half(model: ModelProto) -> ModelProto:
    """Turn all of the network's float32 into float16, in place: inputs, outputs, weights and what is between."""
    graph = model.graph
    exact = {
        name for node in graph.node for i in FLOAT32_INPUTS.get(node.op_type, ()) for name in node.input[i : i + 1]
    }
    retype(model, TensorProto.FLOAT, TensorProto.FLOAT16, exact)
    for entry in model.metadata_props:
        if entry.key == "gpurender.precision":
            entry.value = "fp16"
    return model


def to_float32(model: ModelProto) -> None:
    """Turn all of the network's float16 into float32, in place; its weights keep their values."""
    retype(model, TensorProto.FLOAT16, TensorProto.FLOAT, set())


def retype(model: ModelProto, before: int, after: int, exact: set[str]) -> None:
    """Give what is of one type another, but for the values named in `exact`."""
    graph = model.graph
    for i, tensor in enumerate(graph.initializer):
        if tensor.name not in exact:
            graph.initializer[i].CopyFrom(retyped(tensor, before, after))
    for node in graph.node:
        if exact.intersection(node.output):
            continue
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.CopyFrom(retyped(attribute.t, before, after))
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", before):
                attribute.i = after
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == before and value.name not in exact:
            value.type.tensor_type.elem_type = after


def retyped(tensor: TensorProto, before: int, after: int) -> TensorProto:
    if tensor.data_type != before:
        return tensor
    values = numpy_helper.to_array(tensor)
    if after == TensorProto.FLOAT16:
        values = values.clip(-LARGEST_HALF, LARGEST_HALF)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(after)), tensor.name)


def widen_depthwise(model: ModelProto) -> ModelProto:
    """A copy of a half-precision network whose grouped convolutions compute in float32, with casts around them."""
    wide = ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    nodes = [part for node in graph.node for part in (widened(node) if is_grouped(node) else [node])]
    wide_weights = {name for node in graph.node if is_grouped(node) for name in node.input[1:]}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name in wide_weights}
    for name, tensor in weights.items():
        values = numpy_helper.to_array(tensor).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, f"{name}.float32"))
    for name in wide_weights - weights.keys():  # computed
        nodes.insert(0, cast(name, f"{name}.float32", TensorProto.FLOAT))
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return wide


def is_grouped(node: NodeProto) -> bool:
    return node.op_type == "Conv" and any(item.name == "group" and item.i > 1 for item in node.attribute)


def widened(node: NodeProto) -> Iterable[NodeProto]:
    first, *weights = node.input
    (last,) = node.output
    wide = NodeProto()
    wide.CopyFrom(node)
    del wide.input[:], wide.output[:]
    wide.input.extend([f"{last}.wide_input", *(f"{name}.float32" for name in weights)])
    wide.output.append(f"{last}.wide")
    yield cast(first, wide.input[0], TensorProto.FLOAT)
    yield wide
    yield cast(wide.output[0], last, TensorProto.FLOAT16)


def cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)
