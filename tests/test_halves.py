from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import network_of
from onnx import ModelProto, TensorProto, helper

import gpurender.halves as module
from gpurender import InputError
from gpurender.export import example_input
from gpurender.half import to_half
from gpurender.halves import Halves, read_halves


def run(model: ModelProto | Path, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model if isinstance(model, Path) else model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    ports = session.get_inputs()
    feed = {port.name: given.astype(types[port.type]) for port, given in zip(ports, inputs, strict=True)}
    return [np.asarray(output) for output in session.run(None, feed)]


def run_halves(halves: Halves, faces: np.ndarray, audio: np.ndarray) -> np.ndarray:
    levels = run(halves.encoder, faces) if halves.encoder else []
    return run(halves.decoder, *([faces] if halves.again else []), *levels, audio)[0]


def example(batch: int) -> tuple[np.ndarray, np.ndarray]:
    faces, audio = example_input(batch, "ave")
    return faces.numpy(), audio.numpy()


@pytest.mark.parametrize("kept_bytes", [0, 500_000, 4 * 2**20, 10**9])
def test_halves_draw_the_same_bits_wherever_the_cut_is(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    halves = read_halves(tiny_onnx)
    assert (halves.encoder is None) == (kept_bytes == 0)
    assert (halves.mode, halves.batch, halves.float16) == ("ave", None, False)
    if kept_bytes:
        assert halves.again == (kept_bytes < TINY["encoder"][0] * 320 * 320 * 4)  # its full-resolution skip
    inputs = example(2)
    # Optimised on its own, a half's convolutions may be computed in another memory layout than the whole's.
    np.testing.assert_allclose(run_halves(halves, *inputs), run(tiny_onnx, *inputs)[0], atol=1e-6)
    for half in (halves.encoder, halves.decoder):
        if half:
            onnx.checker.check_model(half, full_check=True)


def test_what_crosses_the_cut_of_the_full_width(seeded_onnx: Path) -> None:
    """The skips and the bottleneck: 3.2 MB a frame in half precision; the full-resolution skip is computed again."""
    halves = read_halves(seeded_onnx)
    assert halves.encoder is not None
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in halves.encoder.graph.output]
    assert shapes == [[512, 10, 10], [256, 20, 20], [128, 40, 40], [64, 80, 80], [32, 160, 160]]
    assert halves.again
    names = [value.name for value in halves.decoder.graph.input]
    assert names == ["input", *(value.name for value in halves.encoder.graph.output), "audio"]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.tuples(st.text("abc/.:1", min_size=1), st.text("xyz/.:2", min_size=1)).filter(
        lambda two: two[0] != two[1]
    ),
    swapped=st.booleans(),
    batch=st.sampled_from(["n", 1, 2, None]),
    half=st.booleans(),
)
def test_any_names_order_batch_and_type(
    tmp_path: Path, tiny_onnx: Path, names: tuple[str, str], swapped: bool, batch: str | int | None, half: bool
) -> None:
    model = to_half(onnx.load(tiny_onnx)) if half else onnx.load(tiny_onnx)
    renamed: dict[str, str] = dict(zip(("input", "audio"), names, strict=True))
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed.get(value.name, value.name)
        dim = value.type.tensor_type.shape.dim[0]
        dim.Clear()
        if isinstance(batch, str):
            dim.dim_param = batch
        elif batch is not None:
            dim.dim_value = batch
    del model.graph.value_info[:]
    if swapped:
        first, second = (type(value).FromString(value.SerializeToString()) for value in model.graph.input)
        model.graph.input[0].CopyFrom(second)
        model.graph.input[1].CopyFrom(first)
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert halves.encoder is not None
    assert halves.float16 == half
    assert halves.batch == (batch if isinstance(batch, int) else None)
    inputs = example(batch if isinstance(batch, int) else 2)
    expected = run(tiny_onnx, *inputs)[0]
    assert np.abs(run_halves(halves, *inputs).astype(np.float32) - expected).max() < (0.02 if half else 1e-6)


def test_branches_keep_a_network_whole(tmp_path: Path, tiny_onnx: Path) -> None:
    """A branch reads tensors that are not among its node's inputs: where to cut cannot be told from those."""
    model = onnx.load(tiny_onnx)
    picture = model.graph.node[-1].output[0]
    model.graph.node[-1].output[0] = "drawn"
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    shape = model.graph.output[0].type
    then, other = (
        helper.make_graph(
            [helper.make_node("Identity", ["drawn"], [name])], name, [], [helper.make_value_info(name, shape)]
        )
        for name in ("then", "other")
    )
    model.graph.initializer.append(flag)
    model.graph.node.append(helper.make_node("If", ["flag"], [picture], then_branch=then, else_branch=other))
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert halves.encoder is None
    assert halves.again


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"hello"), ("zeros", bytes(100))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not an ONNX network that can be read"):
            read_halves(tmp_path / name)


