"""What benchmarks render, made on the spot: templates of the bundled avatar's pictures, sounds, networks."""

import shutil
from pathlib import Path

import torch
from PIL import Image
from widen import widened_encoder, widened_unet

from gpurender import (
    AudioEncoder,
    UNet,
    find_template,
    frame_order,
    load_audio_encoder,
    load_unet,
    open_template,
)
from gpurender.seeds import save_seeded

SMALL_UNET = {
    "encoder": (8, 8, 8, 16, 16, 16),
    "audio": (32, 16, 16, 16, 16),
    "fuse": (16, 16),
    "decoder": (16, 8, 8, 8, 8),
}
SMALL_ENCODER = (4, 4, 4, 8, 8, 8, 8, 8, 8, 16, 16, 16, 512)


def avatar_pictures(to: Path, frames: int) -> Path:
    """A template directory of the avatar's frames as JPEG files, there and back until there are enough; no masks."""
    avatar = find_template("avatar")
    person = open_template(avatar, parsing=False)
    for folder in ("full_body_img", "landmarks"):
        (to / folder).mkdir(parents=True)
    for number, shown in enumerate(frame_order(len(person), range(frames), "mirror")):
        pixels = person.frames([shown])[0][0]
        file = to / "full_body_img" / f"{number}.jpg"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, quality=95)
        shutil.copy(avatar / "landmarks" / f"{shown}.lms", to / "landmarks" / f"{number}.lms")
    return to


def seeded_networks(folder: Path) -> tuple[Path, Path]:
    """Full-width checkpoints of a U-Net and an audio encoder, their weights by rule."""
    return save_seeded(UNet(), folder / "seeded.pth"), save_seeded(AudioEncoder(), folder / "seeded_encoder.pth")


def small_networks(folder: Path) -> tuple[Path, Path]:
    """The same in narrow, for benchmarks that are not about the network."""
    unet, encoder = UNet(**SMALL_UNET), AudioEncoder(SMALL_ENCODER)
    return save_seeded(unet, folder / "small.pth"), save_seeded(encoder, folder / "small_encoder.pth")


def avatar_networks() -> tuple[Path, Path]:
    """The bundled avatar's checkpoints."""
    models = find_template("avatar") / "models"
    return models / "generator.pth", models / "audio_encoder.pth"


def widened_networks(folder: Path) -> tuple[Path, Path]:
    """Full-width checkpoints that draw and hear what the avatar's do, see widen.py."""
    unet, encoder = avatar_networks()
    files = folder / "widened.pth", folder / "widened_encoder.pth"
    torch.save(widened_unet(load_unet(unet)).state_dict(), files[0])
    torch.save(widened_encoder(load_audio_encoder(encoder)).state_dict(), files[1])
    return files
