import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import corner, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender import Features, InputError, load_audio_encoder, load_features
from gpurender.audio import mel_starts
from gpurender.network import FRAME_RATES, WINDOW_SHAPES, Mode
from gpurender.sound import decode_sound, mel_blocks

FEATURE_SHAPES: dict[Mode, tuple[int, ...]] = {"ave": (512,), "hubert": (2, 1024), "wenet": (16, 512)}


# --- independent re-statements ---------------------------------------------------------------------------------------


def naive_windows(features: np.ndarray) -> np.ndarray:
    """(N,16,D): features [i-8, i+8) of every i, zeros outside."""
    windows = np.zeros((len(features), 16, features[0].size), np.float32)
    for i in range(len(features)):
        for k in range(16):
            if 0 <= i - 8 + k < len(features):
                windows[i, k] = features[i - 8 + k].ravel()
    return windows


def naive_starts(mel_rows: int) -> list[int]:
    count = int((mel_rows - 16) / 80 * 25) + 2
    return [min(int(80 * (i / 25)), mel_rows - 16) for i in range(count)]


def corners(mel: np.ndarray) -> np.ndarray:
    """What `corner` must hear: a feature a frame, the first and the last twice."""
    features = [mel[start : start + 16].T.ravel()[:512] for start in naive_starts(len(mel))]
    return np.stack([features[0], *features, features[-1]])


def heard(features: Features) -> np.ndarray:
    """(N,512): the feature at each frame, the ninth of its window."""
    return features.windows(0, len(features)).reshape(len(features), 16, -1)[:, 8].cpu().numpy()


def mel_of(samples: np.ndarray) -> np.ndarray:
    return torch.cat(list(mel_blocks(iter([samples]), torch.device("cpu")))).numpy()


# --- features of sound -----------------------------------------------------------------------------------------------


def test_golden_features_and_windows(shared: Path, seeded_encoder: Path, device: torch.device) -> None:
    golden = np.load(shared / "golden" / "speech.npz")
    tolerance = 1e-4 * np.ptp(golden["features"])
    encoder = load_audio_encoder(seeded_encoder).to(device)
    features = load_features(shared / "sample" / "speech.wav", encoder=encoder, device=device)
    assert (features.mode, features.fps, len(features)) == ("ave", 25, len(golden["features"]))
    np.testing.assert_allclose(heard(features), golden["features"], atol=tolerance)
    for i, window in zip(golden["window_index"], golden["windows"], strict=True):
        ours = features.windows(int(i), int(i) + 1)
        assert ours.shape == (1, 32, 16, 16)
        assert ours.device.type == device.type
        np.testing.assert_allclose(ours[0].reshape(16, 512).cpu().numpy(), window, atol=tolerance)


def test_a_file_is_no_encoder_yet(speech: Path, seeded_encoder: Path) -> None:
    with pytest.raises(InputError, match="load_audio_engine makes one of its file"):
        load_features(speech, encoder=seeded_encoder)  # pyright: ignore[reportArgumentType]


def test_encoders_hear_in_float32(speech: Path) -> None:
    """Not in TF32, which cuDNN may take otherwise."""

    def encoder(mel: torch.Tensor) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return corner(mel)

    allowed: list[bool] = []
    heard(load_features(speech, encoder=encoder))
    assert set(allowed) == {False}


@pytest.mark.parametrize("fps", [None, 25])
def test_features_follow_the_formula(tmp_path: Path, fps: float | None) -> None:
    soundfile.write(tmp_path / "a.wav", noise(39_000), 16000, subtype="FLOAT")
    features = load_features(tmp_path / "a.wav", encoder=corner, fps=fps)
    expected = corners(mel_of(noise(39_000)))
    assert features.fps == 25
    assert len(features) == len(expected)
    np.testing.assert_allclose(heard(features), expected, atol=1e-5)
    windows = features.windows(0, len(features)).reshape(len(features), 16, 512)
    np.testing.assert_allclose(windows, naive_windows(expected), atol=1e-5)


@pytest.mark.parametrize("fps", [1, 12, 20, 24, 29.97, 30, 50, 60])
def test_at_another_rate_a_frame_hears_what_it_would_at_25(tmp_path: Path, fps: float) -> None:
    """Sixteen features 0.04 s apart, about its own moment."""
    soundfile.write(tmp_path / "a.wav", noise(39_000), 16000, subtype="FLOAT")
    encoder = CountingEncoder()
    features = load_features(tmp_path / "a.wav", encoder=encoder, fps=fps)
    mel = mel_of(noise(39_000))
    count = len(naive_starts(len(mel)))
    assert features.fps == fps
    assert len(features) == round((count + 2) * fps / 25)
    expected = np.zeros((len(features), 16, 512), np.float32)
    for i in range(len(features)):
        for k in range(16):
            number = i * 25 / fps - 8 + k
            if 0 <= number < count + 2:
                row = min(int(80 * (min(max(number - 1, 0), count - 1) / 25)), len(mel) - 16)
                expected[i, k] = mel[row : row + 16].T.ravel()[:512]
    windows = [features.windows(i, min(i + 7, len(features))) for i in range(0, len(features), 7)]
    np.testing.assert_allclose(torch.cat(windows).reshape(-1, 16, 512), expected, atol=1e-5)
    assert encoder.windows <= len(mel) - 15 + 10 * len(windows)  # a row is heard once, but for a few of each piece
    assert torch.equal(features.windows(1, 2), features.rows(1, 2))


