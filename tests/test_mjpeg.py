"""Motion JPEG, read back with FFmpeg."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import TICK, clicks, opened, smooth

from gpurender import InputError, write_frames
from gpurender.mjpeg import jpeg_quality


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_mjpeg(tmp_path: Path, device: torch.device, suffix: str) -> None:
    frames = smooth(30, 64, 48)
    sound = clicks(tmp_path / "a.wav", 44100, 1, seconds=1.2)
    out = tmp_path / f"a.{suffix}"
    written = write_frames(frames.to(device).split(8), out, fps=25, sound=sound, encoder="mjpeg")
    assert written == (30, "mjpeg", [])
    with opened(out) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"
        pictures = list(container.decode(video=0))
    assert [frame.time for frame in pictures] == pytest.approx([i * TICK for i in range(30)], abs=0.0015)
    for picture, frame in zip(pictures, frames, strict=True):
        difference = picture.to_ndarray(format="rgb24").astype(int) - frame.permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 2
    with opened(out) as container:
        assert container.duration / av.time_base == pytest.approx(1.2, abs=0.05)  # pyright: ignore
        assert len(container.streams.audio) == 1


def test_mjpegs_quality(tmp_path: Path) -> None:
    assert [jpeg_quality(quality) for quality in (2, 3, 16, 31)] == [97, 93, 50, 1]
    sizes = []
    for quality in (2, 10, 31):
        out = tmp_path / f"{quality}.mov"
        write_frames([smooth(5)], out, fps=25, encoder="mjpeg", quality=quality)
        sizes.append(out.stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(InputError, match=r"quality 40 is not within 2 \(best\) to 31, as mjpeg has it"):
        write_frames([smooth(5)], tmp_path / "a.mov", fps=25, encoder="mjpeg", quality=40)
