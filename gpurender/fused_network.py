"""The U-Net for a GPU: the function of `network.UNet` in half precision, by the kernels of kernels/residual.py.

Three steps make it cheaper, none of which changes the function. Batch normalisations become part of the convolutions
before them. Of the 1×1 convolution behind an upsampling and a concatenation, the upsampled part is computed before the
upsampling, at a quarter of the pixels. And `inc` ends with a 1×1 convolution where `down1` and `up5` begin with one:
each of them takes the two as one, so that the widest tensor that the template makes is never made.

Tensors are (B,H,W,C), contiguous.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import AudioModel, DoubleConv, InvertedResidual, UNet

WIDEST = 128
"""Up to so many channels, one kernel filters and then narrows them: it holds all of them in registers."""

Exact = tuple[Tensor, Tensor]
"""A convolution in float64 on the CPU: weight (C,M) of a 1×1, (9,C) of a 3×3 depthwise one; bias (M,) or (C,)."""

Block = Callable[[Tensor], Tensor]


class Linear(NamedTuple):
    """A 1×1 convolution."""

    weight: Tensor  # (C,M) in the network's type
    bias: Tensor  # (M,) float32


class Taps(NamedTuple):
    """A 3×3 depthwise convolution."""

    weight: Tensor  # (9,C) float32
    bias: Tensor  # (C,) float32


class Place(NamedTuple):
    """Where weights are, and the network's type."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, exact: Exact) -> Linear:
        weight, bias = exact
        largest = torch.finfo(self.dtype).max
        weight = weight.clamp(-largest, largest).to(self.device, self.dtype).contiguous()
        return Linear(weight, bias.to(self.device, torch.float32))

    def taps(self, exact: Exact) -> Taps:
        weight, bias = exact
        return Taps(weight.to(self.device, torch.float32).contiguous(), bias.to(self.device, torch.float32))


class FusedUNet:
    """A network of SyncTalk_2D's architecture on a device, in half precision or bfloat16.

    Args:
        network: in eval mode; stays as it is.
    """

    def __init__(self, network: UNet, device: torch.device, dtype: torch.dtype) -> None:
        place = Place(device, dtype)
        self._dtype = dtype
        widen, taps, narrow = layers_of(cast(InvertedResidual, network.inc.inconv[0]))
        self._inc_widen, self._inc_taps = place.linear(widen), place.taps(taps)
        downs = (network.down1, network.down2, network.down3, network.down4, network.down5)
        first, *others = (cast(DoubleConv, down.maxpool_conv[0]) for down in downs)
        self._downs = [double(first, place, before=narrow), *(double(down, place) for down in others)]
        self._audio = audio_model(network.audio_model, place)
        self._fuse = [double(cast(DoubleConv, part), place) for part in network.fuse_conv]
        self._ups: list[Callable[[Tensor, Tensor], Tensor]] = []
        channels = channels_of(cast(DoubleConv, network.fuse_conv[1]))
        for block in (network.up1, network.up2, network.up3, network.up4, network.up5):
            skip_before = narrow if block is network.up5 else None
            self._ups.append(up(block.conv, place, channels, skip_before))
            channels = channels_of(block.conv)
        self._outc = place.linear(convolution(network.outc.conv))

    def encode(self, faces: Tensor) -> tuple[Tensor, ...]:
        """(B,6,320,320) in 0..1 to what the second half takes of the template, the largest first."""
        x = faces.to(self._dtype).permute(0, 2, 3, 1).contiguous()
        levels = [filtered(widened(x, self._inc_widen), self._inc_taps)]  # (B,320,320,12)
        for down in self._downs:
            levels.append(down(levels[-1]))
        return tuple(levels)

    def decode(self, levels: tuple[Tensor, ...], audio: Tensor) -> Tensor:
        """Those and (B,*WINDOW_SHAPES[mode]) to (B,3,320,320) float32 in 0..1."""
        *skips, x = levels
        x = torch.cat([x, self._audio(audio.to(self._dtype).permute(0, 2, 3, 1).contiguous())], 3)
        for fuse in self._fuse:
            x = fuse(x)
        for joins, skip in zip(self._ups, reversed(skips), strict=True):
            x = joins(x, skip)
        return drawn(x, self._outc)


# --- blocks ----------------------------------------------------------------------------------------------------------


def residual(block: InvertedResidual, place: Place, before: Exact | None = None) -> Block:
    """An inverted residual; `before` is a 1×1 convolution whose output goes nowhere else."""
    first, second, third = layers_of(block)
    widen = place.linear(first if before is None else composed(before, first))
    taps, narrow = place.taps(second), place.linear(third)
    if cast(nn.Conv2d, block.conv[3]).stride[0] == 2:
        return lambda x: halved(widened(x, widen), taps, narrow)
    return lambda x: narrowed(widened(x, widen), taps, narrow, x if block.residual else None)


def double(block: DoubleConv, place: Place, before: Exact | None = None) -> Block:
    first, second = (cast(InvertedResidual, part) for part in block.double_conv)
    one, two = residual(first, place, before), residual(second, place)
    return lambda x: two(one(x))


