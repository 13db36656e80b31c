import gc
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import gpurender.linear as module
from gpurender.export import example_input
from gpurender.half import to_half
from gpurender.halves import cut, read_network
from gpurender.linear import ease, is_channelwise, is_pointwise


def pictures(model: ModelProto) -> np.ndarray:
    faces, audio = example_input(2, "ave")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, (faces.numpy(), audio.numpy()), strict=True)))[0])


def multiplications(model: ModelProto) -> float:
    """Of all convolutions, a frame."""
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    return sum(
        float(np.prod([d.dim_value for d in shapes[node.output[0]].type.tensor_type.shape.dim[2:]]))
        * np.prod(weights[node.input[1]])
        for node in model.graph.node
        if node.op_type == "Conv"
    )


def test_the_full_width_network_is_the_same_function_with_fewer_multiplications(seeded_onnx: Path) -> None:
    model, mode = read_network(seeded_onnx)
    before = model.SerializeToString()
    eased = ease(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(eased, full_check=True)
    # ONNX Runtime on the file itself; its pictures from the two differ by the order of the sums.
    np.testing.assert_allclose(pictures(eased), pictures(model), atol=1e-4)
    plain, eased = cut(model, mode), cut(eased, mode)
    assert plain.encoder is not None
    assert eased.encoder is not None
    assert multiplications(eased.decoder) < 0.8 * multiplications(plain.decoder)
    # `inc` ends in 32 channels made of 12, of which `down1` makes 64: now it makes them of the 12.
    assert sum(list(tensor.dims) == [64, 12, 1, 1] for tensor in eased.encoder.graph.initializer) == 1
    assert not any(list(tensor.dims) == [32, 12, 1, 1] for tensor in eased.encoder.graph.initializer)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in eased.encoder.graph.output]
    # The bottleneck and the two smallest skips with their convolutions; the larger skips themselves.
    assert shapes == [[2048, 10, 10], [1024, 20, 20], [512, 40, 40], [64, 80, 80], [32, 160, 160]]


