"""The reference's sequential loop against gpurender: wall clock from files to the finished video, sound included.

    python benchmarks/baseline.py
    python benchmarks/baseline.py --networks widened --precision auto

`seeded` networks have the full width and weights by rule; `widened` ones the full width too, but draw what the bundled
avatar's trained ones do; `avatar` are those, narrow.

Both render the same template, sound and networks in turn (loop, gpurender, loop, gpurender, …), each in a process of
its own and with torch's default threads; on a CPU under Linux the loop also with memory kept, see benchmarks/README.md.
That their frames are alike is checked first, and of the files again at the end.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast
from unittest import mock

import av
import numpy as np
from av.video.stream import VideoStream
from materials import avatar_networks, avatar_pictures, seeded_networks, widened_networks
from records import OTHERS, count, measure_and_keep, options, tell
from reference_loop import frames as loop_frames
from reference_loop import hear, make_video

from gpurender import (
    Summary,
    find_sound,
    frame_order,
    load_audio_encoder,
    load_engine,
    load_features,
    load_unet,
    make,
    open_template,
    render,
)
from gpurender.bench.measured import Measured
from gpurender.bench.subject import sound_of
from gpurender.bench.watch import OtherWork
from gpurender.cuda import resolve_device
from gpurender.engine import PROBED, Precision
from gpurender.errors import InputError
from gpurender.openvino_engine import faster_on_cpu
from gpurender.render import probe_inputs

NETWORKS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "seeded": seeded_networks,
    "widened": widened_networks,
    "avatar": lambda folder: avatar_networks(),
}
TEMPLATE_FRAMES = 160
MEMORY_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}  # of glibc
LEAST_ALIKE_DB = 40.0  # what `auto` promises of the face
LEAST_FILES_DB = 25.0  # of two lossy files


def measure(
    folder: Path,
    device: str,
    networks: str,
    precisions: list[Precision],
    seconds: list[float],
    pairs: int,
    checked: int,
    memory_gib: float | None,
    notes: list[str],
) -> list[Measured]:
    """All runs, and the figures that are made of them.

    Args:
        folder: an empty one.
        device: of both.
        networks: see `NETWORKS`.
        precisions: of gpurender, each in every pair; the loop is float32.
        seconds: of sound, one or more lengths.
        pairs: how often each renders each length.
        checked: frames that are compared before anything is timed.
        memory_gib: gpurender's memory budget; None is its default.
        notes: is told what was unusual.
    """
    tell("making the template and the networks")
    template = avatar_pictures(folder / "avatar", TEMPLATE_FRAMES)
    unet, encoder = NETWORKS[networks](folder)
    sounds = [sound_of(find_sound("hello"), length, folder / f"hello{length:g}.wav") for length in seconds]
    loop_file, our_file = folder / "loop.mp4", folder / "gpurender.mp4"
    loops = {"reference loop": {}}
    if device == "cpu" and sys.platform == "linux":
        loops["reference loop, memory kept"] = MEMORY_KEPT

    def take_turns(sound: Path) -> list[Measured]:
        tell("comparing frames")
        faces = {name: alike(template, sound, unet, encoder, name, checked, device) for name in precisions}
        for name, decibels in faces.items():
            if min(decibels) < LEAST_ALIKE_DB:
                notes.append(
                    f"{name}: faces are {min(decibels):.1f} dB from the loop's, so its ratio is of unlike work"
                )
        runs: dict[str, list[Run]] = {name: [] for name in (*loops, *precisions)}
        files: dict[str, float] = {}

        def run(name: str, pair: int, function: Callable[..., Run], *given: object) -> None:
            runs[name].append(alone(loops.get(name, {}), function, *given))
            count, seconds, *_ = runs[name][-1]
            tell(f"{count} frames, pair {pair} of {pairs}: {name} took {seconds:.1f} s")

        for pair in range(1, pairs + 1):
            for name in loops:
                run(name, pair, run_loop, template, sound, unet, encoder, loop_file, device)
            for precision in precisions:
                run(precision, pair, run_ours, template, sound, unet, encoder, our_file, device, precision, memory_gib)
                if pair == 1:
                    files[precision] = files_alike(loop_file, our_file, runs[precision][0].frames)

        count = runs[precisions[0]][0].frames
        common = {"width": 1280, "height": 720, "frames": count, "networks": networks, "device": device}
        results = [result for name in loops for result in speeds(name, {**common, "precision": "fp32"}, runs[name])]
        for precision in precisions:
            summary = runs[precision][-1].summary
            assert summary is not None
            notes.extend(note for note in summary.notes if note not in notes)
            used = {
                **common,
                "asked": precision,
                "precision": summary.precision,
                "engine": summary.engine,
                "encoder": summary.encoder,
                "batch": summary.batch,
                "memory_GiB": memory_gib,
            }
            results += speeds("gpurender", used, runs[precision])
            for name in loops:
                ratios = [a.seconds / b.seconds for a, b in zip(runs[name], runs[precision], strict=True)]
                against = name.replace("reference", "the", 1)
                results.append(Measured(f"gpurender against {against}", used, "times as fast", ratios))
            results += [
                Measured("faces before encoding, against the loop's", used, "dB", faces[precision]),
                Measured("decoded files, against the loop's", used, "dB", [files[precision]]),
            ]
        return results

    return [result for sound in sounds for result in take_turns(sound)]


class Run(NamedTuple):
    """A render from files to a file, by wall clock; what other programs took meanwhile; gpurender's own account."""

    frames: int
    seconds: float
    others_percent: float | None
    summary: Summary | None


