"""Sound beside the pictures of a video, as a player hears it."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import pytest
import soundfile
from av.audio.stream import AudioStream
from videos import TICK, clicks, decoded, opened, smooth

from gpurender import InputError, sound_track, write_frames
from gpurender.software_encoder import SoftwareEncoder
from gpurender.sound import decode_sound


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
