"""A module out of an ONNX export, against the module that was exported."""

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gpurender import InputError, UNet, load_engine, load_unet, predict
from gpurender.export import cached_onnx, example_input
from gpurender.find import BUNDLED
from gpurender.half import to_half
from gpurender.network import Mode
from gpurender.onnx_unet import unet_of_onnx


def far(a: UNet, b: UNet, frames: int = 2) -> float:
    inputs = example_input(frames, a.mode)
    with torch.inference_mode():
        return (a(*inputs) - b(*inputs)).abs().max().item()


@pytest.mark.parametrize("mode", ["ave", "hubert", "wenet"])
def test_it_is_the_module_that_was_exported(tiny_of: Callable[[Mode], Path], mode: Mode) -> None:
    network = unet_of_onnx(cached_onnx(tiny_of(mode), mode), mode)
    assert network.mode == mode
    assert far(network, load_unet(tiny_of(mode), mode)) < 1e-5


@pytest.mark.parametrize("folding", [True, False])
def test_by_the_exporter_that_other_projects_use(tiny_unet: Path, tmp_path: Path, folding: bool) -> None:
    """Weights have no names there; without folding, batch normalisations are layers of their own."""
    network = load_unet(tiny_unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            example_input(1, "ave"),
            tmp_path / "a.onnx",
            dynamo=False,
            do_constant_folding=folding,
            training=torch.onnx.TrainingMode.EVAL if folding else torch.onnx.TrainingMode.PRESERVE,
            input_names=["face", "sound"],
        )
    assert far(unet_of_onnx(tmp_path / "a.onnx"), network) < 1e-5


def test_the_bundled_export() -> None:
    models = BUNDLED / "avatar" / "models"
    assert far(unet_of_onnx(models / "generator.onnx"), load_unet(models / "generator.pth")) < 1e-5


def changed(path: Path, to: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, to)
    return to


def test_a_file_in_half_precision(tiny_unet: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    half = changed(tiny_onnx, tmp_path / "half.onnx", to_half)
    assert far(unet_of_onnx(half), load_unet(tiny_unet)) < 0.02


def test_the_torch_engine_draws_with_it(tiny_unet: Path, tiny_onnx: Path, device: torch.device) -> None:
    inputs = tuple(tensor.to(device) for tensor in example_input(3, "ave"))
    drawn = [
        predict(load_engine(path, device=device, engine="torch", precision="fp32"), *inputs)
        for path in (tiny_onnx, tiny_unet)
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5


def double_the_picture(model: ModelProto) -> None:
    two = helper.make_tensor("two", 1, [], [2.0])
    (picture,) = model.graph.output
    model.graph.initializer.append(two)
    for node in model.graph.node:
        if node.output[0] == picture.name:
            node.output[0] = "once"
    model.graph.node.append(helper.make_node("Mul", ["once", "two"], [picture.name]))


def have_two_layers_share_weights(model: ModelProto) -> None:
    """Which look like one layer less."""
    of_shape: dict[tuple[int, ...], str] = {}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[1] = of_shape.setdefault(shapes[node.input[1]], node.input[1])


def narrow_a_layer(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4 and tensor.dims[0] == 3:  # to the picture
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :4].copy(), tensor.name))


def contradict_itself(model: ModelProto) -> None:
    shape = [3, 4, 1, 1]  # as exports say it of their weights, too
    model.graph.value_info.append(helper.make_tensor_value_info("outc.conv.weight", TensorProto.FLOAT, shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            double_the_picture,
            "but what it draws is not .*torch cannot run it. Give --engine tensorrt, or --device",
        ),
        (
            have_two_layers_share_weights,
            "328-pixel U-Net only, which has 33, 17, 43 convolutions of .*; this has",
        ),
        (narrow_a_layer, r"outc.conv.weight has shape \(3, 4, 1, 1\), expected \(3, 8, 1, 1\)"),
        (contradict_itself, "is not an ONNX network that can be read: .*ShapeInferenceError"),
    ],
)
def test_another_architecture_is_refused(
    tiny_onnx: Path, tmp_path: Path, change: Callable[[ModelProto], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        unet_of_onnx(changed(tiny_onnx, tmp_path / "a.onnx", change))


def test_features_of_another_kind_are_refused(tiny_onnx: Path) -> None:
    with pytest.raises(InputError, match="a lip-sync network takes batches of"):
        unet_of_onnx(tiny_onnx, "wenet")