@pytest.mark.parametrize("float16", [False, True])
def test_damaged_weights_are_told(tmp_path: Path, tiny_onnx: Path, float16: bool) -> None:
    model = onnx.load(tiny_onnx)
    if float16:
        model = to_half(model)
    of_type = TensorProto.FLOAT16 if float16 else TensorProto.FLOAT
    damaged = next(t for t in model.graph.initializer if t.data_type == of_type and len(t.dims) == 4)
    values = np.array(onnx.numpy_helper.to_array(damaged))
    values.flat[7] = np.nan
    damaged.CopyFrom(onnx.numpy_helper.from_array(values, damaged.name))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="holds NaN: its weights are damaged"):
        read_halves(tmp_path / "a.onnx")


def test_networks_that_cannot_be_run_are_told(tmp_path: Path, tiny_onnx: Path) -> None:
    short = onnx.load(tiny_onnx)
    cut_off = next(tensor for tensor in short.graph.initializer if len(tensor.dims) == 4)
    cut_off.raw_data = cut_off.raw_data[:-4]
    circle = onnx.load(tiny_onnx)
    circle.graph.node[3].input[0] = circle.graph.node[9].output[0]
    misspelt = onnx.load_from_string(tiny_onnx.read_bytes().replace(b"Relu", b"\xc3elu"))  # no UTF-8
    for model, words in (
        (misspelt, "a name in it is damaged"),
        (short, f"{cut_off.name} has not the weights that its"),
        (circle, "run in a circle"),
    ):
        onnx.save(model, tmp_path / "a.onnx")
        with pytest.raises(InputError, match=words):
            read_halves(tmp_path / "a.onnx")
    onnx.save(onnx.load(tiny_onnx), tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
    (tmp_path / "a.data").unlink()
    with pytest.raises(InputError, match=r"not an ONNX network that can be read \(.*a\.data"):
        read_halves(tmp_path / "a.onnx")


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_that_one_input_alone_fixes(tmp_path: Path, tiny_onnx: Path, which: int) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.input[which].type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "a.onnx")
    assert read_halves(tmp_path / "a.onnx").batch == 3


def test_weights_that_are_listed_as_inputs(tmp_path: Path, tiny_onnx: Path) -> None:
    """As old exporters list them."""
    model = onnx.load(tiny_onnx)
    weights = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in model.graph.initializer]
    model.graph.input.extend(weights)
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert (halves.encoder is not None, halves.mode) == (True, "ave")
    inputs = example(2)
    np.testing.assert_allclose(run_halves(halves, *inputs), run(tiny_onnx, *inputs)[0], atol=1e-6)


