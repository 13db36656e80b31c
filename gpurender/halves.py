"""An ONNX lip-sync network, cut in two where it begins to hear: what any engine loads."""

from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
import onnx.utils
from onnx import ModelProto, TensorProto, ValueInfoProto

from .errors import InputError, first_line
from .network import FACE_SHAPE, WINDOW_SHAPES, Mode

KEPT_BYTES = 4 * 2**20  # the largest tensor that is kept between the halves, per frame, in float32
STAND_INS = 3, 5  # for a batch of any size, while shapes are inferred
SHAPE_BYTES = 1024  # larger constants are weights, smaller ones may be sizes or scales
PICTURE_SHAPE = (3, *FACE_SHAPE[1:])
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class Halves:
    """A network's two halves.

    The first dimension of their inputs and outputs is the batch; they are float32, or float16 where the file's are.

    Attributes:
        mode: the kind of features, told from the audio input's shape.
        batch: the only batch that the network takes; None if it takes any.
        encoder: the face to what of the network depends on it alone; None if nothing does.
        decoder: the face (if `again`), the encoder's outputs and the audio, in this order, to the picture.
        again: whether the decoder computes some of what depends on the face alone once more, from the face.
    """

    mode: Mode
    batch: int | None
    encoder: ModelProto | None
    decoder: ModelProto
    again: bool

    @property
    def float16(self) -> bool:
        """Whether it takes and gives float16."""
        return self.decoder.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def read_halves(path: Path, mode: Mode | None = None) -> Halves:
    """Read an ONNX file and cut it; its inputs may have any names and order, its batch may be symbolic or a number.

    Raises:
        InputError: the file is not ONNX, or not a lip-sync network, or one for other features than `mode`.
    """
    return cut(*read_network(path, mode))


def read_network(path: Path, mode: Mode | None = None) -> tuple[ModelProto, Mode]:
    """Read an ONNX file: its inputs are face and audio then, of known shapes but for the batch."""
    model = load_onnx(path)
    face, audio, found = recognise_inputs(path, model, mode)
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS and np.isnan(weights_of(path, tensor)).any():
            raise InputError(f"{path}: {tensor.name} holds NaN: its weights are damaged.")
    check_no_circle(path, model)
    fix_shapes(face, audio, model.graph.output[0], found)
    others = [value for value in model.graph.input if value.name not in (face.name, audio.name)]
    ordered = [ValueInfoProto.FromString(value.SerializeToString()) for value in (face, audio, *others)]
    del model.graph.input[:]
    model.graph.input.extend(ordered)
    try:
        shapes = infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"{path} is not an ONNX network that can be read: {first_line(error)}") from None
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    for port in (face, audio):
        if not has_branches(model) and model.graph.output[0].name not in depend_on(model, port.name):
            raise InputError(f"{path} makes nothing of its input {port.name}; it is no lip-sync network.")
    return model, found


def load_onnx(path: Path) -> ModelProto:
    """Read an ONNX file; the functions that it defines are written out, as OpenVINO knows none."""
    try:
        model = onnx.load(path)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf's errors, those of files with external data, and of functions in a circle
        raise InputError(f"{path} is not an ONNX network that can be read ({first_line(error)}).") from None
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX network that can be read.")
    if not all(isinstance(word, str) for word in words_of(model)):  # where they are not UTF-8, protobuf gives bytes
        raise InputError(f"{path} is not an ONNX network that can be read: a name in it is damaged.")
    return model


def words_of(model: ModelProto) -> Iterator[str]:
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for values in (model.graph.input, model.graph.output, model.graph.initializer, model.graph.value_info):
        yield from (value.name for value in values)


def weights_of(path: Path, tensor: TensorProto) -> np.ndarray:
    try:
        return onnx.numpy_helper.to_array(tensor)
    except ValueError:
        raise InputError(f"{path}: {tensor.name} has not the weights that its shape says: it is damaged.") from None


def check_no_circle(path: Path, model: ModelProto) -> None:
    """Raise InputError if a step needs what it leads to: OpenVINO would follow that for ever."""
    makers = {name: node.input for node in model.graph.node for name in node.output if name}
    try:
        TopologicalSorter(makers).prepare()
    except CycleError:
        raise InputError(f"{path} is not an ONNX network that can be read: its steps run in a circle.") from None


def infer_shapes(model: ModelProto) -> list[ValueInfoProto]:
    """What is between the nodes. A batch of any size would get lost where sizes are computed with, as in Resize and
    Reshape: it is inferred for two sizes, and what differs between them was made from it."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if tensor.ByteSize() > SHAPE_BYTES:  # weights, which are slow to pass on
            for content in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(content)
    ports = [value.type.tensor_type.shape.dim for value in (*bare.graph.input, *bare.graph.output)]
    batches = [dims[0] for dims in ports if dims and dims[0].dim_param]
    if not batches:
        return list(inferred(bare).values())
    symbol = batches[0].dim_param
    found = []
    for size in STAND_INS:
        for batch in batches:
            batch.dim_value = size
        found.append(inferred(bare))
    values, others = found
    for name, value in values.items():
        dims, again = (v.type.tensor_type.shape.dim for v in (value, others.get(name, ValueInfoProto())))
        if len(dims) != len(again):
            value.type.tensor_type.ClearField("shape")
            continue
        for place, (dim, other) in enumerate(zip(dims, again, strict=True)):
            if place == 0 and (dim.dim_value, other.dim_value) == STAND_INS:
                dim.dim_param = symbol
            elif dim.dim_value != other.dim_value:
                dim.Clear()
    return list(values.values())


def inferred(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Shapes by name. Numbers are followed only where the network computes with sizes: ONNX writes out each of a row
    that may be sizes, a flattened picture's, too."""
    computes = any(node.op_type in ("Shape", "Size") for node in model.graph.node)
    found = onnx.shape_inference.infer_shapes(model, data_prop=computes).graph.value_info
    return {value.name: value for value in found}


