"""Networks that hear `hubert` and `wenet` features, from feature file to video: frames, rates and windows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import MakeTemplate
from PIL import Image
from test_network import golden_face

from gpurender import (
    InputError,
    UNet,
    crop_faces,
    face_input,
    frame_order,
    load_engine,
    load_features,
    load_unet,
    make,
    open_template,
    paste_faces,
    predict,
    write_features,
)
from gpurender.cli import main
from gpurender.export import cached_onnx
from gpurender.network import WINDOW_SHAPES, Mode
from gpurender.seeds import seeded_weights

MODES: list[Mode] = ["hubert", "wenet"]
ROWS = {"hubert": (2, 1024), "wenet": (16, 512)}
RATES = {"hubert": 25, "wenet": 20}
SHAPES = {"hubert": (32, 32, 32), "wenet": (256, 16, 32)}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture
def checkpoint(mode: Mode, tiny_of: Callable[[Mode], Path]) -> Path:
    return tiny_of(mode)


def numbers(mode: Mode, count: int) -> np.ndarray:
    return np.random.RandomState(count).uniform(0, 2, (count, *ROWS[mode])).astype(np.float32)


def window(array: np.ndarray, mode: Mode, frame: int) -> torch.Tensor:
    """As the specification says: rows [i-8, i+8), zeros where that leaves the array, flattened and reshaped."""
    rows = np.zeros((16, *array.shape[1:]), np.float32)
    for k, i in enumerate(range(frame - 8, frame + 8)):
        if 0 <= i < len(array):
            rows[k] = array[i]
    return torch.from_numpy(rows.reshape(1, *SHAPES[mode]))


def test_golden_pictures_by_openvino(shared: Path, tmp_path: Path) -> None:
    """The full-width network of the golden numbers, from a checkpoint, as `make` loads it."""
    golden = json.loads((shared / "golden" / "unet.json").read_text())["modes"]["wenet"]
    torch.save(seeded_weights(UNet("wenet")), tmp_path / "seeded.pth")
    engine = load_engine(tmp_path / "seeded.pth", mode="wenet", device="cpu", precision="fp32")
    assert (engine.mode, tuple(golden["audio_shape"])) == ("wenet", WINDOW_SHAPES["wenet"])
    audio = np.random.RandomState(1).uniform(0, 2, (1, *golden["audio_shape"])).astype(np.float32)
    picture = predict(engine, golden_face(), torch.from_numpy(audio))[0].numpy()
    c, y, x = np.array(golden["cyx"]).T
    np.testing.assert_allclose(picture[c, y, x], golden["value"], atol=1e-4)
    assert picture.mean() == pytest.approx(golden["mean"], abs=1e-4)


@pytest.mark.parametrize("count", [1, 7, 8, 23])
def test_windows(mode: Mode, tmp_path: Path, count: int) -> None:
    array = numbers(mode, count)
    for name, content in (("rows", array), ("flat", array.reshape(count, -1))):
        np.save(tmp_path / f"{name}.npy", content)
        features = load_features(tmp_path / f"{name}.npy")
        assert (features.mode, features.fps, len(features)) == (mode, RATES[mode], count)
        expected = torch.cat([window(array, mode, i) for i in range(count)])
        assert torch.equal(features.windows(0, count), expected)
        assert torch.equal(features.windows(count // 2, count), expected[count // 2 :])
    np.save(tmp_path / "ready.npy", expected.numpy())
    assert torch.equal(load_features(tmp_path / "ready.npy").windows(0, count), expected)


def test_frames_are_the_steps_one_after_another(
    make_template: MakeTemplate, tmp_path: Path, mode: Mode, checkpoint: Path
) -> None:
    array, path = numbers(mode, 11), make_template(suffix=".png")
    np.save(tmp_path / "a.npy", array)
    summary = make(path, tmp_path / "a.npy", tmp_path / "frames" / "%d.png", model=checkpoint, precision="fp32")
    assert (summary.frames, summary.fps, summary.engine) == (11, RATES[mode], "openvino")
    template, network = open_template(path), load_unet(checkpoint, mode)
    for i, shown in enumerate(frame_order(5, range(11))):
        original, _ = template.frames([shown])
        rects = template.rects[[shown]]
        crops = crop_faces(original, rects)
        with torch.inference_mode():
            prediction = network(face_input(crops), window(array, mode, i))
        expected = paste_faces(original, crops, prediction, rects, None)[0].permute(1, 2, 0).numpy()
        written = np.asarray(Image.open(tmp_path / "frames" / f"{i + 1}.png"))
        assert np.abs(written.astype(int) - expected).max() <= 1


def test_from_the_command_line(
    make_template: MakeTemplate, tmp_path: Path, speech: Path, mode: Mode, checkpoint: Path
) -> None:
    """A feature file as another implementation writes it, the network beside the template, sound to go with it."""
    template = make_template()
    shutil.copy(cached_onnx(checkpoint, mode), template / "unet.onnx")
    np.save(tmp_path / "a.npy", numbers(mode, 31))
    write_features(load_features(tmp_path / "a.npy"), tmp_path / "a.bin")
    assert json.loads((tmp_path / "a.bin.json").read_text())["shape"] == [31, *ROWS[mode]]
    command = ["make", "--template", template, "--audio", tmp_path / "a.bin", "--sound", speech]
    result = CliRunner().invoke(main, [*map(str, command), "--out", str(tmp_path / "a.mp4")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"31 frames of 320×240, {31 / RATES[mode]:.2f} s at {RATES[mode]} a second" in result.output
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == RATES[mode]
        times = [float(frame.time or 0) for frame in container.decode(video=0)]
        assert times == pytest.approx([i / RATES[mode] for i in range(31)], abs=1e-3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.audio[0].duration or 0) * float(
            container.streams.audio[0].time_base or 0
        ) == pytest.approx(1.5, abs=0.05)  # all of the sound


def test_networks_for_other_features_are_refused(
    make_template: MakeTemplate, tmp_path: Path, mode: Mode, checkpoint: Path, tiny_onnx: Path, speech: Path
) -> None:
    template = make_template()
    np.save(tmp_path / "a.npy", numbers(mode, 3))
    with pytest.raises(InputError, match=rf"tiny\.onnx takes input .* audio \[.*,32,16,16\]; .*\({mode}\)"):
        make(template, tmp_path / "a.npy", tmp_path / "a.mp4", model=tiny_onnx)
    shutil.copy(cached_onnx(checkpoint, mode), tmp_path / "network.onnx")
    np.save(tmp_path / "ave.npy", np.zeros((3, 512), np.float32))
    with pytest.raises(InputError, match=r"network\.onnx takes input .*\(ave\)"):
        make(template, tmp_path / "ave.npy", tmp_path / "a.mp4", model=tmp_path / "network.onnx")
    assert not (tmp_path / "a.mp4").exists()
