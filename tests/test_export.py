import itertools
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gpurender import InputError, OutputError, UNet, export_onnx, load_audio_engine
from gpurender.cache import cache_directory, is_whole
from gpurender.export import cached_onnx, example_input, example_inputs, onnx_bytes, with_norms_folded
from gpurender.find import BUNDLED
from gpurender.network import Mode, load_network, load_unet
from gpurender.seeds import save_seeded


def test_batch_is_dynamic_and_pictures_agree(seeded_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(seeded_onnx, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input", "audio"]
    faces, audio = example_input(5, "ave")
    (five,) = session.run(["output"], {"input": faces.numpy(), "audio": audio.numpy()})
    (one,) = session.run(["output"], {"input": faces[4:].numpy(), "audio": audio[4:].numpy()})
    np.testing.assert_allclose(np.asarray(five)[4:], np.asarray(one), atol=1e-4)


def test_the_check_is_measured(tmp_path: Path, tiny_unet: Path) -> None:
    check = export_onnx(tiny_unet, tmp_path / "a.onnx")
    assert check.largest_difference < 1e-4
    assert check.psnr_db > 80
    assert "PSNR" in str(check)
    model = onnx.load(tmp_path / "a.onnx")
    assert {p.key: p.value for p in model.metadata_props}["gpurender.mode"] == "ave"


def test_an_export_does_not_say_where_it_was_made(tiny_onnx: Path) -> None:
    for file in (tiny_onnx, BUNDLED / "avatar" / "models" / "generator.onnx"):
        assert b".py" not in file.read_bytes()


@pytest.mark.parametrize("mode", ["hubert", "wenet"])
def test_other_modes(tmp_path: Path, tiny_of: Callable[[Mode], Path], mode: Mode) -> None:
    assert export_onnx(tiny_of(mode), tmp_path / "a.onnx", mode=mode).psnr_db > 80
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(tmp_path / "a.onnx").graph.input]
    assert shapes[1][1:] == ([32, 32, 32] if mode == "hubert" else [256, 16, 32])


def test_an_audio_encoder(tmp_path: Path, seeded_encoder: Path) -> None:
    check = export_onnx(seeded_encoder, tmp_path / "audio_encoder.onnx")
    assert check.psnr_db > 100
    session = onnxruntime.InferenceSession(tmp_path / "audio_encoder.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("mel", [1, 80, 16])]
    assert [(o.name, o.shape[1:]) for o in session.get_outputs()] == [("emb", [512])]
    mel = torch.rand(5, 1, 80, 16, generator=torch.Generator().manual_seed(2)) * 8 - 4
    (features,) = session.run(None, {"mel": mel.numpy()})
    with torch.inference_mode():
        expected = load_audio_engine(seeded_encoder)(mel)
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-4)
    with pytest.raises(InputError, match="is an audio encoder, which is exported in fp32 only"):
        export_onnx(seeded_encoder, tmp_path / "b.onnx", precision="fp16")


@pytest.mark.parametrize("mode", [*get_args(Mode), None])
def test_the_graph_is_the_one_that_torchs_exporter_makes(
    tiny_of: Callable[[Mode], Path], tiny_encoder: Path, mode: Mode | None
) -> None:
    network = load_network(tiny_of(mode) if mode else tiny_encoder, mode)
    ours = onnx.load_from_string(onnx_bytes(network, "fp32", 64))
    onnx.checker.check_model(ours, full_check=True)
    inputs = example_inputs(network, 2)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},) * len(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own deprecations
        program = torch.onnx.export(
            with_norms_folded(network),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=[*inputs],
            verbose=False,
        )
    assert program is not None
    theirs = program.model_proto
    sizes = ("Flatten", "Reshape", "Shape", *(["Concat"] if mode is None else []))  # torch 2.11 computes the batch's
    kinds = [Counter(n.op_type for n in model.graph.node if n.op_type not in sizes) for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    made, expected = (run_onnx(model, inputs) for model in (ours, theirs))
    np.testing.assert_allclose(made, expected, atol=2e-5 * np.abs(expected).max())


def run_onnx(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def test_half_precision_all_through(tmp_path: Path, tiny_unet: Path) -> None:
    check = export_onnx(tiny_unet, tmp_path / "a.onnx", precision="fp16", max_batch=1)
    assert check.psnr_db > 40
    model = onnx.load(tmp_path / "a.onnx")
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    assert weights
    assert all(t.data_type == onnx.TensorProto.FLOAT16 for t in weights)
    assert all(i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for i in model.graph.input)


def test_an_export_that_differs_is_not_written(
    tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = onnx.load(tiny_onnx)
    weights = next(array for array in wrong.graph.initializer if len(array.dims) == 4)
    weights.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weights), weights.name))
    monkeypatch.setattr("gpurender.export.onnx_bytes", lambda *arguments: wrong.SerializeToString())
    with pytest.raises(InputError, match="fp32 export is not close enough.*nothing was written"):
        export_onnx(tiny_unet, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path, tiny_unet: Path) -> None:
    (tmp_path / "a.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists; give --overwrite"):
        export_onnx(tiny_unet, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_text() == "mine"
    with pytest.raises(OutputError, match="is not a directory"):
        export_onnx(tiny_unet, tmp_path / "none" / "a.onnx")
    for name in ("b.txt", "b.ONNX", "b"):
        with pytest.raises(InputError, match="an ONNX export is named .onnx"):
            export_onnx(tiny_unet, tmp_path / name)
    with pytest.raises(InputError, match="max_batch is at least 1"):
        export_onnx(tiny_unet, tmp_path / "b.onnx", max_batch=0)
    with pytest.raises(InputError, match="'bf16' is no precision of an export; choose fp32, fp16"):
        export_onnx(tiny_unet, tmp_path / "b.onnx", precision=cast(Any, "bf16"))


def test_the_cache_is_private_and_keyed_by_content(
    tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurender.export.onnx_bytes", lambda *arguments: tiny_onnx.read_bytes())
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    first = cached_onnx(tiny_unet)
    assert stat.S_IMODE(cache_directory().stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in cache_directory().iterdir()} == {0o600}
    copy = tmp_path / "renamed.pth"
    copy.write_bytes(tiny_unet.read_bytes())
    written = first.stat().st_mtime_ns
    assert cached_onnx(copy) == first
    assert first.stat().st_mtime_ns == written
    for mode in (0o720, 0o702):
        os.chmod(tmp_path / "cache", mode)
        with pytest.raises(OutputError, match="not yours alone to write"):
            cached_onnx(tiny_unet)


def test_a_cache_that_is_not_to_be_written_is_named(
    tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **options: object) -> None:
        raise OutputError("the disk is full.")

    monkeypatch.setattr("gpurender.export.onnx_bytes", full)
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OutputError, match=r"^the disk is full\. That is the cache of exports; set GPURENDER_CACHE"):
        cached_onnx(tiny_unet)


def test_a_user_without_a_home_has_the_cache_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("GPURENDER_CACHE")
    with pytest.raises(OutputError, match="no home directory for a cache; set GPURENDER_CACHE"):
        cache_directory()


def test_a_file_of_no_sums_says_nothing_of_what_is_whole(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").touch()
    assert not is_whole(tmp_path / "SHA256SUMS", [])


def test_a_damaged_export_is_made_anew(
    tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurender.export.onnx_bytes", lambda *arguments: tiny_onnx.read_bytes())
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    made = cached_onnx(tiny_unet)
    whole = made.read_bytes()
    made.write_bytes(whole[:-100] + bytes(100))
    assert cached_onnx(tiny_unet) == made
    assert made.read_bytes() == whole


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_kept_as_the_one_before(
    tmp_path: Path, tiny_unet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(path: Path, mode: Mode | None) -> UNet:
        save_seeded(UNet(), path)
        return load_unet(path, mode)

    checkpoint = Path(shutil.copy(tiny_unet, tmp_path / "latest.pth"))
    monkeypatch.setattr("gpurender.export.load_unet", replacing)
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"latest\.pth was replaced while it was read; try again"):
        cached_onnx(checkpoint)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_programs_may_fill_the_cache_at_once(
    tmp_path: Path, tiny_unet: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: object) -> bytes:
        if next(calls) == 0:
            cached_onnx(tiny_unet)  # the other program is done first
        return tiny_onnx.read_bytes()

    calls = itertools.count()
    monkeypatch.setattr("gpurender.export.onnx_bytes", made)
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    onnx.checker.check_model(str(cached_onnx(tiny_unet)))
    assert next(calls) == 2


AT_ONCE = """
import sys, threading
from gpurender import load_engine
errors = []
def load():
    try:
        load_engine(sys.argv[1], mode="ave", device="cpu")
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=load) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors)
"""


def test_threads_that_need_the_same_export_at_once(tmp_path: Path, tiny_unet: Path) -> None:
    environment = os.environ | {"GPURENDER_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", AT_ONCE, str(tiny_unet)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "[]\n", done.stderr
    assert len(list(tmp_path.glob("*.onnx"))) == 1
