import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import av.error
import cv2
import numpy as np
import pytest
import torch
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from conftest import numbered_picture, read_number, write_video
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender import InputError, pack, write_frames
from gpurender.video import FEWEST, VideoFrames, to_rgb

OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"}
UNEVEN = [i * i // 3 + 7 * i for i in range(40)]
FILES: dict[str, dict[str, Any]] = {
    "long.mp4": {"options": {"g": "250", "bf": "3"}},
    "short.mp4": {"options": {"g": "2", "bf": "3"}},
    "intra.mp4": {"options": {"g": "1"}},
    "open.mp4": {"options": OPEN_GOP},
    "open.mkv": {"options": OPEN_GOP},
    "pyramid.mp4": {"options": {"x264-params": "b-pyramid=normal:bframes=8:keyint=30:b-adapt=0"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=15"}},  # keyframes that do not stand alone
    "uneven.mp4": {"options": {"g": "20", "bf": "2"}, "times": UNEVEN, "time_base": Fraction(1, 1000)},
    "stream.ts": {"options": {"g": "12", "bf": "2"}},  # seeks past what was asked for
    "old.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "bt470bg.mp4": {"options": {"colorspace": "bt470bg"}},
    "smpte170m.mp4": {"options": {"colorspace": "smpte170m"}},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:min-keyint=12:open-gop=1:log-level=error"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "20", "lag-in-frames": "16", "cpu-used": "5"}},
    "mjpeg.mov": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "ten bits.mp4": {"pixel_format": "yuv420p10le"},
    "prores.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "lossless.mov": {"codec": "png", "pixel_format": "rgb24"},
    "odd width.mkv": {"codec": "mpeg4", "width": 97},
    "odd height.mkv": {"codec": "mpeg4", "height": 81},
    "odd.mp4": {"pixel_format": "yuv444p", "width": 97, "height": 81},
    "sound.mp4": {"sound": True, "options": {"g": "12", "bf": "2"}},
    "a:b %d.mp4": {"frames": 2},
    "one.mp4": {"frames": 1},
    **{f"turned {angle}.mp4": {"frames": 5, "turned": angle} for angle in (90, 180, -90, 45, 135)},
}


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of `FILES`, made once."""
    directory = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        file = directory / name
        return file if file.exists() else write_video(file, **FILES[name])

    return make


def opencv_frames(file: Path) -> list[np.ndarray]:
    """(3,H,W) RGB of every frame, as OpenCV reads them."""
    capture, frames = cv2.VideoCapture(str(file)), []
    while True:
        there, pixels = capture.read()
        if not there:
            return frames
        frames.append(pixels[..., ::-1].transpose(2, 0, 1))


def assert_same(frames: list[torch.Tensor], expected: list[np.ndarray]) -> None:
    for frame, pixels in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.numpy(), pixels)


# --- which frame -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_frames_are_opencvs_forwards_and_backwards(video: Callable[[str], Path], name: str) -> None:
    file = video(name)
    expected = opencv_frames(file)
    assert len(expected) == FILES[name].get("frames", 40)
    source = VideoFrames(file, cache_limit=3)
    assert len(source) == len(expected)
    assert source.size == expected[0].shape[:0:-1]
    order = [*range(len(expected)), *reversed(range(len(expected)))]
    for i in order:
        (frame,) = source.frames([i])
        assert (frame.dtype, frame.is_contiguous()) == (torch.uint8, True)
        np.testing.assert_array_equal(frame.numpy(), expected[i])
        if not FILES[name].get("turned"):
            assert read_number(frame.numpy()) == i


@settings(max_examples=60)
@given(
    name=st.sampled_from(["long.mp4", "open.mp4", "open.mkv", "uneven.mp4", "mpeg4.mp4", "stream.ts", "refresh.mp4"]),
    requests=st.lists(st.lists(st.integers(0, 39), max_size=4), max_size=6),
    limit=st.integers(1, 6),
)
def test_any_order_gives_the_same_frames(
    video: Callable[[str], Path], name: str, requests: list[list[int]], limit: int
) -> None:
    file = video(name)
    source, expected = VideoFrames(file, limit), opencv_frames(file)
    for indices in requests:
        assert_same(source.frames(indices), [expected[i] for i in indices])
        assert len(source._cache) <= limit


def test_threads_take_turns(video: Callable[[str], Path]) -> None:
    source = VideoFrames(video("open.mp4"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.RandomState(seed).randint(0, 40, 25):
            (frame,) = source.frames([int(i)])
            if read_number(frame.numpy()) != i:
                wrong.append(int(i))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("name", "stand_alone"), [("long.mp4", True), ("short.mp4", True), ("open.mp4", False), ("hevc.mp4", False)]
)
def test_keyframes_that_do_not_stand_alone_are_noticed(
    video: Callable[[str], Path], name: str, stand_alone: bool
) -> None:
    assert VideoFrames(video(name)).stand_alone == stand_alone


@pytest.mark.parametrize("shift", [-7, -1, 5])
def test_edit_lists_are_followed(tmp_path: Path, shift: int) -> None:
    """MP4 hides frames before time 0 by an edit list, and shifts later ones; the sound's times do not matter."""
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    file = tmp_path / "edited.mp4"
    with av.open(str(file), "w", container_options=options) as container:
        stream = cast(av.VideoStream, container.add_stream("libx264", rate=25, options={"g": "12", "bf": "3"}))
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(31):
            frame = None
            if i < 30:
                frame = av.VideoFrame.from_ndarray(numbered_picture(96, 80, i)).reformat(format="yuv420p")
                frame.pts, frame.time_base = i, Fraction(1, 25)
            for packet in stream.encode(frame):
                assert packet.pts is not None
                assert packet.dts is not None
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                container.mux(packet)
    source = VideoFrames(file, cache_limit=2)
    hidden = max(-shift, 0)
    assert len(source) == 30 - hidden
    expected = opencv_frames(file)
    for i in (0, len(source) - 1, 13, 12, 3, 0):
        (frame,) = source.frames([i])
        assert read_number(frame.numpy()) == i + hidden
        np.testing.assert_array_equal(frame.numpy(), expected[i])


def test_repeated_indices_and_none(video: Callable[[str], Path]) -> None:
    source = VideoFrames(video("long.mp4"))
    assert source.frames([]) == []
    assert [read_number(frame.numpy()) for frame in source.frames([7, 3, 7, 7, 0])] == [7, 3, 7, 7, 0]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each frame was decoded."""
    counts: Counter[int] = Counter()
    keep = VideoFrames._keep

    def count(self: VideoFrames, number: int, frame: av.VideoFrame) -> None:
        counts[number] += 1
        keep(self, number, frame)
        assert len(self._cache) <= self.cache_limit

    monkeypatch.setattr(VideoFrames, "_keep", count)
    return counts


def test_a_video_that_fits_is_decoded_once(video: Callable[[str], Path], decoded: Counter[int]) -> None:
    source = VideoFrames(video("open.mp4"), cache_limit=40)
    for i in [*range(40), *reversed(range(40)), 5, 30, 0, 39]:
        source.frames([i])
    assert decoded == dict.fromkeys(range(40), 1)


@pytest.mark.parametrize("limit", [4, 10])
def test_backwards_decodes_a_stretch_once_for_all_that_is_kept(
    video: Callable[[str], Path], decoded: Counter[int], limit: int
) -> None:
    source = VideoFrames(video("long.mp4"), cache_limit=limit)  # 40 frames after one keyframe
    for i in [*range(40), *reversed(range(39))]:
        source.frames([i])
    assert max(decoded.values()) <= 40 // limit
    assert sum(decoded.values()) <= 40 * (40 // limit + 1) // 2 + 40


def test_a_batch_backwards_needs_one_pass(video: Callable[[str], Path], decoded: Counter[int]) -> None:
    source = VideoFrames(video("long.mp4"), cache_limit=1)
    source.frames(range(39, 19, -1))
    assert max(decoded[i] for i in range(1, 40)) == 1


def test_frame_bytes_are_what_a_frame_takes(video: Callable[[str], Path]) -> None:
    assert VideoFrames(video("long.mp4")).frame_bytes == pytest.approx(96 * 80 * 1.5, rel=0.4)  # rows are padded
    assert VideoFrames(video("long.mp4")).cache_limit == FEWEST


# --- colours ---------------------------------------------------------------------------------------------------------

LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # red, blue by matrix number


def exact_rgb(yuv: tuple[int, int, int], matrix: int, full: bool) -> np.ndarray:
    """RGB 0..255 in float64 by H.273."""
    red, blue = LUMA[matrix]
    if full:
        y, u, v = yuv[0] / 255, (yuv[1] - 128) / 255, (yuv[2] - 128) / 255
    else:
        y, u, v = (yuv[0] - 16) / 219, (yuv[1] - 128) / 224, (yuv[2] - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.clip(255 * np.array([r, g, b]), 0, 255)


def flat_frame(yuv: tuple[int, int, int], size: tuple[int, int], matrix: int, color_range: int) -> av.VideoFrame:
    frame = av.VideoFrame(*size, "yuv420p")
    for plane, level in zip(frame.planes, yuv, strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, color_range
    return frame


YUV = st.tuples(st.integers(16, 235), st.integers(16, 240), st.integers(16, 240))
SIZES = st.sampled_from([(64, 48), (66, 48), (63, 48), (64, 47), (33, 31), (2, 2)])


@given(yuv=YUV, size=SIZES, matrix=st.sampled_from([1, 9]), color_range=st.sampled_from([0, 1, 2]))
def test_tagged_colours_are_rounded_exactly(
    yuv: tuple[int, int, int], size: tuple[int, int], matrix: int, color_range: int
) -> None:
    pixels = to_rgb(flat_frame(yuv, size, matrix, color_range), VideoReformatter()).double().numpy()
    assert pixels.shape == (3, size[1], size[0])
    expected = exact_rgb(yuv, matrix, full=color_range == 2)
    assert np.abs(pixels - expected[:, None, None]).max() < 0.53  # half a level, and swscale's fixed point


@given(yuv=YUV, size=SIZES, matrix=st.sampled_from([2, 5, 6]), color_range=st.sampled_from([0, 1, 2]))
def test_bt601_and_untagged_colours_are_as_near_as_opencvs(
    yuv: tuple[int, int, int], size: tuple[int, int], matrix: int, color_range: int
) -> None:
    pixels = to_rgb(flat_frame(yuv, size, matrix, color_range), VideoReformatter()).double().numpy()
    expected = exact_rgb(yuv, 5, full=color_range == 2)
    assert np.abs(pixels - expected[:, None, None]).max() < 4  # 3.4 measured: OpenCV has swscale's fast conversion


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_our_own_videos_keep_their_colours(tmp_path: Path, codec: Any) -> None:
    colours = torch.randint(0, 256, (60, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    flat = colours[:, :, None, None].expand(60, 3, 64, 96)
    write_frames([flat], tmp_path / "flat.mp4", fps=25, codec=codec, quality=1)
    frames = torch.stack(VideoFrames(tmp_path / "flat.mp4").frames(range(60)))
    assert (frames.int() - flat.int()).abs().max() <= 2


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "full_body_video.mp4"])
def test_our_own_videos_say_where_chroma_is(tmp_path: Path, name: str) -> None:
    """Amid its 2×2 pixels. Who takes it for beside the left ones, as where nothing is said, has colours half a pixel
    off: 35 dB."""
    x, y = torch.arange(96.0), torch.arange(64.0)[:, None]
    wave = 60 * torch.sin(x / 4 + y / 12)
    frames = (torch.stack([128 + wave, 128 - wave * 0.3, 128 - wave]).round().to(torch.uint8))[None].repeat(3, 1, 1, 1)
    if name == "full_body_video.mp4":
        pack.write_video(tmp_path, [frames], fps=25, quality=1)
    else:
        write_frames([frames], tmp_path / name, fps=25, codec=cast(Any, name[:4]), quality=1)
    read = torch.stack(VideoFrames(tmp_path / name).frames(range(3)))
    assert (read.float() - frames.float()).square().mean() < 255**2 / 10**4.3


# --- files that cannot be used ---------------------------------------------------------------------------------------


def test_colours_that_cannot_be_converted_are_told(tmp_path: Path) -> None:
    """Those of YCgCo, say, of which swscale knows nothing."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", 25))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = 8
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"a\.mp4: the colours of frame 0 cannot be converted .*; convert the video"):
        VideoFrames(tmp_path / "a.mp4").frames([0])


