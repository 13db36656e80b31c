"""A checkpoint -> a Core ML package (.mlpackage) in half precision, for Apple's devices.

Core ML runs on those only. What is checked here, before the package appears, is what it holds: its operations are
computed one by one by torch, from the written files, and held against the network itself.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .export import LEAST_PSNR, OUTPUTS, ExportCheck, difference_of, example_inputs, mode_of
from .network import AudioEncoder, Mode, UNet, load_network
from .output import check_output_directory, complete_or_absent_directory, umask

MARK = "Manifest.json"
"""The file that tells an .mlpackage from other directories."""


def export_coreml(
    checkpoint: str | Path,
    out: str | Path,
    *,
    mode: Mode | None = None,
    overwrite: bool = False,
) -> ExportCheck:
    """Export a checkpoint as a Core ML program in half precision, for macOS 13, iOS 16 and later.

    A U-Net has inputs `input` (1,6,320,320) and `audio` (1,*WINDOW_SHAPES[mode]), output `output` (1,3,320,320). An
    audio encoder has input `mel` (1,1,80,16), output `emb` (1,512). All are multi-arrays of float16; weights and
    arithmetic are float16.

    Args:
        checkpoint: `.pth`, see `load_network`.
        out: the `.mlpackage`, a directory; it appears only once the export has passed its check.
        mode: see `load_unet`.
        overwrite: replace `out` if it is an `.mlpackage`.

    Returns:
        how close the package's operations, computed by torch and rounded to half precision, are to the network itself.

    Raises:
        InputError: the checkpoint cannot be used, coremltools is not installed, or the export is not close enough.
        OutputError: `out` exists or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".mlpackage":
        raise InputError(f"{out}: a Core ML package is named .mlpackage.")
    check_output_directory(out, overwrite, MARK, [checkpoint])
    network = load_network(checkpoint, mode)
    coremltools = find_coremltools()
    with complete_or_absent_directory(out, overwrite, MARK) as directory:
        package = directory / out.name  # the suffix is asked for
        with quiet():
            model = convert(coremltools, network)
            model.save(str(package))
        check = check_package(coremltools, package, network)
        if not check.psnr_db >= LEAST_PSNR["fp16"]:
            raise InputError(
                f"{checkpoint}: its Core ML export is not close enough to the network itself ({check}; at least "
                f"{LEAST_PSNR['fp16']:g} dB are required), so nothing was written."
            )
        for path in package.rglob("*"):  # coremltools makes some of them for their owner only
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
        for part in package.iterdir():
            part.rename(directory / part.name)
        package.rmdir()
    return check


def find_coremltools() -> Any:
    try:
        with quiet():
            import coremltools
    except ImportError:
        raise InputError(
            'a Core ML package is made by coremltools, which is not installed; pip install "gpurender[coreml]".'
        ) from None
    return coremltools


@contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' bars, its notes on the versions that it was tested with, and what it misses off a Mac."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def convert(coremltools: Any, network: UNet | AudioEncoder) -> Any:
    inputs = example_inputs(network, 1)
    with torch.inference_mode():
        traced = torch.jit.trace(network, tuple(inputs.values()), check_trace=False)
    model = coremltools.convert(
        traced,
        inputs=[coremltools.TensorType(name, tuple(value.shape)) for name, value in inputs.items()],
        outputs=[coremltools.TensorType(OUTPUTS[type(network)])],
        convert_to="mlprogram",
        compute_precision=coremltools.precision.FLOAT16,
        minimum_deployment_target=coremltools.target.macOS13,
    )
    model.user_defined_metadata["gpurender.mode"] = mode_of(network)
    return model


def check_package(coremltools: Any, package: Path, network: UNet | AudioEncoder) -> ExportCheck:
    inputs = example_inputs(network, 1)
    with torch.inference_mode():
        made = evaluate(coremltools, package, inputs)[OUTPUTS[type(network)]]
        return difference_of([(made, network(*inputs.values()))], isinstance(network, UNet))


# --- what a package computes -----------------------------------------------------------------------------------------


def evaluate(coremltools: Any, package: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a Core ML program for some inputs: its operations by torch, each rounded to half precision.

    Source of what the operations mean: coremltools' reference of MIL operations (iOS 15 set).

    Raises:
        InputError: the program has an operation that the networks here do not need.
    """
    spec = coremltools.utils.load_spec(str(package))
    main = spec.mlProgram.functions["main"]
    block = main.block_specializations[main.opset]
    constants = Constants(package)
    values: dict[str, Any] = {name: half(value) for name, value in inputs.items()}
    for operation in block.operations:
        if operation.type == "const":
            values[operation.outputs[0].name] = constants.read(operation.attributes["val"])
            continue
        if operation.type not in OPERATIONS:
            raise InputError(f"{package.name} holds the operation {operation.type}, which cannot be checked.")
        given = {key: [values[a.name] for a in argument.arguments] for key, argument in operation.inputs.items()}
        given = {key: value if key == "values" else value[0] for key, value in given.items()}
        values[operation.outputs[0].name] = half(OPERATIONS[operation.type](**given))
    return {name: values[name] for name in block.outputs}


class Constants:
    """A program's constants: in the program itself, or in its weight file."""

    def __init__(self, package: Path) -> None:
        from coremltools.libmilstoragepython import _BlobStorageReader  # pyright: ignore

        self._file = _BlobStorageReader(str(package / "Data/com.apple.CoreML/weights/weight.bin"))

    def read(self, value: Any) -> Any:
        """A float32 tensor for arrays of half precision, a list or a number for what says how to compute."""
        shape = [dim.constant.size for dim in value.type.tensorType.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            bits = np.array(self._file.read_fp16_data(value.blobFileValue.offset), np.uint16)
            return torch.from_numpy(bits.view(np.float16).astype(np.float32)).reshape(shape)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "bytes":
            return torch.from_numpy(np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32)).reshape(shape)
        content = list(getattr(tensor, kind).values)
        return content if shape else content[0]


def half(value: Tensor) -> Tensor:
    return value.half().float()


def conv(
    x: Tensor,
    weight: Tensor,
    strides: list[int],
    pad_type: str,
    pad: list[int],
    dilations: list[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    if pad_type == "custom":  # before and after, rows first
        x = F.pad(x, (pad[2], pad[3], pad[0], pad[1]))
    elif pad_type != "valid":
        raise InputError(f"a convolution pads by {pad_type}, which cannot be checked.")
    return F.conv2d(x, weight, bias, strides, 0, dilations, groups)


def upsample_bilinear(
    x: Tensor, scale_factor_height: float, scale_factor_width: float, align_corners: bool, **rest: Any
) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=bool(align_corners))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "conv": conv,
    "relu": lambda x: x.relu(),
    "add": lambda x, y: x + y,
    "concat": lambda values, axis, interleave: torch.cat(values, axis),
    "upsample_bilinear": upsample_bilinear,
    "sigmoid": lambda x: x.sigmoid(),
    "reshape": lambda x, shape: x.reshape(shape),
}
