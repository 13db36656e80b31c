"""What is written is read back with decoders that know nothing of our writer."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import pytest
import soundfile
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from PIL import Image

from gpurender import InputError, OutputError, rgb_to_nv12, software_encoder, sound_track, write_frames
from gpurender.encode import check_destination
from gpurender.mjpeg import jpeg_quality
from gpurender.software_encoder import Codec, SoftwareEncoder, nv12_frames, yuv_frames
from gpurender.sound import decode_sound
from gpurender.timings import Timings

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
BT709_LIMITED = (1, 1, 1, 1)  # matrix, primaries, transfer of BT.709; MPEG range
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


def boxes(path: Path) -> list[bytes]:
    """The names of an MP4's outermost boxes, in order."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        names.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return names


def is_exact(picture: Path, frame: torch.Tensor) -> bool:
    return np.array_equal(np.asarray(Image.open(picture)), frame.permute(1, 2, 0).numpy())


# --- video -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "name", "tag"),
    [
        ("h264", "a.mp4", "avc1"),
        ("h264", "a.mov", "avc1"),
        ("h264", "a.MKV", None),
        ("hevc", "a.mp4", "hvc1"),
        ("hevc", "a.mov", "hvc1"),
        ("hevc", "a.mkv", None),
        ("av1", "a.mp4", "av01"),
        ("av1", "a.mkv", None),
    ],
)
@pytest.mark.parametrize(("fps", "rate"), [(29.97, Fraction(30000, 1001)), (25, Fraction(25)), (20.0, Fraction(20))])
def test_videos_are_what_was_asked_for(
    tmp_path: Path, codec: Codec, name: str, tag: str | None, fps: float, rate: Fraction
) -> None:
    out = tmp_path / name
    assert write_frames([smooth(7), smooth(5)], out, fps=fps, codec=codec).frames == 12
    with opened(out) as container:
        video = container.streams.video[0]
        context = video.codec_context
        assert context.name.removeprefix("lib").replace("dav1d", "av1") == codec
        assert (video.width, video.height, context.pix_fmt) == (96, 64, "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == BT709_LIMITED
        assert video.average_rate == rate
        assert tag is None or context.codec_tag == tag
        assert container.duration is not None
        assert container.duration / av.time_base == pytest.approx(12 / rate, abs=0.0015)  # Matroska counts in ms
        frames = list(container.decode(video))
    assert len(frames) == 12
    assert [frame.time for frame in frames] == pytest.approx([i / float(rate) for i in range(12)], abs=0.0015)
    assert [(f.colorspace, f.color_primaries, f.color_trc, f.color_range) for f in frames] == [BT709_LIMITED] * 12
    if tag is not None:
        names = boxes(out)
        assert names.index(b"moov") < names.index(b"mdat")


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (23.976, Fraction(24000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (12.345, Fraction(2469, 200)),
        (29.9, Fraction(299, 10)),
        (1, Fraction(1)),
    ],
)
def test_frame_rates(tmp_path: Path, fps: float, rate: Fraction) -> None:
    write_frames([smooth(3)], tmp_path / "a.mp4", fps=fps)
    with opened(tmp_path / "a.mp4") as container:
        assert container.streams.video[0].average_rate == rate


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


# --- other encoders --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "encoder", "codec", "words"),
    [
        ("a.mp4", "mjpeg", "av1", "the mjpeg encoder does not make av1; leave one of them out"),
        ("%d.png", "nvenc", "h264", "numbered pictures are not made by a video encoder; leave out nvenc"),
    ],
)
def test_encoders_that_do_not_go_with_the_rest(tmp_path: Path, name: str, encoder, codec, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_frames([smooth(1)], tmp_path / name, fps=25, encoder=encoder, codec=codec)


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


def test_timings_tell_what_stages_cost(tmp_path: Path) -> None:
    timings = Timings()
    write_frames([smooth(20, 320, 240)], tmp_path / "a.mp4", fps=25, timings=timings)
    assert set(timings.host_seconds) == {"colour", "encode"}
    assert all(seconds > 0 for seconds in timings.host_seconds.values())
    assert timings.device_seconds == {}


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 4, 1], [0, 9, 0]])
def test_batch_sizes_do_not_matter(tmp_path: Path, sizes: list[int]) -> None:
    frames = smooth(9)
    assert write_frames(iter(frames.split(sizes)), tmp_path / "a.mp4", fps=25).frames == 9
    assert len(decoded(tmp_path / "a.mp4")) == 9
    assert write_frames(frames.split(sizes), tmp_path / "%d.png", fps=25).frames == 9
    for i, frame in enumerate(frames, 1):
        assert is_exact(tmp_path / f"{i}.png", frame)


