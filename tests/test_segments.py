"""Videos encoded in segments, held against those by one encoder, by decoders that know nothing of either."""

import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.packet import Packet
from videos import decoded, opened, plane, smooth

from gpurender import rgb_to_nv12, segments, software_encoder
from gpurender.prefetch import prefetch
from gpurender.segments import Segment, encoded_in_segments, most_that_wait
from gpurender.software_encoder import SoftwareEncoder, segments_at_once
from gpurender.timings import Timings

CPU = torch.device("cpu")
SPS, PPS = 7, 8  # H.264, table 7-1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Frames of a segment."""
    monkeypatch.setattr(segments, "SEGMENT", 20)
    return 20


def write(out: Path, surfaces: torch.Tensor, at_once: int, batch: int = 16) -> list[int]:
    """A video of NV12 surfaces; how many frames were done at each step."""
    counts = []
    with av.open(str(out), "w") as container, pytest.MonkeyPatch.context() as patch:
        patch.setattr(software_encoder, "segments_at_once", lambda codec, device: at_once)
        encoder = SoftwareEncoder(container, "h264", None, Fraction(25), surfaces.device, True)
        for count, packets in encoder.packets(iter(surfaces.split(batch)), Timings()):
            counts.append(count)
            container.mux(packets)
    return counts


def psnr(path: Path, surfaces: torch.Tensor) -> float:
    """The least likely frame's, of luma."""
    height = surfaces.shape[1] * 2 // 3
    pairs = zip(decoded(path), surfaces.cpu().numpy(), strict=True)
    errors = [np.mean((plane(frame, 0) - surface[:height]) ** 2) for frame, surface in pairs]
    return 10 * np.log10(255**2 / max(errors))


@pytest.mark.parametrize("batch", [7, 16, 20, 64])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_segments_are_one_video(tmp_path: Path, short: int, device: torch.device, suffix: str, batch: int) -> None:
    surfaces = rgb_to_nv12(smooth(95, 320, 180)).to(device)
    one, many = tmp_path / f"one{suffix}", tmp_path / f"many{suffix}"
    write(one, surfaces, 1, batch)
    counts = write(many, surfaces, 3, batch)
    assert counts == list(range(1, 96))
    assert [frame.pts for frame in decoded(many)] == [frame.pts for frame in decoded(one)]
    assert psnr(many, surfaces) > psnr(one, surfaces) - 1 > 40
    headers, times = [], []
    for path in (one, many):
        with opened(path) as container:
            headers.append(container.streams.video[0].codec_context.extradata)
            packets = [packet for packet in container.demux(video=0) if packet.size]
        times.append([(p.dts, p.pts, p.is_keyframe) for p in packets])
        assert not {SPS, PPS} & {kind for packet in packets for kind in nal_unit_types(bytes(packet))}  # once, in front
    assert headers[0] == headers[1]
    assert [dts for dts, _, _ in times[1]] == [dts for dts, _, _ in times[0]]
    assert [i for i, (_, _, key) in enumerate(times[1]) if key] == list(range(0, 95, short))


def nal_unit_types(packet: bytes) -> Iterator[int]:
    """Of H.264, each unit behind its length, as containers have them."""
    while packet:
        length = int.from_bytes(packet[:4], "big")
        yield packet[4] & 31
        packet = packet[4 + length :]


def test_a_segment_is_as_long_as_x264_lets_a_keyframe_wait(tmp_path: Path) -> None:
    still = rgb_to_nv12(smooth(1)).expand(2 * segments.SEGMENT + 1, -1, -1)
    write(tmp_path / "a.mp4", still, 1, 250)
    with opened(tmp_path / "a.mp4") as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    assert keys == [0, segments.SEGMENT, 2 * segments.SEGMENT]


@pytest.mark.parametrize("count", [1, 20, 21])
def test_few_frames(tmp_path: Path, short: int, count: int) -> None:
    write(tmp_path / "a.mp4", rgb_to_nv12(smooth(count)), 4)
    assert len(decoded(tmp_path / "a.mp4")) == count


