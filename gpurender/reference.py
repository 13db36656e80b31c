"""Sample frames of a render with the numbers behind them, for other implementations to be checked by.

What is written, and how another program reads it: `gpurender.reference_set`.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .audio import Features
from .audio_engine import hear
from .cache import hash_of
from .choose_engine import load_engine, network_for
from .crop import INNER, crop_and_mask
from .cuda import resolve_device
from .engine import Engine, EngineName, predict
from .errors import InputError
from .find import find_sound, find_template
from .host import one_torch_thread
from .network import WINDOW_SHAPES
from .output import check_output_directory, complete_or_absent_directory, errors_passed, write_text
from .paste import paste_faces
from .progress import Progress, Silent
from .reference_set import ARRAYS, FORMAT, METADATA, VERSION, ReferenceSet, open_reference
from .report import installed
from .template import Order, Template, frame_order, open_template


def write_reference(
    template: str | Path,
    audio: str | Path,
    out: str | Path,
    *,
    frames: int = 10,
    model: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    device: str = "cpu",
    engine: EngineName = "auto",
    fps: float | None = None,
    order: Order = "bounce",
    start_frame: int = 0,
    parsing: bool | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReferenceSet:
    """Write a reference set of a render: sample frames, and what went into the network and came out, in float32.

    On a CPU, the same inputs on the same machine give the same bytes.

    Args:
        template, audio, model, audio_encoder, fps, order, start_frame, parsing: as `make` has them.
        out: the directory to make.
        frames: how many samples, evenly spaced from the first frame to the last; at most all.
        device, engine: see `load_engine`.
        overwrite: replace the reference set at `out`.
        progress: is told about stages and samples.

    Returns:
        the set, opened.

    Raises:
        InputError, DeviceError, OutputError: with what to do about it; nothing is left at `out` then.
    """
    progress, out = progress or Silent(), Path(out)
    template, audio, place = find_template(template), find_sound(audio), resolve_device(device)
    check_output_directory(out, overwrite, METADATA, [template, audio, model, audio_encoder])
    if (out / METADATA).is_file():
        open_reference(out)  # else it is not ours to replace
    if frames < 1:
        raise InputError(f"{frames} sample frames cannot be taken; give at least 1.")
    person = open_template(template, device=place, parsing=parsing)
    frame_order(len(person), range(1), order, start_frame)
    network = network_for(template, model, engine, place)
    features, encoder_file = hear(audio, template, audio_encoder, fps, place, progress.stage)
    progress.stage(f"loading {network.name}")
    runtime = load_engine(
        network, mode=features.mode, device=place, engine=engine, precision="fp32", notify=progress.stage
    )

    last, count = len(features) - 1, min(frames, len(features))
    indices = [round(k * last / (count - 1)) for k in range(count)] if count > 1 else [0]
    with one_torch_thread(), complete_or_absent_directory(out, overwrite, METADATA) as directory:
        (directory / "frames").mkdir()
        (directory / "samples").mkdir()
        samples = []
        for index in errors_passed(progress.each(indices, count)):
            shown = frame_order(len(person), range(index, index + 1), order, start_frame)
            samples.append(write_sample(directory, index, shown, person, features, runtime))
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "frames": len(features),
            "fps": features.fps,
            "width": person.width,
            "height": person.height,
            "mode": features.mode,
            "precision": runtime.precision,
            "engine": runtime.name,
            "template": {
                "name": Path(os.path.abspath(template)).name,
                "frames": len(person),
                "order": order,
                "start_frame": start_frame,
                "parsing": person.parsing,
            },
            "model": named(network),
            "audio": named(audio),
            "audio_encoder": None if encoder_file is None else named(encoder_file),
            "arrays": {
                "input": {"shape": [6, INNER, INNER], "dtype": "<f4"},
                "audio": {"shape": list(WINDOW_SHAPES[features.mode]), "dtype": "<f4"},
                "output": {"shape": [3, INNER, INNER], "dtype": "<f4"},
            },
            "versions": installed(),
            "samples": samples,
        }
        text = json.dumps(metadata, indent=2, ensure_ascii=False)
        write_text(directory / METADATA, text + "\n", overwrite=False)
    return open_reference(out)


def write_sample(
    directory: Path, index: int, shown: list[int], person: Template, features: Features, engine: Engine
) -> dict[str, Any]:
    """Draw one output frame, over the one template frame that is `shown`; write it, and say what it is."""
    pixels, keep = person.frames(shown)
    rects = person.rects[shown]
    crops, faces = crop_and_mask(pixels, rects)
    window = features.windows(index, index + 1)
    drawn = predict(engine, faces, window)
    pasted = paste_faces(pixels, crops, drawn, rects, keep)
    frame, arrays = f"frames/{index:05d}.png", f"samples/{index:05d}.npz"
    Image.fromarray(pasted[0].permute(1, 2, 0).cpu().numpy()).save(directory / frame)
    stored = {
        name: np.ascontiguousarray(tensor[0].cpu().numpy(), "<f4")
        for name, tensor in zip(ARRAYS, (faces, window, drawn), strict=True)
    }
    np.savez(directory / arrays, **stored)  # pyright: ignore[reportArgumentType]  # of names that are options
    return {
        "index": index,
        "template_frame": shown[0],
        "rect": rects[0].tolist(),
        "frame": frame,
        "frame_sha256": hash_of(directory / frame),
        "arrays": arrays,
        "arrays_sha256": hash_of(directory / arrays),
    }


def named(file: Path) -> dict[str, str]:
    return {"name": file.name, "sha256": hash_of(file)}