def test_tags_need_not_be_utf_8(tmp_path: Path) -> None:
    file = write_video(tmp_path / "a.mkv", 3, container_options={"write_crc32": "0"}, title="Kunstler")
    file.write_bytes(file.read_bytes().replace(b"Kunstler", b"K\xfcnstle"))
    assert len(VideoFrames(file).frames(range(3))) == 3


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def raw_h264(file: Path) -> None:
    write_video(file.with_suffix(".h264")).rename(file)


def sound_only(file: Path) -> None:
    with av.open(str(file), "w") as container:
        container.add_stream("aac", rate=16000, layout="mono")
        container.start_encoding()


def two_sizes(file: Path) -> None:
    with av.open(str(file), "w", format="matroska") as container:
        stream = container.add_mux_stream("mpeg2video", rate=25, width=96, height=80)
        for part, (width, height) in enumerate([(96, 80), (64, 48)]):
            context = cast(VideoCodecContext, av.CodecContext.create("mpeg2video", "w"))
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
            for i in range(13):
                frame = None
                if i < 12:
                    frame = av.VideoFrame.from_ndarray(numbered_picture(width, height, i)).reformat(format="yuv420p")
                    frame.pts, frame.time_base = i, Fraction(1, 25)
                for packet in context.encode(frame):
                    assert packet.pts is not None
                    assert packet.dts is not None
                    packet.pts, packet.dts = packet.pts + 12 * part, packet.dts + 12 * part
                    packet.time_base, packet.stream = Fraction(1, 25), stream
                    container.mux(packet)


