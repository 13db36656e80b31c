"""Encoded pictures into containers: x264's, x265's and SVT-AV1's bytes stand in for NVENC's, which look the same."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.video.codeccontext import VideoCodecContext

from gpurender.elementary import ElementaryTrack, begins_anew, obu_types
from gpurender.software_encoder import LIBRARIES, Codec, scheduling_kept

RATE = Fraction(30000, 1001)
COUNT, GOP = 23, 10


def encoded(codec: Codec, b_frames: int, count: int = COUNT) -> list[tuple[bytes, int, bool]]:
    """Grey pictures that grow lighter, with parameter sets in the stream and no colour tags, as NVENC gives them."""
    context = cast(VideoCodecContext, av.CodecContext.create(LIBRARIES[codec].name, "w"))
    context.width, context.height, context.pix_fmt = 96, 64, "yuv420p"
    context.time_base, context.framerate = 1 / RATE, RATE
    context.options = {
        "h264": {"bf": str(b_frames), "g": str(GOP), "b-pyramid": "none", "b_strategy": "0", "sc_threshold": "0"},
        "hevc": {"x265-params": f"log-level=error:bframes={b_frames}:keyint={GOP}:b-adapt=0:b-pyramid=0:scenecut=0"},
        "av1": {"preset": "10", "g": str(GOP), "svtav1-params": "pred-struct=1"},
    }[codec]
    packets = []
    for number in range(count):
        frame = av.VideoFrame.from_ndarray(np.full((96, 96), 128, np.uint8), "yuv420p")
        np.frombuffer(frame.planes[0], np.uint8)[:] = 20 + 8 * number  # pyright: ignore
        frame.pts = number
        with scheduling_kept():
            packets += context.encode(frame)
    packets += context.encode(None)
    return [(bytes(packet), cast(int, packet.pts), packet.is_keyframe) for packet in packets]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(
    ("codec", "b_frames"), [("h264", 0), ("h264", 2), ("h264", 3), ("hevc", 0), ("hevc", 2), ("av1", 0)]
)
def test_pictures_become_a_video(tmp_path: Path, codec: Codec, b_frames: int, suffix: str) -> None:
    if (codec, suffix) == ("av1", "mov"):
        pytest.skip("AV1 does not go into .mov")
    pictures = encoded(codec, b_frames)
    assert ([pts for _, pts, _ in pictures] != sorted(pts for _, pts, _ in pictures)) == (b_frames > 0)
    out = tmp_path / f"a.{suffix}"
    with av.open(str(out), "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        track = ElementaryTrack(container, codec, RATE, (96, 64), delay=b_frames)
        for data, number, _ in pictures:
            container.mux(track.packets(data, number))
    with av.open(str(out)) as container:
        video = container.streams.video[0]
        context = video.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert (context.width, context.height) == (96, 64)
        assert video.average_rate == pytest.approx(RATE, abs=0.02 if suffix == "mkv" else 1e-9)
        if suffix != "mkv":
            assert context.codec_tag == {"h264": "avc1", "hevc": "hvc1", "av1": "av01"}[codec]
        frames = list(container.decode(video))
    assert len(frames) == COUNT
    assert [frame.time for frame in frames] == pytest.approx([i / float(RATE) for i in range(COUNT)], abs=0.0015)
    greys = [frame.to_ndarray()[:64].mean() for frame in frames]
    assert all(6 < lighter - darker < 10 for darker, lighter in pairwise(greys))
    assert {frame.colorspace for frame in frames} == {1}
    with av.open(str(out)) as container:  # one can begin at each keyframe, and at no other
        keys = [packet.pts for packet in container.demux(video=0) if packet.is_keyframe and packet.size]
    assert len(keys) == sum(key for *_, key in pictures) >= 2


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_keyframes_are_told_by_their_bytes(codec: Codec) -> None:
    pictures = encoded(codec, 0)
    assert [begins_anew(data, codec) for data, *_ in pictures] == [key for *_, key in pictures]
    assert not begins_anew(b"", codec)


@pytest.mark.parametrize(("kind", "key"), [(1, False), (15, False), (16, True), (20, True), (21, True), (22, False)])
def test_kinds_of_hevc_pictures_where_decoding_can_begin(kind: int, key: bool) -> None:
    """16 to 21: BLA, IDR and CRA pictures (H.265, table 7-1)."""
    assert begins_anew(b"\0\0\1" + bytes([kind << 1, 1]), "hevc") == key
    assert not begins_anew(bytes([kind << 1, 1]) + b"\0\0\1", "hevc")


def test_obus_may_have_an_extension_byte() -> None:
    assert obu_types(bytes([0x0E, 0x00, 0x01, 0xAA, 0x32, 0x01, 0xBB])) == [1, 6]


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\x0a\xff", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff", b"\x12\x00\x32"])
def test_broken_obus_end(data: bytes) -> None:
    assert len(obu_types(data)) <= len(data)
