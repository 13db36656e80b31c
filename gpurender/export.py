"""A checkpoint -> ONNX with a dynamic batch; files that users get are checked against the torch module."""

import copy
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .cache import cache_directory, hash_of, is_whole, seal
from .crop import MASK_X, MASK_Y
from .cuda import on_the_host, without_autocast
from .errors import InputError, OutputError, check_choice
from .network import FACE_SHAPE, MEL_SHAPE, WINDOW_SHAPES, AudioEncoder, Mode, UNet, load_network, load_unet
from .onnx_graph import onnx_graph
from .output import complete_or_absent

ExportPrecision = Literal["fp32", "fp16"]
OUTPUTS = {UNet: "output", AudioEncoder: "emb"}
EXPORTING = threading.RLock()
"""Held by whoever needs a cached export: it is made once."""
EXPORT_VERSION = 3  # part of the cache key: raise it when exports change
# The bound for fp16 is meant to catch a wrong export only. How much half precision costs depends on the network (the
# golden numbers' seeded weights: 39.8 dB); the figure is shown, and the user judges.
LEAST_PSNR = {"fp32": 80.0, "fp16": 30.0}


@dataclass(frozen=True)
class ExportCheck:
    """How close what an export computes is to what the float32 torch module computes."""

    largest_difference: float
    """of a picture in 0..1; of features, as a share of the largest"""
    psnr_db: float

    def __str__(self) -> str:
        return f"largest difference {self.largest_difference:.2g} of 1, PSNR {self.psnr_db:.1f} dB"


@without_autocast()
@on_the_host()
def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    mode: Mode | None = None,
    precision: ExportPrecision = "fp32",
    max_batch: int = 64,
    overwrite: bool = False,
) -> ExportCheck:
    """Export a checkpoint to ONNX, under the names that template packages have.

    A U-Net has inputs `input` (B,6,320,320) and `audio` (B,*WINDOW_SHAPES[mode]), output `output` (B,3,320,320). An
    audio encoder has input `mel` (B,1,80,16), output `emb` (B,512).

    Args:
        checkpoint: `.pth`, see `load_network`.
        out: the `.onnx` file; it appears only once the export has passed its check.
        mode: see `load_unet`.
        precision: of weights, inputs, outputs and arithmetic; an audio encoder's is fp32.
        max_batch: 1 makes a file that takes one frame at a time, any other number one that takes as many as one likes:
            ONNX has no bounds.
        overwrite: replace `out` if it exists.

    Returns:
        how close ONNX Runtime's results, for batches of 1 and 2, are to the torch module's.

    Raises:
        InputError: the checkpoint cannot be used, or what comes from ONNX is not close enough.
        OutputError: `out` exists or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise InputError(f"{out}: an ONNX export is named .onnx.")
    if max_batch < 1:
        raise InputError(f"max_batch is at least 1, given {max_batch}.")
    check_choice("precision of an export", precision, get_args(ExportPrecision))
    network = load_network(checkpoint, mode)
    if isinstance(network, AudioEncoder) and precision != "fp32":
        raise InputError(f"{checkpoint} is an audio encoder, which is exported in fp32 only: it is small.")
    with complete_or_absent(out, overwrite) as name:
        model = onnx_bytes(network, precision, max_batch)
        check = check_export(model, network, min(2, max_batch))
        if not check.psnr_db >= LEAST_PSNR[precision]:
            raise InputError(
                f"{checkpoint}: its {precision} export is not close enough to the network itself ({check}; at least "
                f"{LEAST_PSNR[precision]:g} dB are required), so nothing was written."
            )
        Path(name).write_bytes(model)
    return check


def cached_onnx(
    checkpoint: str | Path, mode: Mode | None = None, notify: Callable[[str], None] = lambda text: None
) -> Path:
    """The checkpoint's float32 ONNX export in the user's cache, made there if need be. It is not checked: that takes
    longer than the export, and stays in memory for all of the first render."""
    network_hash = hash_of(Path(checkpoint))[:32]
    path = cache_directory() / f"{network_hash}-{mode or 'any'}-fp32-v{EXPORT_VERSION}.onnx"
    sums = path.with_name(path.name + ".sha256")
    with EXPORTING:
        if not is_whole(sums, [path]):
            network = load_unet(checkpoint, mode)
            if hash_of(Path(checkpoint))[:32] != network_hash:  # its export would be kept as that of the one before
                raise InputError(f"{checkpoint} was replaced while it was read; try again.")
            notify(f"exporting {Path(checkpoint).name} to ONNX, once, into {path.parent}")
            export_to_cache(network, path, sums)
    return path


def export_to_cache(network: UNet, path: Path, sums: Path) -> None:
    try:
        with complete_or_absent(path, overwrite=True) as name:  # another program may be at it: either's will do
            Path(name).write_bytes(onnx_bytes(network, "fp32", 64))
        seal(sums, [path])
    except OutputError as error:
        raise OutputError(f"{error} That is the cache of exports; set GPURENDER_CACHE to another place.") from None


def onnx_bytes(network: UNet | AudioEncoder, precision: ExportPrecision, max_batch: int) -> bytes:
    written = with_norms_folded(network).to(torch.float16 if precision == "fp16" else torch.float32)
    inputs = (
        {"input": FACE_SHAPE, "audio": WINDOW_SHAPES[network.mode]} if isinstance(network, UNet) else {"mel": MEL_SHAPE}
    )
    model = onnx_graph(written, inputs, OUTPUTS[type(network)], "batch" if max_batch > 1 else 1)
    onnx.helper.set_model_props(model, {"gpurender.mode": mode_of(network), "gpurender.precision": precision})
    return model.SerializeToString()


def with_norms_folded(network: UNet | AudioEncoder) -> nn.Module:
    """A copy whose batch normalisations are part of the convolutions before them."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for (name, layer), (after, norm) in itertools.pairwise(list(module.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, norm))
                setattr(module, after, nn.Identity())
    return network