def alone(environment: Mapping[str, str], function: Callable[..., Run], *given: object) -> Run:
    """What a function gives in a process of its own, which has imported this file."""
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        return process.submit(function, *given).result()


def run_loop(template: Path, sound: Path, unet: Path, encoder: Path, out: Path, device: str) -> Run:
    began, others = time.perf_counter(), OtherWork()
    count = make_video(template, sound, unet, encoder, out, device)
    return Run(count, time.perf_counter() - began, others.percent(), None)


def run_ours(
    template: Path,
    sound: Path,
    unet: Path,
    encoder: Path,
    out: Path,
    device: str,
    precision: Precision,
    memory_gib: float | None,
) -> Run:
    began, others = time.perf_counter(), OtherWork()
    summary = make(
        *(template, sound, out),
        model=unet,
        audio_encoder=encoder,
        device=device,
        precision=precision,
        memory_budget=None if memory_gib is None else round(memory_gib * 2**30),
        overwrite=True,
    )
    return Run(summary.frames, time.perf_counter() - began, others.percent(), summary)


def speeds(name: str, of: dict[str, object], runs: list[Run]) -> list[Measured]:
    shares = [run.others_percent for run in runs if run.others_percent is not None]
    return [
        Measured(name, of, "s", [run.seconds for run in runs]),
        Measured(name, of, "frames a second", [run.frames / run.seconds for run in runs]),
        *([Measured(OTHERS, {**of, "of": name}, "%", shares)] if shares else []),
    ]


def alike(
    template: Path, sound: Path, unet: Path, encoder: Path, precision: Precision, checked: int, device: str
) -> list[float]:
    """PSNR in dB of each checked frame's face, the loop's against gpurender's, before encoding.

    Raises:
        InputError: they are not alike, or differ outside the face.
    """
    person = open_template(template, device=device)
    listener = load_audio_encoder(encoder).to(device)
    features = load_features(sound, encoder=listener, device=device)
    probe = probe_inputs(person, features) if precision in PROBED else None
    engine = load_engine(unet, mode=features.mode, device=device, precision=precision, probe=probe)
    expected = loop_frames(template, hear(sound, listener, device), load_unet(unet).to(device).eval(), device)
    batches = render(person, features, engine, batch=4)
    drawn = (frame for batch in batches for frame in batch.permute(0, 2, 3, 1).cpu().numpy())
    found: list[float] = []
    for shown, ours, theirs in zip(frame_order(len(person), range(checked)), drawn, expected, strict=False):
        x0, y0, x1, y1 = person.rects[shown].tolist()
        theirs = theirs[..., ::-1]
        outside = np.ones(ours.shape[:2], bool)
        outside[y0:y1, x0:x1] = False
        if (ours != theirs)[outside].any():
            raise InputError(f"frame {len(found)} differs from the loop's outside the face: the runs are not alike.")
        found.append(psnr_db(ours[y0:y1, x0:x1], theirs[y0:y1, x0:x1]))
    least = LEAST_ALIKE_DB if precision in ("auto", "fp32") else 0.0
    if min(found) < least:
        raise InputError(f"a face is {min(found):.1f} dB from the loop's; less than {least:g} dB is not alike.")
    return found


