"""A network in half precision: that all of it is, and what that costs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run_whole
from onnx import ModelProto, TensorProto
from skimage.metrics import structural_similarity
from torch import Tensor

from gpurender import InputError, load_audio_encoder, load_engine, load_features, open_template, predict
from gpurender.engine import least_psnr
from gpurender.export import example_input
from gpurender.find import BUNDLED
from gpurender.half import cached_half, folded, to_half, widen_depthwise
from gpurender.halves import load_onnx, read_halves
from gpurender.render import probe_inputs


def test_half_precision_is_all_through(tiny_onnx: Path) -> None:
    half = to_half(folded(tiny_onnx, onnx.load(tiny_onnx)))
    onnx.checker.check_model(half, full_check=True)
    # The five upsamplings' scales stay float32: the operator takes nothing else.
    exact = [t.name for t in half.graph.initializer if t.data_type == TensorProto.FLOAT]
    scales = {node.input[2] for node in half.graph.node if node.op_type == "Resize"}
    assert set(exact) == scales
    assert not [node for node in half.graph.node if node.op_type in ("BatchNormalization", "Cast")]
    assert {p.key: p.value for p in half.metadata_props}["gpurender.precision"] == "fp16"


def test_only_depthwise_convolutions_are_widened(tiny_onnx: Path) -> None:
    half = to_half(folded(tiny_onnx, onnx.load(tiny_onnx)))
    before = half.SerializeToString()
    wide = widen_depthwise(half)
    assert half.SerializeToString() == before
    onnx.checker.check_model(wide, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in wide.graph.initializer}
    for node in wide.graph.node:
        if node.op_type == "Conv":
            grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
            assert {types[name] for name in node.input[1:]} == {TensorProto.FLOAT if grouped else TensorProto.FLOAT16}
    assert sum(node.op_type == "Cast" for node in wide.graph.node) == 60  # before and behind each of 30


def test_weights_beyond_half_precision_are_the_largest_half(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    bias = next(t for t in model.graph.initializer if len(t.dims) == 1 and t.data_type == TensorProto.FLOAT)
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, 1e9, np.float32), bias.name))
    half = to_half(model)
    (found,) = (onnx.numpy_helper.to_array(t) for t in half.graph.initializer if t.name == bias.name)
    assert np.isfinite(found).all()


def test_half_networks_are_cached_by_content(tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    first = cached_half(tiny_onnx, told.append)
    (tmp_path / "b.onnx").write_bytes(tiny_onnx.read_bytes())
    assert cached_half(tmp_path / "b.onnx", told.append) == first
    assert len(told) == 1
    assert read_halves(first).float16
    (tmp_path / "c.onnx").write_bytes(b"hello")
    with pytest.raises(InputError, match="not an ONNX network that can be read"):
        cached_half(tmp_path / "c.onnx")


def test_a_network_that_is_replaced_while_it_is_read_is_not_kept_as_the_one_before(
    tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(path: Path) -> ModelProto:
        path.write_bytes(path.read_bytes() + b"\0")
        return load_onnx(tiny_onnx)

    monkeypatch.setattr("gpurender.half.load_onnx", replacing)
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"latest\.onnx was replaced while it was read; try again"):
        cached_half(Path(shutil.copy(tiny_onnx, tmp_path / "latest.onnx")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_may_lie_beside_the_file(tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's exporter leaves them: what is made holds them, and is made anew where they change."""
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.onnx"
    onnx.save(onnx.load(tiny_onnx), path, save_as_external_data=True, location="a.onnx.data", size_threshold=1024)
    half = cached_half(path)
    faces, audio = example_input(1, "ave")
    assert least_psnr(run_whole(onnx.load(half), faces, audio), run_whole(onnx.load(path), faces, audio)) >= 30
    assert cached_half(path) == half
    weights = tmp_path / "a.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert cached_half(path) != half


@pytest.fixture(scope="module")
def avatar_probe() -> tuple[Tensor, Tensor]:
    encoder = load_audio_encoder(BUNDLED / "avatar/models/audio_encoder.pth")
    features = load_features(BUNDLED / "hello.flac", encoder=encoder, fps=25)
    return probe_inputs(open_template(BUNDLED / "avatar"), features)[:2]


@pytest.mark.parametrize("precision", ["fp16", "mixed"])
def test_half_precision_draws_the_avatar(avatar_probe: tuple[Tensor, Tensor], precision: str) -> None:
    path = BUNDLED / "avatar/models/generator.onnx"
    expected = run_whole(onnx.load(path), *avatar_probe)
    half = to_half(folded(path, onnx.load(path)))
    pictures = run_whole(widen_depthwise(half) if precision == "mixed" else half, *avatar_probe)
    assert least_psnr(pictures, expected) >= 50  # 61.9 measured
    for a, b in zip(pictures.numpy(), expected.numpy(), strict=True):
        similarity: Any = structural_similarity(a, b, channel_axis=0, data_range=1.0)
        assert similarity >= 0.99  # 0.99998 measured


def test_half_precision_with_every_layer_rounded_draws_the_avatar(avatar_probe: tuple[Tensor, Tensor]) -> None:
    """ONNX Runtime's CPU computes half-precision layers in float32; torch rounds between layers, as a GPU does."""
    path = BUNDLED / "avatar/models/generator.onnx"
    expected = run_whole(onnx.load(path), *avatar_probe)
    engine = load_engine(path.with_suffix(".pth"), device="cpu", engine="torch", precision="fp16")
    assert least_psnr(predict(engine, *avatar_probe), expected) >= 50  # 59.7 measured