@pytest.mark.parametrize("kept_bytes", [0, 100_000, 10**9])
def test_it_is_the_same_function_whatever_is_kept(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    model, _ = read_network(tiny_onnx)
    np.testing.assert_allclose(pictures(ease(model)), pictures(model), atol=1e-5)


def test_the_avatar_is_the_same_function() -> None:
    avatar = Path(module.__file__).parent / "demo/files/avatar/models/generator.onnx"
    model, _ = read_network(avatar)
    np.testing.assert_allclose(pictures(ease(model)), pictures(model), atol=1e-5)


def test_networks_in_half_precision_stay_as_they_are(tiny_onnx: Path) -> None:
    model, _ = read_network(tiny_onnx)
    half = to_half(model)
    assert ease(half) is half


# --- one block, against ONNX's reference implementation ---------------------------------------------------------------


def block(
    scale: float,
    mode: str,
    coordinates: str,
    seen_first: bool,
    bias: bool,
    skip_twice: bool,
    narrow: int,
    rng: np.random.Generator,
) -> ModelProto:
    """conv(concat(resize(heard), conv(face))), the skip from `narrow` channels; with `skip_twice` it is an output's
    other half too."""

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    constants = [
        weights("narrow_w", narrow, 2, 3, 3),
        weights("skip_w", 4, narrow, 1, 1),
        weights("skip_b", 4),
        weights("expand_w", 6, 7, 1, 1),
        numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "scales"),
    ]
    if bias:
        constants.append(weights("expand_b", 6))
    nodes = [
        helper.make_node("Conv", ["face", "narrow_w"], ["before"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["before"], ["narrow"]),
        helper.make_node("Conv", ["narrow", "skip_w", "skip_b"], ["skip"]),
        helper.make_node(
            "Resize", ["sound", "", "scales"], ["up"], mode=mode, coordinate_transformation_mode=coordinates
        ),
        helper.make_node("Concat", ["skip", "up"] if seen_first else ["up", "skip"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "expand_w", *(["expand_b"] if bias else [])], ["wide"]),
        helper.make_node("Relu", ["wide"], ["drawn"]),
        helper.make_node("Concat", ["drawn", "skip"] if skip_twice else ["drawn"], ["y"], axis=1),
    ]
    side = int(5 * scale)
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", channels, size, size])
        for name, channels, size in [("face", 2, side), ("sound", 3, 5), ("y", 10 if skip_twice else 6, side)]
    ]
    graph = helper.make_graph(nodes, "block", values[:2], values[2:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


@settings(max_examples=40)
@given(
    scale=st.sampled_from([1.0, 2.0, 3.0]),
    how=st.sampled_from([("linear", "align_corners"), ("linear", "half_pixel"), ("nearest", "asymmetric")]),
    seen_first=st.booleans(),
    bias=st.booleans(),
    skip_twice=st.booleans(),
    narrow=st.sampled_from([3, 4, 5]),
    kept=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_such_block(
    scale: float,
    how: tuple[str, str],
    seen_first: bool,
    bias: bool,
    skip_twice: bool,
    narrow: int,
    kept: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    model = block(scale, *how, seen_first, bias, skip_twice, narrow, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT_BYTES", 10**6 if kept else 0)
        eased = ease(model)
    onnx.checker.check_model(eased, full_check=True)
    convolutions = [
        list(tensor.dims)
        for node in eased.graph.node
        for tensor in eased.graph.initializer
        if node.op_type == "Conv" and tensor.name == node.input[1]
    ]
    if kept:
        assert sorted(convolutions)[-2:] == [[6, 3, 1, 1], [6, 4, 1, 1]]
    elif narrow == 3:
        assert [6, 6, 1, 1] in convolutions  # three channels are heard, three come from before the skip
    else:
        assert [6, 7, 1, 1] in convolutions
    inputs = {
        "face": rng.normal(size=(2, 2, int(5 * scale), int(5 * scale))).astype(np.float32),
        "sound": rng.normal(size=(2, 3, 5, 5)).astype(np.float32),
    }
    found, expected = (
        np.concatenate(cast(list[np.ndarray], ReferenceEvaluator(network).run(None, inputs)))
        for network in (eased, model)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


# --- what is left alone ----------------------------------------------------------------------------------------------


def first_node(kind: str, inputs: dict[str, np.ndarray | None], **attributes: Any) -> ir.Node:
    """A node of a value `x` and constants."""
    given = [numpy_helper.from_array(value, name) for name, value in inputs.items() if value is not None]
    names = [name if value is not None else "" for name, value in inputs.items()]
    node = helper.make_node(kind, ["x", *names], ["y"], **attributes)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4, 8, 8]) for name in "xy")
    graph = helper.make_graph([node], "one", [x], [y], given)
    return next(iter(ir.from_proto(helper.make_model(graph)).graph))


@pytest.mark.parametrize(
    ("attributes", "taken"),
    [
        ({}, True),
        ({"strides": [1, 1], "pads": [0, 0, 0, 0], "group": 1, "auto_pad": "NOTSET"}, True),
        ({"strides": [2, 2]}, False),
        ({"strides": [1, 2]}, False),
        ({"pads": [0, 0, 1, 0]}, False),
        ({"group": 2}, False),
        ({"auto_pad": "SAME_UPPER"}, False),
    ],
)
def test_convolutions_that_are_more_than_a_matrix_are_left_alone(attributes: dict[str, Any], taken: bool) -> None:
    weights = np.ones((6, 4 // cast(int, attributes.get("group", 1)), 1, 1), np.float32)
    assert is_pointwise(first_node("Conv", {"w": weights}, **attributes)) == taken
    if taken:
        assert not is_pointwise(first_node("Conv", {"w": np.ones((6, 4, 3, 3), np.float32)}, **attributes))
        assert not is_pointwise(first_node("Conv", {"w": weights.astype(np.float64)}, **attributes))


@pytest.mark.parametrize(
    ("scales", "attributes", "taken"),
    [
        ([1, 1, 2, 2], {}, True),
        ([1, 2, 2, 2], {}, False),
        ([2, 1, 2, 2], {}, False),
        ([2, 2], {"axes": [2, 3]}, False),
        ([1, 1, 2, 2], {"coordinate_transformation_mode": "tf_crop_and_resize"}, False),
    ],
)
def test_resizes_of_more_than_height_and_width_are_left_alone(
    scales: list[float], attributes: dict[str, Any], taken: bool
) -> None:
    node = first_node("Resize", {"roi": None, "scales": np.array(scales, np.float32)}, **attributes)
    assert is_channelwise(node) == taken


def test_constants_and_dead_ends_of_older_exporters_are_no_hindrance(tiny_onnx: Path) -> None:
    model, _ = read_network(tiny_onnx)
    expected = sum(".eased" in node.output[0] for node in ease(model).graph.node)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for place, node in reversed([*enumerate(model.graph.node)]):
        if node.op_type == "Resize":
            size = helper.make_node("Shape", node.output[:], [f"{node.output[0]}.size"])
            scales = helper.make_node("Constant", [], [f"{node.output[0]}.scales"], value=values[node.input[2]])
            node.input[2] = scales.output[0]
            model.graph.node.insert(place + 1, size)
            model.graph.node.insert(place, scales)
    assert sum(".eased" in node.output[0] for node in ease(model).graph.node) == expected > 10


def test_batch_normalisations_become_part_of_convolutions_and_their_weights_are_let_go(tiny_onnx: Path) -> None:
    def held() -> int:
        gc.collect()
        return sum(type(thing) in (ir.Tensor, ir.serde.TensorProtoTensor) for thing in gc.get_objects())

    model, _ = read_network(tiny_onnx)
    place, last = max((place, node) for place, node in enumerate(model.graph.node) if node.op_type == "Conv")
    (picture,) = last.output
    last.output[0] = "raw"
    values = {"scale": [0.5, 1, 2], "shift": [-0.1, 0, 0.1], "mean": [0, 0.1, 0.2], "variance": [1, 2, 3]}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    norm = helper.make_node("BatchNormalization", ["raw", *values], [picture])
    model.graph.node.insert(place + 1, norm)
    before = held()
    eased = ease(model)
    assert held() <= before
    assert not any(node.op_type == "BatchNormalization" for node in eased.graph.node)
    np.testing.assert_allclose(pictures(eased), pictures(model), atol=1e-5)