def files_alike(theirs: Path, ours: Path, count: int) -> float:
    """The least PSNR in dB of every tenth frame of two videos, decoded.

    Raises:
        InputError: their frames, sizes or sounds differ, or are not alike.
    """
    pictures, seconds = zip(*(decoded(file) for file in (theirs, ours)), strict=True)
    if {len(frames) for frames in pictures} != {len(range(0, count, 10))} or len({f[0].shape for f in pictures}) > 1:
        raise InputError(f"the two videos are not of {count} frames of one size.")
    if abs(seconds[0] - seconds[1]) > 0.1:
        raise InputError(f"the sound is {seconds[0]:.2f} s long in one video and {seconds[1]:.2f} s in the other.")
    least = min(psnr_db(a, b) for a, b in zip(*pictures, strict=True))
    if least < LEAST_FILES_DB:
        raise InputError(f"the videos are {least:.1f} dB apart; less than {LEAST_FILES_DB:g} dB is not alike.")
    return least


def decoded(file: Path) -> tuple[list[np.ndarray], float]:
    """Every tenth frame as (H,W,3) uint8 RGB, by the matrix and range of its tags, and the seconds of sound."""
    with av.open(str(file)) as container:
        track = container.streams.audio[0]
        seconds = float((track.duration or 0) * (track.time_base or 0))
        video = cast(VideoStream, container.streams.video[0])
        frames = [frame.to_ndarray(format="rgb24") for k, frame in enumerate(container.decode(video)) if k % 10 == 0]
    return frames, seconds


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Of 8-bit pictures; equal ones are 100 dB, so that JSON can hold it."""
    error = np.square(a.astype(np.float64) - b).mean()
    return min(float(10 * np.log10(255**2 / error)), 100.0) if error else 100.0


def default_precisions(device: str) -> list[Precision]:
    """The exact type, `auto`, and the device's fastest type whatever `auto` makes of it."""
    if resolve_device(device).type == "cuda":
        return ["fp32", "auto", "fp16"]
    return ["fp32", "auto", *cast(list[Precision], faster_on_cpu()[:1])]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", choices=NETWORKS, default="seeded", help="see above [seeded]")
    types = ["auto", "fp32", "fp16", "bf16", "mixed", "int8"]
    parser.add_argument(
        "--precision", action="append", choices=types, help="repeatable [fp32, auto, and the fastest type]"
    )
    parser.add_argument(
        "--seconds", type=float, action="append", help="of sound; repeatable [10.2, which is 254 frames]"
    )
    parser.add_argument("--pairs", type=count, default=3, help="how often each renders [3]")
    parser.add_argument("--checked", type=count, default=16, help="frames that are compared first [16]")
    parser.add_argument("--memory", type=float, metavar="GIB", help="gpurender's memory budget [its default]")
    given = parser.parse_args()
    notes: list[str] = []

    def measured(folder: Path, device: str) -> list[Measured]:
        return measure(
            folder,
            device,
            networks=given.networks,
            precisions=given.precision or default_precisions(device),
            seconds=given.seconds or [10.2],
            pairs=given.pairs,
            checked=given.checked,
            memory_gib=given.memory,
            notes=notes,
        )

    suite = "baseline" if given.networks == "seeded" else f"baseline-{given.networks}"
    measure_and_keep(suite, given, measured, notes)


if __name__ == "__main__":
    main()