def test_frames_of_any_device_and_stride(tmp_path: Path, device: torch.device) -> None:
    frames = noise(6)
    turned = frames.permute(0, 2, 3, 1).contiguous().to(device).permute(0, 3, 1, 2)
    write_frames([turned[:4], turned[4:]], tmp_path / "%d.png", fps=25)
    for i, frame in enumerate(frames, 1):
        assert is_exact(tmp_path / f"{i}.png", frame)
    assert write_frames([turned], tmp_path / "a.mp4", fps=25).frames == 6


@pytest.mark.parametrize("name", ["a.mp4", "frames/%05d.png", "frames/%05d.jpg"])
@pytest.mark.parametrize("batches", [[], [smooth(0)]])
def test_no_frames_are_refused(tmp_path: Path, name: str, batches: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match="no frames"):
        write_frames(batches, tmp_path / name, fps=25)
    assert list(tmp_path.iterdir()) == []


# --- sound -----------------------------------------------------------------------------------------------------------


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


class Heard(NamedTuple):
    rate: int
    channels: int
    seconds: float  # of all samples
    loud: list[float]  # when each channel's first loud sample is heard


def heard(path: Path) -> Heard:
    """What a player that goes by the time stamps plays."""
    with opened(path) as container:
        track = container.streams.audio[0]
        to_float = av.AudioResampler("flt", track.layout, track.rate)
        blocks: list[np.ndarray] = []
        times: list[np.ndarray] = []
        for frame in container.decode(track):
            assert frame.time is not None
            blocks.append(to_float.resample(frame)[0].to_ndarray().reshape(-1, track.channels))
            times.append(frame.time + np.arange(frame.samples) / frame.sample_rate)
        samples, time = np.abs(np.concatenate(blocks)), np.concatenate(times)
        loud = [float(time[np.argmax(channel > 0.2)]) if channel.max() > 0.2 else np.inf for channel in samples.T]
        return Heard(track.rate, track.channels, len(samples) / track.rate, loud)


