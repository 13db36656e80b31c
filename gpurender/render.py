"""START HERE: how a template, speech and a trained network become a video.

template  frames on the device, a face rectangle for each           template.py
audio     sound or features -> what the network hears at a frame    audio.py
crop      each face cut out, resized, its mouth blacked out         crop.py; once a template frame: faces.py
engine    the network draws the mouth that goes with the sound      engine.py, network.py
paste     the face resized back and written over the frame          paste.py
encode    frames -> video with the sound, or numbered pictures      encode.py
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .audio import FEATURE_FILES, Features, load_features
from .crop import crop_faces, face_input
from .encode import ENCODERS, Codec, check_destination, is_pattern, write_frames
from .engine import Engine, EngineName, Precision, load_audio_engine, load_engine, resolve_device
from .faces import Faces
from .find import find_audio_encoder, find_network, find_sound, find_template
from .network import Encoded
from .paste import paste_faces
from .prefetch import prefetch
from .template import Order, Template, frame_order, open_template

T = TypeVar("T")
PROBE_FRAMES = 4


def render(
    template: Template,
    features: Features,
    engine: Engine,
    *,
    batch: int | None = None,
    order: Order = "bounce",
    start_frame: int = 0,
) -> Iterator[Tensor]:
    """Render all frames of some features.

    Args:
        template: see `open_template`.
        features: see `load_features`.
        engine: see `load_engine`; on the template's device.
        batch: frames at a time; None is what suits the engine.
        order, start_frame: which template frame is shown when, see `frame_order`.

    Yields:
        (B,3,H,W) uint8 RGB on the device, `len(features)` frames in all; the last batch may be smaller.
    """
    batch = batch or engine.batch
    faces = Faces(template, engine, template.memory_left)

    def inputs() -> Iterator[tuple[list[int], Tensor, Tensor | None, Tensor, list[Encoded], Tensor]]:
        for start in range(0, len(features), batch):
            stop = min(start + batch, len(features))
            shown = frame_order(len(template), range(start, stop), order, start_frame)
            frames, keep = template.frames(shown)
            crops, encoded = faces(shown, frames)
            yield shown, frames, keep, crops, encoded, features.windows(start, stop)

    for shown, frames, keep, crops, encoded, windows in prefetch(inputs()):
        predictions = engine.decode(encoded, windows)
        yield paste_faces(frames, crops, predictions, template.rects[shown], keep, inplace=True)


class Progress(Protocol):
    """Who is told how a render is getting on."""

    def stage(self, text: str) -> None:
        """Something begins that may take a while."""
        ...

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterable[Tensor]:
        """Pass batches on, counting their frames."""
        ...


class Silent:
    def stage(self, text: str) -> None:
        pass

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterable[Tensor]:
        return batches


@dataclass(frozen=True)
class Summary:
    """What a render made, and which path it took."""

    out: Path
    frames: int
    fps: float
    width: int
    height: int
    seconds: float
    """wall clock, all stages"""
    render_seconds: float
    """of it, from the first frame's rendering to the finished file"""
    device: str
    engine: str
    precision: str
    measured_psnr_db: dict[str, float]
    encoder: str
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        quality = "".join(
            f" ({kind} is within {psnr:.1f} dB of fp32{'' if kind == self.precision else ': not taken'})"
            for kind, psnr in self.measured_psnr_db.items()
        )
        return (
            f"wrote {self.out}: {self.frames} frames of {self.width}×{self.height}, {self.frames / self.fps:.2f} s at "
            f"{self.fps:g} a second\n"
            f"used {self.engine} {self.precision}{quality} on {self.device}, encoder {self.encoder}; took "
            f"{self.seconds:.1f} s, {self.frames / self.render_seconds:.1f} frames a second"
        )


