"""Core ML packages: what is in them, read with coremltools; their numbers against the network's own."""

import copy
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY_ENCODER
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import gpurender.coreml as module
from gpurender import AudioEncoder, InputError, OutputError, export_coreml, load_audio_encoder, load_unet
from gpurender.cli import main
from gpurender.coreml import Constants, convert, evaluate, quiet
from gpurender.export import example_inputs
from gpurender.network import WINDOW_SHAPES, Mode


@pytest.fixture(scope="session")
def coremltools() -> Any:
    with quiet():
        return pytest.importorskip(
            "coremltools", reason="coremltools is not installed: NOTHING IS CHECKED OF CORE ML EXPORTS"
        )


def ports(descriptions: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    return {d.name: (tuple(d.type.multiArrayType.shape), d.type.multiArrayType.dataType) for d in descriptions}


def load_spec(coremltools: Any, package: Path) -> Any:
    return coremltools.utils.load_spec(str(package))


def types_in(coremltools: Any, spec: Any) -> set[tuple[int, int]]:
    """The types, and numbers of axes, of all that is computed."""
    main = spec.mlProgram.functions["main"]
    return {
        (output.type.tensorType.dataType, len(output.type.tensorType.dimensions))
        for operation in main.block_specializations[main.opset].operations
        if operation.type != "const"
        for output in operation.outputs
    }


def weights_in(coremltools: Any, package: Path) -> list[torch.Tensor]:
    """Weights and biases of all convolutions, in the order in which they are computed."""
    main = load_spec(coremltools, package).mlProgram.functions["main"]
    block = main.block_specializations[main.opset]
    constants = Constants(package)
    values = {op.outputs[0].name: op.attributes["val"] for op in block.operations if op.type == "const"}
    convolutions = [op for op in block.operations if op.type == "conv"]
    return [
        constants.read(values[op.inputs[name].arguments[0].name]) for op in convolutions for name in ("weight", "bias")
    ]


def folded_weights(network: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The same of the torch module, its batch norms folded into the convolutions before them by torch."""
    order: list[nn.Module] = []
    leaves = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    # Once each: `inc` is computed in both halves of the torch module, and once in the package.
    hooks = [m.register_forward_hook(lambda m, *_: order.append(m) if m not in order else None) for m in leaves]
    with torch.inference_mode():
        network(*inputs.values())
    for hook in hooks:
        hook.remove()
    found = []
    for this, following in zip(order, [*order[1:], None], strict=True):
        if isinstance(this, nn.Conv2d):
            convolution = copy.deepcopy(this)
            if isinstance(following, nn.BatchNorm2d):
                convolution = fuse_conv_bn_eval(convolution, following)
            assert convolution.bias is not None
            found += [convolution.weight.detach(), convolution.bias.detach()]
    return found


@pytest.mark.parametrize("mode", ["ave", "hubert", "wenet"])
def test_names_shapes_types_and_weights(
    coremltools: Any, tmp_path: Path, tiny_of: Callable[[Mode], Path], mode: Mode
) -> None:
    package = tmp_path / "Generator.mlpackage"
    check = export_coreml(tiny_of(mode), package, mode=mode)
    assert check.psnr_db > 40
    spec = load_spec(coremltools, package)
    assert types_in(coremltools, spec) == {(coremltools.proto.MIL_pb2.DataType.FLOAT16, 4)}
    half = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert ports(spec.description.input) == {
        "input": ((1, 6, 320, 320), half),
        "audio": ((1, *WINDOW_SHAPES[mode]), half),
    }
    assert ports(spec.description.output) == {"output": ((1, 3, 320, 320), half)}
    assert spec.WhichOneof("Type") == "mlProgram"
    assert spec.specificationVersion == 7  # macOS 13, iOS 16
    assert spec.description.metadata.userDefined["gpurender.mode"] == mode

    network = load_unet(tiny_of(mode), mode)
    expected = folded_weights(network, example_inputs(network, 1))
    found = weights_in(coremltools, package)
    assert len(found) == len(expected) == 2 * 93
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        bound = theirs.abs() * 2**-10 + 1e-6  # half precision's rounding, and folding in another order
        assert ((ours - theirs).abs() <= bound).all()


def test_the_audio_encoder(coremltools: Any, tmp_path: Path, tiny_encoder: Path) -> None:
    package = tmp_path / "AudioEncoder.mlpackage"
    assert export_coreml(tiny_encoder, package).psnr_db > 60
    spec = load_spec(coremltools, package)
    half = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    assert ports(spec.description.input) == {"mel": ((1, 1, 80, 16), half)}
    assert ports(spec.description.output) == {"emb": ((1, 512), half)}
    network = load_audio_encoder(tiny_encoder)
    expected = folded_weights(network, example_inputs(network, 1))
    for ours, theirs in zip(weights_in(coremltools, package), expected, strict=True):
        assert ((ours - theirs).abs() <= theirs.abs() * 2**-10 + 1e-6).all()


class Uneven(nn.Module):
    """Pads and strides that differ by axis, where a wrong reading would show."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.conv = nn.Conv2d(2, 4, (5, 3), (2, 1), (2, 0), groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.padded:
            x = nn.functional.pad(x, (1, 0, 2, 3))
        return nn.functional.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("padded", [False, True])
def test_evaluation_is_the_networks_or_none(coremltools: Any, tmp_path: Path, padded: bool) -> None:
    network, x = Uneven(padded).eval(), torch.randn(1, 2, 12, 9, generator=torch.Generator().manual_seed(3))
    with quiet(), torch.inference_mode():
        model = coremltools.convert(
            torch.jit.trace(network, x),
            inputs=[coremltools.TensorType("x", tuple(x.shape))],
            outputs=[coremltools.TensorType("y")],
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.macOS13,
        )
        model.save(str(tmp_path / "a.mlpackage"))
        expected = network(x)
    if padded:  # an operation that the networks here do not have
        with pytest.raises(InputError, match=r"a\.mlpackage holds the operation pad, which cannot be checked"):
            evaluate(coremltools, tmp_path / "a.mlpackage", {"x": x})
    else:
        made = evaluate(coremltools, tmp_path / "a.mlpackage", {"x": x})["y"]
        np.testing.assert_allclose(made, expected, atol=5e-3)


def test_an_export_that_differs_is_not_written(
    coremltools: Any, tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tools: Any, network: AudioEncoder) -> Any:
        return convert(tools, AudioEncoder(TINY_ENCODER).eval())  # random weights

    monkeypatch.setattr(module, "convert", wrong)
    with pytest.raises(InputError, match="Core ML export is not close enough.*nothing was written"):
        export_coreml(tiny_encoder, tmp_path / "a.mlpackage")
    assert os.listdir(tmp_path) == []


def test_overwriting_and_permissions(coremltools: Any, tmp_path: Path, tiny_unet: Path, tiny_encoder: Path) -> None:
    package = tmp_path / "a.mlpackage"
    export_coreml(tiny_encoder, package)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in package.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
    with pytest.raises(OutputError, match=r"a\.mlpackage exists; give --overwrite"):
        export_coreml(tiny_unet, package)
    export_coreml(tiny_unet, package, overwrite=True)
    assert "input" in ports(load_spec(coremltools, package).description.input)
    assert os.listdir(tmp_path) == ["a.mlpackage"]


def test_refusals(tmp_path: Path, tiny_unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.mlpackage"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.mlpackage has no Manifest\.json: it is something else"):
        export_coreml(tiny_unet, mine, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "mine"
    with pytest.raises(InputError, match=r"a\.zip: a Core ML package is named \.mlpackage"):
        export_coreml(tiny_unet, tmp_path / "a.zip")
    for option in (("--precision", "fp32"), ("--max-batch", "4")):
        result = CliRunner().invoke(main, ["export", str(tiny_unet), "--out", str(tmp_path / "a.mlpackage"), *option])
        assert result.exit_code == 2
        assert "fp16 with a batch of 1; leave out --precision and --max-batch" in " ".join(result.output.split())
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(InputError, match=r'not installed; pip install "gpurender\[coreml\]"'):
        export_coreml(tiny_unet, tmp_path / "a.mlpackage")
    assert os.listdir(tmp_path) == ["mine.mlpackage"]


def test_from_the_command_line(coremltools: Any, tmp_path: Path, tiny_encoder: Path) -> None:
    out = str(tmp_path / "AudioEncoder.mlpackage")
    result = CliRunner().invoke(main, ["export", str(tiny_encoder), "--out", out], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}: a Core ML program for macOS 13 and iOS 16, fp16, batch 1" in result.stdout
    assert "checked operation by operation with torch, not on an Apple device: largest difference" in result.stdout
    assert "converting" not in result.stderr.lower()  # coremltools' own bars