def up(block: DoubleConv, place: Place, channels: int, skip_before: Exact | None) -> Callable[[Tensor, Tensor], Tensor]:
    """An `up` block: conv(up(x), skip) = up(conv_x(x)) + conv_skip(skip), `up` being the upsampling, `,` the
    concatenation.

    Args:
        channels: of x.
        skip_before: a 1×1 convolution that the skip still has to go through.
    """
    one, two = (cast(InvertedResidual, part) for part in block.double_conv)
    (weight, bias), second, third = layers_of(one)
    of_x = place.linear((weight[:channels], torch.zeros_like(bias)))
    of_skip = weight[channels:], bias
    widen = place.linear(of_skip if skip_before is None else composed(skip_before, of_skip))
    taps, narrow, then = place.taps(second), place.linear(third), residual(two, place)
    return lambda x, skip: then(narrowed(widened(skip, widen, below=joined(x, of_x)), taps, narrow))


def audio_model(model: AudioModel, place: Place) -> Block:
    steps: list[Block] = [residual(model.conv1, place), residual(model.conv2, place)]
    steps += [dense(model.conv3, model.bn3, place), residual(model.conv4, place)]
    steps += [dense(model.conv5, model.bn5, place), residual(model.conv6, place), residual(model.conv7, place)]

    def heard(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return heard


def dense(convolution: nn.Conv2d, norm: nn.BatchNorm2d, place: Place) -> Block:
    """A convolution by torch, clipped below zero: two layers of few pixels."""
    folded = nn.utils.fuse_conv_bn_eval(convolution, norm)
    weight = folded.weight.detach().to(place.device, place.dtype, memory_format=torch.channels_last)
    bias = folded.bias.detach().to(place.device, place.dtype)  # pyright: ignore[reportOptionalMemberAccess]

    def run(x: Tensor) -> Tensor:
        made = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, folded.stride, folded.padding)
        return F.relu_(made).permute(0, 2, 3, 1).contiguous()

    return run


# --- weights ---------------------------------------------------------------------------------------------------------


def layers_of(block: InvertedResidual) -> tuple[Exact, Exact, Exact]:
    """The three convolutions of an inverted residual, each with its batch normalisation."""
    first, first_norm, _, second, second_norm, _, third, third_norm = block.conv
    pairs = (first, first_norm), (second, second_norm), (third, third_norm)
    one, two, three = (convolution(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)) for conv, norm in pairs)
    return one, two, three


def convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> Exact:
    weight = conv.weight.detach().double().cpu().flatten(1)  # (M,C) of a 1×1, (C,9) of a depthwise one
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double().cpu()
    if norm is not None:
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight.detach().double().cpu() / (norm.running_var.double().cpu() + norm.eps).sqrt()
        weight, bias = weight * scale[:, None], (bias - norm.running_mean.double().cpu()) * scale
        bias = bias + norm.bias.detach().double().cpu()
    return weight.T, bias


def composed(first: Exact, second: Exact) -> Exact:
    """Two 1×1 convolutions as one."""
    return first[0] @ second[0], first[1] @ second[0] + second[1]


def channels_of(block: DoubleConv) -> int:
    """The number of channels that the block makes."""
    return cast(nn.Conv2d, cast(InvertedResidual, block.double_conv[1]).conv[6]).out_channels


# --- steps -----------------------------------------------------------------------------------------------------------


def widened(x: Tensor, widen: Linear, below: Tensor | None = None) -> Tensor:
    """1×1 convolution, `below` upsampled and added, clipped below zero."""
    from .kernels.residual import pointwise  # Triton takes a while to load, and is not everywhere

    out = x.new_empty(*x.shape[:3], len(widen.bias))
    pointwise(x, *widen, out, "relu", below)
    return out


def joined(x: Tensor, linear: Linear, added: Tensor | None = None) -> Tensor:
    """1×1 convolution."""
    from .kernels.residual import pointwise

    out = x.new_empty(*x.shape[:3], len(linear.bias))
    pointwise(x, *linear, out, "none", added=added)
    return out


def filtered(x: Tensor, taps: Taps) -> Tensor:
    """3×3 depthwise convolution, clipped below zero."""
    from .kernels.residual import depthwise

    out = torch.empty_like(x)
    depthwise(x, *taps, out)
    return out


def narrowed(x: Tensor, taps: Taps, narrow: Linear, added: Tensor | None = None) -> Tensor:
    """3×3 depthwise convolution, clipped below zero, then 1×1."""
    from .kernels.residual import depthwise

    if x.shape[3] > WIDEST:
        return joined(filtered(x, taps), narrow, added)
    out = x.new_empty(*x.shape[:3], len(narrow.bias))
    depthwise(x, *taps, out, narrow, added)
    return out


def halved(x: Tensor, taps: Taps, narrow: Linear) -> Tensor:
    """The same with a stride of 2."""
    from .kernels.residual import depthwise_halving

    batch, height, width, _ = x.shape
    out = x.new_empty(batch, height // 2, width // 2, len(narrow.bias))
    depthwise_halving(x, *taps, out, narrow)
    return out


def drawn(x: Tensor, linear: Linear) -> Tensor:
    """1×1 convolution and sigmoid, to (B,3,H,W) float32."""
    from .kernels.residual import pointwise

    batch, height, width, _ = x.shape
    out = x.new_empty(batch, len(linear.bias), height, width, dtype=torch.float32)
    pointwise(x, *linear, out, "sigmoid", planes=True)
    return out
