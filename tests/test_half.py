"""What half precision costs."""

from typing import Any

import onnx
import pytest
from conftest import run_whole
from skimage.metrics import structural_similarity
from torch import Tensor

from gpurender import load_audio_encoder, load_engine, load_features, open_template, predict
from gpurender.engine import least_psnr
from gpurender.find import BUNDLED
from gpurender.half import folded, to_half, widen_depthwise
from gpurender.render import probe_inputs


@pytest.fixture(scope="module")
def avatar_probe() -> tuple[Tensor, Tensor]:
    encoder = load_audio_encoder(BUNDLED / "avatar/models/audio_encoder.pth")
    features = load_features(BUNDLED / "hello.flac", encoder=encoder, fps=25)
    return probe_inputs(open_template(BUNDLED / "avatar"), features)[:2]


@pytest.mark.parametrize("precision", ["fp16", "mixed"])
def test_half_precision_draws_the_avatar(avatar_probe: tuple[Tensor, Tensor], precision: str) -> None:
    path = BUNDLED / "avatar/models/generator.onnx"
    expected = run_whole(onnx.load(path), *avatar_probe)
    half = to_half(folded(path))
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
