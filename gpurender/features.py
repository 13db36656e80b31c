"""What the network hears -> a feature file, .npy or .bin, that other implementations read; and between the two."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
from torch import Tensor

from .audio import FEATURE_FILES, Features, load_features
from .audio_engine import load_audio_engine
from .cuda import resolve_device
from .errors import InputError
from .find import find_audio_encoder, find_sound, find_template
from .host import one_torch_thread
from .output import check_output, complete_or_absent, errors_passed
from .progress import Progress, Silent

BLOCK = 256  # frames at a time


def make_features(
    source: str | Path,
    out: str | Path,
    *,
    template: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Features:
    """Write a sound's features as a feature file, or a feature file as another: all that `gpurender features` does.

    Args:
        source: sound or features, see `load_features`; or `hello`, the bundled recording.
        out: see `write_features`.
        template: whose audio encoder hears the sound, see `find_audio_encoder`; or `avatar`.
        audio_encoder: the encoder itself, `.pth` or `.onnx`; goes before the template's.
        device: where it runs, see `resolve_device`.
        overwrite: replace what is at `out`.
        progress: is told about frames.

    Returns:
        the features that were written.

    Raises:
        InputError, DeviceError, OutputError: with what to do about it; nothing is left at `out` then.
    """
    source, out = find_sound(source), Path(out)
    check_feature_file(out, overwrite)
    place = resolve_device(device)
    listener = None
    if source.suffix.lower() not in FEATURE_FILES:
        if audio_encoder is None:
            if template is None:
                raise InputError(
                    f"{source} is sound, which needs an audio encoder: give --audio-encoder FILE (.onnx or .pth), or "
                    "--template DIR to use the template's (avatar is the bundled one)."
                )
            audio_encoder = find_audio_encoder(find_template(template))
        listener = load_audio_engine(audio_encoder, place)
    features = load_features(source, encoder=listener, device=place)
    write_features(features, out, overwrite=overwrite, progress=progress)
    return features


@one_torch_thread()  # as `make` hears where OpenVINO draws: the same bits
def write_features(
    features: Features,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write features as float32: `load_features` gives the same bits back.

    Args:
        features: see `load_features`.
        out: `.npy`; or `.bin`, little-endian in C order, with a `.bin.json` beside it:
            `{"num_frames": N, "feature_size": 512, "shape": [N, 512]}`.
        overwrite: replace what is there.
        progress: is told about frames.

    Raises:
        InputError: `out` is no such name.
        OutputError: `out` exists or cannot be written. Neither file is left then: they appear once complete.
    """
    out = Path(out)
    check_feature_file(out, overwrite)
    starts = range(0, len(features), BLOCK)
    rows = (features.rows(start, min(start + BLOCK, len(features))) for start in starts)
    blocks = errors_passed((progress or Silent()).frames(rows, len(features)))
    if out.suffix.lower() == ".npy":
        with complete_or_absent(out, overwrite) as name, open(name, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": features.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(rows_bytes(blocks))
        return
    header = {
        "num_frames": len(features),
        "feature_size": prod(features.shape[1:]),
        "shape": list(features.shape),
    }
    appeared = False
    try:
        # The numbers appear first: without the header, or beside an older one, they are refused or they are right.
        with complete_or_absent(header_of(out), overwrite) as name:
            Path(name).write_text(json.dumps(header) + "\n", "ascii")
            with complete_or_absent(out, overwrite) as data, open(data, "wb") as file:
                file.writelines(rows_bytes(blocks))
            appeared = not overwrite
    except BaseException:  # an interrupt, too
        if appeared:
            with suppress(OSError):
                out.unlink()
        raise


def rows_bytes(blocks: Iterable[Tensor]) -> Iterator[bytes]:
    for block in blocks:
        yield block.cpu().numpy().astype("<f4").tobytes()


def header_of(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def check_feature_file(out: Path, overwrite: bool) -> None:
    """Raise InputError or OutputError where `write_features` would, before anything is heard."""
    if out.suffix.lower() not in FEATURE_FILES:
        raise InputError(f"{out}: a feature file is named .npy, or .bin with its shape in .bin.json beside it.")
    check_output(out, overwrite)
    if out.suffix.lower() == ".bin":
        check_output(header_of(out), overwrite)