def check_export(model: bytes, network: UNet | AudioEncoder, max_batch: int) -> ExportCheck:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it would take more than is used, and this is the most that an export takes
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    inputs = example_inputs(network, max_batch)
    with torch.inference_mode():  # one after another: two at once take 0.3 GB more, the most that an export takes
        expected = torch.cat([network(*(value[i : i + 1] for value in inputs.values())) for i in range(max_batch)])
    pairs = []
    for batch in {1, max_batch}:
        (made,) = session.run(None, {name: value[:batch].numpy().astype(dtype) for name, value in inputs.items()})
        pairs.append((torch.from_numpy(np.asarray(made, np.float32)), expected[:batch]))
    return difference_of(pairs, isinstance(network, UNet))


def difference_of(pairs: list[tuple[Tensor, Tensor]], pictures: bool) -> ExportCheck:
    """What an export made and what it should have made: pictures in 0..1, or features."""
    full = 1.0 if pictures else max(expected.abs().max().item() for _, expected in pairs)
    differences = torch.cat([(made - expected).double().flatten() / full for made, expected in pairs])
    squares = differences.square().mean().item()
    psnr = -10 * np.log10(squares) if squares else float("inf")
    return ExportCheck(differences.abs().max().item(), float(psnr))


def mode_of(network: UNet | AudioEncoder) -> Mode:
    return network.mode if isinstance(network, UNet) else "ave"


@on_the_host()
def example_inputs(network: UNet | AudioEncoder, batch: int) -> dict[str, Tensor]:
    """Inputs by their names, for a network to chew on."""
    if isinstance(network, UNet):
        return dict(zip(("input", "audio"), example_input(batch, network.mode), strict=True))
    return {"mel": torch.rand(batch, *MEL_SHAPE, generator=torch.Generator().manual_seed(1)) * 8 - 4}


@on_the_host()
def example_input(batch: int, mode: Mode) -> tuple[Tensor, Tensor]:
    """Wavy pictures with the mouth masked, and random audio: something for a network to chew on."""
    x, y = torch.arange(320.0), torch.arange(320.0)[:, None]
    shift = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(3)[:, None, None]
    picture = 0.5 + 0.5 * torch.sin(2 * torch.pi * (x * (channel + 1) / 64 + y * (channel + 2) / 97 + shift / 7))
    masked = picture.clone()
    masked[:, :, MASK_Y, MASK_X] = 0
    audio = torch.rand(batch, *WINDOW_SHAPES[mode], generator=torch.Generator().manual_seed(1)) * 2
    return torch.cat([picture, masked], 1), audio
