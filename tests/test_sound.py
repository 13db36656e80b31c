import itertools
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import corner, noise, tones
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loop import mel_of as librosa_mel  # the reference's front end, of librosa and SciPy

from gpurender import InputError, load_features
from gpurender.sound import decode_sound, mel_blocks, mel_filters
from gpurender.sound_track import check_sound

CPU = torch.device("cpu")


def samples_of(path: Path) -> np.ndarray:
    return np.concatenate(list(decode_sound(path)))


def mel_of(samples: np.ndarray, cuts: tuple[int, ...] = (), block_rows: int = 2400) -> np.ndarray:
    blocks = np.split(samples.astype(np.float32), sorted(cuts))
    return torch.cat(list(mel_blocks(iter(blocks), CPU, block_rows))).numpy()


# --- mel -------------------------------------------------------------------------------------------------------------


def test_mel_is_the_golden_one(shared: Path, device: torch.device) -> None:
    golden = np.load(shared / "golden" / "speech.npz")["mel"]
    mel = torch.cat(list(mel_blocks(decode_sound(shared / "sample" / "speech.wav"), device)))
    assert mel.device.type == device.type
    np.testing.assert_allclose(mel.cpu().numpy(), golden, atol=1e-3)


@pytest.mark.filterwarnings("ignore:n_fft=800 is too large")
@pytest.mark.parametrize(
    "wave",
    [
        tones(1.3, 16000)[:, 0],
        noise(20_001),
        noise(16_000, 1e-4),
        np.zeros(3210, np.float32),
        np.sign(tones(0.5, 16000)[:, 0]),
        np.eye(1, 4000, 1999, dtype=np.float32)[0],
        noise(1),
        noise(199),
        noise(200),
        noise(401),
    ],
    ids=["tones", "noise", "faint", "silence", "clipped", "click", "1", "199", "200", "401"],
)
def test_mel_is_librosas(wave: np.ndarray) -> None:
    np.testing.assert_allclose(mel_of(wave), librosa_mel(wave), atol=1e-3)


def test_mel_filters_are_librosas() -> None:
    oracle = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    np.testing.assert_allclose(mel_filters().numpy(), oracle, atol=1e-7)


@settings(max_examples=60)
@given(st.integers(0, 5000), st.lists(st.integers(0, 5000), max_size=6), st.integers(1, 30))
def test_mel_does_not_depend_on_how_samples_are_cut(count: int, cuts: list[int], block_rows: int) -> None:
    wave = noise(count)
    blockwise = mel_of(wave, tuple(min(cut, count) for cut in cuts), block_rows)
    assert blockwise.shape == (1 + count // 200, 80)
    np.testing.assert_allclose(blockwise, mel_of(wave), atol=1e-5)


def test_mel_blocks_are_bounded() -> None:
    blocks = list(mel_blocks(iter([noise(20_399)]), CPU, 10))
    assert {len(block) for block in blocks[:-1]} == {10}
    assert len(blocks[-1]) <= 11


def test_ten_minutes_need_little_memory() -> None:
    wave = noise(1024)
    tracemalloc.start()
    try:
        rows = sum(len(block) for block in mel_blocks(itertools.repeat(wave, 9375), CPU))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 1 + 10 * 60 * 80
    assert peak < 30e6


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_mixing_and_resampling_are_librosas(tmp_path: Path, rate: int, channels: int) -> None:
    soundfile.write(tmp_path / "a.wav", tones(0.7, rate, channels), rate, subtype="FLOAT")
    oracle, _ = librosa.load(tmp_path / "a.wav", sr=16000, res_type="soxr_hq")
    samples = samples_of(tmp_path / "a.wav")
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, oracle, atol=2e-6)


@pytest.mark.parametrize(
    ("rate", "count"),
    [(48_000, 49_798), (44_100, 45_751), (11_025, 7_028), (192_000, 65_537), (44_100, 1)],
)
def test_there_are_as_many_samples_as_librosas(tmp_path: Path, rate: int, count: int) -> None:
    """Rounded up: where that is a multiple of 200, the mel has a row more, and there may be one frame more."""
    soundfile.write(tmp_path / "a.wav", noise(count), rate, subtype="FLOAT")
    oracle, _ = librosa.load(tmp_path / "a.wav", sr=16000, res_type="soxr_hq")
    np.testing.assert_allclose(samples_of(tmp_path / "a.wav"), oracle, atol=2e-6)


def write_with_av(path: Path, wave: np.ndarray | None, rate: int = 44100, pictures: int = 0) -> None:
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", 25) if pictures else None
        audio = out.add_stream("aac", rate, layout="mono") if wave is not None else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for _ in range(pictures):
                out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), "rgb24")))
            out.mux(video.encode())
        if audio is not None and wave is not None:
            frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
            frame.sample_rate, frame.pts = rate, 0
            out.mux(audio.encode(frame))
            out.mux(audio.encode())


LOSSLESS = {"int16.wav": "PCM_16", "int24.wav": "PCM_24", "float32.wav": "FLOAT", "uint8.wav": "PCM_U8", "a.flac": None}
COMPRESSED = ["a.ogg", "a.mp3", "a.m4a", "video.mp4", "video.mkv"]


