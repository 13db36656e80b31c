"""An ONNX export of the U-Net -> the module that it was made from, for torch: whoever exported it, under any names."""

from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from .cuda import on_the_host
from .errors import InputError
from .export import difference_of, example_input
from .half import folded, to_float32
from .halves import depend_on, read_network
from .network import Mode, UNet, unet_of

LEAST_PSNR_DB = 60.0


class Layer(NamedTuple):
    """A convolution of the U-Net, and the batch normalisation behind it."""

    name: str
    biased: bool
    norm: str | None


Convolution = tuple[Tensor, Tensor]
"""weight and bias, float32"""


@on_the_host()
def unet_of_onnx(path: Path, mode: Mode | None = None) -> UNet:
    """The network of an ONNX export of a SyncTalk_2D 328-pixel U-Net, as a float32 module in eval mode on the CPU.

    Convolutions are matched by what they depend on (the face, the audio or both) and by their order, which is unique
    within each of the three chains. The module's picture is then compared with ONNX Runtime's.

    Raises:
        InputError: the file is not ONNX, no lip-sync network for such features, or one of another architecture.
    """
    model, found = read_network(path, mode)
    to_float32(model)
    face, audio = (value.name for value in model.graph.input[:2])
    model = folded(path, model)
    with torch.device("meta"):
        layers = layers_of(UNet(found))
    convolutions = convolutions_of(model, face, audio)
    if list(map(len, convolutions)) != list(map(len, layers)):
        has, wanted = (", ".join(str(len(chain)) for chain in chains) for chains in (convolutions, layers))
        raise InputError(
            f"{path}: torch runs ONNX exports of SyncTalk_2D's 328-pixel U-Net only, which has {wanted} convolutions "
            f"of the face, the audio and both; this has {has}. Give --engine tensorrt, or --device cpu."
        )
    network = unet_of(path, weights_of(layers, convolutions), found)
    check_against(path, model, [face, audio], network)
    return network


def layers_of(network: UNet) -> list[list[Layer]]:
    """Of the face, of the audio and of both, each in the order in which they are computed."""
    chains: list[list[Layer]] = [[], [], []]
    for name, module in network.named_modules():
        part = name.split(".")[0]
        chain = chains[0 if part.startswith(("inc", "down")) else 1 if part == "audio_model" else 2]
        if isinstance(module, nn.Conv2d):
            chain.append(Layer(name, module.bias is not None, None))
        elif isinstance(module, nn.BatchNorm2d):
            chain[-1] = chain[-1]._replace(norm=name)
    return chains


def convolutions_of(model: ModelProto, face: str, audio: str) -> list[list[Convolution]]:
    """The same of a graph whose batch normalisations are part of them; none twice, as exports may have those of `inc`.

    Args:
        face, audio: names of inputs.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    sees, hears = depend_on(model, face), depend_on(model, audio)
    chains: list[list[Convolution]] = [[], [], []]
    for node in model.graph.node:
        if node.op_type != "Conv" or not all(name in values for name in node.input[1:]):
            continue
        weight, *bias = (torch.from_numpy(np.array(numpy_helper.to_array(values[name]))) for name in node.input[1:])
        chain = chains[2 if node.output[0] in sees & hears else node.output[0] in hears]
        if not any(weight.equal(other) for other, _ in chain):
            chain.append((weight, bias[0] if bias else weight.new_zeros(len(weight))))
    return chains


def weights_of(layers: list[list[Layer]], convolutions: list[list[Convolution]]) -> dict[str, Tensor]:
    """A checkpoint's, in which batch normalisations add the bias and do nothing else."""
    weights: dict[str, Tensor] = {}
    for chain, found in zip(layers, convolutions, strict=True):
        for (name, biased, norm), (weight, bias) in zip(chain, found, strict=True):
            weights[f"{name}.weight"] = weight
            if biased:
                weights[f"{name}.bias"] = bias if norm is None else torch.zeros_like(bias)
            if norm is not None:
                one = torch.ones_like(bias)
                weights[f"{norm}.weight"] = sqrt(1 + nn.BatchNorm2d(1).eps) * one
                weights |= {f"{norm}.bias": bias, f"{norm}.running_mean": 0 * one, f"{norm}.running_var": one}
    return weights


def check_against(path: Path, model: ModelProto, names: list[str], network: UNet) -> None:
    """Have ONNX Runtime and the module draw the same frame."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    inputs = example_input(batch if isinstance(batch, int) else 1, network.mode)
    (made,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.inference_mode():
        check = difference_of([(torch.from_numpy(np.asarray(made)), network(*inputs))], pictures=True)
    if not check.psnr_db >= LEAST_PSNR_DB:
        raise InputError(
            f"{path}: its convolutions are those of SyncTalk_2D's 328-pixel U-Net, but what it draws is not ({check}), "
            "so torch cannot run it. Give --engine tensorrt, or --device cpu."
        )
