"""The kernels of the large `up` blocks, against float64, and in the network's second half."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpurender.jit as jit
import gpurender.openvino_engine as openvino_engine
from gpurender import UNet, predict
from gpurender.export import cached_onnx, example_input, export_onnx
from gpurender.jit import Processor, compiled, this_processor
from gpurender.kernels.up import scratch_places, skip_scratch_places, write_up
from gpurender.kernels.up_weights import (
    Levels,
    UpLevels,
    UpShape,
    UpWeights,
    fits,
    fits_tiles,
    nearest_bfloat16,
    packed,
    skip_stride,
    window_bytes,
)
from gpurender.kernels.vectors import rounded_up
from gpurender.openvino_engine import OpenVinoEngine
from gpurender.openvino_network import make_ready
from gpurender.private_openvino import openvino, opset
from gpurender.ranges import Ranges, measured_ranges
from gpurender.up_blocks import find_up_blocks
from gpurender.up_decoder import UpDecoder, skip_function, up_function

CANARY = 12345.0


def network_of(shape: UpShape) -> UpWeights:
    random = np.random.default_rng(1)

    def weights(*size: int) -> np.ndarray:
        return random.standard_normal(size, np.float32) / np.float32(np.sqrt(np.prod(size[1:]) if size[1:] else 4))

    def residual(into: int, inner: int) -> list[np.ndarray]:
        sizes = ((inner, into), (inner,), (inner, 3, 3), (inner,), (shape.out, inner), (shape.out,))
        return [weights(*size) for size in sizes]

    face, skip = shape.face, shape.skip
    return UpWeights(
        *residual(shape.below + skip, shape.inner),
        *residual(shape.out, shape.inner2),
        stem=(weights(skip, face), weights(skip), weights(skip, 3, 3), weights(skip)) if face else None,
        last=(weights(3, shape.out), weights(3)) if shape.picture else None,
    )


def expected_of(
    shape: UpShape, network: UpWeights, y: Tensor, seen: Tensor, kind: torch.dtype, levels: UpLevels | None = None
) -> Tensor:
    """By torch: (C,H,W) of y (h,w,C) and of the skip (H,W,C) or the face (C,H,W); with levels, as torch has 8 bits."""

    def convolved(x: Tensor, weights: np.ndarray, bias: np.ndarray, of: Levels | None = None) -> Tensor:
        w, b = (torch.tensor(array).to(kind) for array in (weights, bias))
        if w.ndim == 3:
            w = w[:, None]
        if of is not None:
            steps = w.abs().flatten(1).amax(1).float() / 127
            x = torch.fake_quantize_per_tensor_affine(x.float(), of.step, of.zero, 0, 255).to(kind)
            none = torch.zeros(len(w), dtype=torch.int32)
            w = torch.fake_quantize_per_channel_affine(w.float(), steps, none, 0, -127, 127).to(kind)
        if w.ndim == 4:
            return F.conv2d(x, w, b, padding=1, groups=len(w))
        return F.conv2d(x, w[:, :, None, None], b)

    seen = (seen if shape.face else seen.permute(2, 0, 1))[None].to(kind)
    if network.stem:
        seen = convolved(convolved(seen, *network.stem[:2]).relu(), *network.stem[2:]).relu()
    of_y, of_skip, of_inner, of_filtered, of_x, of_inner2, of_filtered2 = levels or [None] * 7
    if window_bytes(shape, shape.inner) != 1:
        of_inner = None
    if window_bytes(shape, shape.inner2) != 1:
        of_inner2 = None
    y = y.permute(2, 0, 1)[None].to(kind)
    doubled = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)  # noqa: E731
    of_y_alone, of_skip_alone = network.expand[:, : shape.below], network.expand[:, shape.below :]
    if shape.tiles:  # y is resized before it is multiplied, and both shares are one product
        parts, weights = [doubled(y), seen], torch.tensor(network.expand).to(kind)
        if of_y is not None and of_skip is not None:
            parts = [
                torch.fake_quantize_per_tensor_affine(x.float(), of.step, of.zero, 0, 255).to(kind)
                for x, of in zip(parts, (of_y, of_skip), strict=True)
            ]
            each = torch.tensor([of_y.step] * shape.below + [of_skip.step] * shape.skip)
            scaled = weights.float() * each
            steps, none = scaled.abs().amax(1) / 127, torch.zeros(len(weights), dtype=torch.int32)
            scaled = torch.fake_quantize_per_channel_affine(scaled, steps, none, 0, -127, 127)
            weights = (scaled / each).to(kind)
        inner = F.conv2d(torch.cat(parts, 1), weights[:, :, None, None], torch.tensor(network.expand_bias).to(kind))
    else:
        none = np.zeros(shape.inner, np.float32)
        larger = doubled(convolved(y, of_y_alone, none, of_y))
        inner = larger + convolved(seen, of_skip_alone, network.expand_bias, of_skip)
    filtered = convolved(inner.relu(), network.depthwise, network.depthwise_bias, of_inner).relu()
    x = convolved(filtered, network.project, network.project_bias, of_filtered)
    inner2 = convolved(x, network.expand2, network.expand2_bias, of_x).relu()
    filtered2 = convolved(inner2, network.depthwise2, network.depthwise2_bias, of_inner2).relu()
    if network.last is None:
        return (x + convolved(filtered2, network.project2, network.project2_bias, of_filtered2))[0]
    last, last_bias = network.last
    both = convolved(filtered2, last @ network.project2, last @ network.project2_bias + last_bias, of_filtered2)
    return (both + convolved(x, last, np.zeros(3, np.float32))).sigmoid()[0]


def drawn_by_kernel(
    shape: UpShape,
    network: UpWeights,
    y: Tensor,
    seen: Tensor,
    finite: bool = True,
    levels: UpLevels | None = None,
) -> Tensor:
    """The same by the kernel; what it must not write to is looked at, and if `finite`, that all is written."""
    function = up_function(shape)
    y = y.to(torch.bfloat16 if shape.per_word == 2 else torch.float32).contiguous()
    seen = seen.to(torch.bfloat16 if shape.seen_bfloat16 else torch.float32).contiguous()
    channels = rounded_up(shape.out, shape.lanes)
    size = (3, shape.height, shape.width) if shape.picture else (shape.height, shape.width, channels)
    kind = torch.bfloat16 if shape.out_bfloat16 else torch.float32
    weights = torch.from_numpy(packed(network, shape, levels)).clone()
    if shape.per_word == 4:
        seen = skip_in_bytes(shape, seen, weights)
    _, words = scratch_places(shape)
    scratch = torch.zeros(words + 64)
    scratch[words:] = CANARY
    results = []
    for _ in range(2):  # what the first call leaves in the scratch memory is none of the second one's business
        out = torch.full((int(np.prod(size)) + 64,), torch.nan, dtype=kind)
        function(*(tensor.data_ptr() for tensor in (y, seen, weights, scratch, out)))
        assert out[-64:].isnan().all()
        assert (scratch[words:] == CANARY).all()
        results.append(out[:-64].view(size))
    first, second = results
    assert not finite or not first.isnan().any(), "not all was written"
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return first if shape.picture else first.permute(2, 0, 1)[: shape.out]


def skip_in_bytes(shape: UpShape, seen: Tensor, weights: Tensor) -> Tensor:
    size = shape.height, shape.width, skip_stride(shape)
    _, words = skip_scratch_places(shape)
    scratch = torch.zeros(words + 64)
    scratch[words:] = CANARY
    skip = torch.full((int(np.prod(size)) + 64,), 77, dtype=torch.uint8)
    for _ in range(2):
        skip_function(shape)(*(tensor.data_ptr() for tensor in (seen, weights, scratch, skip)))
    assert (skip[-64:] == 77).all()
    assert (scratch[words:] == CANARY).all()
    return skip[:-64].view(size)


def check(shape: UpShape) -> None:
    """The kernel's error is of the size of torch's own in the same precision."""
    network = network_of(shape)
    torch.manual_seed(2)
    y = torch.randn(shape.height // 2, shape.width // 2, shape.below)
    face, skip = (shape.face, shape.height, shape.width), (shape.height, shape.width, shape.skip)
    seen = torch.rand(face) if shape.face else torch.randn(skip)
    if shape.per_word == 2:
        y = y.bfloat16()
    if shape.seen_bfloat16:
        seen = seen.bfloat16()
    stride = shape.below_stride * (2 if shape.per_word == 2 else 1)
    beyond = lambda y: F.pad(y, (0, stride - shape.below))  # noqa: E731
    exact = expected_of(shape, network, y, seen, torch.float64)
    least = torch.finfo(torch.bfloat16 if shape.out_bfloat16 else torch.float32).eps * exact.abs().max()
    if shape.per_word == 4:
        levels = levels_of(shape)
        found = drawn_by_kernel(shape, network, beyond(y), seen, levels=levels).double()
        of_torch = expected_of(shape, network, y, seen, torch.float64, levels)
        # float32 may fall on the other side where a level ends, here and there; float16 is itself rounded
        part = 0.1 if any(window_bytes(shape, size) == 2 for size in (shape.inner, shape.inner2)) else 0.05
        assert (found - of_torch).abs().mean() <= part * (of_torch - exact).abs().mean() + least
        assert (found - exact).abs().max() <= 1.5 * (of_torch - exact).abs().max() + least
        return
    found = drawn_by_kernel(shape, network, beyond(y), seen).double()
    kind = torch.bfloat16 if shape.per_word == 2 else torch.float32
    of_torch = (expected_of(shape, network, y, seen, kind) - exact).abs()
    error = (found - exact).abs()
    assert error.max() <= 3 * of_torch.max() + 4 * least
    assert error.mean() <= 2 * of_torch.mean() + least


def levels_of(shape: UpShape) -> UpLevels:
    """For what is multiplied; some of it is beyond."""
    of_skip = (0.0, 1.5) if shape.face else (-3.5, 3.0)
    ranges = ((-3.0, 3.5), of_skip, (0.0, 4.0), (0.0, 3.0), (-2.0, 2.5), (0.0, 2.5), (0.0, 2.0))
    return UpLevels(*[Levels.between(low, high) for low, high in ranges])


def shape_of(processor: Processor, **given: Any) -> UpShape:
    per_word = given.get("per_word", 1)
    half = per_word == 2
    stride = rounded_up(given["below"], processor.lanes) if given.pop("whole", False) else given["below"]
    usual: dict[str, Any] = {
        "per_word": 1,
        "below_stride": stride // (2 if half else 1),
        "seen_bfloat16": half,
        "out_bfloat16": half,
        "lanes": processor.lanes,
        "tiles": False,
    }
    shape = UpShape(**{**usual, **given})
    shape = shape._replace(out_bfloat16=shape.out_bfloat16 and not shape.picture)
    return shape._replace(tiles=processor.tiles and fits_tiles(shape))


LAST = {"below": 32, "face": 6, "skip": 12, "inner": 128, "out": 16, "inner2": 32, "picture": True}
FIRST = {"below": 64, "face": 0, "skip": 64, "inner": 256, "out": 32, "inner2": 64, "picture": False}
AVATARS = {"below": 8, "face": 6, "skip": 8, "inner": 48, "out": 8, "inner2": 16, "picture": True, "whole": True}
ODD = {"below": 16, "face": 0, "skip": 36, "inner": 48, "out": 96, "inner2": 80, "picture": False}  # 9 words of bytes
NARROW = {"below": 10, "face": 0, "skip": 6, "inner": 20, "out": 6, "inner2": 18, "picture": True}


@pytest.mark.parametrize("channels", [LAST, FIRST, AVATARS, ODD, NARROW])
@pytest.mark.parametrize(("height", "width"), [(8, 48), (14, 22), (6, 80), (4, 4)])
def test_a_block_is_computed(processor: Processor, height: int, width: int, channels: dict[str, Any]) -> None:
    width = rounded_up(width, processor.lanes) if channels["picture"] else width
    for per_word in per_words(processor):
        shape = shape_of(processor, height=height, width=width, per_word=per_word, **channels)
        wide = channels is not NARROW and per_word > 1 and width >= 16
        assert shape.tiles == (processor.tiles and wide)
        if fits(shape):
            check(shape)


def per_words(processor: Processor) -> list[int]:
    return [1, *[2] * processor.bfloat16, *[4] * processor.bytes]


@settings(max_examples=12)
@given(data=st.data())
def test_blocks_of_any_width(data: st.DataObject) -> None:
    processor = this_processor()
    if not processor.lanes:
        pytest.skip("this processor has neither AVX2 nor AVX-512: NO KERNEL RUNS HERE")
    per_word = data.draw(st.sampled_from(per_words(processor)), "numbers in a word")
    half, step = per_word == 2, per_word
    channels = lambda most: st.integers(1, most // step).map(lambda n: n * step)  # noqa: E731
    face = data.draw(st.sampled_from([0, 1, 6]), "face")
    picture = data.draw(st.booleans(), "picture")
    times = 16 if picture else 2 * per_word
    shape = shape_of(
        processor,
        height=2 * data.draw(st.integers(2, 6), "half the height"),
        width=times * data.draw(st.integers(1 if times > 2 else 2, 52 // times + 1), "width"),
        below=data.draw(channels(40), "below"),
        whole=data.draw(st.booleans(), "y in whole vectors"),
        face=face,
        skip=data.draw(channels(40), "skip"),
        inner=data.draw(st.integers(1, 70), "inner"),
        out=data.draw(channels(40), "out"),
        inner2=data.draw(st.integers(1, 70), "inner2"),
        picture=picture,
        per_word=per_word,
        seen_bfloat16=(half and not face)
        or (per_word > 1 and data.draw(st.booleans(), "the face or skip in bfloat16")),
        out_bfloat16=data.draw(st.booleans(), "output in bfloat16") and processor.bfloat16,
    )
    assert fits(shape)
    check(shape)


def test_sigmoid_where_it_saturates(processor: Processor) -> None:
    shape = shape_of(processor, height=4, width=16, **NARROW)
    zeros = [np.zeros_like(array) for array in network_of(shape)[:12]]
    for bias in (-1e30, -1000.0, -87.5, -20.0, 0.0, 20.0, 87.5, 1000.0, 1e30):
        network = UpWeights(*zeros, stem=None, last=(np.zeros((3, 6), np.float32), np.full(3, bias, np.float32)))
        found = drawn_by_kernel(shape, network, torch.zeros(2, 8, 10), torch.zeros(4, 16, 6))
        torch.testing.assert_close(found, torch.full((3, 4, 16), bias).sigmoid(), rtol=3e-7, atol=1e-34)


def test_what_is_not_a_number_shows(processor: Processor) -> None:
    """In the picture around it, and nowhere else. Where windows are float16, infinity becomes its largest number."""
    for per_word in [1, *[2] * processor.bfloat16]:
        shape = shape_of(processor, height=16, width=16, per_word=per_word, **LAST)
        for broken in [torch.nan, *[torch.inf] * (not shape.tiles)]:
            y, face = torch.zeros(8, 8, 32), torch.zeros(6, 16, 16)
            y[0, 0, 3] = broken
            found = drawn_by_kernel(shape, network_of(shape), y, face, finite=False)
            assert found[:, 0, 0].isnan().all()
            assert found[:, 8:, 8:].isfinite().all()


def test_what_float16_cannot_hold_is_its_largest_number() -> None:
    processor = this_processor()
    if not processor.tiles:
        pytest.skip("this processor does not multiply matrices (AMX): NO TILE IS MULTIPLIED HERE")
    shape = shape_of(processor, height=8, width=32, per_word=2, **FIRST)
    y, skip = torch.randn(4, 16, 64), torch.zeros(8, 32, 64)
    y[1, 4] *= 1e6
    assert drawn_by_kernel(shape, network_of(shape), y, skip).isfinite().all()


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    values[:4] = 0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)  # ties, too
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(nearest_bfloat16(values), expected)


# --- compiled code ---------------------------------------------------------------------------------------------------


def test_code_is_kept_and_made_anew_where_it_is_damaged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not this_processor().lanes:
        pytest.skip("this processor has neither AVX2 nor AVX-512: NO KERNEL IS COMPILED HERE")
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    shape = shape_of(this_processor(), height=4, width=16, **NARROW)
    made: list[str] = []

    def write(module: Any) -> None:
        made.append("")
        write_up(module, "up_kept", shape)

    compiled("up_kept", write, pointers=5)
    compiled("up_kept", write, pointers=5)
    assert len(made) == 1
    (file,) = (tmp_path / "cache" / "built").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        compiled("up_kept", write, pointers=5)
        assert file.read_bytes() == whole
    assert len(made) == 4
    monkeypatch.setattr(jit, "hash_of_sources", lambda: "others")
    compiled("up_kept", write, pointers=5)
    assert len(made) == 5


# --- in the network --------------------------------------------------------------------------------------------------


def engines(
    network: Any, precision: str, monkeypatch: pytest.MonkeyPatch, ranges: Ranges | None = None
) -> tuple[OpenVinoEngine, OpenVinoEngine]:
    """With kernels and without."""
    fast = OpenVinoEngine(network, precision, ranges)
    with monkeypatch.context() as patch:
        patch.setattr(openvino_engine, "up_decoder", lambda *given: None)
        return fast, OpenVinoEngine(network, precision, ranges)


def test_the_second_half_draws_what_openvino_draws(
    processor: Processor, seeded_onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_ready(seeded_onnx, None)
    assert [block.height for block in find_up_blocks(network.decoder)] == [80, 160, 320]
    inputs = example_input(3, "ave")
    exact_engine = OpenVinoEngine(network, "fp32")
    exact = predict(exact_engine, *inputs)
    levels = exact_engine.encode(inputs[0])
    ranges = measured_ranges(network.decoder, [(*seen, heard) for seen, heard in zip(levels, inputs[1], strict=True)])
    for precision in ("fp32", *["bf16", "mixed"] * processor.bfloat16, *["int8"] * processor.bytes):
        fast, whole = engines(network, precision, monkeypatch, ranges if precision == "int8" else None)
        assert isinstance(fast._decoder, UpDecoder)
        tiled = [kernel._shape.tiles for kernel in fast._decoder._kernels]
        assert any(tiled) == (processor.tiles and precision != "fp32")
        assert not isinstance(whole._decoder, UpDecoder)
        ours, theirs = (predict(engine, *inputs) for engine in (fast, whole))
        if precision == "fp32":
            assert (ours - theirs).abs().max() < 1e-4
        else:  # as near to float32 as OpenVINO's own, on average
            assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()


@pytest.mark.parametrize("mode", ["ave", "hubert", "wenet"])
def test_narrow_networks_of_any_mode(tiny_of: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_ready(cached_onnx(tiny_of(mode), mode, print), mode)
    assert find_up_blocks(network.decoder)
    fast, whole = engines(network, "fp32", monkeypatch)
    inputs = example_input(2, mode)
    assert (predict(fast, *inputs) - predict(whole, *inputs)).abs().max() < 1e-4


def test_networks_that_end_otherwise_are_left_to_openvino() -> None:
    face, audio = opset.parameter([1, 6, 320, 320], np.float32), opset.parameter([1, 32, 16, 16], np.float32)
    loud = opset.reduce_mean(audio, np.array([1, 2, 3]), True)
    weights = np.random.default_rng(1).standard_normal((3, 6, 1, 1), np.float32)
    plain = opset.convolution(opset.add(face, loud), weights, [1, 1], [0, 0], [0, 0], [1, 1])
    biased = opset.add(plain, np.ones((1, 3, 1, 1), np.float32))
    for end in (plain, biased, opset.relu(biased), opset.sigmoid(plain), opset.sigmoid(biased)):
        model = openvino.Model([end], [face, audio])  # pyright: ignore  # its own annotations contradict each other
        assert find_up_blocks(model) == []


def test_a_network_without_the_usual_channels(tmp_path: Any) -> None:
    """Numbers of channels that are no multiples of anything."""
    checkpoint = tmp_path / "odd.pth"
    torch.manual_seed(3)
    unet = UNet(encoder=(5, 7, 9, 11, 13, 15), audio=(32, 9, 9, 9, 9), fuse=(9, 7), decoder=(11, 9, 7, 5, 3)).eval()
    torch.save(unet.state_dict(), checkpoint)
    export_onnx(checkpoint, tmp_path / "odd.onnx")
    network = make_ready(tmp_path / "odd.onnx", None)
    inputs = example_input(2, "ave")
    with torch.inference_mode():
        expected = unet(*inputs)
    for precision, most in (("fp32", 1e-4), ("bf16", 0.05)):
        if precision in ("fp32", *openvino_engine.faster_on_cpu()):
            assert (predict(OpenVinoEngine(network, precision), *inputs) - expected).abs().max() < most
