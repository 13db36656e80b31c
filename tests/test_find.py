import re
from pathlib import Path

import pytest
import torch
from conftest import MakeTemplate

from gpurender import InputError
from gpurender.choose_engine import network_for
from gpurender.engine import EngineName
from gpurender.find import AUDIO_ENCODERS, NETWORKS, find_audio_encoder, find_network


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """An empty template within a SyncTalk_2D tree."""
    path = tmp_path / "dataset" / "anna"
    (path / "models").mkdir(parents=True)
    (tmp_path / "checkpoint" / "anna").mkdir(parents=True)
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    return path


def test_documented_names() -> None:
    assert NETWORKS == ("generator.onnx", "unet.onnx", "unet.pth", "generator.pth")
    assert AUDIO_ENCODERS == ("audio_encoder.onnx", "audio_encoder.pth", "audio_visual_encoder.pth")


def both_places(names: tuple[str, ...]) -> list[str]:
    return [*names, *(f"models/{name}" for name in names)]


@pytest.mark.parametrize("name", both_places(NETWORKS))
def test_each_network_is_found(template: Path, name: str) -> None:
    (template / name).touch()
    assert find_network(template) == template / name
    assert find_network(str(template)) == template / name


def test_the_preferred_kind_is_taken_where_there_are_both(template: Path) -> None:
    for name in NETWORKS:
        (template / "models" / name).touch()
    assert find_network(template) == template / "models" / "generator.onnx"
    assert find_network(template, ".pth") == template / "models" / "unet.pth"
    (template / "unet.onnx").touch()
    assert find_network(template, ".pth") == template / "unet.onnx"  # beside the frames comes before models/


@pytest.mark.parametrize(
    ("engine", "device", "kind"),
    [("auto", "cpu", "onnx"), ("openvino", "cpu", "onnx"), ("torch", "cpu", "pth"), ("auto", "cuda", "pth")],
)
def test_torch_gets_a_checkpoint_where_there_is_one(
    template: Path, tmp_path: Path, engine: EngineName, device: str, kind: str
) -> None:
    (template / "unet.onnx").touch()
    (template / "unet.pth").touch()
    assert network_for(template, None, engine, torch.device(device)) == template / f"unet.{kind}"
    with pytest.raises(InputError, match=r"mine\.pth: there is no such network file"):
        network_for(template, tmp_path / "mine.pth", engine, torch.device(device))
    (tmp_path / "mine.pth").touch()
    assert network_for(template, tmp_path / "mine.pth", engine, torch.device(device)) == tmp_path / "mine.pth"


@pytest.mark.parametrize("name", both_places(AUDIO_ENCODERS))
def test_each_audio_encoder_is_found(template: Path, name: str) -> None:
    (template / name).touch()
    assert find_audio_encoder(template) == template / name
    assert find_audio_encoder(str(template)) == template / name


def test_earlier_names_come_first(template: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "anna" / "99.pth").touch()
    for name in reversed(both_places(NETWORKS)):
        (template / name).touch()
        assert find_network(template) == template / name
    (tmp_path / "model" / "checkpoints" / "audio_visual_encoder.pth").touch()
    for name in reversed(both_places(AUDIO_ENCODERS)):
        (template / name).touch()
        assert find_audio_encoder(template) == template / name


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["9.pth", "10.pth"], "10.pth"),
        (["009.pth", "10.pth", "1.pth"], "10.pth"),
        (["epoch_9.pth", "epoch_100.pth", "epoch_20.pth"], "epoch_100.pth"),
        (["328_epoch_9.pth", "160_epoch_10.pth"], "160_epoch_10.pth"),
        (["5.pth", "best.pth", "99.txt"], "5.pth"),
        (["0.pth"], "0.pth"),
        (["195.pth", "195_ema.pth"], "195.pth"),
        (["9.pth", "epoch_12_loss_0.0031.pth", "195_2024-11-27.pth"], "9.pth"),
    ],
)
def test_last_checkpoint_of_a_tree_is_found(template: Path, tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / "checkpoint" / "anna" / name).touch()
    assert find_network(template) == tmp_path / "checkpoint" / "anna" / found


def test_audio_encoder_of_a_tree_is_found(template: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "model" / "checkpoints" / "audio_visual_encoder.pth"
    encoder.touch()
    assert find_audio_encoder(template) == encoder


def test_relative_paths_are_found(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint" / "anna" / "7.pth").touch()
    monkeypatch.chdir(template)
    assert find_network(".") == tmp_path / "checkpoint" / "anna" / "7.pth"


def test_directories_are_no_networks(template: Path) -> None:
    (template / "unet.onnx").mkdir()
    (template / "unet.pth").touch()
    assert find_network(template) == template / "unet.pth"


@pytest.mark.parametrize("strays", [[], ["best.pth", "5.txt"]])
def test_what_was_looked_for_is_told(template: Path, tmp_path: Path, strays: list[str]) -> None:
    for name in strays:
        (tmp_path / "checkpoint" / "anna" / name).touch()
    checkpoints = re.escape(str(tmp_path / "checkpoint" / "anna"))
    words = (
        rf"no network for anna: none of {', '.join(NETWORKS)} in {re.escape(str(template))} or its models "
        rf"directory, and no numbered .pth in {checkpoints}. Give --model FILE"
    )
    with pytest.raises(InputError, match=words):
        find_network(template)


def test_audio_encoders_that_were_looked_for_are_told(template: Path) -> None:
    words = f"no audio encoder for anna: none of {', '.join(AUDIO_ENCODERS)} in .*audio_visual_encoder.pth. Give"
    with pytest.raises(InputError, match=words):
        find_audio_encoder(template)


def test_a_template_outside_a_tree_is_looked_in_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no network for absent"):
        find_network(tmp_path / "absent")
    with pytest.raises(InputError, match="no audio encoder for absent"):
        find_audio_encoder(tmp_path / "absent")


def test_a_linked_template_is_looked_for_where_the_link_is(template: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2" / "frames"
    elsewhere.mkdir(parents=True)
    (tmp_path / "dataset" / "bob").symlink_to(elsewhere)
    (tmp_path / "checkpoint" / "bob").mkdir()
    (tmp_path / "checkpoint" / "bob" / "7.pth").touch()
    (tmp_path / "model" / "checkpoints" / "audio_visual_encoder.pth").touch()
    assert find_network(tmp_path / "dataset" / "bob") == tmp_path / "checkpoint" / "bob" / "7.pth"
    assert find_audio_encoder(tmp_path / "dataset" / "bob").name == "audio_visual_encoder.pth"


def test_networks_of_a_package_are_found(make_package: MakeTemplate) -> None:
    path = make_package()
    (path / "models").mkdir()
    for name in ("generator.onnx", "audio_encoder.onnx"):
        (path / "models" / name).touch()
    assert find_network(path) == path / "models/generator.onnx"
    assert find_audio_encoder(path) == path / "models/audio_encoder.onnx"
