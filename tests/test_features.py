"""Feature files: what is written is read back to the bit, by us and by those who only know the format."""

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import REPEATABLE_WIDTH, MakeTemplate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpurender.output as output_module
from gpurender import InputError, OutputError, load_audio_engine, load_features, make, make_features, write_features
from gpurender.cli import main
from gpurender.features import BLOCK
from gpurender.host import one_torch_thread
from gpurender.progress import Silent

SHAPES = [(512,), (2, 1024), (2048,), (16, 512), (8192,), (32, 16, 16), (32, 32, 32)]
SETTINGS = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_bin(path: Path) -> np.ndarray:
    """As the format is described, by nothing of ours."""
    header = json.loads(path.with_name(path.name + ".json").read_text())
    assert set(header) == {"num_frames", "feature_size", "shape"}
    assert header["num_frames"] == header["shape"][0]
    assert header["feature_size"] == np.prod(header["shape"][1:])
    return np.frombuffer(path.read_bytes(), "<f4").reshape(header["shape"])


@SETTINGS
@given(data=st.data(), count=st.integers(1, 3), rest=st.sampled_from(SHAPES))
def test_npy_to_bin_and_back_keeps_every_bit(
    tmp_path: Path, data: st.DataObject, count: int, rest: tuple[int, ...]
) -> None:
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    array = data.draw(arrays.arrays(np.float32, (count, *rest), elements=numbers, fill=numbers))
    np.save(tmp_path / "a.npy", array)
    make_features(tmp_path / "a.npy", tmp_path / "b.bin", overwrite=True)
    assert read_bin(tmp_path / "b.bin").tobytes() == array.tobytes()
    assert read_bin(tmp_path / "b.bin").shape == array.shape
    make_features(tmp_path / "b.bin", tmp_path / "c.npy", overwrite=True)
    back = np.load(tmp_path / "c.npy")
    assert (back.dtype, back.shape) == (np.float32, array.shape)
    assert back.tobytes() == array.tobytes()
    one, other = (load_features(tmp_path / name) for name in ("a.npy", "b.bin"))
    assert (one.mode, one.fps, len(one)) == (other.mode, other.fps, len(other))
    assert torch.equal(one.windows(0, count), other.windows(0, count))


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int16])
def test_other_numbers_become_float32(tmp_path: Path, kind: type) -> None:
    array = np.random.RandomState(2).uniform(0, 10, (5, 512)).astype(kind)
    np.save(tmp_path / "a.npy", np.asfortranarray(array))
    make_features(tmp_path / "a.npy", tmp_path / "b.bin")
    assert np.array_equal(read_bin(tmp_path / "b.bin"), array.astype(np.float32))


def test_a_double_beyond_float32_is_refused(tmp_path: Path) -> None:
    array = np.zeros((70, 512))
    array[66, 1] = 1e300
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"a\.npy: features of frame 66 hold NaN or infinity"):
        make_features(tmp_path / "a.npy", tmp_path / "b.bin")


