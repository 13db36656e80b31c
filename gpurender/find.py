"""Where things are: the bundled template and recording, and the networks that belong to a template."""

import os
import re
from pathlib import Path
from typing import Literal

from .errors import InputError, check_no_pipe

BUNDLED = Path(__file__).parent / "demo" / "files"
AVATAR, HELLO = "avatar", "hello"

NETWORKS = ("generator.onnx", "unet.onnx", "unet.pth", "generator.pth")
AUDIO_ENCODERS = ("audio_encoder.onnx", "audio_encoder.pth", "audio_visual_encoder.pth")


def find_template(name: str | Path) -> Path:
    """The path itself; `avatar` is the bundled template, a drawn person, where there is nothing of that name."""
    path = Path(name)
    return BUNDLED / AVATAR if str(name) == AVATAR and not path.exists() else path


def find_sound(name: str | Path) -> Path:
    """The path itself; `hello` is the bundled recording, a synthetic voice, where there is nothing of that name."""
    path = Path(name)
    return BUNDLED / f"{HELLO}.flac" if str(name) == HELLO and not path.exists() else path


def check_network_file(path: Path) -> None:
    """Raise InputError if it is not there."""
    check_no_pipe(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such network file.")


def find_network(template: str | Path, prefer: Literal[".onnx", ".pth"] = ".onnx") -> Path:
    """The U-Net of a template: one of `NETWORKS` in its directory or its `models/`, or, where the template is
    `dataset/<name>` of a SyncTalk_2D tree, the checkpoint with the highest number in `checkpoint/<name>`,
    of which those that are a number alone (`195.pth`) come first.

    Args:
        template: its directory, or `avatar`, the bundled one.
        prefer: which kind to take where a directory has both.

    Raises:
        InputError: there is none.
    """
    template = Path(os.path.abspath(find_template(template)))  # a link to a template keeps its own place
    preferred = sorted(NETWORKS, key=lambda name: not name.endswith(prefer))
    for file in (directory / name for directory in (template, template / "models") for name in preferred):
        if file.is_file():
            return file
    checkpoints = template.parent.parent / "checkpoint" / template.name
    numbered = [(n, file) for file in checkpoints.glob("*.pth") if (n := re.findall(r"[0-9]+", file.stem))]
    if numbered:  # plain numbers, as SyncTalk_2D names them, before other names
        return max(numbered, key=lambda found: (found[1].stem.isdecimal(), int(found[0][-1]), found[1].name))[1]
    raise InputError(
        f"no network for {template.name}: none of {', '.join(NETWORKS)} in {template} or its models directory, and "
        f"no numbered .pth in {checkpoints}. Give --model FILE."
    )


def find_audio_encoder(template: str | Path) -> Path:
    """The audio encoder of a template: one of `AUDIO_ENCODERS` in its directory or its `models/`, or, in a
    SyncTalk_2D tree, `model/checkpoints/audio_visual_encoder.pth`. `avatar` is the bundled one's.

    Raises:
        InputError: there is none.
    """
    template = Path(os.path.abspath(find_template(template)))  # a link to a template keeps its own place
    tree = template.parent.parent / "model" / "checkpoints" / "audio_visual_encoder.pth"
    beside = (directory / name for directory in (template, template / "models") for name in AUDIO_ENCODERS)
    for file in (*beside, tree):
        if file.is_file():
            return file
    raise InputError(
        f"no audio encoder for {template.name}: none of {', '.join(AUDIO_ENCODERS)} in {template} or its models "
        f"directory, and no {tree}. Give --audio-encoder FILE, or features instead of sound."
    )
