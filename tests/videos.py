"""Frames to write, and what is in the files that were made of them, by decoders that know nothing of our writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from av.container import InputContainer
from PIL import Image

BARS = [
    (255, 255, 255),
    (255, 255, 0),
    (0, 255, 255),
    (0, 255, 0),
    (255, 0, 255),
    (255, 0, 0),
    (0, 0, 255),
    (0, 0, 0),
    (64, 64, 64),
    (128, 128, 128),
    (192, 192, 192),
]
TICK = 1 / 25


def smooth(count: int, width: int = 96, height: int = 64) -> torch.Tensor:
    """(count,3,H,W) uint8: soft colours that move."""
    x, y, t = torch.arange(width), torch.arange(height)[:, None], torch.arange(count)[:, None, None]
    waves = [torch.sin((x * (c + 1) + 4 * t) / 40 + y * (c + 2) / 60) for c in range(3)]
    return (128 + 100 * torch.stack(waves, 1)).to(torch.uint8)


def noise(count: int, width: int = 64, height: int = 48) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    with av.open(str(path)) as container:
        yield container


def decoded(path: Path) -> list[av.VideoFrame]:
    with opened(path) as container:
        return list(container.decode(video=0))


def plane(frame: av.VideoFrame, index: int) -> np.ndarray:
    """(H,W) float64 of one plane, as decoded, no conversion."""
    source = frame.planes[index]
    rows = np.frombuffer(source, np.uint8).reshape(-1, source.line_size)  # pyright: ignore
    return rows[: source.height, : source.width].astype(float)


def is_exact(picture: Path, frame: torch.Tensor) -> bool:
    return np.array_equal(np.asarray(Image.open(picture)), frame.permute(1, 2, 0).numpy())


def clicks(path: Path, rate: int, channels: int, *, at: tuple[float, ...] = (0.5,), seconds: float = 1.0) -> Path:
    """A sound with 20 ms tones at those times; where there are as many as channels, one in each.

    With 5.1 or more channels they are bass tones, as one channel is a subwoofer's.
    """
    t = np.arange(round(seconds * rate)) / rate
    pitch = 2 * np.pi * (1000 if channels < 6 else 100)
    tones = [np.where((t >= start) & (t < start + 0.02), 0.5 * np.sin(pitch * (t - start)), 0) for start in at]
    wave = np.stack(tones, 1) if len(at) == channels else np.repeat(np.sum(tones, 0)[:, None], channels, 1)
    soundfile.write(path, wave, rate)
    return path