def test_the_samples_bin_is_ours_to_the_byte(shared: Path, tmp_path: Path) -> None:
    sample = shared / "sample"
    make_features(sample / "aud_ave.npy", tmp_path / "aud_ave.bin")
    assert (tmp_path / "aud_ave.bin").read_bytes() == (sample / "aud_ave.bin").read_bytes()
    ours, theirs = (json.loads((place / "aud_ave.bin.json").read_text()) for place in (tmp_path, sample))
    assert ours == theirs


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_features_of_a_sound_render_the_same_frames(
    make_template: MakeTemplate, speech: Path, tiny_onnx: Path, tiny_encoder: Path, tmp_path: Path, suffix: str
) -> None:
    template, file = make_template(width=3 * REPEATABLE_WIDTH), tmp_path / f"speech{suffix}"
    written = make_features(speech, file, audio_encoder=tiny_encoder)
    heard = load_features(speech, encoder=load_audio_engine(tiny_encoder))
    assert len(written) == len(heard) == 36
    with one_torch_thread():
        assert torch.equal(load_features(file).windows(0, 36), heard.windows(0, 36))
    pictures = []
    for audio, sound, out in ((speech, None, "a.mkv"), (file, speech, "b.mkv")):
        make(template, audio, tmp_path / out, model=tiny_onnx, audio_encoder=tiny_encoder, sound=sound)
        with av.open(str(tmp_path / out)) as container:
            pictures.append([frame.to_ndarray() for frame in container.decode(video=0)])
            assert container.streams.audio[0].rate == 22050
    assert len(pictures[0]) == 36
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("seed", range(3))
def test_features_are_the_same_bits_however_many_threads_torch_has(tmp_path: Path, seed: int) -> None:
    """A chunk that is not full is rounded in other ways by two threads."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, 60_000 + 9_000 * seed).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16_000)
    before, written = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            make_features(tmp_path / "a.wav", tmp_path / f"{threads}.npy", template="avatar", device="cpu")
            written.append((tmp_path / f"{threads}.npy").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]


def test_damage_is_told(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 64_000)
    soundfile.write(tmp_path / "a.mp3", noise, 16_000)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    content[9000:10500] = bytes(1500)
    (tmp_path / "b.mp3").write_bytes(content)
    told = [make_features(tmp_path / f"{name}.mp3", tmp_path / f"{name}.npy", template="avatar").notes for name in "ab"]
    assert told[0] == []
    assert [note[:52] for note in told[1]] == ["what could not be decoded of the sound is left out: "]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_caller_changes_no_features(
    speech: Path, tiny_encoder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    def heard() -> torch.Tensor:
        return load_features(speech, encoder=load_audio_engine(tiny_encoder)).windows(0, 36)

    with one_torch_thread():
        expected = heard()
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(heard(), expected)


def test_autocast_of_a_caller_changes_no_render(
    make_template: MakeTemplate, speech: Path, tiny_unet: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    template, rendered = make_template(), []
    for out, enabled in (("a", False), ("b", True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            make(template, speech, tmp_path / out / "%d.png", model=tiny_unet, audio_encoder=tiny_encoder)
        rendered.append([file.read_bytes() for file in sorted((tmp_path / out).iterdir())])
    assert len(rendered[0]) == 36
    assert rendered[0] == rendered[1]


class Disconnected(Silent):
    def frames(self, batches: Iterable[torch.Tensor], total: int) -> Iterator[torch.Tensor]:
        yield next(iter(batches))
        raise ConnectionResetError


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_an_error_of_the_progress_is_not_the_files(tmp_path: Path, suffix: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 512), np.float32))
    features = load_features(tmp_path / "a.npy")
    with pytest.raises(ConnectionResetError):
        write_features(features, tmp_path / f"b{suffix}", progress=Disconnected())
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


def test_features_are_not_pickled(speech: Path, tiny_encoder: Path) -> None:
    features = load_features(speech, encoder=load_audio_engine(tiny_encoder))
    with pytest.raises(TypeError, match="Features cannot be copied or sent to another process: load it there"):
        pickle.dumps(features)


def test_more_than_a_block_of_frames(tmp_path: Path) -> None:
    array = np.random.RandomState(1).standard_normal((2 * BLOCK + 3, 512)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    write_features(load_features(tmp_path / "a.npy"), tmp_path / "b.bin")
    assert np.array_equal(read_bin(tmp_path / "b.bin"), array)


def test_a_file_may_replace_itself(tmp_path: Path) -> None:
    array = np.random.RandomState(1).standard_normal((9, 512)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    make_features(tmp_path / "a.npy", tmp_path / "a.npy", overwrite=True)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)


@pytest.mark.parametrize("taken", ["b.bin", "b.bin.json"])
def test_neither_file_appears_where_one_is_taken(tmp_path: Path, taken: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 512), np.float32))
    (tmp_path / taken).write_text("mine")
    with pytest.raises(OutputError, match=f"{taken} exists; give --overwrite"):
        make_features(tmp_path / "a.npy", tmp_path / "b.bin")
    assert sorted(os.listdir(tmp_path)) == ["a.npy", taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_numbers_do_not_stay_without_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 512), np.float32))
    real = output_module._link

    def link(source: str, path: Path, nameless: int | None) -> None:
        if Path(path).name == "b.bin.json":
            assert (tmp_path / "b.bin").exists()
            Path(path).write_text("somebody was quicker")
        real(source, path, nameless)

    monkeypatch.setattr(output_module, "_link", link)
    with pytest.raises(OutputError, match=r"b\.bin\.json has come up during the work"):
        make_features(tmp_path / "a.npy", tmp_path / "b.bin")
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.bin.json"]
    assert (tmp_path / "b.bin.json").read_text() == "somebody was quicker"


def test_an_error_in_the_middle_leaves_nothing(speech: Path, tmp_path: Path) -> None:
    calls = 0

    def encoder(mel: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        raise InputError("the encoder cannot go on.")

    features = load_features(speech, encoder=encoder)
    for name in ("a.npy", "a.bin"):
        with pytest.raises(InputError, match="cannot go on"):
            write_features(features, tmp_path / name)
    assert calls == 2
    assert os.listdir(tmp_path) == ["speech.wav"]


def test_from_the_command_line(
    make_template: MakeTemplate, speech: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_encoder, make_template() / "audio_encoder.pth")

    def run(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["features", *words], catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    code, said, progress = run("speech.wav", "--template", "anna", "--out", "a.bin", "--device", "cpu")
    assert (code, said) == (0, "wrote a.bin: ave features of 36 frames, (36, 512)\n")
    assert "heard 36 of 36 frames" in progress
    assert run("a.bin", "--out", "b.npy", "--quiet") == (0, "", "")
    assert np.load("b.npy").tobytes() == Path("a.bin").read_bytes()
    code, said, _ = run("speech.wav", "--audio-encoder", "anna/audio_encoder.pth", "--out", "b.npy", "--overwrite")
    assert code == 0
    assert np.load("b.npy").tobytes() == Path("a.bin").read_bytes()