def test_every_other_frame_at_50_is_one_at_25(speech: Path) -> None:
    usual, twice = (load_features(speech, encoder=corner, fps=fps) for fps in (25, 50))
    assert len(twice) == 2 * len(usual)
    assert torch.equal(twice.windows(0, len(twice))[::2], usual.windows(0, len(usual)))


@given(st.integers(16, 5000))
def test_window_starts_follow_the_formula(mel_rows: int) -> None:
    assert mel_starts(mel_rows).tolist() == naive_starts(mel_rows)


@pytest.mark.parametrize("count", [1, 2, 50, 800, 3040, 3199, 3200, 3360, 4000])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_short_sounds_give_frames(tmp_path: Path, count: int, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", noise(count), rate)
    features = load_features(tmp_path / "a.wav", encoder=corner)
    windows = features.windows(0, len(features))
    assert len(features) >= 4
    assert windows.shape == (len(features), 32, 16, 16)
    assert windows.isfinite().all()


def test_sound_shorter_than_a_window_goes_on_in_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(800), 16000, subtype="FLOAT")
    mel = np.full((16, 80), -4, np.float32)
    mel[:5] = mel_of(noise(800))
    features = load_features(tmp_path / "a.wav", encoder=corner)
    np.testing.assert_allclose(heard(features), corners(mel), atol=1e-5)