def recognise_inputs(path: Path, model: ModelProto, mode: Mode | None) -> tuple[ValueInfoProto, ValueInfoProto, Mode]:
    """The face and the audio input, by their shapes, and the mode."""
    weights = {tensor.name for tensor in model.graph.initializer}  # old exporters list them as inputs too
    inputs = [value for value in model.graph.input if value.name not in weights]
    modes: list[Mode] = [m for m in WINDOW_SHAPES if mode in (None, m)]
    if len(model.graph.output) != 1 or not fits(model.graph.output[0], PICTURE_SHAPE):
        given = ", ".join(map(written_shape, model.graph.output))
        raise InputError(f"{path} gives {given}; a lip-sync network gives one batch of {PICTURE_SHAPE}.")
    if len(inputs) == 2:
        for face, audio in (inputs, inputs[::-1]):
            for m in modes:
                if fits(face, FACE_SHAPE) and fits(audio, WINDOW_SHAPES[m]):
                    return face, audio, m
    given = ", ".join(f"{value.name} {written_shape(value)}" for value in inputs)
    wanted = " or ".join(f"{WINDOW_SHAPES[m]} ({m})" for m in modes)
    raise InputError(f"{path} takes {given}; a lip-sync network takes batches of {FACE_SHAPE} and {wanted}.")


def fits(value: ValueInfoProto, expected: tuple[int, ...]) -> bool:
    """Whether these are floats of a batch of `expected`, as far as the file says."""
    tensor = value.type.tensor_type
    known = [dim.dim_value for dim in tensor.shape.dim]
    return tensor.elem_type in FLOATS and (
        not tensor.HasField("shape")
        or (len(known) == 1 + len(expected) and all(a in (0, b) for a, b in zip(known[1:], expected, strict=True)))
    )


def written_shape(value: ValueInfoProto) -> str:
    return f"[{','.join(str(dim.dim_value or '?') for dim in value.type.tensor_type.shape.dim)}]"


def fix_shapes(face: ValueInfoProto, audio: ValueInfoProto, picture: ValueInfoProto, mode: Mode) -> None:
    """Write out what the shapes are, with one batch for all: a number if any of them has one, else a symbol."""
    tensors = [value.type.tensor_type for value in (face, audio, picture)]
    batch = max(tensor.shape.dim[0].dim_value if tensor.shape.dim else 0 for tensor in tensors)
    for tensor, shape in zip(tensors, (FACE_SHAPE, WINDOW_SHAPES[mode], PICTURE_SHAPE), strict=True):
        del tensor.shape.dim[:]
        first = tensor.shape.dim.add()
        if batch:
            first.dim_value = batch
        else:
            first.dim_param = "batch"
        for size in shape:
            tensor.shape.dim.add().dim_value = size


def cut(model: ModelProto, mode: Mode) -> Halves:
    """Cut a network of `read_network` in two where it stops depending on the face alone.

    Tensors that cross the cut and are small become the encoder's outputs; large ones (full resolution) are left in the
    decoder as well, because computing them again costs less than reading them.
    """
    face, audio = (value.name for value in model.graph.input[:2])
    (picture,) = (value.name for value in model.graph.output)
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    sees, hears = depend_on(model, face), depend_on(model, audio)
    crossing = {
        name: None  # once each, in the order of the graph
        for node in model.graph.node
        if hears.intersection(node.output)
        for name in node.input
        if name in sees - hears - {face}
    }
    shapes = {value.name: value for value in model.graph.value_info}
    kept = [name for name in crossing if name in shapes and is_small(shapes[name], dim)]
    if has_branches(model):
        kept = []
    pieces = onnx.utils.Extractor(model)
    decoder = pieces.extract_model([face, *kept, audio], [picture])
    again = not kept or any(face in node.input for node in decoder.graph.node)
    if not again:
        del decoder.graph.input[0]
    encoder = pieces.extract_model([face], kept) if kept else None
    return Halves(mode, dim.dim_value or None, encoder, decoder, again)


def depend_on(model: ModelProto, name: str) -> set[str]:
    """The tensors that depend on this one, itself included."""
    found = {name}
    for node in model.graph.node:  # ONNX keeps them in an order in which they can be computed
        if found.intersection(node.input):
            found.update(filter(None, node.output))  # an output that is left out has no name
    return found


def has_branches(model: ModelProto) -> bool:
    """Whether there are branches or loops, which see tensors that are not among their nodes' inputs."""
    return any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)


def is_small(value: ValueInfoProto, batch: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether it is a batch of floats, each at most `KEPT_BYTES` in float32."""
    tensor = value.type.tensor_type
    if tensor.elem_type not in FLOATS or not tensor.shape.dim:
        return False
    first, *rest = tensor.shape.dim
    same_batch = (first.dim_value, first.dim_param) == (batch.dim_value, batch.dim_param)
    return same_batch and 0 < 4 * prod(dim.dim_value for dim in rest) <= KEPT_BYTES
