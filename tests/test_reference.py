"""Reference sets: what is written, read as a port in another language would, and what comparing with one finds."""

import io
import json
import math
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import MakeTemplate, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpurender import InputError, OutputError, compare_frames, load_features, load_unet, make, open_reference
from gpurender import write_reference as write
from gpurender.reference_set import array_differences

FRAMES = 23
INDICES = [0, 7, 15, 22]


@pytest.fixture
def anna(make_template: MakeTemplate, tiny_onnx: Path) -> Path:
    path = make_template("anna", parsing=True)
    shutil.copy(tiny_onnx, path / "unet.onnx")
    return path


@pytest.fixture
def features(tmp_path: Path) -> Path:
    file = tmp_path / "aud.npy"
    np.save(file, np.random.RandomState(3).uniform(0, 3, (FRAMES, 512)).astype(np.float32))
    return file


@pytest.fixture
def stored(anna: Path, features: Path, tmp_path: Path) -> Path:
    write(anna, features, tmp_path / "set", frames=4)
    return tmp_path / "set"


def metadata_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "metadata.json").read_text("utf-8"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = metadata_of(path)
    change(metadata)
    (path / "metadata.json").write_text(json.dumps(metadata))


def hash_of(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def port_reads(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by a ZIP reader and the format's description alone: nothing is inflated or unpickled."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            stream = io.BytesIO(archive.read(entry))
            magic, major, minor, length = struct.unpack("<6sBBH", stream.read(10))
            assert (magic, major, minor) == (b"\x93NUMPY", 1, 0)
            header = stream.read(length).decode("ascii")
            assert "'descr': '<f4'" in header
            assert "'fortran_order': False" in header
            shape = tuple(int(n) for n in header.partition("(")[2].partition(")")[0].split(",") if n.strip())
            values = struct.unpack(f"<{math.prod(shape)}f", stream.read())
            arrays[entry.filename] = np.array(values, np.float32).reshape(shape)
    return arrays


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_a_set_holds(stored: Path, anna: Path, features: Path, tiny_unet: Path) -> None:
    metadata = metadata_of(stored)
    assert (metadata["format"], metadata["version"]) == ("gpurender reference set", 1)
    assert (metadata["frames"], metadata["fps"], metadata["width"], metadata["height"]) == (FRAMES, 25, 320, 240)
    assert (metadata["mode"], metadata["precision"], metadata["audio_encoder"]) == ("ave", "fp32", None)
    assert metadata["model"] == {"name": "unet.onnx", "sha256": hash_of(anna / "unet.onnx")}
    assert metadata["audio"] == {"name": "aud.npy", "sha256": hash_of(features)}
    assert metadata["template"] == {"name": "anna", "frames": 5, "order": "bounce", "start_frame": 0, "parsing": True}
    assert [sample["index"] for sample in metadata["samples"]] == INDICES
    assert [sample["template_frame"] for sample in metadata["samples"]] == [1, 0, 0, 1]  # of 1 2 3 4 3 2 1 0
    listed = {"metadata.json"}
    network = load_unet(tiny_unet).eval()
    windows = load_features(features)
    for sample in metadata["samples"]:
        for key in ("frame", "arrays"):
            listed.add(sample[key])
            assert sample[f"{key}_sha256"] == hash_of(stored / sample[key])
        assert Image.open(stored / sample["frame"]).size == (320, 240)
        arrays = port_reads(stored / sample["arrays"])
        assert list(arrays) == ["input.npy", "audio.npy", "output.npy"]
        shapes = {f"{name}.npy": tuple(array["shape"]) for name, array in metadata["arrays"].items()}
        assert {name: array.shape for name, array in arrays.items()} == shapes

        x0, y0, x1, y1 = sample["rect"]
        picture = cv2.imread(str(anna / f"full_body_img/{sample['template_frame']}.jpg"))
        assert picture is not None
        face = cv2.resize(picture[y0:y1, x0:x1], (328, 328), interpolation=cv2.INTER_CUBIC)[4:324, 4:324]
        whole = face.transpose(2, 0, 1).astype(np.float32) / 255
        assert np.abs(arrays["input.npy"][:3] - whole).max() < 1.1 / 255
        masked = whole.copy()
        masked[:, 5:310, 5:315] = 0
        assert np.abs(arrays["input.npy"][3:] - masked).max() < 1.1 / 255
        index = sample["index"]
        assert np.array_equal(arrays["audio.npy"], windows.windows(index, index + 1)[0].numpy())
        with torch.inference_mode():
            drawn = network(*(torch.from_numpy(arrays[name])[None] for name in ("input.npy", "audio.npy")))
        assert np.abs(arrays["output.npy"] - drawn[0].numpy()).max() < 1e-4
    assert {str(file.relative_to(stored)) for file in stored.rglob("*") if file.is_file()} == listed


def test_samples_are_found_by_their_frames(stored: Path) -> None:
    kept = open_reference(stored)
    assert [kept.position(sample.index) for sample in kept.samples] == [*range(len(kept))]
    for index in {*range(-1, kept.samples[-1].index + 2)} - {sample.index for sample in kept.samples}:
        with pytest.raises(ValueError, match=f"no sample of frame {index}"):
            kept.position(index)


def test_the_same_bytes_again(stored: Path, anna: Path, features: Path, tmp_path: Path) -> None:
    write(anna, features, tmp_path / "again", frames=4)
    for file in stored.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(stored)).read_bytes(), file


@pytest.mark.parametrize(("frames", "expected"), [(1, [0]), (2, [0, 22]), (99, list(range(23)))])
def test_evenly_spaced(anna: Path, features: Path, tmp_path: Path, frames: int, expected: list[int]) -> None:
    made = write(anna, features, tmp_path / "set", frames=frames, order="loop", start_frame=2, parsing=False)
    assert [sample.index for sample in made.samples] == expected
    samples = metadata_of(tmp_path / "set")["samples"]
    assert [sample["template_frame"] for sample in samples] == [(index + 2) % 5 for index in expected]


# --- compared --------------------------------------------------------------------------------------------------------


def test_pictures_of_the_render_are_equal(stored: Path, anna: Path, features: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "frames" / "%05d.png"
    make(anna, features, pattern, precision="fp32", device="cpu")
    for a, b in ((stored, pattern), (pattern.parent, stored)):
        comparison = compare_frames(a, b, min_psnr_db=math.inf, min_ssim=1.0)
        assert comparison.alike, str(comparison)
        assert list(comparison.figures) == INDICES
    wrong = tmp_path / "frames" / "00016.png"
    Image.fromarray(np.array(Image.open(wrong)) // 2).save(wrong)
    comparison = compare_frames(stored, pattern)
    assert (comparison.alike, comparison.below(), comparison.worst()) == (False, [15], [15])
    os.remove(tmp_path / "frames" / "00023.png")
    differences = compare_frames(stored, pattern, min_psnr_db=0, min_ssim=-1).differences()
    assert differences == ["A has 23 frames, B has 22", "B lacks frames 22"]
    assert compare_frames(stored, pattern, frames=15).alike


def test_a_video_of_the_avatar_is_alike(run: Run) -> None:
    np.save("aud.npy", np.random.RandomState(3).uniform(0, 3, (9, 512)).astype(np.float32))
    what = ("--template", "avatar", "--audio", "aud.npy")
    result = run("reference", *what, "--out", "set", "--frames", 3)
    assert result.exit_code == 0, result.output
    assert "wrote set: 3 of 9 frames of 1280×720" in result.stdout
    assert "drew 3 of 3 frames" in result.stderr
    assert run("make", *what, "--out", "a.mp4", "--precision", "fp32").exit_code == 0
    result = run("compare", "set", "a.mp4")
    assert result.exit_code == 0, result.output
    assert "compared 3 frames of 1280×720, whole frames" in result.stdout
    for part in ("face", "avatar"):
        result = run("compare", "set", "a.mp4", "--rect", part, "--min-psnr", 36)
        assert result.exit_code == 0, result.output


def test_an_altered_sample_is_found(stored: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stored, tmp_path / "other"))
    assert compare_frames(stored, other, min_psnr_db=math.inf, min_ssim=1, tolerance=0).alike
    sample = metadata_of(other)["samples"][2]
    file = other / sample["arrays"]
    with np.load(file) as arrays:
        changed = dict(arrays)
    changed["output"][1, 100, 200] += 0.25
    np.savez(file, **changed)
    with pytest.raises(InputError, match=r"00015.npz is not the file that metadata.json means: its sha256 is"):
        compare_frames(stored, other)
    edit(other, lambda metadata: metadata["samples"][2].update(arrays_sha256=hash_of(file)))
    comparison = compare_frames(stored, other)
    assert comparison.differences() == ["output is up to 0.25 apart (frame 15), more than 0.01"]
    assert comparison.arrays["input"] == (0, 0)
    assert comparison.as_dict()["arrays"]["output"] == {"largest": pytest.approx(0.25, abs=1e-6), "frame": 15}
    assert compare_frames(stored, other, tolerance=0.3).alike
    changed["output"][0, 0, 0] = np.nan
    np.savez(file, **changed)
    edit(other, lambda metadata: metadata["samples"][2].pop("arrays_sha256"))
    assert not compare_frames(stored, other, tolerance=0.3).alike


def test_a_set_of_another_implementation_needs_little(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "port").mkdir()
    for index in INDICES:
        shutil.copy(stored / f"frames/{index:05d}.png", tmp_path / f"port/{index}.png")
    few = [{"index": index, "frame": f"{index}.png"} for index in INDICES]
    minimal = {"format": "gpurender reference set", "version": 1, "samples": few}
    (tmp_path / "port/metadata.json").write_text(json.dumps(minimal))
    comparison = compare_frames(tmp_path / "port", stored, rect="face", min_psnr_db=math.inf)
    assert comparison.alike
    assert comparison.arrays == {}
    minimal["samples"] = [few[0] | {"rect": [0, 0, 12, 12]}, *few[1:]]  # of one face alone: the other set's are taken
    (tmp_path / "port/metadata.json").write_text(json.dumps(minimal))
    assert compare_frames(tmp_path / "port", stored, rect="face", min_psnr_db=math.inf).alike
    minimal["samples"] = few[1:]
    (tmp_path / "port/metadata.json").write_text(json.dumps(minimal))
    assert compare_frames(tmp_path / "port", stored).differences() == ["A lacks frames 0"]
    with pytest.raises(InputError, match=r"have no frame in common below frame 5"):
        compare_frames(tmp_path / "port", stored, frames=5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="another"), "is not that of a reference set"),
        (lambda m: m.update(version=2), "is of version 2; this program reads version 1"),
        (lambda m: m.update(frames=7), "sample 7 is not within the render's 7 frames"),
        (lambda m: m.update(frames="many"), "\"frames\" is 'many', not a number of at least 1"),
        (lambda m: m.update(fps=0), '"fps" is 0, not a number of at least 0.01'),
        (lambda m: m.update(samples=[]), 'lists no "samples"'),
        (lambda m: m["samples"].reverse(), "indices are to rise"),
        (lambda m: m["samples"].insert(0, m["samples"][0]), "sample 0 comes after 0; indices are to rise"),
        (lambda m: m["samples"][1].pop("index"), 'without an "index" from 0'),
        (lambda m: m["samples"][1].pop("frame"), 'sample 7 has None as its "frame", not text'),
        (lambda m: m["samples"][1].update(frame="frames/8.png"), "'frames/8.png', is not a file in this set"),
        (lambda m: m["samples"][1].update(frame="../set/frames/00007.png"), "is not a file in this set"),
        (lambda m: m["samples"][1].update(frame=__file__), "is not a file in this set"),
        (lambda m: m["samples"][1].update(arrays=300 * "a"), "is not a file in this set"),
        (lambda m: m["samples"][1].update(rect=[1, 2, 3]), "is [1, 2, 3], not four integers"),
    ],
)
def test_bad_metadata(stored: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(stored, change)
    with pytest.raises(InputError) as caught:
        open_reference(stored)
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare")
    Image.new("RGB", (20, 12)).save(path / "0.png")
    return path


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.dictionaries(
    st.sampled_from(["index", "frame", "frame_sha256", "arrays", "arrays_sha256", "rect"]), ANY | st.just("0.png")
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=ANY, fps=ANY, samples=st.lists(ENTRY | st.just({"index": 0, "frame": "0.png"}), max_size=3) | ANY)
def test_any_metadata_is_read_or_refused(bare: Path, frames: Any, fps: Any, samples: Any) -> None:
    metadata = {"format": "gpurender reference set", "version": 1, "frames": frames, "fps": fps, "samples": samples}
    (bare / "metadata.json").write_text(json.dumps(metadata), "utf-8")
    try:
        opened = open_reference(bare)
        (picture,) = opened.frames([0])
        opened.arrays(0)
    except InputError:
        return
    assert picture.shape == (3, 12, 20)


def test_files_that_are_no_arrays(stored: Path) -> None:
    edit(stored, lambda metadata: [sample.pop("arrays_sha256") for sample in metadata["samples"]])
    file = stored / "samples/00000.npz"
    alone, huge = io.BytesIO(), io.BytesIO()
    np.save(alone, np.zeros(3))
    with zipfile.ZipFile(huge, "w") as archive:
        archive.writestr("input.npy", alone.getvalue().replace(b"(3,), }     ", b"(99999999999,), }"[:12]))
    for content in (b"", b"text", file.read_bytes()[:5000], alone.getvalue(), huge.getvalue()):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"00000.npz is not an .npz file of arrays"):
            open_reference(stored).arrays(0)
    np.savez(file, input=np.array(["words"]))
    with pytest.raises(InputError, match=r"input does not hold real numbers"):
        open_reference(stored).arrays(0)
    np.savez(file, input=np.zeros((0, 32, 32), np.float32))
    with pytest.raises(InputError, match=r"input does not hold real numbers, but \(0, 32, 32\) of float32"):
        open_reference(stored).arrays(0)
    np.savez(file, input=np.zeros((6, 32, 32), np.float32))
    other = Path(shutil.copytree(stored, stored.parent / "other"))
    shutil.copy(stored / "samples/00007.npz", other / "samples/00000.npz")
    with pytest.raises(InputError, match=r"frame 0: input is \(6, 32, 32\) in .*, but \(6, 320, 320\) in"):
        compare_frames(stored, other)