def numbered(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
    """Stands for an encoder: packets that hold their frames' numbers."""
    for part in frames:
        for value in part.flatten().tolist():
            yield packet_of(value)


def packet_of(value: int) -> Packet:
    packet = Packet()
    packet.pts = value
    return packet


def test_empty_batches_and_order(short: int) -> None:
    batches = iter(torch.arange(110).split([0, 9, 0, 50, 51, 0]))
    made = list(encoded_in_segments(batches, numbered, 3))
    assert [count for count, _ in made] == list(range(1, 111))
    assert [packet.pts for _, packets in made for packet in packets] == list(range(110))
    assert list(encoded_in_segments(iter([torch.empty(0)]), numbered, 3)) == []


@pytest.mark.parametrize(("nbytes", "at_once"), [(2**20, 16), (2**23, 2), (2**24 + 1, 1)])
def test_large_frames_are_given_a_few_at_a_time(nbytes: int, at_once: int) -> None:
    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        for part in frames:
            sizes.append(len(part))
            yield from map(packet_of, range(len(part)))

    sizes: list[int] = []
    batch = torch.empty(1, dtype=torch.uint8).expand(16, nbytes)
    assert len(list(encoded_in_segments(iter([batch]), encode, 2))) == 16
    assert sizes == [at_once] * (16 // at_once)


def test_no_more_frames_wait_than_are_allowed(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that hold still: the caller is stopped, too."""
    batch = torch.zeros(10, 8, dtype=torch.uint8)
    monkeypatch.setattr(segments, "WAITING_BYTES", 4 * batch.nbytes)
    may_go, asked, waits = threading.Event(), [], threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        for number in range(40):
            asked.append(number)
            if number == 4:
                waits.set()
            yield batch

    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        may_go.wait()
        for part in frames:
            yield from map(packet_of, range(len(part)))

    done: list[int] = []
    caller = threading.Thread(
        target=lambda: done.extend(count for count, _ in encoded_in_segments(batches(), encode, 3)), daemon=True
    )
    caller.start()
    assert waits.wait(10)
    caller.join(0.2)
    assert asked == list(range(5))  # four wait, and the fifth is in hand
    may_go.set()
    caller.join(10)
    assert done == list(range(1, 401))


@pytest.mark.parametrize("segment", [0, 40])
@pytest.mark.parametrize("room", [2**20, 1])
def test_an_encoder_that_fails_ends_it(short: int, monkeypatch: pytest.MonkeyPatch, room: int, segment: int) -> None:
    monkeypatch.setattr(segments, "WAITING_BYTES", room)

    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        for packet in numbered(first, frames):
            if first == segment:
                raise ValueError("no more")
            yield packet

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        list(encoded_in_segments(iter(torch.arange(1000).split(8)), encode, 3))
    assert threading.active_count() == before


@pytest.mark.parametrize("segment", [0, 40, 980])
def test_an_encoder_that_fails_as_it_is_flushed_ends_it(short: int, segment: int) -> None:
    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        yield from numbered(first, prefetch(frames, 8))  # which has taken all by then
        if first == segment:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(encoded_in_segments(iter(torch.arange(1000).split(8)), encode, 3))


def test_a_caller_that_stops_early_is_not_kept(short: int) -> None:
    given = []

    def batches() -> Iterator[torch.Tensor]:
        for batch in torch.arange(1000).split(8):
            given.append(batch)
            yield batch

    before = threading.active_count()
    packets = encoded_in_segments(batches(), numbered, 2)
    next(packets)
    packets.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before
    assert len(given) < 125


def test_as_many_segments_are_encoded_side_by_side_as_are_asked_for(short: int) -> None:
    together = threading.Barrier(3)

    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        together.wait(10)
        yield from numbered(first, frames)

    made = [packet.pts for _, packets in encoded_in_segments([torch.arange(60)], encode, 3) for packet in packets]
    assert made == list(range(60))


def test_frames_that_wait_are_not_encoded_where_the_caller_stops(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = threading.Event(), threading.Event()
    encoded: list[int] = []
    close = Segment.close

    def closed(segment: Segment, stop: bool = False) -> None:
        close(segment, stop)
        if stop:
            stopped.set()

    def encode(first: int, frames: Iterator[torch.Tensor]) -> Iterator[Packet]:
        for packet in numbered(first, frames):
            begun.set()
            assert stopped.wait(10)
            encoded.append(packet.pts or 0)
            yield packet

    def batches() -> Iterator[torch.Tensor]:
        yield from torch.arange(short).split(4)
        assert begun.wait(10)
        raise InterruptedError

    monkeypatch.setattr(Segment, "close", closed)
    with pytest.raises(InterruptedError):
        list(encoded_in_segments(batches(), encode, 1))
    assert encoded == [0, 1, 2, 3]  # those that the encoder had


@pytest.mark.parametrize(("nbytes", "most"), [(2**20, 100), (2**26, 6), (2**31, 2)])
def test_frames_for_all_encoders_wait_or_those_that_fit_the_memory(nbytes: int, most: int) -> None:
    batch = torch.empty(1, dtype=torch.uint8).expand(10, nbytes)
    assert most_that_wait(batch, 4) == most


def test_an_error_while_frames_are_made_ends_it(short: int) -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield from torch.arange(64).split(8)
        raise InterruptedError

    before = threading.active_count()
    with pytest.raises(InterruptedError):
        list(encoded_in_segments(batches(), numbered, 2))
    assert threading.active_count() == before


def test_x264_has_no_more_threads_than_make_it_faster(
    tmp_path: Path, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software_encoder, "usable_cores", lambda: 16)
    assert [software_encoder.x264_threads(height) for height in (90, 720, 1080, 2160)] == [3, 6, 9, 16]
    write(tmp_path / "one.mp4", rgb_to_nv12(smooth(1, 64, 720)), 1)
    write(tmp_path / "many.mp4", rgb_to_nv12(smooth(short + 1, 64, 720)), 2)
    told = [re.findall(rb" threads=([0-9]+)", (tmp_path / name).read_bytes()) for name in ("one.mp4", "many.mp4")]
    assert told == [[b"6"], [b"6", b"3"]]  # each encoder says so in its first packet
    monkeypatch.setattr(software_encoder, "usable_cores", lambda: 2)
    assert software_encoder.x264_threads(2160) == 2


def test_where_segments_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for cores, at_once in ((1, 1), (2, 1), (4, 1), (6, 2), (16, 6), (64, 24)):
        monkeypatch.setattr(software_encoder.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert segments_at_once("h264", cuda) == at_once
        assert (segments_at_once("h264", CPU), segments_at_once("hevc", cuda)) == (1, 1)
