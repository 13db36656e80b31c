"""The networks: a face U-Net driven by audio features, and the encoder that makes those features from mel.

Modules and parameters carry the names of SyncTalk_2D's 328-pixel models, so its checkpoints load unchanged. Widths
are read from the weights: a half-width "mobile" checkpoint builds a half-width network.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cuda import on_the_host
from .errors import InputError, check_no_pipe, first_line

Mode = Literal["ave", "hubert", "wenet"]

FACE_SHAPE = (6, 320, 320)
WINDOW_SHAPES: dict[Mode, tuple[int, int, int]] = {
    "ave": (32, 16, 16),
    "hubert": (32, 32, 32),
    "wenet": (256, 16, 32),
}
"""The audio input of one frame for each kind of feature."""

MEL_SHAPE = (1, 80, 16)
"""What the audio encoder hears for one feature."""

FRAME_RATES: dict[Mode, int] = {"ave": 25, "hubert": 25, "wenet": 20}
"""The frames a second that each kind of network was trained at."""

Encoded = tuple[Tensor, ...]
"""What a network makes of one template frame before it hears anything; opaque outside the engine that made it."""

Weights = Mapping[str, Tensor]


# --- building blocks, in SyncTalk_2D's names -------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """1×1 convolution to `hidden` channels, 3×3 depthwise, 1×1 back; adds its input where `residual`."""

    def __init__(self, inp: int, hidden: int, out: int, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class DoubleConv(nn.Module):
    """One inverted residual that changes width and size, one that keeps both and adds its input."""

    def __init__(self, inp: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            InvertedResidual(inp, 2 * inp, out, stride),
            InvertedResidual(out, 2 * out, out, residual=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class InConv(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.inconv = nn.Sequential(InvertedResidual(inp, 2 * inp, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.inconv(x)


class Down(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(DoubleConv(inp, out, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Doubles the size (bilinear, corners aligned), joins the skip behind it, then a double convolution."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv = DoubleConv(inp, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # Sizes are 10·2ᵏ throughout, so the reference's padding to the skip's size never pads.
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.conv(torch.cat([x, skip], 1))


class OutConv(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class AudioModel(nn.Module):
    """An audio window to the (C,10,10) that joins the U-Net's bottleneck.

    `widths` are the channels of the input and behind conv1, conv2, conv3 and conv5.
    """

    def __init__(self, mode: Mode, widths: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        inp, c1, c2, c3, c5 = widths
        wenet = mode == "wenet"
        stride = {"ave": (1, 1), "hubert": (2, 2), "wenet": (1, 2)}[mode]
        self.conv1 = InvertedResidual(inp, 2 * inp, c1, residual=wenet and inp == c1)
        self.conv2 = InvertedResidual(c1, 2 * c1, c2, residual=wenet and c1 == c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride, 1)
        self.bn3 = nn.BatchNorm2d(c3)
        self.conv4 = InvertedResidual(c3, 2 * c3, c3, residual=True)
        self.conv5 = nn.Conv2d(c3, c5, 3, 2, 3)
        self.bn5 = nn.BatchNorm2d(c5)
        self.relu = nn.ReLU()
        self.conv6 = InvertedResidual(c5, 2 * c5, c5, residual=True)
        self.conv7 = InvertedResidual(c5, 2 * c5, c5, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.conv4(x)
        x = self.relu(self.bn5(self.conv5(x)))
        return self.conv7(self.conv6(x))


# --- the two networks ------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Masked face and audio window to face: SyncTalk_2D's 328-pixel U-Net.

    Args:
        mode: the kind of audio features.
        encoder: channels behind `inc` and `down1..5`.
        audio: channels behind the audio model's input, conv1, conv2, conv3 and conv5.
        fuse: channels behind the two double convolutions at the bottleneck.
        decoder: channels behind `up1..5`.
    """

    def __init__(
        self,
        mode: Mode = "ave",
        encoder: tuple[int, ...] = (32, 32, 64, 128, 256, 512),
        audio: tuple[int, int, int, int, int] | None = None,
        fuse: tuple[int, int] = (512, 256),
        decoder: tuple[int, ...] = (128, 64, 32, 32, 16),
    ) -> None:
        super().__init__()
        if audio is None:
            audio = (256, 256, 256, 256, 512) if mode == "wenet" else (32, 64, 128, 256, 512)
        self.mode: Mode = mode
        self.audio_model = AudioModel(mode, audio)
        self.fuse_conv = nn.Sequential(DoubleConv(encoder[5] + audio[4], fuse[0]), DoubleConv(*fuse))
        self.inc = InConv(FACE_SHAPE[0], encoder[0])
        self.down1 = Down(encoder[0], encoder[1])
        self.down2 = Down(encoder[1], encoder[2])
        self.down3 = Down(encoder[2], encoder[3])
        self.down4 = Down(encoder[3], encoder[4])
        self.down5 = Down(encoder[4], encoder[5])
        self.up1 = Up(fuse[1] + encoder[4], decoder[0])
        self.up2 = Up(decoder[0] + encoder[3], decoder[1])
        self.up3 = Up(decoder[1] + encoder[2], decoder[2])
        self.up4 = Up(decoder[2] + encoder[1], decoder[3])
        self.up5 = Up(decoder[3] + encoder[0], decoder[4])
        self.outc = OutConv(decoder[4], 3)

    def forward(self, face: Tensor, audio: Tensor) -> Tensor:
        """(B,6,320,320) in 0..1 and (B,*WINDOW_SHAPES[mode]) to (B,3,320,320) in 0..1; BGR as the face is."""
        return self.decode(face, self.encode(face), audio)

    def encode(self, face: Tensor) -> tuple[Tensor, ...]:
        """The part that sees the template alone."""
        x2 = self.down1(self.inc(face))  # (B,32,160,160)
        x3 = self.down2(x2)  # (B,64,80,80)
        x4 = self.down3(x3)  # (B,128,40,40)
        x5 = self.down4(x4)  # (B,256,20,20)
        x6 = self.down5(x5)  # (B,512,10,10)
        return x2, x3, x4, x5, x6

    def decode(self, face: Tensor, encoded: tuple[Tensor, ...], audio: Tensor) -> Tensor:
        """The part that also hears the audio."""
        x2, x3, x4, x5, x6 = encoded
        x1 = self.inc(face)  # (B,32,320,320): cheaper to compute again than to keep and read
        x = self.fuse_conv(torch.cat([x6, self.audio_model(audio)], 1))  # (B,256,10,10)
        x = self.up1(x, x5)
        x = self.up2(x, x4)
        x = self.up3(x, x3)
        x = self.up4(x, x2)
        x = self.up5(x, x1)  # (B,16,320,320)
        return torch.sigmoid(self.outc(x))