@pytest.mark.parametrize("name", [*LOSSLESS, *COMPRESSED])
def test_formats_sound_alike(tmp_path: Path, name: str) -> None:
    wave = tones(1.5, 44100)[:, 0]
    soundfile.write(tmp_path / "reference.wav", wave, 44100, subtype="FLOAT")
    if name.endswith((".m4a", ".mp4", ".mkv")):
        write_with_av(tmp_path / name, wave, pictures=0 if name.endswith(".m4a") else 5)
    else:
        soundfile.write(tmp_path / name, wave, 44100, subtype=LOSSLESS.get(name))
    reference = load_features(tmp_path / "reference.wav", encoder=corner)
    features = load_features(tmp_path / name, encoder=corner)
    assert abs(len(features) - len(reference)) <= 1
    assert features.sound == features.source == tmp_path / name
    original, decoded = samples_of(tmp_path / "reference.wav"), samples_of(tmp_path / name)
    shorter = min(len(original), len(decoded))
    error = np.sqrt(np.mean((original[:shorter] - decoded[:shorter]) ** 2))
    assert error < (0.005 if name in LOSSLESS else 0.05)  # of tones of 0.25


def test_blocks_of_decoded_sound_are_small(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tones(20, 16000), 16000)
    assert max(len(block) for block in decode_sound(tmp_path / "a.wav")) < 16000


def test_joined_mono_and_stereo_mp3_plays_on(tmp_path: Path) -> None:
    for channels in (1, 2):
        soundfile.write(tmp_path / f"{channels}.mp3", tones(1, 16000, channels), 16000)
    joined = tmp_path / "joined.mp3"
    joined.write_bytes(b"".join((tmp_path / f"{channels}.mp3").read_bytes() for channels in (1, 2)))
    assert len(samples_of(joined)) == pytest.approx(32000, abs=3000)


def test_a_name_with_a_colon_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "take:1.wav", tones(0.5, 16000), 16000)
    monkeypatch.chdir(tmp_path)
    assert len(load_features("take:1.wav", encoder=corner)) == 11


# --- bad input -------------------------------------------------------------------------------------------------------


def cut_flac(path: Path) -> None:
    soundfile.write(path, noise(16000), 16000)
    path.write_bytes(path.read_bytes()[:9000])


def not_finite(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        wave = noise(16000)
        wave[9000] = value
        soundfile.write(path, wave, 16000, subtype="FLOAT")

    return write


def two_rates(path: Path) -> None:
    parts = []
    for rate in (16000, 24000):
        soundfile.write(path, tones(1, rate), rate)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


def of_unknown_kind(path: Path) -> None:
    """What FFmpeg has no decoder for, as Apple's spatial audio."""
    write_with_av(path, noise(16000), 16000)
    path.write_bytes(path.read_bytes().replace(b"mp4a", b"apac").replace(b"esds", b"free"))


def without_channels(path: Path) -> None:
    soundfile.write(path, noise(16000), 16000)
    content = bytearray(path.read_bytes())
    content[22:24] = bytes(2)
    path.write_bytes(content)


BAD_SOUNDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent.wav": (lambda path: None, "absent.wav: there is no such sound or feature file"),
    "directory": (os.mkdir, "directory is a directory"),
    "empty.wav": (lambda path: path.write_bytes(b""), "empty.wav is not sound that can be decoded"),
    "text.wav": (lambda path: path.write_text("la la la " * 99), "text.wav is not sound that can be decoded"),
    "no samples.wav": (lambda path: soundfile.write(path, noise(0), 16000), "the sound track is empty"),
    "cut.flac": (cut_flac, r"cut.flac: the sound breaks off after 0\.\d\d s"),
    "nan.wav": (not_finite(np.nan), r"nan.wav: the sound holds NaN or infinity after 0\.\d\d s"),
    "infinity.wav": (not_finite(np.inf), r"the sound holds NaN or infinity after 0\.\d\d s"),
    "silent.mp4": (lambda path: write_with_av(path, None, pictures=5), "silent.mp4 has no sound track"),
    "unknown.m4a": (of_unknown_kind, "unknown.m4a has a sound track that FFmpeg cannot decode; convert it to WAV"),
    "nobody.wav": (
        without_channels,
        r"nobody.wav: the sound breaks off after 0\.00 s",
    ),
    "rates.mp3": (two_rates, "the sound changes its sample rate"),
}


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_bad_sounds_are_told(tmp_path: Path, name: str) -> None:
    write, words = BAD_SOUNDS[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=words):
        load_features(tmp_path / name, encoder=corner)


def test_tags_need_not_be_utf_8(tmp_path: Path) -> None:
    wave = noise(16000)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    content = (tmp_path / "a.wav").read_bytes()
    tag = b"LIST" + (22).to_bytes(4, "little") + b"INFOIART" + (9).to_bytes(4, "little") + b"K\xfcnstler\0\0"
    whole = b"RIFF" + (len(content) - 8 + len(tag)).to_bytes(4, "little") + content[8:] + tag
    (tmp_path / "b.wav").write_bytes(whole)
    np.testing.assert_array_equal(samples_of(tmp_path / "b.wav"), wave)
    check_sound(tmp_path / "b.wav")


def test_decoding_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such sound file"):
        next(iter(decode_sound(tmp_path / "absent.wav")))


def test_a_cut_mp3_plays_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, tones(2, 16000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 16000 * 0.5 < len(samples_of(path)) < 16000 * 1.5


def test_errors_while_samples_are_read_pass_through() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield noise(1000)
        raise InputError("broken off")

    with pytest.raises(InputError, match="broken off"):
        list(mel_blocks(broken(), CPU))
