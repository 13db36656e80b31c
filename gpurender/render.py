"""START HERE: how a template, speech and a trained network become a video.

template  frames on the device, a face rectangle for each           template.py
audio     sound or features -> what the network hears at a frame    audio.py, sound.py
crop      each face cut out, resized, its mouth blacked out         crop.py; once a template frame: faces.py
engine    the network draws the mouth that goes with the sound      engine.py, network.py
paste     the face resized back and written over the frame          paste.py; for video on a CPU: backdrops.py
encode    frames -> video with the sound, or numbered pictures      encode.py
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .audio import FEATURE_FILES, Features
from .audio_engine import hear
from .backdrops import Backdrop, Backdrops, crop_backdrops, paste_on_backdrops
from .choose_engine import load_engine, network_for
from .crop import crop_and_mask
from .cuda import is_out_of_memory, resolve_device, without_autocast
from .cuda_graphs import wait_for_all
from .encode import EncoderName, check_destination, write_frames
from .engine import NO_FIRST_HALF, PROBED, Engine, EngineName, Precision, Probe
from .errors import DeviceError, InputError, OutputError, check_choice
from .faces import Faces
from .find import find_sound, find_template
from .host import free_memory, one_torch_thread
from .network import FRAME_RATES
from .ops import why_no_kernels
from .output import check_outputs, is_pattern
from .paste import paste_faces, paste_faces_nv12
from .prefetch import stage
from .progress import Progress, Silent
from .report import Summary
from .software_encoder import Codec
from .sound_track import check_sound
from .template import CONTENTS, DecoderName, Order, Template, decoded_ahead, frame_order, open_template
from .timings import Timings, write_trace

Pixels = Literal["rgb", "nv12"]
PROBE_FRAMES, PROBE_SOUNDS = 4, 16


class Shown(NamedTuple):
    """What is shown and heard in a batch of output frames."""

    indices: list[int]
    """of the template frames"""
    behind: tuple[Tensor, Tensor | None] | list[Backdrop]
    """those frames, (B,3,H,W) uint8 RGB, and their keep masks, (B,H,W) bool; or their backdrops"""
    windows: Tensor  # (B,*WINDOW_SHAPES[mode]) float32


class Begun(NamedTuple):
    """A batch that the network is about to draw."""

    shown: Shown
    crops: Tensor  # (B,3,328,328) uint8 RGB
    predictions: Callable[[], Tensor]  # waits for (B,3,320,320) float BGR


class Drawn(NamedTuple):
    shown: Shown
    crops: Tensor
    predictions: Tensor


def render(
    template: Template,
    features: Features,
    engine: Engine,
    *,
    batch: int | None = None,
    order: Order = "bounce",
    start_frame: int = 0,
    pixels: Pixels = "rgb",
    timings: Timings | None = None,
    notes: list[str] | None = None,
) -> Generator[Tensor]:
    """Render all frames of some features. Nothing happens, and nothing is checked, before the first batch is asked for.

    The stages run side by side, each on a thread and, on a GPU, a stream of its own. Where a GPU runs out of memory,
    the batch is halved and the render goes on. Renders may run side by side, too, on one engine, each with a template
    and features of its own.

    Args:
        template: see `open_template`.
        features: see `load_features`; on any device.
        engine: see `load_engine`; on the template's device.
        batch: frames at a time; None is what suits the engine.
        order, start_frame: which template frame is shown when, see `frame_order`.
        pixels: `nv12` is what video encoders take, made as the face is pasted, without RGB frames in between.
        timings: adds up what the stages cost; call its `finish()` before reading it.
        notes: a line is added if the batch had to be halved, or if more memory would have saved work.

    Yields:
        (B,3,H,W) uint8 RGB on the device, or (B,H*3/2,W) uint8 NV12 in BT.709, limited range, H and W rounded up to
        even; `len(features)` frames in all; the last batch may be smaller.

    Raises:
        InputError: a template frame cannot be decoded, the batch is not at least 1, there is no such order or kind
            of pixels, or the engine is not on the template's device or is for other features.
        DeviceError: the GPU has too little memory even for one frame at a time.
    """
    check_batch(batch)
    check_choice("kind of pixels", pixels, get_args(Pixels))
    if features.mode != engine.mode:
        raise InputError(f"the features are {features.mode}'s, but the engine takes {engine.mode}'s.")
    places = engine.device, template.device
    if places[0].type != places[1].type or len({place.index for place in places} - {None}) > 1:
        raise InputError(f"the engine is on {engine.device}, but the template on {template.device}.")
    timings = timings or Timings()
    times = Counter(frame_order(len(template), range(len(features)), order, start_frame))
    shown_again = {index for index, count in times.items() if count > 1}
    # A GPU converts a whole frame's colour in less time than it takes to look for what changed.
    backdrops = None
    if pixels == "nv12" and template.device.type == "cpu":
        backdrops = Backdrops(template, shown_again, template.memory_left)
    memory_left = (backdrops or template).memory_left
    faces = Faces(shown_again, engine, memory_left)

    def show(outputs: range) -> Shown:
        indices = frame_order(len(template), outputs, order, start_frame)
        behind = backdrops(indices) if backdrops else template.frames(indices)
        windows = features.windows(outputs.start, outputs.stop)
        if windows.device.type != template.device.type:
            windows = windows.to(template.device)
        return Shown(indices, behind, windows)

    def draw(shown: Shown) -> Begun:
        indices, behind, windows = shown

        def crop(which: list[int]) -> tuple[Tensor, Tensor]:
            if isinstance(behind, list):
                return crop_backdrops([behind[k] for k in which])
            frames = torch.stack([behind[0][k] for k in which])  # indexing with a list would wait for a GPU
            return crop_and_mask(frames, template.rects[[indices[k] for k in which]])

        crops, encoded = faces(indices, crop)
        timings.counts["faces encoded"] = faces.encoded
        return Begun(shown, crops, engine.begin(encoded, windows))

    def finish(begun: Generator[Begun]) -> Generator[Drawn]:
        with closing(begun):
            for shown, crops, wait in begun:
                # On the next stage's thread, while the network's begins the next batch.
                yield Drawn(shown, crops, timings.measured("network", wait).detach())
                del shown, crops, wait

    def paste(drawn: Drawn) -> Tensor:
        (indices, behind, _), crops, predictions = drawn
        if isinstance(behind, list):
            return paste_on_backdrops(behind, crops, predictions)
        frames, keep = behind
        if pixels == "nv12":
            return paste_faces_nv12(frames, crops, predictions, template.rects[indices], keep)
        return paste_faces(frames, crops, predictions, template.rects[indices], keep, inplace=True)

    def batches(start: int, size: int) -> Generator[Tensor]:
        outputs = (range(i, min(i + size, len(features))) for i in range(start, len(features), size))
        shown = stage("template", show, outputs, template.device, timings)
        begun = stage("network", draw, shown, template.device, timings)
        return stage("paste", paste, finish(begun), template.device, timings)

    size = min(batch or engine.batch, len(features))
    done = 0
    while done < len(features):
        short_of_memory = False
        try:
            with closing(batches(done, size)) as frames:
                for pasted in frames:
                    done += len(pasted)
                    yield pasted
                    del pasted
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise DeviceError(
                    f"{template.device} has too little free memory for a frame of {template.width}×{template.height}; "
                    "end other programs on it, or give a smaller --memory"
                    f"{'' if template.device.type == 'cpu' else ' or --device cpu'}."
                ) from None
            short_of_memory = True
        if short_of_memory:  # the error is gone by now, and with it what its stages held
            size //= 2
            if notes is not None:
                notes.append(f"{template.device} ran out of memory: rendered {size} frames at a time from frame {done}")
            if template.device.type == "cuda":
                wait_for_all(template.device)
                torch.cuda.empty_cache()
    too_little = faces.memory_for_all > memory_left and faces.encoded > 1.1 * len(times)
    if notes is not None and too_little and NO_FIRST_HALF not in engine.notes:
        needed = template.memory_for_all + (backdrops.memory_for_all if backdrops else 0) + faces.memory_for_all
        notes.append(
            f"the network's first half ran {faces.encoded} times for {len(times)} template frames: "
            f"{what_keeping_takes(needed, template.device)}"
        )


def check_batch(batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise InputError(f"a batch of {batch} frames cannot be rendered; give at least 1.")


def default_output(template: Path, audio: Path) -> Path:
    name = f"{Path(os.path.abspath(template)).name}_{audio.stem}.mp4"
    return Path(name.replace("%", "_"))  # a name with % would mean numbered pictures


def what_keeping_takes(needed: int, device: torch.device) -> str:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is not None and needed > free:
        return f"keeping what it makes would take {needed // 2**20 + 1} MiB, more than is free"
    return f"with --memory {needed // 2**20 + 1} it would run once for each"


@without_autocast()
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
    decoder: DecoderName = "auto",
    encoder: EncoderName = "auto",
    codec: Codec = "h264",
    quality: int | None = None,
    overwrite: bool = False,
    report: str | Path | None = None,
    trace: str | Path | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Render a talking video: everything that `gpurender make` does.

    Args:
        template: a template directory, see `open_template`; or `avatar`, the bundled one.
        audio: sound or features, see `load_features`; or `hello`, the bundled recording.
        out: see `write_frames`; None is `<template>_<audio>.mp4` in the working directory.
        model, audio_encoder: the networks; None looks where `find_network` and `find_audio_encoder` say.
        sound: what is heard in the video, or `hello`; None is `audio`, if that is sound.
        device, engine, precision: see `load_engine`.
        batch, order, start_frame: see `render`.
        fps: see `load_features`.
        parsing, memory_budget, decoder: see `open_template`.
        encoder, codec, quality, overwrite: see `write_frames`.
        report: a JSON file to write with the summary, the machine and the timings of all stages.
        trace: a JSON file to write with when each stage was at work, see `write_trace`.
        progress: is told about stages and frames.

    Raises:
        InputError, DeviceError, OutputError: with what to do about it; no video is left at `out` then, unless it is the
            report or the trace that cannot be written; of numbered pictures, those that were complete are.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    check_batch(batch)
    template, audio = find_template(template), find_sound(audio)
    out = Path(out) if out is not None else default_output(template, audio)
    check_destination(out, frames=0, codec=codec, quality=quality, encoder=encoder, overwrite=overwrite)
    header = f"{audio}.json" if audio.suffix.lower() == ".bin" else None
    inputs = [audio, header, sound, model, audio_encoder, *(template / name for name in CONTENTS)]
    check_outputs([out, report, trace], overwrite, inputs)
    if sound is not None and is_pattern(out):
        raise InputError(f"{out}: numbered pictures have no sound; leave out {sound}.")
    sound = None if sound is None else find_sound(sound)
    if sound is not None or (audio.is_file() and audio.suffix.lower() not in FEATURE_FILES and not is_pattern(out)):
        check_sound(sound or audio)
    place = resolve_device(device)

    surfaces = not is_pattern(out) and encoder != "mjpeg"
    person = open_template(
        template,
        device=place,
        parsing=parsing,
        memory_budget=memory_budget,
        decoder=decoder,
        keep_frames=not (surfaces and place.type == "cpu"),
    )
    frame_order(len(person), range(1), order, start_frame)  # which says what is wrong with them before the wait
    network = network_for(template, model, engine, place)
    features, listener = hear(audio, template, audio_encoder, fps, place, progress.stage)
    check_outputs([out, report, trace], overwrite, [network, listener])
    check_destination(out, frames=len(features), codec=codec, quality=quality, encoder=encoder, overwrite=overwrite)
    progress.stage(f"loading {network.name}")
    probe = probe_inputs(person, features) if precision in PROBED else None
    shown = frame_order(len(person), range(len(features)), order, start_frame)
    # A GPU has a decoder of its own, which would be idle; and the encoders begin with little if it has to begin then.
    with decoded_ahead(person, shown) if place.type == "cuda" else nullcontext():
        runtime = load_engine(
            network,
            mode=features.mode,
            device=place,
            engine=engine,
            precision=precision,
            batch=batch,
            probe=probe,
            notify=progress.stage,
        )

    rendering = time.perf_counter()
    timings = Timings(spans=None if trace is None else [])
    notes: list[str] = []
    size = batch or runtime.batch
    usual = FRAME_RATES[features.mode]
    if features.sound is None and features.fps != usual:
        notes.append(f"{audio.name} is taken for {features.fps:g} features a second; usually there are {usual}")
    if place.type == "cuda" and (why := why_no_kernels("cuda")) is not None:
        notes.append(f"Kornia and torch crop, paste and convert, not kernels: Triton {why}")
    frames = render(
        person,
        features,
        runtime,
        batch=size,
        order=order,
        start_frame=start_frame,
        pixels="nv12" if surfaces else "rgb",
        timings=timings,
        notes=notes,
    )
    first: list[float] = []
    # OpenVINO keeps all cores busy: torch's threads would wait for each other in the middle of each small step.
    alone = one_torch_thread() if runtime.name == "openvino" else nullcontext()
    with alone, closing(frames):  # its threads end before an error is reported
        written = write_frames(
            progress.frames(noting_the_first(frames, first), len(features)),
            out,
            fps=features.fps,
            sound=sound or features.sound if not is_pattern(out) else None,
            encoder=encoder,
            codec=codec,
            quality=quality,
            overwrite=overwrite,
            timings=timings,
        )
    timings.finish()
    ended = time.perf_counter()
    summary = Summary(
        out=out,
        frames=written.frames,
        fps=features.fps,
        width=person.width,
        height=person.height,
        seconds=ended - began,
        prepare_seconds=rendering - began,
        first_frame_seconds=first[0] - began,
        render_seconds=ended - rendering,
        stage_seconds=timings.host_seconds,
        stage_device_seconds=timings.device_seconds,
        template_frames=len(person),
        faces_encoded=0 if NO_FIRST_HALF in runtime.notes else timings.counts["faces encoded"],
        device=str(place),
        engine=runtime.name,
        precision=runtime.precision,
        measured_psnr_db=runtime.measured_psnr_db,
        batch=size,
        decoder=person.decoder,
        encoder=written.encoder,
        notes=[*dict.fromkeys([*person.notes, *features.notes, *runtime.notes, *notes, *written.notes])],
    )
    try:
        if report is not None:
            summary.write(Path(report), overwrite)
        if trace is not None:
            write_trace(Path(trace), timings.spans or [], overwrite)
    except OutputError as error:
        raise OutputError(f"{error} {out} is complete.") from None
    return summary


def noting_the_first(batches: Iterable[Tensor], when: list[float]) -> Iterator[Tensor]:
    """Pass batches on, and note when the first comes."""
    for batch in batches:
        if not when:
            when.append(time.perf_counter())
        yield batch


def probe_inputs(template: Template, features: Features) -> Probe:
    """The network's inputs for a few frames spread over the template and the sound: what `load_engine` measures on.

    Args:
        template, features: four frames of the template are decoded for it.
    """
    shown = [len(template) * k // PROBE_FRAMES for k in range(PROBE_FRAMES)]
    heard = [len(features) * k // PROBE_FRAMES for k in range(PROBE_FRAMES)]
    others = [len(features) * (2 * k + 1) // (2 * PROBE_SOUNDS) for k in range(PROBE_SOUNDS)]
    frames, _ = template.frames(shown)
    audio, others = (torch.cat([features.windows(i, i + 1) for i in which]) for which in (heard, others))
    return Probe(crop_and_mask(frames, template.rects[shown])[1], audio, others, len(features))
