import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from gpurender import AudioEncoder, InputError, UNet, load_audio_encoder, load_unet
from gpurender.network import WINDOW_SHAPES, Mode
from gpurender.seeds import seeded_weights

MODES: list[Mode] = ["ave", "hubert", "wenet"]


def golden_face() -> torch.Tensor:
    x, y = np.meshgrid(np.arange(320), np.arange(320))
    waves = [np.sin(2 * np.pi * (x * (c + 1) / 64 + y * (c + 2) / 97)) for c in range(3)]
    image = np.stack([np.rint(127.5 + 127.5 * wave) for wave in waves]).astype(np.uint8)
    masked = image.copy()
    masked[:, 5:310, 5:315] = 0
    return torch.from_numpy(np.concatenate([image, masked])[None]).float() / 255


@pytest.mark.parametrize("mode", MODES)
def test_golden_pictures(shared: Path, device: torch.device, mode: Mode) -> None:
    golden = json.loads((shared / "golden" / "unet.json").read_text())["modes"][mode]
    network = UNet(mode).eval()
    network.load_state_dict(seeded_weights(network))
    shape = (1, *golden["audio_shape"])
    audio = torch.from_numpy(np.random.RandomState(1).uniform(0, 2, shape).astype(np.float32))
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        picture = network.to(device)(golden_face().to(device), audio.to(device))[0].cpu().numpy()
    c, y, x = np.array(golden["cyx"]).T
    np.testing.assert_allclose(picture[c, y, x], golden["value"], atol=1e-4)
    assert picture.mean() == pytest.approx(golden["mean"], abs=1e-4)
    assert picture.std() == pytest.approx(golden["std"], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_golden_parameters(shared: Path, mode: Mode) -> None:
    golden = json.loads((shared / "golden" / "keys.json").read_text())
    assert {name: list(value.shape) for name, value in UNet(mode).state_dict().items()} == golden[mode]


def test_golden_encoder_parameters(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "keys.json").read_text())["ave_encoder"]
    assert {name: list(value.shape) for name, value in AudioEncoder().state_dict().items()} == golden


@pytest.mark.parametrize("wrapper", [None, "model", "model_state_dict", "state_dict"])
def test_plain_and_wrapped_checkpoints_load(tmp_path: Path, wrapper: str | None) -> None:
    weights: Any = {f"module.{name}": value for name, value in seeded_weights(UNet(**TINY)).items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "a.pth")
    network = load_unet(tmp_path / "a.pth")
    assert not network.training
    assert torch.equal(network.state_dict()["outc.conv.bias"], weights["module.outc.conv.bias"])


@pytest.mark.parametrize("mode", MODES)
def test_half_width_loads(tmp_path: Path, mode: Mode) -> None:
    audio = (128, 128, 128, 128, 256) if mode == "wenet" else (16, 32, 64, 128, 256)
    narrow = UNet(
        mode,
        encoder=(16, 16, 32, 64, 128, 256),
        audio=(WINDOW_SHAPES[mode][0], *audio[1:]),  # pyright: ignore
        fuse=(256, 128),
        decoder=(64, 32, 16, 16, 8),
    ).eval()
    narrow.load_state_dict(seeded_weights(narrow))
    torch.save(narrow.state_dict(), tmp_path / "half.pth")
    loaded = load_unet(tmp_path / "half.pth", mode)
    inputs = golden_face(), torch.rand(1, *WINDOW_SHAPES[mode])
    with torch.inference_mode():
        assert torch.equal(loaded(*inputs), narrow(*inputs))


def test_mode_is_told_from_the_weights(tmp_path: Path) -> None:
    torch.save(UNet("wenet").state_dict(), tmp_path / "wenet.pth")
    assert load_unet(tmp_path / "wenet.pth").mode == "wenet"
    with pytest.raises(InputError, match="network for wenet features, not for ave"):
        load_unet(tmp_path / "wenet.pth", "ave")
    torch.save(UNet("hubert", **TINY).state_dict(), tmp_path / "hubert.pth")
    assert load_unet(tmp_path / "hubert.pth").mode == "ave"  # the weights' shapes are the same
    assert load_unet(tmp_path / "hubert.pth", "hubert").mode == "hubert"


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/gpurender-was-attacked"),)


def test_bad_checkpoints(tmp_path: Path) -> None:
    weights = seeded_weights(UNet(**TINY))
    bad: dict[str, tuple[Any, str]] = {
        "encoder": (AudioEncoder().state_dict(), r"is an audio encoder, not a U-Net; give it as --audio-encoder"),
        "extra": (weights | {"extra.weight": torch.zeros(1)}, r"no missing keys, 1 unknown keys \(extra.weight\)"),
        "shape": (weights | {"up3.conv.double_conv.1.conv.0.weight": torch.zeros(7, 3, 1, 1)}, "has shape .*expected"),
        "large": (weights | {"outc.conv.bias": torch.full((3,), 1e39, dtype=torch.float64)}, "infinite in float32"),
        "variance": (weights | {"inc.inconv.0.conv.1.running_var": torch.full((12,), -0.1)}, "negative variances"),
        "nan": (weights | {"outc.conv.bias": torch.full((3,), torch.nan)}, "outc.conv.bias holds NaN"),
        "flat": (weights | {"inc.inconv.0.conv.6.weight": torch.zeros(8)}, "has shape .8,., which is no convolution's"),
        "number": (weights | {"audio_model.conv1.conv.0.weight": torch.tensor(1.0)}, "has shape .., which is no conv"),
        "none": (weights | {"fuse_conv.0.double_conv.0.conv.6.weight": torch.zeros(0, 4, 1, 1)}, "no convolution's"),
        "few": (weights | {"outc.conv.bias": torch.zeros(1).expand(3)}, "outc.conv.bias is not a plain tensor"),
        "sparse": (weights | {"outc.conv.bias": torch.zeros(3).to_sparse()}, "is not a plain tensor of numbers"),
        "eight bits": (weights | {"outc.conv.bias": torch.zeros(3).to(torch.float8_e4m3fn)}, "is not a plain tensor"),
        "elsewhere": (weights | {"outc.conv.bias": torch.zeros(3, device="meta")}, "is not a plain tensor of numbers"),
        "list": ([1, 2], "holds no state dict"),
        "code": (Malicious(), "more than tensors.*others can run code"),
    }
    for name, (content, words) in bad.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match=words):
            load_unet(tmp_path / f"{name}.pth")
    assert not Path("/tmp/gpurender-was-attacked").exists()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "nan.pth").read_bytes()[:5000])
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match=r"pipe\.pth is a pipe or a device"):
        load_unet(tmp_path / "pipe.pth")
    for name in ("text", "empty", "cut"):
        with pytest.raises(InputError, match="not a checkpoint that can be loaded safely"):
            load_unet(tmp_path / f"{name}.pth")
    with pytest.raises(InputError, match="no such checkpoint"):
        load_unet(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="File name too long"):
        load_unet(tmp_path / f"{'x' * 300}.pth")
    torch.save(weights, tmp_path / "unet.pth")
    with pytest.raises(InputError, match="is not SyncTalk_2D's audio encoder"):
        load_audio_encoder(tmp_path / "unet.pth")