def test_differences_of_small_whole_numbers(stored: Path) -> None:
    edit(stored, lambda metadata: [sample.pop("arrays_sha256") for sample in metadata["samples"]])
    other = Path(shutil.copytree(stored, stored.parent / "other"))
    for path, levels in ((stored, [3, 200]), (other, [5, 199])):
        np.savez(path / "samples/00000.npz", output=np.array(levels, np.uint8))
    assert array_differences(open_reference(stored), open_reference(other), 0) == {"output": 2}


def test_where_a_set_is_written(stored: Path, anna: Path, features: Path, tmp_path: Path) -> None:
    before = (stored / "metadata.json").read_bytes()
    with pytest.raises(OutputError, match=r"set exists; give --overwrite to replace it"):
        write(anna, features, stored)
    assert (stored / "metadata.json").read_bytes() == before
    assert len(write(anna, features, stored, frames=2, overwrite=True)) == 2
    assert len(list((stored / "frames").iterdir())) == 2
    inside = Path(shutil.copy(features, stored / "features.npy"))
    with pytest.raises(OutputError, match=r"set holds .*features\.npy, which is read and would be gone"):
        write(anna, inside, stored, overwrite=True)
    assert inside.read_bytes() == features.read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"mine has no metadata\.json: it is something else, and is not replaced"):
        write(anna, features, tmp_path / "mine", overwrite=True)
    (tmp_path / "mine" / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not that of a reference set"):
        write(anna, features, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert len(write(anna, features, tmp_path / "empty", frames=1)) == 1
    with pytest.raises(OutputError, match=r"is not a directory, so .* cannot be written there"):
        write(anna, features, tmp_path / "no" / "set")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_error_leaves_nothing(run: Run, anna: Path, features: Path, tmp_path: Path) -> None:
    (anna / "full_body_img/0.jpg").write_bytes((anna / "full_body_img/0.jpg").read_bytes()[:5000])
    before = sorted(os.listdir(tmp_path))
    result = run("reference", "--template", anna, "--audio", features, "--out", "set", "--frames", 23)
    assert result.exit_code == 2
    assert "0.jpg is corrupt or truncated" in result.stderr
    assert sorted(os.listdir(tmp_path)) == before