def test_functions_are_looked_into(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    opset = model.opset_import[0]
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("mine", "Rectified", ["x"], ["y"], body, [opset]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    rectifiers = [node for node in model.graph.node if node.op_type == "Relu"]
    for node in rectifiers:
        node.op_type, node.domain = "Rectified", "mine"
    assert rectifiers
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "a.onnx")
    halves, plain = read_halves(tmp_path / "a.onnx"), read_halves(tiny_onnx)
    assert halves.encoder is not None
    assert plain.encoder is not None
    assert len(halves.encoder.graph.output) == len(plain.encoder.graph.output)
    assert not halves.encoder.functions
    assert not halves.decoder.functions
    inputs = example(2)
    np.testing.assert_allclose(run_halves(halves, *inputs), run(tiny_onnx, *inputs)[0], atol=1e-6)


def test_what_has_not_the_batch_in_front_is_not_kept(tmp_path: Path, tiny_onnx: Path) -> None:
    """Engines take the first dimension of what crosses the cut for the batch's."""
    model = onnx.load(tiny_onnx)
    plain = read_halves(tiny_onnx)
    assert plain.encoder is not None
    skips = {value.name for value in plain.encoder.graph.output}
    i, join = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Concat" and skips & {*n.input})
    turned = [f"{name}_turned" for name in join.input]
    nodes = [
        *(helper.make_node("Transpose", [a], [b], perm=[1, 0, 2, 3]) for a, b in zip(join.input, turned, strict=True)),
        helper.make_node("Concat", turned, ["joined"], axis=0),
        helper.make_node("Transpose", ["joined"], join.output, perm=[1, 0, 2, 3]),
    ]
    others = [*model.graph.node[:i], *nodes, *model.graph.node[i + 1 :]]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(others)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert halves.encoder is not None
    assert {value.name for value in halves.encoder.graph.output} == skips - {*join.input}
    inputs = example(2)
    np.testing.assert_allclose(run_halves(halves, *inputs), run(tiny_onnx, *inputs)[0], atol=1e-6)


@pytest.mark.parametrize("batch", ["n", 2])
@pytest.mark.parametrize("how", ["resized", "reshaped"])
def test_a_cut_behind_what_computes_with_the_batch(tmp_path: Path, how: str, batch: int | str) -> None:
    """ONNX's shape inference loses a symbol there. An output that is left out has no name, as have other nodes' inputs
    that are: nothing leads from one to the other."""
    small = {
        "resized": [helper.make_node("Resize", ["face", "", "quarter"], ["small"], mode="linear")],
        "reshaped": [
            helper.make_node("Shape", ["face"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "zero"], ["count"]),
            helper.make_node("Concat", ["count", "rest"], ["wanted"], axis=0),
            helper.make_node("AveragePool", ["face"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Reshape", ["pooled", "wanted"], ["small"]),
        ],
    }
    random = np.random.default_rng(0)
    model = network_of(
        helper.make_node("MaxPool", ["audio"], ["pooled_audio", ""], kernel_shape=[1, 1]),
        *small[how],
        helper.make_node("Conv", ["small", "seen"], ["squeezed"], kernel_shape=[1, 1]),
        helper.make_node("Conv", ["pooled_audio", "heard"], ["told"], kernel_shape=[1, 1]),
        helper.make_node("Resize", ["told", "", "five"], ["spread"], mode="nearest"),
        helper.make_node("Add", ["squeezed", "spread"], ["sum"]),
        helper.make_node("Resize", ["sum", "", "four"], ["picture"], mode="nearest"),
        batch=batch,
        quarter=np.array([1, 1, 0.25, 0.25], np.float32),
        four=np.array([1, 1, 4, 4], np.float32),
        five=np.array([1, 1, 5, 5], np.float32),
        zero=np.array([0], np.int64),
        rest=np.array([6, 80, 80], np.int64),
        seen=random.normal(size=(3, 6, 1, 1)).astype(np.float32),
        heard=random.normal(size=(3, 32, 1, 1)).astype(np.float32),
    )
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert halves.encoder is not None
    assert [value.name for value in halves.encoder.graph.output] == ["squeezed"]
    assert not halves.again
    for half in (halves.encoder, halves.decoder):
        onnx.checker.check_model(half, full_check=True)
    inputs = example(2)
    np.testing.assert_array_equal(run_halves(halves, *inputs), run(tmp_path / "a.onnx", *inputs)[0])


def test_a_picture_in_a_row_is_not_taken_for_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX would write out each number of it: 20 GB for some thousand pictures."""
    monkeypatch.setattr(module, "STAND_INS", (300_000, 500_000))
    model = network_of(
        helper.make_node("Resize", ["face", "", "quarter"], ["small"], mode="linear"),
        helper.make_node("Reshape", ["small", "row"], ["flat"]),
        helper.make_node("Add", ["flat", "half"], ["more"]),
        helper.make_node("Reshape", ["more", "pictures"], ["seen"]),
        helper.make_node("Conv", ["audio", "heard"], ["told"], kernel_shape=[1, 1]),
        helper.make_node("Resize", ["told", "", "five"], ["spread"], mode="nearest"),
        helper.make_node("Add", ["seen", "spread"], ["sum"]),
        helper.make_node("Resize", ["sum", "", "four"], ["large"], mode="nearest"),
        helper.make_node("Conv", ["large", "drawn"], ["picture"], kernel_shape=[1, 1]),
        batch="n",
        quarter=np.array([1, 1, 0.25, 0.25], np.float32),
        four=np.array([1, 1, 4, 4], np.float32),
        five=np.array([1, 1, 5, 5], np.float32),
        row=np.array([-1], np.int64),
        half=np.array(0.5, np.float32),
        pictures=np.array([-1, 6, 80, 80], np.int64),
        heard=np.ones((6, 32, 1, 1), np.float32) / 32,
        drawn=np.ones((3, 6, 1, 1), np.float32) / 6,
    )
    onnx.save(model, tmp_path / "a.onnx")
    halves = read_halves(tmp_path / "a.onnx")
    assert halves.encoder is not None
    assert [value.name for value in halves.encoder.graph.output] == ["seen"]


@pytest.mark.parametrize("unused", ["face", "audio"])
def test_networks_that_make_nothing_of_an_input_are_refused(tmp_path: Path, unused: str) -> None:
    used, factor = ("face", 1) if unused == "audio" else ("audio", 20)
    model = network_of(
        helper.make_node("Conv", [used, "weights"], ["drawn"], kernel_shape=[1, 1]),
        helper.make_node("Resize", ["drawn", "", "factor"], ["picture"], mode="nearest"),
        batch="n",
        factor=np.array([1, 1, factor, factor], np.float32),
        weights=np.ones((3, 6 if used == "face" else 32, 1, 1), np.float32),
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match=f"makes nothing of its input {unused}"):
        read_halves(tmp_path / "a.onnx")


def test_networks_of_integers_are_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.node.insert(0, helper.make_node("Cast", ["pixels"], ["input"], to=TensorProto.FLOAT))
    model.graph.input[0].name = "pixels"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="a lip-sync network takes batches of"):
        read_halves(tmp_path / "a.onnx")
