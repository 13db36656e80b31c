"""Which audio encoder hears a sound, and what runs it: torch a checkpoint, OpenVINO an ONNX export."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .audio import FEATURE_FILES, AudioEncoderLike, Features, load_features
from .cuda import resolve_device
from .errors import InputError
from .find import find_audio_encoder
from .halves import check_no_circle, load_onnx
from .network import load_audio_encoder
from .openvino_requests import compiled_on_cpu
from .private_openvino import PREPARING, openvino


def hear(
    audio: Path,
    template: Path,
    given: str | Path | None,
    fps: float | None,
    device: torch.device,
    notify: Callable[[str], None],
) -> tuple[Features, Path | None]:
    """The features of some audio, and the audio encoder that makes them of sound: the one that is given, else the
    template's; None for feature files.

    Raises:
        InputError: the template has none, see `find_audio_encoder`; or as `load_features`.
    """
    file = encoder = None
    if audio.suffix.lower() not in FEATURE_FILES:
        file = find_audio_encoder(template) if given is None else Path(given)
        encoder = load_audio_engine(file, device)
    elif given is not None:
        check_encoder_file(Path(given))  # it is not needed, but a wrong name is better told
    notify(f"reading {audio.name}")
    return load_features(audio, encoder=encoder, fps=fps, device=device), file


def load_audio_engine(path: str | Path, device: str | torch.device = "cpu") -> AudioEncoderLike:
    """The audio encoder as a function of (B,1,80,16) mel windows: torch on the device for a `.pth` checkpoint, OpenVINO
    on the CPU for `.onnx` (what goes in and out is small: 5 KB and 2 KB a frame).

    Args:
        path: a SyncTalk_2D audio encoder.
        device: where the function takes float32 and gives features (B,512) float32.

    Raises:
        InputError: the file is no audio encoder.
        DeviceError: there is no such device here.
    """
    path = Path(path)
    device = resolve_device(device)
    check_encoder_file(path)
    if path.suffix.lower() == ".pth":
        return load_audio_encoder(path).to(device)
    if path.suffix.lower() == ".onnx":
        with PREPARING:
            return load_onnx_encoder(path, device)
    raise InputError(f"{path}: an audio encoder is an .onnx export or a .pth checkpoint.")


def check_encoder_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: there is no such audio encoder.")


def load_onnx_encoder(path: Path, device: torch.device) -> AudioEncoderLike:
    read = load_onnx(path)  # OpenVINO would print what its parsers of other formats make of a damaged file
    check_no_circle(path, read)
    try:
        model = openvino.Core().read_model(read.SerializeToString())
    except RuntimeError:
        raise InputError(f"{path} is not an ONNX network that can be read.") from None
    shapes = [port.partial_shape for port in (*model.inputs, *model.outputs)]
    wanted = [openvino.PartialShape([-1, 1, 80, 16]), openvino.PartialShape([-1, 512])]
    if len(shapes) != 2 or not all(shape.compatible(other) for shape, other in zip(shapes, wanted, strict=True)):
        given = " and ".join(str(shape) for shape in shapes)
        raise InputError(f"{path} has {given}; an audio encoder takes a batch of (1, 80, 16) and gives one of (512,).")
    model.reshape([1, 1, 80, 16])
    ready = compiled_on_cpu(model, {"INFERENCE_PRECISION_HINT": "f32"})
    one_at_a_time = threading.Lock()  # there is one request, and renders may share the encoder

    def encode(mel: Tensor) -> Tensor:
        with one_at_a_time:
            rows = [ready(row[None])[0].copy() for row in mel.cpu().numpy()]
        return torch.from_numpy(np.concatenate(rows)).to(device)

    return encode