def make(
    template: str | Path,
    audio: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    audio_encoder: str | Path | None = None,
    sound: str | Path | None = None,
    device: str = "auto",
    engine: EngineName = "auto",
    precision: Precision = "auto",
    batch: int | None = None,
    fps: float | None = None,
    order: Order = "bounce",
    start_frame: int = 0,
    parsing: bool | None = None,
    memory_budget: int | None = None,
    codec: Codec = "h264",
    quality: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Render a talking video: everything that `gpurender make` does.

    Args:
        template: a template directory, see `open_template`; or `avatar`, the bundled one.
        audio: sound or features, see `load_features`; or `hello`, the bundled recording.
        out: see `write_frames`; None is `<template>_<audio>.mp4` in the working directory.
        model, audio_encoder: the networks; None looks where `find_network` and `find_audio_encoder` say.
        sound: what is heard in the video; None is `audio`, if that is sound.
        device, engine, precision: see `load_engine`.
        batch, order, start_frame: see `render`.
        fps: see `load_features`.
        parsing, memory_budget: see `open_template`.
        codec, quality, overwrite: see `write_frames`.
        progress: is told about stages and frames.

    Raises:
        InputError, DeviceError, OutputError: with what to do about it; nothing is left at `out` then.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    template, audio = find_template(template), find_sound(audio)
    out = Path(out) if out is not None else Path(f"{Path(os.path.abspath(template)).name}_{audio.stem}.mp4")
    check_destination(out, frames=0, codec=codec, quality=quality, overwrite=overwrite)
    place = resolve_device(device)

    person = open_template(template, device=place, parsing=parsing, memory_budget=memory_budget)
    frame_order(len(person), range(1), order, start_frame)
    torch_runs_it = engine == "torch" or (engine == "auto" and place.type == "cuda")
    network = Path(model) if model is not None else find_network(template, ".pth" if torch_runs_it else ".onnx")
    encoder = None
    if audio.suffix.lower() not in FEATURE_FILES:
        encoder = load_audio_engine(audio_encoder or find_audio_encoder(template), place)
    progress.stage(f"reading {audio.name}")
    features = load_features(audio, encoder=encoder, fps=fps, device=place)
    check_destination(out, frames=len(features), codec=codec, quality=quality, overwrite=overwrite)
    progress.stage(f"loading {network.name}")
    probe = probe_inputs(person, features) if precision == "auto" else None
    runtime = load_engine(
        network,
        mode=features.mode,
        device=place,
        engine=engine,
        precision=precision,
        probe=probe,
        notify=progress.stage,
    )

    rendering = time.perf_counter()
    batches = render(person, features, runtime, batch=batch, order=order, start_frame=start_frame)
    with closing(prefetch(batches)) as ahead:  # closed: its threads end before an error is reported
        written = write_frames(
            progress.frames(ahead, len(features)),
            out,
            fps=features.fps,
            sound=sound or features.sound if not is_pattern(out) else None,
            codec=codec,
            quality=quality,
            overwrite=overwrite,
        )
    ended = time.perf_counter()
    return Summary(
        out=out,
        frames=written,
        fps=features.fps,
        width=person.width,
        height=person.height,
        seconds=ended - began,
        render_seconds=ended - rendering,
        device=str(place),
        engine=runtime.name,
        precision=runtime.precision,
        measured_psnr_db=runtime.measured_psnr_db,
        encoder=out.suffix[1:] if is_pattern(out) else ENCODERS[codec].name,
        notes=person.notes,
    )


def probe_inputs(template: Template, features: Features) -> tuple[Tensor, Tensor]:
    """The network's inputs for a few frames spread over the template and the sound: a probe for `load_engine`."""
    shown = [len(template) * k // PROBE_FRAMES for k in range(PROBE_FRAMES)]
    heard = [len(features) * k // PROBE_FRAMES for k in range(PROBE_FRAMES)]
    frames, _ = template.frames(shown)
    windows = torch.cat([features.windows(i, i + 1) for i in heard])
    return face_input(crop_faces(frames, template.rects[shown])), windows