def stream_seconds(path: Path) -> tuple[float, float]:
    """How long the container says that the video and the sound are."""
    with opened(path) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert video.duration is not None
        assert sound.duration is not None
        assert video.time_base is not None
        assert sound.time_base is not None
        return float(video.duration * video.time_base), float(sound.duration * sound.time_base)


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [
        ("a.wav", 8_000, 1),
        ("a.wav", 16_000, 1),
        ("a.wav", 48_000, 2),
        ("a.mp3", 44_100, 2),
        ("a.ogg", 22_050, 1),
        ("a.wav", 96_000, 2),
        ("a.flac", 48_000, 3),
        ("a.wav", 48_000, 6),
        ("a.flac", 48_000, 6),
        ("a.wav", 48_000, 8),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_sound_is_kept_and_in_sync(tmp_path: Path, name: str, rate: int, channels: int, suffix: str) -> None:
    sound, out = clicks(tmp_path / name, rate, channels), tmp_path / f"a{suffix}"
    assert write_frames([smooth(25)], out, fps=25, sound=sound).frames == 25
    assert len(decoded(out)) == 25
    track = heard(out)
    assert (track.rate, track.channels) == (rate, channels)
    assert track.loud == pytest.approx([0.5] * channels, abs=0.005)
    assert track.seconds == pytest.approx(1, abs=TICK)
    if suffix != ".mkv":  # Matroska keeps no durations of streams
        assert stream_seconds(out) == pytest.approx((1, 1), abs=TICK)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_channels_stay_in_their_order(tmp_path: Path, name: str) -> None:
    at = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=clicks(tmp_path / name, 48_000, 6, at=at))
    assert heard(tmp_path / "a.mp4").loud == pytest.approx(at, abs=0.005)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_of_a_plain_wav_are_not_mixed(tmp_path: Path, channels: int) -> None:
    """The file does not say which is which. One of 5.1 and more is a subwoofer's: noise up to 100 Hz in all."""
    bass = np.random.default_rng(0).standard_normal((channels, 200))  # at 100 Hz
    sound = np.repeat(0.2 * bass.clip(-2, 2), 480, 1).T
    soundfile.write(tmp_path / "a.wav", sound, 48_000, subtype="FLOAT")
    write_frames([smooth(50)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.wav")
    interleaved = av.AudioResampler(format="flt")  # PyAV reads planes of 8 wrongly
    with opened(tmp_path / "a.mp4") as container:
        frames = [part.to_ndarray() for frame in container.decode(audio=0) for part in interleaved.resample(frame)]
    made = np.concatenate(frames, 1).reshape(-1, channels)
    shared = min(len(made), len(sound))
    alike = np.corrcoef(made[:shared].T, sound[:shared].T)[:channels, channels:]
    assert (alike.max(1) > 0.9).all()
    assert sorted(alike.argmax(1)) == list(range(channels))  # decoders have their own order


def test_ac3s_channels_have_names_that_aac_knows(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.flac"), "w") as container:
        stream = cast(AudioStream, container.add_stream("flac", 48_000, layout="5.1(side)", format="s16"))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 6 * 4800), np.int16), "s16", "5.1(side)")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    write_frames([smooth(5)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.flac")
    with opened(tmp_path / "a.mp4") as container:
        assert container.streams.audio[0].layout.name == "5.1"


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_samples_that_are_no_sound_are_told(tmp_path: Path, value: float) -> None:
    wave = np.zeros(16_000, np.float32)
    wave[9000] = value
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"a\.wav: FFmpeg makes no AAC of what it holds .*NaN, or far beyond 1"):
        write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.wav")


@pytest.mark.parametrize("channels", [9, 12, 16])
def test_more_channels_than_aac_has_are_refused(tmp_path: Path, channels: int) -> None:
    sound = clicks(tmp_path / "a.wav", 48_000, channels)
    with pytest.raises(InputError, match=f"cannot make AAC of its {channels} channels .*; mix it to stereo first"):
        write_frames([smooth(5)], tmp_path / "a.mp4", fps=25, sound=sound)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_shorter_or_longer_than_the_video_is_kept_whole(tmp_path: Path, seconds: float, suffix: str) -> None:
    sound, out = clicks(tmp_path / "a.wav", 16_000, 1, at=(seconds / 2,), seconds=seconds), tmp_path / f"a{suffix}"
    write_frames([smooth(10), smooth(15)], out, fps=25, sound=sound)
    assert [frame.time for frame in decoded(out)] == pytest.approx([i / 25 for i in range(25)])
    assert heard(out).seconds == pytest.approx(seconds, abs=0.064)  # whole AAC packets of 1024
    assert heard(out).loud == pytest.approx([seconds / 2], abs=0.005)
    if suffix == ".mp4":
        assert stream_seconds(out) == pytest.approx((1, seconds), abs=TICK)


def test_sound_and_frames_are_interleaved(tmp_path: Path) -> None:
    sound = clicks(tmp_path / "a.wav", 48_000, 2, seconds=4.0)
    write_frames([smooth(100)], tmp_path / "a.mp4", fps=25, sound=sound)
    latest = {"video": 0.0, "audio": 0.0}
    with opened(tmp_path / "a.mp4") as container:
        for packet in container.demux():
            if packet.dts is not None:
                latest[packet.stream.type] = float(packet.dts * packet.time_base)
                assert abs(latest["video"] - latest["audio"]) < 1.5


def test_sound_is_made_while_the_first_packets_are_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a video in segments come late."""

    def heard_to_the_end(*of: Any) -> Iterator[av.AudioFrame]:
        yield from decode(*of)
        ended.set()

    def late(self: SoftwareEncoder, *of: Any) -> Iterator[Any]:
        in_time.append(ended.wait(10))
        yield from packets(self, *of)

    decode, packets, ended, in_time = sound_track.decoded_frames, SoftwareEncoder.packets, threading.Event(), []
    monkeypatch.setattr(sound_track, "decoded_frames", heard_to_the_end)
    monkeypatch.setattr(SoftwareEncoder, "packets", late)
    out = tmp_path / "a.mp4"
    write_frames([smooth(25)], out, fps=25, sound=clicks(tmp_path / "a.wav", 48_000, 2, at=(0.5,) * 2, seconds=20))
    assert in_time == [True]
    assert heard(out).seconds == pytest.approx(20, abs=TICK)


def test_a_videos_sound_is_sound(tmp_path: Path) -> None:
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=clicks(tmp_path / "a.wav", 48_000, 2))
    write_frames([smooth(5)], tmp_path / "b.mp4", fps=25, sound=tmp_path / "a.mp4")
    assert heard(tmp_path / "b.mp4").loud == pytest.approx([0.5, 0.5], abs=0.005)


def test_a_sound_that_changes_its_channels_on_the_way(tmp_path: Path) -> None:
    parts = [clicks(tmp_path / f"{n}.mp3", 48_000, n).read_bytes() for n in (1, 2)]
    (tmp_path / "a.mp3").write_bytes(b"".join(parts))
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.mp3")
    assert heard(tmp_path / "a.mp4").loud == pytest.approx([0.5, 0.5], abs=0.005)
    assert heard(tmp_path / "a.mp4").seconds == pytest.approx(2, abs=0.1)


def test_a_sound_that_changes_its_rate_on_the_way(tmp_path: Path) -> None:
    parts = [clicks(tmp_path / f"{rate}.mp3", rate, 1).read_bytes() for rate in (48_000, 24_000)]
    (tmp_path / "a.mp3").write_bytes(b"".join(parts))
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.mp3")
    assert heard(tmp_path / "a.mp4").loud == pytest.approx([0.5], abs=0.005)
    assert heard(tmp_path / "a.mp4").seconds == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("rate", "nearest"), [(192_000, 96_000), (11_000, 11_025), (46_000, 44_100)])
def test_a_rate_that_aac_has_not_becomes_the_nearest(tmp_path: Path, rate: int, nearest: int) -> None:
    sound = clicks(tmp_path / "a.wav", rate, 2)
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=sound)
    track = heard(tmp_path / "a.mp4")
    assert (track.rate, track.channels) == (nearest, 2)
    assert track.loud == pytest.approx([0.5, 0.5], abs=0.005)
    assert stream_seconds(tmp_path / "a.mp4") == pytest.approx((1, 1), abs=TICK)


def test_joined_files_are_heard_to_their_end(tmp_path: Path) -> None:
    """Where one MP3 ends, a part of its last frame is missing, and the other begins with bytes that are none."""
    parts = [clicks(tmp_path / f"{at}.mp3", 48_000, 1, at=(at,)).read_bytes() for at in (0.3, 0.7)]
    (tmp_path / "a.mp3").write_bytes(parts[0][:-100] + bytes(range(256)) * 3 + parts[1])
    write_frames([smooth(25)], tmp_path / "a.mp4", fps=25, sound=tmp_path / "a.mp3")
    assert heard(tmp_path / "a.mp4").seconds == pytest.approx(2, abs=0.1)
    assert sum(map(len, decode_sound(tmp_path / "a.mp3"))) / 16_000 == pytest.approx(2, abs=0.1)


def test_damaged_sound_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    whole = clicks(tmp_path / "a.wav", 48_000, 1, at=(0.5, 3.5), seconds=4)
    write_frames([smooth(100)], tmp_path / "a.mp4", fps=25, sound=whole)
    with opened(tmp_path / "a.mp4") as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.pos]
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    for position, size in packets[60:70]:
        content[position : position + size] = np.random.default_rng(1).bytes(size)
    (tmp_path / "b.mp4").write_bytes(content)
    assert 3.5 < sum(map(len, decode_sound(tmp_path / "b.mp4"))) / 16_000 <= 4.1
    written = write_frames([smooth(100)], tmp_path / "c.mp4", fps=25, sound=tmp_path / "b.mp4")
    assert [note[:52] for note in written.notes] == ["what could not be decoded of the sound is left out: "]


def test_the_length_of_a_sound_is_known_however_quick_its_thread_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound_track, "prefetch", lambda items, depth: (packet for packet in list(items)))
    sound = clicks(tmp_path / "a.wav", 16_000, 1, seconds=3)
    assert write_frames([smooth(75)], tmp_path / "a.mp4", fps=25, sound=sound).notes == []


def test_a_sound_of_another_length_than_the_picture_is_told(tmp_path: Path) -> None:
    sound = clicks(tmp_path / "a.wav", 16_000, 1, seconds=3)
    assert write_frames([smooth(72)], tmp_path / "a.mp4", fps=25, sound=sound).notes == []
    (note,) = write_frames([smooth(25)], tmp_path / "b.mp4", fps=25, sound=sound).notes
    assert note == "the sound lasts 3.00 s, the picture 1.00 s"
    (note,) = write_frames([smooth(100)], tmp_path / "c.mp4", fps=25, sound=sound).notes
    assert note == "the sound lasts 3.00 s, the picture 4.00 s"
    (note,) = write_frames([smooth(56)], tmp_path / "d.mp4", fps=25, sound=sound).notes
    assert note.endswith("the picture 2.24 s")


def test_sounds_that_cannot_be_used(tmp_path: Path) -> None:
    write_frames([smooth(3)], tmp_path / "silent.mp4", fps=25)
    (tmp_path / "garbage.wav").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.wav").write_bytes(b"")
    flac = clicks(tmp_path / "cut.flac", 48_000, 2).read_bytes()
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) * 2 // 3])
    with av.open(str(tmp_path / "cube.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", 16_000, layout="cube")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 16_000), np.int16), "s16", "cube")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))  # pyright: ignore
    reasons = {
        "silent.mp4": "silent.mp4 has no sound track",
        "garbage.wav": "garbage.wav is not sound that can be decoded",
        "empty.wav": "empty.wav is not sound that can be decoded",
        "absent.wav": "no such sound file",
        "cut.flac": "cut.flac: the sound breaks off",
        "cube.wav": r"cube.wav: FFmpeg cannot make AAC of its channels \(cube\)",
    }
    before = sorted(tmp_path.iterdir())
    for name, words in reasons.items():
        with pytest.raises(InputError, match=words):
            write_frames([smooth(30)], tmp_path / "a.mp4", fps=25, sound=tmp_path / name)
        assert sorted(tmp_path.iterdir()) == before


# --- pictures --------------------------------------------------------------------------------------------------------


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


# --- names and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.avi", r"the output is a video \(.mp4, .mov, .mkv\) or pictures"),
        ("x", "the output is a video"),
        ("x.png", "the output is a video .*or pictures such as"),
        ("frames/%s.png", "numbered pictures are named like"),
        ("frames/%d_%d.png", "numbered pictures are named like"),
        ("frames/%d%%.png", "numbered pictures are named like"),
        ("frames/%.png", "numbered pictures are named like"),
        ("frames/%05d.mp4", "numbered pictures are named like"),
        ("frames/%05d", "numbered pictures are named like"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_destination(tmp_path / name, frames=3, codec="h264", quality=None, overwrite=True)
    with pytest.raises(InputError, match=words):
        write_frames([smooth(3)], tmp_path / name, fps=25)
    assert list(tmp_path.iterdir()) == []


def test_av1_in_mov_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"AV1 does not go into \.mov; give \.mp4 or \.mkv"):
        write_frames([smooth(3)], tmp_path / "a.mov", fps=25, codec="av1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "codec", "quality", "words"),
    [
        ("a.mp4", "h264", -1, r"quality -1 is not within 0 \(best\) to 51, as h264"),
        ("a.mp4", "h264", 52, r"0 \(best\) to 51"),
        ("a.mp4", "hevc", 52, r"0 \(best\) to 51, as hevc"),
        ("a.mp4", "av1", 0, r"1 \(best\) to 63"),
        ("a.mp4", "av1", 64, r"1 \(best\) to 63"),
        ("%d.jpg", "h264", 1, r"2 \(best\) to 31, as .jpg"),
        ("%d.jpg", "h264", 32, r"2 \(best\) to 31"),
        ("%d.png", "h264", 10, "PNG pictures are exact"),
    ],
)
def test_qualities_that_are_refused(tmp_path: Path, name: str, codec: str, quality: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_frames([smooth(3)], tmp_path / name, fps=25, codec=cast(Codec, codec), quality=quality)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("codec", "qualities"), [("h264", (0, 51)), ("hevc", (0, 51)), ("av1", (1, 63))])
def test_qualities_at_the_ends(tmp_path: Path, codec: Codec, qualities: tuple[int, int]) -> None:
    for quality in qualities:
        assert write_frames([smooth(3)], tmp_path / f"{quality}.mp4", fps=25, codec=codec, quality=quality).frames == 3
        assert len(decoded(tmp_path / f"{quality}.mp4")) == 3


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf"), 1e-9])
@pytest.mark.parametrize("name", ["a.mp4", "%d.png"])
def test_frame_rates_that_are_refused(tmp_path: Path, name: str, fps: float) -> None:
    with pytest.raises(InputError, match="frames a second is not within"):
        write_frames([smooth(3)], tmp_path / name, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_bytes(b"old")
    (tmp_path / "directory.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    reasons = {
        "missing/a.mp4": "missing is not a directory",
        "missing/too/%d.png": "missing is not a directory",
        "there.mp4/a.mp4": "there.mp4 is not a directory",
        "there.mp4/%d.png": "there.mp4 is not a directory",
        "there.mp4": "there.mp4 exists; give --overwrite",
        "dangling.mp4": "dangling.mp4 exists; give --overwrite",
        "directory.mp4": "directory.mp4 is a directory; give a file name in it",
    }
    for name, words in reasons.items():
        with pytest.raises(OutputError, match=words):
            check_destination(tmp_path / name, frames=3, codec="h264", quality=None, overwrite=False)
        with pytest.raises(OutputError, match=words):
            write_frames([smooth(3)], tmp_path / name, fps=25)
    assert (tmp_path / "there.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.mp4", "directory.mp4", "there.mp4"]


def test_an_old_video_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")

    def batches(fail: bool) -> Iterator[torch.Tensor]:
        yield noise(200)
        assert out.read_bytes() == b"old"
        if fail:
            raise RuntimeError("no more")
        yield noise(2)

    with pytest.raises(RuntimeError, match="no more"):
        write_frames(batches(fail=True), out, fps=25, overwrite=True)
    assert out.read_bytes() == b"old"
    assert write_frames(batches(fail=False), out, fps=25, overwrite=True).frames == 202
    assert len(decoded(out)) == 202
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# --- what is no frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "%03d.png"])
@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([smooth(2).float() / 255], r"frames are uint8 tensors of levels 0 to 255, given torch.float32; of values in"),
        ([smooth(2).long()], "given torch.int64"),
        ([smooth(2).numpy()], "given ndarray"),
        ([smooth(2).permute(0, 2, 3, 1)], r"batches are \(B,3,H,W\) RGB.*, given \(2, 64, 96, 3\)"),
        ([smooth(2)[:, :1]], r"given \(2, 1, 64, 96\)"),
        (list(noise(2, width=63)), r"given \(3, 48, 63\); a frame alone is frame\[None\]"),
        (smooth(2), "give a list of them, not a tensor"),
        ([smooth(2), smooth(2, width=98)], r"all frames are alike .*: first \(\(3, 64, 96\), .*, then \(\(3, 64, 98\)"),
    ],
)
def test_what_is_no_frames_is_refused(tmp_path: Path, name: str, batches: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_frames(batches, tmp_path / name, fps=25)
    assert not (tmp_path / "a.mp4").exists()


def test_other_encoders_and_codecs_are_refused(tmp_path: Path) -> None:
    wrong: Any = "vp9"
    with pytest.raises(InputError, match="'vp9' is no encoder; choose auto, nvenc, x264, mjpeg"):
        write_frames([smooth(1)], tmp_path / "a.mp4", fps=25, encoder=wrong)
    with pytest.raises(InputError, match="'vp9' is no codec; choose h264, hevc, av1"):
        write_frames([smooth(1)], tmp_path / "a.mp4", fps=25, codec=wrong)


def test_pictures_have_no_sound_and_those_of_a_longer_render_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numbered pictures have no sound"):
        write_frames([smooth(1)], tmp_path / "%d.png", fps=25, sound=tmp_path / "a.wav")
    assert write_frames([smooth(5)], tmp_path / "%d.png", fps=25).notes == []
    assert write_frames([smooth(5)], tmp_path / "%d.png", fps=25, overwrite=True).notes == []
    shorter = write_frames([smooth(3)], tmp_path / "%d.png", fps=25, overwrite=True)
    assert shorter.notes == ["4.png is there, too, of a longer render before"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_and_pictures_lie_beside_each_other_in_the_file(tmp_path: Path, suffix: str) -> None:
    """A player that reads on need not look for either."""
    sound = clicks(tmp_path / "a.wav", 48000, 2, seconds=8)
    write_frames(iter(smooth(200).split(8)), tmp_path / f"a.{suffix}", fps=25, sound=sound)
    places: dict[str, list[tuple[int, float]]] = {"video": [], "audio": []}
    with opened(tmp_path / f"a.{suffix}") as container:
        for packet in container.demux():
            if packet.pos is not None and packet.pts is not None:
                places[packet.stream.type].append((packet.pos, float(packet.pts * packet.time_base)))
    for seconds in (1, 3, 5):
        video, audio = (max(pos for pos, at in places[kind] if at < seconds) for kind in ("video", "audio"))
        later, earlier = (min(pos for pos, at in places[kind] if at > seconds + 2) for kind in ("video", "audio"))
        assert video < earlier, "two seconds of pictures come before the sound of later"
        assert audio < later
