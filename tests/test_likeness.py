"""MSE, PSNR and SSIM against scikit-image's."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from gpurender import compare_pictures


def planar(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def by_scikit_image(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    similar: Any = structural_similarity(
        *(a, b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1
    )
    with np.errstate(divide="ignore"):
        return float(mean_squared_error(a, b)), float(peak_signal_noise_ratio(a, b, data_range=255)), float(similar)


@settings(max_examples=60)
@given(
    width=st.integers(11, 70),
    height=st.integers(11, 70),
    kind=st.sampled_from(["noise", "waves", "flat", "extremes"]),
    change=st.integers(0, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_pictures(width: int, height: int, kind: str, change: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    a = {
        "noise": lambda: random.randint(0, 256, (height, width, 3)).astype(np.uint8),
        "waves": lambda: picture(width, height, seed % 1000),
        "flat": lambda: np.full((height, width, 3), random.randint(256), np.uint8),
        "extremes": lambda: (255 * random.randint(0, 2, (height, width, 3))).astype(np.uint8),
    }[kind]()
    b = np.clip(a + random.randint(-change, change + 1, a.shape), 0, 255).astype(np.uint8)
    assert compare_pictures(planar(a), planar(b)) == pytest.approx(by_scikit_image(a, b), abs=1e-9)


@pytest.mark.parametrize("kind", ["waves", "bright"])
def test_large_pictures(device: torch.device, kind: str) -> None:
    """On a CPU these are compared in float32; bright ones are the hardest for it."""
    a = picture(900, 600, 1) if kind == "waves" else np.full((600, 900, 3), 250, np.uint8)
    b = a.copy()
    b[::7, ::5] = np.minimum(b[::7, ::5].astype(int) + 3, 255)
    found = compare_pictures(planar(a).to(device), planar(b).to(device))
    mse, psnr_db, ssim = by_scikit_image(a, b)
    assert found.mse == pytest.approx(mse, abs=1e-9)
    assert found.psnr_db == pytest.approx(psnr_db, abs=1e-9)
    assert found.ssim == pytest.approx(ssim, abs=1e-4 if device.type == "cpu" else 1e-9)


@pytest.mark.parametrize("levels", [1, 5, 40])
def test_a_known_change(levels: int) -> None:
    a = torch.randint(0, 255 - levels, (3, 64, 80), dtype=torch.uint8)
    mse, psnr_db, _ = compare_pictures(a, a + levels)
    assert mse == levels**2
    assert psnr_db == pytest.approx(20 * math.log10(255 / levels), abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [(220, 221), (245, 250), (0, 1)])
def test_plain_colours_that_differ_are_not_alike(device: torch.device, a: int, b: int) -> None:
    """In float32, which large pictures on a CPU are compared in, these would be alike."""
    flat = torch.full((3, 600, 600), a, dtype=torch.uint8, device=device)
    found = compare_pictures(flat, torch.full_like(flat, b))
    expected = (2 * a * b + 2.55**2) / (a**2 + b**2 + 2.55**2)
    assert found.ssim == pytest.approx(expected, abs=5e-4)
    assert found.ssim < 1


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("side", [11, 600])
def test_equal_pictures(level: int, side: int) -> None:
    flat = torch.full((3, side, side), level, dtype=torch.uint8)
    assert compare_pictures(flat, flat.clone()) == (0, math.inf, 1)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(3, 20, 20), torch.zeros(3, 20, 20), "pictures are uint8"),
        (torch.zeros(3, 20, 20).byte(), torch.zeros(3, 20, 21).byte(), "given (3, 20, 20), (3, 20, 21)"),
        (torch.zeros(1, 20, 20).byte(), torch.zeros(1, 20, 20).byte(), "pictures are (3,H,W)"),
        (torch.zeros(3, 10, 20).byte(), torch.zeros(3, 10, 20).byte(), "at least 11"),
    ],
)
def test_what_is_no_pair_of_pictures(a: torch.Tensor, b: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compare_pictures(a, b)
