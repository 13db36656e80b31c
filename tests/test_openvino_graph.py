from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpurender.openvino_graph as module
from gpurender.openvino_graph import lower_large, tile, without_empty_windows
from gpurender.openvino_network import make_ready
from gpurender.private_openvino import openvino, opset

Pair = tuple[int, int]


def pairs(least: int, most: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=60)
@given(size=pairs(1, 6), kernel=pairs(1, 4), stride=pairs(1, 3), before=pairs(0, 6), data=st.data())
def test_windows_of_padding_alone_are_not_computed(
    size: Pair, kernel: Pair, stride: Pair, before: Pair, data: st.DataObject
) -> None:
    after = data.draw(st.tuples(*(st.integers(0, k - 1) for k in kernel)), "after")  # OpenVINO crashes at some wider
    assume(all(s + p + q >= k for s, p, q, k in zip(size, before, after, kernel, strict=True)))
    empty = [max(min((p - k) // t + 1, p // t), 0) for p, k, t in zip(before, kernel, stride, strict=True)]
    random = np.random.default_rng(1)
    picture = random.standard_normal((1, 2, *size), np.float32)
    weights = random.standard_normal((3, 2, *kernel), np.float32)
    padded = F.pad(torch.tensor(picture), (before[1], after[1], before[0], after[0]))
    expected = F.conv2d(padded, torch.tensor(weights), stride=stride)
    seen = [m - n for m, n in zip(expected.shape[2:], empty, strict=True)]
    assume(min(seen) > 0)  # some windows see the picture
    source = opset.parameter(picture.shape, np.float32)
    convolution = opset.convolution(source, weights, stride, before, after, [1, 1])
    model = openvino.Model([convolution], [source])  # pyright: ignore  # its own annotations contradict each other
    trimmed = without_empty_windows(model)
    assert [list(op.get_output_shape(0))[2:] for op in convolutions(trimmed)] == [seen]
    assert list(convolutions(model)[0].get_output_shape(0)) == list(expected.shape), "the model itself was changed"
    drawn = openvino.Core().compile_model(trimmed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([picture])[0]
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


@settings(max_examples=40)
@given(
    bands=st.integers(1, 4),
    size=st.tuples(st.integers(8, 19), st.integers(2, 6)),
    stride=st.sampled_from([1, 2]),
    joined=st.booleans(),
    twice=st.booleans(),
)
def test_bands_of_rows_draw_what_the_whole_block_draws(
    bands: int, size: Pair, stride: int, joined: bool, twice: bool
) -> None:
    random = np.random.default_rng(1)

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))

    def block(x: openvino.Output, step: int) -> openvino.Output:
        """An inverted residual of four channels, with its sum where the size stays."""
        y = opset.convolution(x, weights(6, 4, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])
        y = opset.relu(opset.add(y, weights(1, 6, 1, 1)))
        y = opset.group_convolution(y, weights(6, 1, 1, 3, 3), [step, step], [1, 1], [1, 1], [1, 1])
        y = opset.relu(opset.add(y, weights(1, 6, 1, 1)))
        y = opset.convolution(y, weights(4, 6, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])
        y = opset.add(y, weights(1, 4, 1, 1))
        return (opset.add(x, y) if step == 1 else y).output(0)

    sources = [opset.parameter([1, 2, *size], np.float32) for _ in range(2)]
    pictures = [random.standard_normal((1, 2, *size), np.float32) for _ in sources]
    x = opset.concat(sources, 1).output(0)
    if not joined:
        x = opset.abs(x).output(0)
    drawn = block(x, stride)
    if twice:
        drawn = block(drawn, 1)
    model = openvino.Model([drawn], sources)  # pyright: ignore  # its own annotations contradict each other

    def run(model: openvino.Model) -> np.ndarray:
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return compiled(pictures)[0].copy()

    expected = run(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILED_BYTES", 0)
        patch.setattr(module, "BANDS", bands)
        tiled = tile(model)
    blocks = 1 + twice
    assert len(convolutions(tiled)) == 3 * blocks * bands
    assert len(convolutions(model)) == 3 * blocks, "the model itself was changed"
    np.testing.assert_allclose(run(tiled), expected, atol=1e-5)


def test_what_is_bfloat16_in_mixed_precision(seeded_onnx: Path) -> None:
    decoder = tile(make_ready(seeded_onnx, None).decoder)
    types = [op.get_output_element_type(0).to_string() for op in decoder.get_ordered_ops()]
    mixed = lower_large(decoder)
    assert [op.get_output_element_type(0).to_string() for op in decoder.get_ordered_ops()] == types
    found = {
        (
            list(op.get_output_shape(0))[3] == 320,
            op.get_output_element_type(0).to_string(),
            list(op.get_output_shape(0))[1],
        )
        for op in convolutions(mixed)
    }
    assert {kind for full, kind, _ in found if not full} == {"f32"}
    assert {channels for full, kind, channels in found if full and kind == "f32"} == {3}  # the last one
    assert {channels for full, kind, channels in found if full and kind == "bf16"} == {12, 16, 32, 128}
    rounded = 0
    for exact, lowered in zip(convolutions(decoder), convolutions(mixed), strict=True):
        weights = torch.tensor(exact.input_value(1).get_node().get_data())
        constant = lowered.input_value(1).get_node()
        if constant.get_element_type().to_string() == "bf16":
            assert torch.equal(torch.tensor(constant.get_data(dtype=np.float32)), weights.bfloat16().float())
            rounded += 1
    assert rounded > 10


def convolutions(model: openvino.Model) -> list[openvino.Node]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() in ("Convolution", "GroupConvolution")]
