"""The host's encoders: what they made is read back with decoders that know nothing of them."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import BARS, decoded, noise, opened, plane, smooth

from gpurender import InputError, rgb_to_nv12, software_encoder, write_frames
from gpurender.software_encoder import Codec, SoftwareEncoder, nv12_frames, yuv_frames
from gpurender.timings import Timings


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
@pytest.mark.parametrize("count", [1, 2])
def test_videos_of_one_or_two_frames(tmp_path: Path, codec: Codec, count: int) -> None:
    """Of which x265 says any time for decoding: it was refused in most of six."""
    for number in range(6):
        out = tmp_path / f"{number}.mp4"
        write_frames([smooth(count)], out, fps=25, codec=codec)
        with opened(out) as container:
            assert len(list(container.decode(video=0))) == count


@pytest.mark.parametrize(("width", "height"), [(62, 200), (200, 16)])
@pytest.mark.parametrize("codec", ["hevc", "av1"])
def test_frames_that_are_too_small_for_an_encoder_are_told(
    tmp_path: Path, codec: Codec, width: int, height: int
) -> None:
    """x265 writes beyond its memory, SVT-AV1 never ends."""
    with pytest.raises(InputError, match=rf"frames of {width}×{height} cannot be made {codec}, .*; take h264"):
        write_frames([smooth(3, width, height)], tmp_path / "a.mp4", fps=25, codec=codec)
    with pytest.raises(InputError, match=r"frames of 96×48 cannot be made"):
        write_frames([rgb_to_nv12(smooth(3, 96, 48))], tmp_path / "a.mp4", fps=25, codec=codec)
    assert list(tmp_path.iterdir()) == []
    assert write_frames([rgb_to_nv12(smooth(3, 64, 64))], tmp_path / "b.mp4", fps=25, codec=codec).frames == 3
    assert write_frames([smooth(3, width, height)], tmp_path / "a.mp4", fps=25).frames == 3


@pytest.mark.parametrize(
    ("codec", "size"), [("h264", (16386, 2)), ("h264", (2, 16386)), ("av1", (16386, 64)), ("av1", (64, 8706))]
)
def test_frames_that_are_too_large_for_an_encoder_are_told(tmp_path: Path, codec: Codec, size: tuple[int, int]) -> None:
    frame = torch.zeros(1, 3, *reversed(size), dtype=torch.uint8)
    with pytest.raises(InputError, match=f"frames of {size[0]}×{size[1]} cannot be made {codec}.*; take hevc"):
        write_frames([frame], tmp_path / "a.mp4", fps=25, codec=codec)


def test_surfaces_may_lie_in_memory_in_any_way(tmp_path: Path) -> None:
    surfaces = rgb_to_nv12(smooth(3))
    strided = surfaces.repeat_interleave(2, 2)[..., ::2]
    for name, given in (("a", surfaces), ("b", strided)):
        write_frames([given], tmp_path / f"{name}.mkv", fps=25)
    decoded = []
    for name in ("a", "b"):
        with opened(tmp_path / f"{name}.mkv") as container:
            decoded.append([frame.to_ndarray() for frame in container.decode(video=0)])
    np.testing.assert_array_equal(*decoded)


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_frames_keep_their_order(tmp_path: Path, codec: Codec) -> None:
    frames = smooth(20)
    write_frames([frames], tmp_path / "a.mp4", fps=25, codec=codec)
    shown = np.stack([plane(frame, 0) for frame in decoded(tmp_path / "a.mp4")])
    asked = np.stack([luma(frame.permute(1, 2, 0).numpy()) for frame in frames])
    distance = np.abs(shown[:, None] - asked[None]).mean((2, 3))
    assert (distance.argmin(1) == np.arange(20)).all()
    assert distance.diagonal().max() < 2


def luma(rgb: np.ndarray) -> np.ndarray:
    return 16 + 219 * (rgb @ [0.2126, 0.7152, 0.0722]) / 255


def chroma(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cb and Cr, BT.709 limited."""
    bright = rgb @ [0.2126, 0.7152, 0.0722]
    return 128 + 224 * (rgb[..., 2] - bright) / 1.8556 / 255, 128 + 224 * (rgb[..., 0] - bright) / 1.5748 / 255


@pytest.mark.parametrize(("codec", "quality"), [("h264", 0), ("h264", 10), ("h264", None), ("hevc", 10), ("av1", 10)])
def test_colour_bars_are_bt709(tmp_path: Path, codec: Codec, quality: int | None) -> None:
    bars = np.repeat(np.array(BARS, np.uint8), 16, 0)  # (176,3)
    frames = torch.from_numpy(bars).T[None, :, None].expand(3, 3, 64, -1)
    write_frames([frames], tmp_path / "a.mp4", fps=25, codec=codec, quality=quality)
    for frame in decoded(tmp_path / "a.mp4"):
        y, cb, cr = (plane(frame, index) for index in range(3))
        expected_cb, expected_cr = chroma(np.array(BARS, float))
        assert np.abs(y[24, 8::16] - luma(np.array(BARS, float))).max() <= 2
        assert np.abs(cb[12, 4::8] - expected_cb).max() <= 3
        assert np.abs(cr[12, 4::8] - expected_cr).max() <= 3


