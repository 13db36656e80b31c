"""A trained network made wider without a change of what it draws, after Net2WiderNet (Chen, Goodfellow, Shlens 2016).

Each channel of the wide network is a copy of one of the narrow network's, times a factor of its own. What comes next
takes the copies of a channel in uneven shares, drawn anew for each of its own channels, which add up to one. So the
sums are the narrow network's, but no two channels have the same weights: there is nothing that could be left out.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gpurender import AudioEncoder, UNet
from gpurender.network import FACE_SHAPE, MEL_SHAPE, WINDOW_SHAPES, DoubleConv, EncoderBlock, InvertedResidual

SEED = 328
FACTORS = (1.0, 1.5)  # of channels: positive, which ReLU lets pass; at least 1, so that no variance is negative
SHARES = (0.5, 1.5)  # of a channel's copies, before they are divided by their sum
Layer = tuple[nn.Conv2d, nn.BatchNorm2d]


class Channels(NamedTuple):
    """What the channels of a wide tensor are: `wide[c] = factor[c] * narrow[of[c]]`."""

    of: Tensor  # (C,) int64
    factor: Tensor  # (C,) float64


def joined(first: Channels, second: Channels) -> Channels:
    """Those of two tensors one behind the other; every channel of the first narrow one is in `first`."""
    of = torch.cat([first.of, second.of + int(first.of.max()) + 1])
    return Channels(of, torch.cat([first.factor, second.factor]))


def unchanged(count: int) -> Channels:
    return Channels(torch.arange(count), torch.ones(count, dtype=torch.float64))


class Widening:
    """Fills wide layers from narrow ones, in the order in which the network runs them."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(SEED)

    def copies(self, narrow: int, wide: int) -> Channels:
        """Every narrow channel, nearly equally often, in any order."""
        rounds = [torch.randperm(narrow, generator=self.random) for _ in range(-(-wide // narrow))]
        of = torch.cat(rounds)[:wide]
        return Channels(of[torch.randperm(wide, generator=self.random)], self.uniform(FACTORS, wide))

    def uniform(self, between: tuple[float, float], *shape: int) -> Tensor:
        low, high = between
        return low + (high - low) * torch.rand(*shape, generator=self.random, dtype=torch.float64)

    def layer(self, narrow: Layer, wide: Layer, inp: Channels, out: Channels | None = None) -> Channels:
        """A convolution and its normalisation; what their channels are, drawn unless they have to be `out`."""
        if out is None:
            out = self.copies(narrow[0].out_channels, wide[0].out_channels)
        between = Channels(out.of, self.uniform(FACTORS, len(out.of)))
        self.convolve(narrow[0], wide[0], inp, between)
        normalise(narrow[1], wide[1], between, out)
        return out

    def convolve(self, narrow: nn.Conv2d, wide: nn.Conv2d, inp: Channels, out: Channels) -> None:
        weight = narrow.weight.double()[out.of] * out.factor[:, None, None, None]
        if narrow.groups > 1:  # depthwise: each channel sees itself alone
            weight = weight / inp.factor[:, None, None, None]
        else:
            shares = self.uniform(SHARES, len(out.of), len(inp.of))
            sums = torch.zeros(len(out.of), narrow.in_channels, dtype=torch.float64).index_add(1, inp.of, shares)
            weight = weight[:, inp.of] * (shares / sums[:, inp.of] / inp.factor)[..., None, None]
        wide.weight.copy_(weight)
        if narrow.bias is not None and wide.bias is not None:
            wide.bias.copy_(narrow.bias[out.of] * out.factor)

    def inverted(self, narrow: InvertedResidual, wide: InvertedResidual, inp: Channels) -> Channels:
        (a1, a2, a3), (b1, b2, b3) = layers(narrow), layers(wide)
        hidden = self.layer(a1, b1, inp)
        seen = self.layer(a2, b2, hidden, Channels(hidden.of, self.uniform(FACTORS, len(hidden.of))))
        return self.layer(a3, b3, seen, inp if narrow.residual else None)

    def double(self, narrow: DoubleConv, wide: DoubleConv, inp: Channels) -> Channels:
        for a, b in zip(narrow.double_conv, wide.double_conv, strict=True):
            inp = self.inverted(cast(InvertedResidual, a), cast(InvertedResidual, b), inp)
        return inp


def normalise(narrow: nn.BatchNorm2d, wide: nn.BatchNorm2d, inp: Channels, out: Channels) -> None:
    mean, variance = cast(Tensor, narrow.running_mean)[inp.of], cast(Tensor, narrow.running_var).double()[inp.of]
    cast(Tensor, wide.running_mean).copy_(mean * inp.factor)
    cast(Tensor, wide.running_var).copy_((variance + narrow.eps) * inp.factor**2 - narrow.eps)
    wide.weight.copy_(narrow.weight[out.of] * out.factor)
    wide.bias.copy_(narrow.bias[out.of] * out.factor)


def layers(block: InvertedResidual) -> list[Layer]:
    return [cast(Layer, (block.conv[i], block.conv[i + 1])) for i in (0, 3, 6)]


@torch.no_grad()
def widened_unet(narrow: UNet) -> UNet:
    """The network at the reference's full width: the same pictures but for rounding. Float32, in eval mode."""
    wide, widen = UNet(narrow.mode).eval(), Widening()
    a, b = narrow.audio_model, wide.audio_model
    heard = widen.inverted(a.conv1, b.conv1, unchanged(WINDOW_SHAPES[narrow.mode][0]))
    heard = widen.inverted(a.conv2, b.conv2, heard)
    heard = widen.layer((a.conv3, a.bn3), (b.conv3, b.bn3), heard)
    heard = widen.inverted(a.conv4, b.conv4, heard)
    heard = widen.layer((a.conv5, a.bn5), (b.conv5, b.bn5), heard)
    heard = widen.inverted(a.conv6, b.conv6, heard)
    heard = widen.inverted(a.conv7, b.conv7, heard)

    a, b = (cast(InvertedResidual, network.inc.inconv[0]) for network in (narrow, wide))
    seen = [widen.inverted(a, b, unchanged(FACE_SHAPE[0]))]
    for name in ("down1", "down2", "down3", "down4", "down5"):
        a, b = (getattr(network, name).maxpool_conv[0] for network in (narrow, wide))
        seen.append(widen.double(a, b, seen[-1]))

    x = joined(seen.pop(), heard)
    for a, b in zip(narrow.fuse_conv, wide.fuse_conv, strict=True):
        x = widen.double(cast(DoubleConv, a), cast(DoubleConv, b), x)
    for name in ("up1", "up2", "up3", "up4", "up5"):
        a, b = (getattr(network, name).conv for network in (narrow, wide))
        x = widen.double(a, b, joined(x, seen.pop()))
    widen.convolve(narrow.outc.conv, wide.outc.conv, x, unchanged(3))
    return wide


@torch.no_grad()
def widened_encoder(narrow: AudioEncoder) -> AudioEncoder:
    """The audio encoder at the reference's full width: the same features but for rounding. Float32, in eval mode."""
    wide, widen = AudioEncoder().eval(), Widening()
    pairs = [(cast(EncoderBlock, a), cast(EncoderBlock, b)) for a, b in zip(narrow, wide, strict=True)]
    x = unchanged(MEL_SHAPE[0])
    for a, b in pairs:
        a_layer, b_layer = cast(Layer, (*a.conv_block,)), cast(Layer, (*b.conv_block,))
        features = unchanged(AudioEncoder.WIDTHS[-1]) if b is pairs[-1][1] else None
        x = widen.layer(a_layer, b_layer, x, x if a.residual else features)
    return wide
