"""What is written is read back with decoders that know nothing of our writer."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import pytest
import torch
from videos import decoded, is_exact, noise, opened, smooth

from gpurender import InputError, OutputError, write_frames
from gpurender.encode import check_destination
from gpurender.software_encoder import Codec
from gpurender.timings import Timings

BT709_LIMITED = (1, 1, 1, 1)  # matrix, primaries, transfer of BT.709; MPEG range


def boxes(path: Path) -> list[bytes]:
    """The names of an MP4's outermost boxes, in order."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        names.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return names


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