@pytest.mark.parametrize(("width", "height"), [(65, 47), (64, 47), (65, 48)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_odd_sizes_repeat_the_last_column_and_row(tmp_path: Path, name: str, width: int, height: int) -> None:
    frames = smooth(3, width, height)
    write_frames([frames], tmp_path / name, fps=25, quality=5)
    for shown, asked in zip(decoded(tmp_path / name), frames, strict=True):
        assert (shown.width, shown.height) == (width + width % 2, height + height % 2)
        padded = np.pad(luma(asked.permute(1, 2, 0).numpy()), ((0, height % 2), (0, width % 2)), "edge")
        assert np.abs(plane(shown, 0) - padded).max() <= 3


def test_quality_is_a_trade_for_size(tmp_path: Path) -> None:
    sizes: list[int] = []
    for quality in (0, 18, 51):
        write_frames([noise(3)], tmp_path / "a.mp4", fps=25, quality=quality, overwrite=True)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_nv12_from_the_device_is_the_same_video(tmp_path: Path) -> None:
    """The way of frames on a GPU: NV12 made there, and x264 on the host. swscale's colours are a level apart."""
    frames = smooth(12, 66, 50)
    rate = Fraction(25)
    pictures: list[list[np.ndarray]] = []
    for way in (yuv_frames(frames.split(5), Timings()), nv12_frames(frames.split(5), frames.device, Timings())):
        made = list(way)
        assert [(frame.width, frame.height) for frame in made] == [(66, 50)] * 12
        pictures.append([frame.reformat(format="yuv420p").to_ndarray() for frame in made])
    for software, device in zip(*pictures, strict=True):
        assert np.abs(software.astype(int) - device).max() <= 2  # chroma's filters differ
        assert np.abs(software.astype(int) - device)[:50].max() <= 1
    for codec in ("h264", "hevc", "av1"):
        out = tmp_path / f"{codec}.mp4"
        with av.open(str(out), "w") as container:
            encoder = SoftwareEncoder(container, codec, None, rate, torch.device("cpu"), nv12=True)
            assert encoder._stream.codec_context.pix_fmt == ("nv12" if codec == "h264" else "yuv420p")
            for _, packets in encoder.packets(frames.split(5), Timings()):
                container.mux(packets)
        for frame, expected in zip(decoded(out), pictures[0], strict=True):
            assert (frame.colorspace, frame.color_range) == (1, 1)
            assert np.abs(frame.to_ndarray().astype(int) - expected).mean() < 3


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_surfaces_make_the_video_that_frames_make(tmp_path: Path, codec: Codec) -> None:
    frames = smooth(7, 65, 67)
    write_frames(frames.split(3), tmp_path / "rgb.mp4", fps=25, codec=codec)
    written = write_frames(rgb_to_nv12(frames).split(3), tmp_path / "nv12.mp4", fps=25, codec=codec)
    assert written.frames == 7
    pictures = [[frame.to_ndarray() for frame in decoded(tmp_path / name)] for name in ("rgb.mp4", "nv12.mp4")]
    assert np.shape(pictures[1]) == (7, 102, 66)
    assert np.abs(np.array(pictures[0], int) - pictures[1]).mean() < 2
    with pytest.raises(ValueError, match=r"batches are \(B,3,H,W\) RGB, given"):
        write_frames([rgb_to_nv12(frames)], tmp_path / "a.mp4", fps=25, encoder="mjpeg")


@pytest.mark.parametrize(("codec", "library"), [("h264", "libx264"), ("hevc", "libx265"), ("av1", "libsvtav1")])
def test_the_hosts_encoder_of_each_codec_can_be_asked_for(tmp_path: Path, codec: Codec, library: str) -> None:
    written = write_frames([smooth(3)], tmp_path / "a.mp4", fps=25, encoder="x264", codec=codec)
    assert written.encoder == library


@pytest.mark.parametrize("allowed", [1, 2])
@pytest.mark.parametrize("codec", ["hevc", "av1"])
def test_the_hosts_encoders_take_the_cores_that_control_groups_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec, allowed: int
) -> None:
    monkeypatch.setattr(software_encoder, "cores_to_run_on", lambda: 2)
    monkeypatch.setattr(software_encoder, "usable_cores", lambda: allowed)
    write_frames([smooth(3)], tmp_path / "a.mp4", fps=25, codec=codec)
    assert len(decoded(tmp_path / "a.mp4")) == 3
    if codec == "hevc":  # x265 writes into its first packet what it was told
        assert (b" numa-pools=1 " in (tmp_path / "a.mp4").read_bytes()) == (allowed == 1)
    assert software_encoder.options_of("av1").get("svtav1-params") == ("lp=1" if allowed == 1 else None)


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux has it")
def test_a_sandbox_may_refuse_that_scheduling_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with software_encoder.scheduling_kept():
        pass


def test_svt_av1_does_not_make_this_thread_a_real_time_one(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0)
    write_frames([smooth(3)], tmp_path / "a.mp4", fps=25, codec="av1")
    assert os.sched_getscheduler(0) == before
