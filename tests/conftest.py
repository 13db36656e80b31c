"""Fixtures: small synthetic templates, sounds and networks, made on the spot; and where the reference's files are."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from seeds import seeded_weights

from gpurender import AudioEncoder, UNet, export_onnx

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""The reference's sample and golden numbers; a real person's, so they are not part of the project."""

TINY = {
    "encoder": (8, 8, 8, 16, 16, 16),
    "audio": (32, 16, 16, 16, 16),
    "fuse": (16, 16),
    "decoder": (16, 8, 8, 8, 8),
}
TINY_ENCODER = (4, 4, 4, 8, 8, 8, 8, 8, 8, 16, 16, 16, 512)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is no GPU; GPURENDER_REQUIRE_GPU=1 has them fail instead."""
    if torch.cuda.is_available() or os.environ.get("GPURENDER_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU (GPURENDER_REQUIRE_GPU=1 makes this a failure)"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["GPURENDER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.chmod(os.environ["GPURENDER_CACHE"], 0o700)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the reference's files are not at {SHARED}: NOTHING IS CHECKED AGAINST THE REFERENCE HERE")
    return SHARED


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seeded_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-width `ave` checkpoint of the golden numbers' weights."""
    return _save(UNet(), tmp_path_factory.mktemp("networks") / "seeded.pth")


@pytest.fixture(scope="session")
def seeded_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(AudioEncoder(), tmp_path_factory.mktemp("networks") / "encoder.pth")


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(UNet(**TINY), tmp_path_factory.mktemp("networks") / "tiny.pth")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(AudioEncoder(TINY_ENCODER), tmp_path_factory.mktemp("networks") / "tiny_encoder.pth")


@pytest.fixture(scope="session")
def tiny_onnx(tiny_unet: Path) -> Path:
    out = tiny_unet.with_suffix(".onnx")
    export_onnx(tiny_unet, out)
    return out


@pytest.fixture(scope="session")
def seeded_onnx(seeded_unet: Path) -> Path:
    out = seeded_unet.with_suffix(".onnx")
    export_onnx(seeded_unet, out)
    return out


def _save(network: torch.nn.Module, path: Path) -> Path:
    torch.save(seeded_weights(network), path)
    return path


# --- templates -------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, number: int) -> np.ndarray:
    """(H,W,3) uint8 RGB: waves that move with the number, and noise."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin((x * (c + 1) + 3 * number) / 23 + y * (c + 2) / 31) for c in range(3)]
    noise = np.random.RandomState(number).uniform(-20, 20, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def landmarks(x0: int, y0: int, x1: int) -> str:
    points = [(200 + 0.5 * i, 100 + i) for i in range(110)]
    points[1], points[31], points[52] = (x0, 77), (x1, 99), (150, y0)
    return "\n".join(f"{x} {y}" for x, y in points) + "\n"


def parsing_mask(width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width, 3), np.uint8)
    mask[:, : width // 3] = 255, 0, 0  # red: kept
    mask[: height // 3] = 255  # white: kept
    mask[-height // 4 :] = 0, 0, 255  # blue: not kept
    return mask


MakeTemplate = Callable[..., Path]


@pytest.fixture
def make_template(tmp_path: Path) -> MakeTemplate:
    def make(
        name: str = "anna",
        frames: int = 5,
        width: int = 320,
        height: int = 240,
        parsing: bool = False,
        suffix: str = ".jpg",
    ) -> Path:
        path = tmp_path / name
        for directory in ("full_body_img", "landmarks", *(["parsing"] if parsing else [])):
            (path / directory).mkdir(parents=True)
        for i in range(frames):
            Image.fromarray(picture(width, height, i)).save(path / "full_body_img" / f"{i}{suffix}", quality=95)
            x0, y0, side = 90 + 2 * i, 60 + i, 120 + 3 * (i % 3)
            (path / "landmarks" / f"{i}.lms").write_text(landmarks(x0, y0, x0 + side))
            if parsing:
                Image.fromarray(parsing_mask(width, height)).save(path / "parsing" / f"{i}.png")
        return path

    return make


# --- sounds ----------------------------------------------------------------------------------------------------------


def tones(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """(n, channels) float32: tones that change, with pauses."""
    t = np.arange(round(seconds * rate)) / rate
    pitch = 200 + 150 * np.sin(2 * np.pi * 0.7 * t)
    wave = 0.4 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) * (np.sin(2 * np.pi * 1.3 * t) > -0.5)
    return np.stack([wave * (1 - 0.3 * c) for c in range(channels)], 1).astype(np.float32)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, tones(1.5, 22050, 2), 22050)
    return path
