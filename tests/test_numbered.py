"""Numbered pictures, read back with Pillow."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videos import BARS, is_exact, noise, smooth

from gpurender import InputError, OutputError, write_frames
from gpurender.encode import check_destination


@pytest.mark.parametrize(("width", "height"), [(64, 48), (65, 47)])
def test_png_pictures_are_exact_and_numbered_from_1(tmp_path: Path, width: int, height: int) -> None:
    frames = noise(12, width, height)
    assert write_frames([frames[:5], frames[5:]], tmp_path / "frames" / "%05d.png", fps=25).frames == 12
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(1, 13)]
    for file, frame in zip(files, frames, strict=True):
        with Image.open(file) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert is_exact(file, frame)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (65, 47)])
@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG"])
def test_jpeg_pictures_are_close(tmp_path: Path, suffix: str, width: int, height: int) -> None:
    frames = smooth(5, width, height)
    assert write_frames([frames], tmp_path / f"x%d.{suffix}", fps=25).frames == 5
    for i, frame in enumerate(frames, 1):
        with Image.open(tmp_path / f"x{i}.{suffix}") as picture:
            assert (picture.format, picture.size) == ("JPEG", (width, height))
            error = np.asarray(picture, float) - frame.permute(1, 2, 0).numpy()
        assert 10 * np.log10(255**2 / (error**2).mean()) > 35


def test_jpeg_colours_are_jfifs(tmp_path: Path) -> None:
    """Full-range BT.601, which is what every reader of JPEG takes it for."""
    frames = torch.from_numpy(np.repeat(np.array(BARS, np.uint8), 16, 0)).T[None, :, None].expand(1, 3, 48, -1)
    write_frames([frames], tmp_path / "%d.jpg", fps=25)
    middles = np.asarray(Image.open(tmp_path / "1.jpg"), int)[24, 8::16]
    assert np.abs(middles - BARS).max() <= 4


def test_jpeg_quality_is_a_trade_for_size(tmp_path: Path) -> None:
    sizes: list[int] = []
    for quality in (2, 10, 31):
        write_frames([noise(1)], tmp_path / "%d.jpg", fps=25, quality=quality, overwrite=True)
        sizes.append((tmp_path / "1.jpg").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("quality", [2, 5, 31])
def test_jpeg_quality_is_the_same_of_all_pictures(tmp_path: Path, quality: int) -> None:
    """Whatever is in them: FFmpeg, asked for less, goes by a bit rate."""
    frames = torch.cat([smooth(2, 320, 240), noise(4, 320, 240)])
    write_frames([frames], tmp_path / "%d.jpg", fps=25, quality=quality)
    tables = [Image.open(tmp_path / f"{number}.jpg").quantization for number in range(1, 7)]  # pyright: ignore
    assert all(table == tables[0] for table in tables)


def test_existing_pictures_are_kept_without_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "%03d.png"
    (tmp_path / "003.png").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"003\.png exists; give --overwrite"):
        check_destination(out, frames=3, codec="h264", quality=None, overwrite=False)
    check_destination(out, frames=2, codec="h264", quality=None, overwrite=False)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match=r"003\.png exists.*first 2 pictures are complete"):
        write_frames([noise(5)], out, fps=25)
    assert (tmp_path / "003.png").read_bytes() == b"old"
    check_destination(out, frames=5, codec="h264", quality=None, overwrite=True)
    assert write_frames([noise(5)], out, fps=25, overwrite=True).frames == 5
    assert is_exact(tmp_path / "003.png", noise(5)[2])


def test_the_pictures_directory_goes_if_nothing_came(tmp_path: Path) -> None:
    def failing() -> Iterator[torch.Tensor]:
        raise RuntimeError("no first frame")
        yield

    with pytest.raises(RuntimeError, match="no first frame"):
        write_frames(failing(), tmp_path / "made" / "%d.png", fps=25)
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError, match="no first frame"):
        write_frames(failing(), tmp_path / "there" / "%d.png", fps=25)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_pictures_that_are_there_after_a_failure_are_complete(tmp_path: Path) -> None:
    frames = noise(20)

    def failing() -> Iterator[torch.Tensor]:
        yield frames
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_frames(failing(), tmp_path / "%d.png", fps=25)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{i}.png" for i in range(1, len(names) + 1)}
    for i in range(len(names)):
        assert is_exact(tmp_path / f"{i + 1}.png", frames[i])


def test_pictures_have_no_sound_and_those_of_a_longer_render_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numbered pictures have no sound"):
        write_frames([smooth(1)], tmp_path / "%d.png", fps=25, sound=tmp_path / "a.wav")
    assert write_frames([smooth(5)], tmp_path / "%d.png", fps=25).notes == []
    assert write_frames([smooth(5)], tmp_path / "%d.png", fps=25, overwrite=True).notes == []
    shorter = write_frames([smooth(3)], tmp_path / "%d.png", fps=25, overwrite=True)
    assert shorter.notes == ["4.png is there, too, of a longer render before"]