def test_silence_is_sound(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    assert (heard(load_features(tmp_path / "a.wav", encoder=corner)) == -4).all()


class CountingEncoder:
    def __init__(self) -> None:
        self.windows = 0

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        assert mel.shape[1:] == (1, 80, 16)
        assert mel.dtype == torch.float32
        assert mel.is_contiguous()
        self.windows += len(mel)
        return corner(mel)


@pytest.fixture(scope="module")
def long_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sounds") / "long.wav"
    soundfile.write(path, noise(8 * 16000), 16000)  # 4 chunks of features
    return path


def test_every_feature_is_computed_once_in_order(long_sound: Path) -> None:
    encoder = CountingEncoder()
    features = load_features(long_sound, encoder=encoder)
    assert encoder.windows == 0
    for start in range(0, len(features), 16):
        features.windows(start, min(start + 16, len(features)))
    assert encoder.windows == len(features) - 2


@pytest.mark.parametrize("before", [[], [(0, 1)], [(0, -1)], [(-3, -1)]])
def test_the_last_row_alone(long_sound: Path, before: list[tuple[int, int]]) -> None:
    features = load_features(long_sound, encoder=corner)
    count = len(features)
    expected = load_features(long_sound, encoder=corner).rows(0, count)[-1:]
    for start, stop in before:
        features.rows(start % count, count + stop if stop < 0 else stop)
    torch.testing.assert_close(features.rows(count - 1, count), expected, rtol=0, atol=0)


def test_features_far_back_are_forgotten(long_sound: Path) -> None:
    encoder = CountingEncoder()
    features = load_features(long_sound, encoder=encoder)
    for i in (0, 100, 190):
        features.windows(i, i + 1)
    before = encoder.windows
    features.windows(0, 1)
    assert encoder.windows > before


@given(st.data())
@settings(max_examples=15)
def test_any_order_of_reading_gives_the_same_windows(long_sound: Path, data: st.DataObject) -> None:
    features = load_features(long_sound, encoder=corner)
    samples = np.concatenate(list(decode_sound(long_sound)))
    expected = naive_windows(corners(mel_of(samples)))
    for _ in range(8):
        start = data.draw(st.integers(0, len(features) - 1))
        stop = data.draw(st.integers(start + 1, len(features)))
        windows = features.windows(start, stop).reshape(-1, 16, 512)
        np.testing.assert_allclose(windows, expected[start:stop], atol=1e-5)


@pytest.mark.parametrize("encoded", [63, 64, 65, 127, 128, 129])
def test_chunks_end_anywhere(tmp_path: Path, encoded: int) -> None:
    wave = noise(200 * (16 + -(-(encoded - 2) * 80 // 25)))
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    features = load_features(tmp_path / "a.wav", encoder=corner)
    assert len(features) == encoded + 2
    expected = naive_windows(corners(mel_of(wave)))
    for i in range(len(features)):
        np.testing.assert_allclose(features.windows(i, i + 1).reshape(16, 512), expected[i], atol=1e-5)


# --- feature files ---------------------------------------------------------------------------------------------------


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for tests of many examples."""
    return tmp_path_factory.mktemp("features")


@settings(max_examples=60)
@given(st.integers(1, 40), st.data())
def test_windows_are_the_rules(place: Path, count: int, data: st.DataObject) -> None:
    array = np.random.default_rng(count).standard_normal((count, 512)).astype(np.float32)
    features = load_features(save(place / "ave.npy", array))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    windows = features.windows(start, stop)
    assert windows.shape == (stop - start, 32, 16, 16)
    np.testing.assert_array_equal(windows.reshape(-1, 16, 512), naive_windows(array)[start:stop])


@pytest.mark.parametrize("count", [1, 3, 7, 20])
@pytest.mark.parametrize("mode", FEATURE_SHAPES)
@pytest.mark.parametrize("flat", [False, True], ids=["axes", "flat"])
def test_features_of_every_mode(tmp_path: Path, mode: Mode, count: int, flat: bool, device: torch.device) -> None:
    array = np.random.default_rng(1).standard_normal((count, *FEATURE_SHAPES[mode])).astype(np.float32)
    path = save(tmp_path / "a.npy", array.reshape(count, -1) if flat else array)
    features = load_features(path, device=device)
    assert (features.mode, features.fps, len(features)) == (mode, FRAME_RATES[mode], count)
    assert features.sound is None
    windows = features.windows(0, count)
    assert windows.device.type == device.type
    expected = naive_windows(array).reshape(count, *WINDOW_SHAPES[mode])
    np.testing.assert_array_equal(windows.cpu().numpy(), expected)


@pytest.mark.parametrize("mode", WINDOW_SHAPES)
def test_ready_windows_of_every_mode(tmp_path: Path, mode: Mode, device: torch.device) -> None:
    array = np.random.default_rng(1).standard_normal((3, *WINDOW_SHAPES[mode])).astype(np.float32)
    features = load_features(save(tmp_path / "a.npy", array), device=device)
    assert (features.mode, features.fps, len(features)) == (mode, FRAME_RATES[mode], 3)
    np.testing.assert_array_equal(features.windows(1, 3).cpu().numpy(), array[1:])


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4", "i2", "u1"])
def test_any_real_numbers_are_read(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(1).uniform(0, 9, (4, 512)).astype(dtype)
    windows = load_features(save(tmp_path / "a.npy", array)).windows(0, 4)
    assert windows.dtype == torch.float32
    np.testing.assert_array_equal(windows.reshape(4, 16, 512)[:, 8], array.astype(np.float32))


def test_columns_first_arrays_are_read(tmp_path: Path) -> None:
    array = np.asfortranarray(np.random.default_rng(1).standard_normal((9, 2, 1024)).astype(np.float32))
    windows = load_features(save(tmp_path / "a.npy", array)).windows(0, 9)
    np.testing.assert_array_equal(windows.reshape(9, 16, 2048), naive_windows(array))


def test_a_rate_can_be_given_for_feature_files(tmp_path: Path) -> None:
    features = load_features(save(tmp_path / "a.npy", np.ones((4, 512))), fps=30)
    assert (features.fps, len(features)) == (30, 4)
    assert repr(features) == "Features(a.npy: 4 frames of ave at 30 a second)"


def test_sample_npy_and_bin_are_the_same(shared: Path) -> None:
    npy, raw = (load_features(shared / "sample" / f"aud_ave.{suffix}") for suffix in ("npy", "bin"))
    assert len(npy) == len(raw) == 80
    assert torch.equal(npy.windows(0, 80), raw.windows(0, 80))
    expected = naive_windows(np.load(shared / "sample" / "aud_ave.npy"))
    np.testing.assert_array_equal(npy.windows(0, 80).reshape(80, 16, 512), expected)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 0), (3, 2), (0, 5), (4, 5)])
def test_windows_outside_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    features = load_features(save(tmp_path / "a.npy", np.ones((4, 512))))
    with pytest.raises(ValueError, match=r"are not within 0\.\.4"):
        features.windows(start, stop)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_sound_needs_an_encoder(speech: Path) -> None:
    with pytest.raises(InputError, match="needs an audio encoder: give --audio-encoder"):
        load_features(speech)


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf")])
def test_impossible_rates_are_told(speech: Path, fps: float) -> None:
    with pytest.raises(InputError, match=r"frames a second cannot be rendered; give a number above 0"):
        load_features(speech, encoder=corner, fps=fps)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    attack = Malicious(tmp_path / "attacked")
    for name, array in {"array": [attack], "scalar": attack}.items():
        np.save(tmp_path / f"{name}.npy", np.array(array, object), allow_pickle=True)
        with pytest.raises(InputError, match="is not a NumPy array file.*Python objects"):
            load_features(tmp_path / f"{name}.npy")
    np.array([attack], object).dump(tmp_path / "plain.npy")
    with pytest.raises(InputError, match="is not a NumPy array file"):
        load_features(tmp_path / "plain.npy")
    assert not (tmp_path / "attacked").exists()


def npy(*shape: int, cut: int | None = None) -> bytes:
    header = np.lib.format.magic(1, 0)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return (header + len(text).to_bytes(2, "little") + text.encode() + bytes(4 * int(np.prod(shape))))[:cut]


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04hello", npy(4, 512, cut=-1), npy(4, 512, cut=60), npy(4, 512).replace(b"}", b"{")],
    ids=["empty", "text", "zip", "short", "cut header", "wrong header"],
)
def test_files_that_are_no_arrays_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match="a.npy is not a NumPy array file"):
        load_features(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", ["(-2, 512)", f"({2**70}, 512)", "(True, 512)", "-" * 9000])
def test_headers_that_no_program_writes_are_told(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4096))
    with pytest.raises(InputError, match=r"a\.npy"):
        load_features(tmp_path / "a.npy")


def test_archives_of_arrays_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones((4, 512)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.npy is not a NumPy array file"):
        load_features(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["c8", "?", "U3", "M8[s]"])
def test_other_than_real_numbers_are_told(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(InputError, match="does not hold real numbers, but"):
        load_features(save(tmp_path / "a.npy", np.zeros((4, 512), dtype)))


@pytest.mark.parametrize(
    "shape", [(), (512,), (4, 511), (4, 1024), (0, 512), (0, 32, 16, 16), (4, 16, 16, 32), (4, 1, 1, 512), (512, 4)]
)
def test_wrong_shapes_are_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"has shape \(.*\). Features are \(N,512\) for ave.*ready windows"):
        load_features(save(tmp_path / "a.npy", np.zeros(shape, np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "at"), [((1100, 512), (1077, 3)), ((5, 2, 1024), (2, 1, 9)), ((2, 32, 16, 16), 1)])
def test_numbers_that_are_none_are_told(tmp_path: Path, shape: tuple[int, ...], at: Any, value: float) -> None:
    array = np.zeros(shape, np.float16)
    array[at] = value
    frame = at if isinstance(at, int) else at[0]
    with pytest.raises(InputError, match=f"features of frame {frame} hold NaN or infinity"):
        load_features(save(tmp_path / "a.npy", array))


GOOD_SHAPE = json.dumps({"shape": [4, 512]})


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        (None, 8192, "a.bin needs a.bin.json beside it"),
        ("shape: 4", 8192, "a.bin.json does not give a shape"),
        ("[4, 512]", 8192, "a.bin.json does not give a shape"),
        ('{"num_frames": 4}', 8192, "a.bin.json does not give a shape"),
        ('{"shape": 4}', 8192, "a.bin.json does not give a shape"),
        ('{"shape": [null, 512]}', 8192, "a.bin.json does not give a shape"),
        ('{"shape": [1e999, 512]}', 8192, "a.bin.json does not give a shape"),
        ('{"shape": []}', 8192, r"a.bin has shape \(\)\. Features are"),
        ('{"shape": [0, 512]}', 0, r"a.bin has shape \(0, 512\)\. Features are"),
        ('{"shape": [-4, -512]}', 8192, r"a.bin has shape \(-4, -512\)\. Features are"),
        ('{"shape": [2, -2, -256]}', 4096, r"a.bin has shape \(2, -2, -256\)\. Features are"),
        (json.dumps({"shape": [1] * 70}), 4, r"a.bin has shape \(1, 1, .{1,60}\. Features are"),
        (GOOD_SHAPE, 8191, r"a.bin has 8191 bytes, but shape \[4, 512\] of float32 takes 8192"),
        (GOOD_SHAPE, 8196, r"a.bin has 8196 bytes, but shape \[4, 512\] of float32 takes 8192"),
        (GOOD_SHAPE, 0, "a.bin has 0 bytes"),
        ('{"shape": [8, 256]}', 8192, r"has shape \(8, 256\). Features are"),
    ],
)
def test_bad_raw_files_are_told(tmp_path: Path, header: str | None, size: int, words: str) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(size))
    if header is not None:
        (tmp_path / "a.bin.json").write_text(header)
    with pytest.raises(InputError, match=words):
        load_features(tmp_path / "a.bin")
