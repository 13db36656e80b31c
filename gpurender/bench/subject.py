"""What `gpurender bench` measures: a template in some size, a sound of some seconds, networks; and all of it loaded."""

import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..audio import FEATURE_FILES, AudioEncoderLike, Features, load_features
from ..audio_engine import load_audio_engine
from ..cache import hash_of
from ..choose_engine import load_engine
from ..encode import EncoderName, write_frames
from ..engine import PROBED, Engine, EngineName, Precision
from ..errors import InputError
from ..find import check_network_file, find_audio_encoder
from ..network import AudioEncoder, UNet
from ..pack import write_rectangles
from ..render import Pixels, probe_inputs
from ..seeds import save_seeded
from ..sound import SAMPLE_RATE, decode_sound
from ..template import MASKS, VIDEO, Template, open_template

AT_ONCE = 8  # frames at a time while a template is enlarged


@dataclass(frozen=True)
class Subject:
    """What is measured, and how it is to be run."""

    template: Path
    sound: Path
    model: Path
    audio_encoder: Path
    device: str
    engine: EngineName
    precision: Precision
    encoder: EncoderName
    batch: int | None

    @property
    def words(self) -> list[object]:
        """The same as options of `gpurender make`."""
        words: list[object] = ["--template", self.template, "--audio", self.sound, "--model", self.model]
        words += ["--audio-encoder", self.audio_encoder, "--device", self.device, "--engine", self.engine]
        words += ["--precision", self.precision, "--encoder", self.encoder]
        return words if self.batch is None else [*words, "--batch", self.batch]


class Loaded:
    """A subject's template, features and engine, as a render has them; each is loaded when it is first asked for."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.device = torch.device(subject.device)

    @cached_property
    def name(self) -> str:
        """The pictures' size, such as 1280×720."""
        return f"{self.template.width}×{self.template.height}"

    @property
    def pixels(self) -> Pixels:
        """What the encoder is given, see `render`."""
        return "rgb" if self.subject.encoder == "mjpeg" else "nv12"

    @property
    def on_backdrops(self) -> bool:
        """Whether faces are pasted on backdrops, which are NV12 and kept in place of frames."""
        return self.device.type == "cpu" and self.pixels == "nv12"

    def open(self) -> Template:
        """The template opened anew: none of its frames is decoded yet."""
        return open_template(self.subject.template, device=self.device, keep_frames=not self.on_backdrops)

    def hear(self) -> Features:
        return load_features(self.subject.sound, encoder=self._listener, device=self.device)

    @cached_property
    def _listener(self) -> AudioEncoderLike:
        return load_audio_engine(self.subject.audio_encoder, self.device)

    @cached_property
    def template(self) -> Template:
        return self.open()

    @cached_property
    def features(self) -> Features:
        return self.hear()

    @cached_property
    def engine(self) -> Engine:
        subject = self.subject
        return load_engine(
            subject.model,
            mode=self.features.mode,
            device=self.device,
            engine=subject.engine,
            precision=subject.precision,
            batch=subject.batch,
            probe=probe_inputs(self.template, self.features) if subject.precision in PROBED else None,
        )

    @property
    def batch(self) -> int:
        return min(self.subject.batch or self.engine.batch, len(self.features))

    @property
    def parameters(self) -> dict[str, Any]:
        """What all figures of this subject depend on."""
        return {
            "width": self.template.width,
            "height": self.template.height,
            "device": self.subject.device,
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "batch": self.batch,
            "decoder": self.template.decoder,
            "parsing": self.template.parsing,
            "network": hash_of(self.subject.model)[:12],
            "template_frames": len(self.template),
        }


# --- making what is measured -----------------------------------------------------------------------------------------


def enlarged(template: Path, size: tuple[int, int], to: Path) -> Path:
    """A template package in another size: frames resized (bicubic), rectangles and parsing masks with them."""
    person = open_template(template, memory_budget=0)
    width, height = size
    scale = torch.tensor([width / person.width, height / person.height] * 2)
    rects = (person.rects * scale).round().long()
    rects[:, 2:] = rects[:, 2:].minimum(torch.tensor(size))
    write_rectangles(to, rects.tolist())
    if person.parsing:
        (to / MASKS).mkdir()

    def resized() -> Iterator[Tensor]:
        for start in range(0, len(person), AT_ONCE):
            frames, keep = person.frames(range(start, min(start + AT_ONCE, len(person))))
            if keep is not None:
                masks = F.interpolate(keep[:, None].float(), (height, width))[:, 0] > 0.5
                for i, mask in enumerate(masks.numpy()):
                    pixels = np.repeat((255 * mask.astype(np.uint8))[..., None], 3, 2)
                    Image.fromarray(pixels).save(to / MASKS / f"{start + i}.png", compress_level=1)
            larger = F.interpolate(frames.float(), (height, width), mode="bicubic", align_corners=False)
            yield larger.round_().clamp_(0, 255).to(torch.uint8)

    write_frames(resized(), to / VIDEO, fps=25, encoder="x264")
    return to


def sound_of(audio: Path, seconds: float, to: Path) -> Path:
    """A WAV file with the first seconds of some sound, over and over where it is shorter: 16 kHz, mono.

    Raises:
        InputError: `audio` is no sound.
    """
    if audio.suffix.lower() in FEATURE_FILES:
        raise InputError(f"{audio} holds features, but sound is measured too: give a sound file.")
    wanted = round(seconds * SAMPLE_RATE)
    parts: list[np.ndarray] = []
    for block in decode_sound(audio):
        parts.append(block)
        if sum(map(len, parts)) >= wanted:
            break
    samples = np.concatenate(parts)
    if not len(samples):
        raise InputError(f"{audio}: the sound track is empty.")
    whole = np.resize(samples, wanted)
    with wave.open(str(to), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((whole.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return to


def chosen_networks(template: Path, model: Path | None, folder: Path) -> tuple[Path, Path]:
    """The U-Net and the audio encoder: what is given, else the full-width network of seeded weights; the audio encoder
    beside the template, else again one of seeded weights.

    Raises:
        InputError: there is no file `model`.
    """
    if model is not None:
        check_network_file(model)
    try:
        listener = find_audio_encoder(template)
    except InputError:
        listener = save_seeded(AudioEncoder(), folder / "audio_encoder.pth")
    return model or save_seeded(UNet(), folder / "seeded.pth"), listener