def same_times(file: Path) -> None:
    """Three frames a millisecond, which Matroska cannot tell apart."""
    write_video(
        file.with_suffix(".mkv"), 6, codec="mjpeg", pixel_format="yuvj420p", time_base=Fraction(1, 3000)
    ).rename(file)


def cut_start_first(file: Path) -> None:
    write_video(file, container_options={"movflags": "faststart"})
    cut(file, 0.6)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: None, r"bad\.mp4 is not a video that can be read \(No such file"),
    "empty": (lambda f: f.write_bytes(b""), r"bad\.mp4 is not a video that can be read \("),
    "text": (lambda f: f.write_text("hello" * 99), r"bad\.mp4 is not a video that can be read \("),
    "a directory": (lambda f: f.mkdir(), r"bad\.mp4 is not a video that can be read \(Is a directory"),
    "sound only": (sound_only, r"bad\.mp4 (has no video track|is not a video)"),
    "no times": (raw_h264, r"bad\.mp4 does not say when frame 0 is shown; convert it to MP4"),
    "same times": (same_times, r"bad\.mp4 shows frames 0 and 1 at one time; convert it to MP4"),
    "cut": (cut_start_first, r"bad\.mp4 is cut off or damaged at frame \d+; copy it again"),
    "cut index": (lambda f: cut(write_video(f), 0.6), r"bad\.mp4 is not a video that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told(tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.mp4"
    BAD[name][0](file)
    with pytest.raises(InputError, match=BAD[name][1]) as error:
        VideoFrames(file)
    assert "\n" not in str(error.value)


def test_another_size_is_told_when_it_comes(tmp_path: Path) -> None:
    two_sizes(tmp_path / "two.mp4")
    source = VideoFrames(tmp_path / "two.mp4")
    source.frames(range(11))
    with pytest.raises(InputError, match=r"two\.mp4: frame 12 is 64×48, but the first is 96×80: all frames of a video"):
        source.frames([20])
    assert read_number(source.frames([10])[0].numpy()) == 10


def test_damage_is_told_with_the_frame(tmp_path: Path) -> None:
    file = write_video(tmp_path / "damaged.mov", 10, codec="png", pixel_format="rgb24")
    with av.open(str(file)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.pos is not None]
    content = bytearray(file.read_bytes())
    position, size = places[6]
    content[position : position + size] = bytes(size)
    file.write_bytes(content)
    source = VideoFrames(file)
    with pytest.raises(InputError, match=r"damaged\.mov: frame 6 of 10 cannot be decoded; the file is damaged there"):
        source.frames([5, 6])
    assert [read_number(frame.numpy()) for frame in source.frames([9, 7, 5])] == [9, 7, 5]


def test_missing_threads_are_no_damage(video: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def starts_none(frames: VideoFrames) -> None:
        raise av.error.BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), "a.mp4")

    frames = VideoFrames(video("long.mp4"))
    monkeypatch.setattr(VideoFrames, "_decode_next", starts_none)
    with pytest.raises(BlockingIOError):
        frames.frames([30])