class EncoderBlock(nn.Module):
    def __init__(
        self, inp: int, out: int, kernel: int, stride: int | tuple[int, int], padding: int, residual: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        self.conv_block = nn.Sequential(nn.Conv2d(inp, out, kernel, stride, padding), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_block(x)
        return F.relu(x + y if self.residual else y)


class AudioEncoder(nn.Sequential):
    """A mel window (B,1,80,16) to one `ave` feature (B,512).

    Args:
        widths: channels behind each of the 13 blocks.
    """

    # (kernel, stride, padding, adds its input) of each block
    LAYOUT = (
        *((3, 1, 1, False), (3, 1, 1, True), (3, 1, 1, True)),
        *((3, (3, 1), 1, False), (3, 1, 1, True), (3, 1, 1, True)),
        *((3, 3, 1, False), (3, 1, 1, True), (3, 1, 1, True)),
        *((3, (3, 2), 1, False), (3, 1, 1, True)),
        *((3, 1, 0, False), (1, 1, 0, False)),
    )
    WIDTHS = (32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 512, 512)

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        inputs = (1, *widths[:-1])
        super().__init__(
            *(EncoderBlock(inp, out, *block) for inp, out, block in zip(inputs, widths, self.LAYOUT, strict=True))
        )

    def forward(self, mel: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(mel).flatten(1)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load_unet(path: str | Path, mode: Mode | None = None) -> UNet:
    """Load a SyncTalk_2D checkpoint as a float32 `UNet` in eval mode on the CPU.

    Args:
        path: `.pth` with a plain state dict, or one under `model`, `model_state_dict` or `state_dict`.
        mode: the kind of features. `wenet` shows in the weights; `ave` and `hubert` have the same weights' shapes and
            differ in one stride, so None means `ave` for them.

    Raises:
        InputError: the file is not a checkpoint, or its keys or shapes are another architecture's.
    """
    weights = read_weights(path)
    if is_audio_encoders(weights):
        raise InputError(f"{path} is an audio encoder, not a U-Net; give it as --audio-encoder.")
    return unet_of(path, weights, mode)


def load_network(path: str | Path, mode: Mode | None) -> UNet | AudioEncoder:
    """Load a checkpoint as the network that it is of: see `load_unet`, `load_audio_encoder`.

    Raises:
        InputError: it is neither's, or `mode` is not the U-Net's.
    """
    weights = read_weights(path)
    return audio_encoder_of(path, weights) if is_audio_encoders(weights) else unet_of(path, weights, mode)


def is_audio_encoders(weights: Weights) -> bool:
    return any(re.fullmatch(r"(audio_encoder\.)?0\.conv_block\.0\.weight", name) for name in weights)


@on_the_host()
def unet_of(path: str | Path, weights: Weights, mode: Mode | None) -> UNet:
    check_keys(path, weights, UNet(), "a SyncTalk_2D 328-pixel U-Net")

    def out(block: str) -> int:
        return channels(path, weights, f"{block}.weight")[0]

    def double(block: str) -> int:
        return out(f"{block}.double_conv.0.conv.6")

    inp = channels(path, weights, "audio_model.conv1.conv.0.weight")[1]
    found: tuple[Mode, ...] = ("wenet",) if inp == WINDOW_SHAPES["wenet"][0] else ("ave", "hubert")
    if mode is not None and mode not in found:
        raise InputError(f"{path} is a network for {' or '.join(found)} features, not for {mode}.")
    audio = [out(f"audio_model.{block}") for block in ("conv1.conv.6", "conv2.conv.6", "conv3", "conv5")]
    network = UNet(
        mode or found[0],
        encoder=(out("inc.inconv.0.conv.6"), *(double(f"down{i}.maxpool_conv.0") for i in range(1, 6))),
        audio=(inp, audio[0], audio[1], audio[2], audio[3]),
        fuse=(double("fuse_conv.0"), double("fuse_conv.1")),
        decoder=tuple(double(f"up{i}.conv") for i in range(1, 6)),
    )
    return cast(UNet, fill(network, path, weights))


def load_audio_encoder(path: str | Path) -> AudioEncoder:
    """Load SyncTalk_2D's audio encoder as a float32 `AudioEncoder` in eval mode on the CPU.

    Raises:
        InputError: the file is not a checkpoint, or its keys or shapes are another architecture's.
    """
    return audio_encoder_of(path, read_weights(path))


@on_the_host()
def audio_encoder_of(path: str | Path, weights: Weights) -> AudioEncoder:
    weights = {name.removeprefix("audio_encoder."): value for name, value in weights.items()}
    check_keys(path, weights, AudioEncoder(), "SyncTalk_2D's audio encoder")
    widths = tuple(channels(path, weights, f"{i}.conv_block.0.weight")[0] for i in range(len(AudioEncoder.WIDTHS)))
    if widths[-1] != AudioEncoder.WIDTHS[-1]:
        raise InputError(f"{path}: an audio encoder gives 512 features, this one gives {widths[-1]}.")
    return cast(AudioEncoder, fill(AudioEncoder(widths), path, weights))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without running any code that it may carry."""
    check_no_pipe(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such checkpoint.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; give the checkpoint file in it.") from None
    except Exception as error:  # torch raises pickle, zip, runtime, EOF and key errors alike for a broken file
        reason = first_line(error)
        if "weights_only" in str(error):
            reason = "it holds more than tensors"
        raise InputError(
            f"{path} is not a checkpoint that can be loaded safely ({reason}). Only files of plain tensors are opened, "
            "because others can run code; save the network's state_dict() with torch.save."
        ) from None
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no state dict: neither plain nor under model, model_state_dict, state_dict.")
    for name, value in content.items():
        if not is_plain(value):
            raise InputError(f"{path}: {name} is not a plain tensor of numbers; save the network in float32.")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def is_plain(value: Tensor) -> bool:
    """Whether these are numbers that are there: not sparse, quantized, nested, of 8-bit floats, without values, or a
    few that stand for many."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    there = value.device.type == "cpu" and value.layout == torch.strided and not value.is_nested
    return there and value.dtype in kinds and value.untyped_storage().nbytes() >= value.nbytes


def check_keys(path: str | Path, weights: Weights, network: nn.Module, what: str) -> None:
    expected = network.state_dict().keys()
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        raise InputError(f"{path} is not {what}: {some(missing, 'missing')}, {some(unknown, 'unknown')}.")


def channels(path: str | Path, weights: Weights, name: str) -> tuple[int, int]:
    """A convolution's outputs and inputs, by its weight."""
    shape = tuple(weights[name].shape)
    if len(shape) != 4 or 0 in shape:
        raise InputError(f"{path}: {name} has shape {shape}, which is no convolution's.")
    return shape[:2]


def some(names: list[str], kind: str) -> str:
    if not names:
        return f"no {kind} keys"
    return f"{len(names)} {kind} keys ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def fill(network: nn.Module, path: str | Path, weights: Weights) -> nn.Module:
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, value in weights.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(f"{path}: {name} has shape {tuple(value.shape)}, expected {shapes[name]}.")
        if not value.float().isfinite().all():
            raise InputError(f"{path}: {name} holds NaN, or numbers that are infinite in float32.")
        if name.endswith("running_var") and (value < 0).any():
            raise InputError(f"{path}: {name} holds negative variances: it is damaged.")
    network.float()  # whatever torch's default type is
    network.load_state_dict(weights, strict=False)  # only num_batches_tracked may be absent, see check_keys
    return network.eval()
