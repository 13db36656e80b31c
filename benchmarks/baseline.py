"""The reference's sequential loop against gpurender: wall clock from files to the finished video, sound included.

    python benchmarks/baseline.py
    python benchmarks/baseline.py --networks widened --precision auto

`seeded` networks have the full width and weights by rule; `widened` ones the full width too, but draw what the bundled
avatar's trained ones do; `avatar` are those, narrow.

Both render the same template, sound and networks in this one process, in turn (loop, gpurender, loop, gpurender, …),
each with torch's default threads. That their frames are alike is checked first, and of the files again at the end.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from materials import avatar_networks, avatar_pictures, seeded_networks, widened_networks
from records import OTHERS, measure_and_keep, options, tell
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
from gpurender.engine import PROBED, Precision, resolve_device
from gpurender.errors import InputError
from gpurender.openvino_engine import faster_on_cpu
from gpurender.render import probe_inputs

NETWORKS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "seeded": seeded_networks,
    "widened": widened_networks,
    "avatar": lambda folder: avatar_networks(),
}
TEMPLATE_FRAMES = 160
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
    tell("comparing frames")
    faces = {
        precision: alike(template, sounds[0], unet, encoder, precision, checked, device) for precision in precisions
    }

    loop_file, our_file = folder / "loop.mp4", folder / "gpurender.mp4"

    def ours(sound: Path, precision: Precision) -> Summary:
        return make(
            *(template, sound, our_file),
            model=unet,
            audio_encoder=encoder,
            device=device,
            precision=precision,
            memory_budget=None if memory_gib is None else round(memory_gib * 2**30),
            overwrite=True,
        )

    def take_turns(sound: Path) -> list[Measured]:
        loop: list[float] = []
        runs: dict[Precision, list[float]] = {precision: [] for precision in precisions}
        summaries: dict[Precision, Summary] = {}
        files: dict[Precision, float] = {}
        shares: dict[str, list[float]] = {name: [] for name in ("reference loop", *precisions)}
        count = 0
        for pair in range(1, pairs + 1):
            began, others = time.perf_counter(), OtherWork()
            count = make_video(template, sound, unet, encoder, loop_file, device)
            loop.append(time.perf_counter() - began)
            shares["reference loop"].append(others.percent() or 0.0)
            tell(f"{count} frames, pair {pair} of {pairs}: the loop took {loop[-1]:.1f} s")
            for precision in precisions:
                began, others = time.perf_counter(), OtherWork()
                summaries[precision] = ours(sound, precision)
                runs[precision].append(time.perf_counter() - began)
                shares[precision].append(others.percent() or 0.0)
                tell(
                    f"{count} frames, pair {pair} of {pairs}: gpurender, {precision}, took {runs[precision][-1]:.1f} s"
                )
                if pair == 1:
                    files[precision] = files_alike(loop_file, our_file, count)
        notes.extend(note for summary in summaries.values() for note in summary.notes if note not in notes)

        common = {"width": 1280, "height": 720, "frames": count, "networks": networks, "device": device}
        looped = {**common, "precision": "fp32"}
        results = [
            Measured("reference loop", looped, "s", loop),
            Measured("reference loop", looped, "frames a second", [count / s for s in loop]),
            Measured(OTHERS, looped, "%", shares["reference loop"]),
        ]
        for precision in precisions:
            summary = summaries[precision]
            used = {
                **common,
                "asked": precision,
                "precision": summary.precision,
                "engine": summary.engine,
                "encoder": summary.encoder,
                "batch": summary.batch,
                "memory_GiB": memory_gib,
            }
            ratios = [a / b for a, b in zip(loop, runs[precision], strict=True)]
            results += [
                Measured("gpurender", used, "s", runs[precision]),
                Measured("gpurender", used, "frames a second", [count / s for s in runs[precision]]),
                Measured(OTHERS, used, "%", shares[precision]),
                Measured("gpurender against the loop", used, "times as fast", ratios),
                Measured("faces before encoding, against the loop's", used, "dB", faces[precision]),
                Measured("decoded files, against the loop's", used, "dB", [files[precision]]),
            ]
        return results

    tell("warming up")
    short = sound_of(find_sound("hello"), 1.0, folder / "short.wav")
    make_video(template, short, unet, encoder, loop_file, device)
    for precision in precisions:
        ours(short, precision)
    results = [result for sound in sounds for result in take_turns(sound)]
    notes += [
        f"{precision}: faces are {min(faces[precision]):.1f} dB from the loop's, so its ratio is of unlike work"
        for precision in precisions
        if min(faces[precision]) < LEAST_ALIKE_DB
    ]
    return results


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
    found: list[float] = []
    for batch in render(person, features, engine, batch=4):
        for ours, theirs in zip(batch.permute(0, 2, 3, 1).cpu().numpy(), expected, strict=False):
            number = len(found)
            x0, y0, x1, y1 = person.rects[shown_at(number, len(person))].tolist()
            theirs = theirs[..., ::-1]
            found.append(psnr_db(ours[y0:y1, x0:x1], theirs[y0:y1, x0:x1]))
            outside = np.ones(ours.shape[:2], bool)
            outside[y0:y1, x0:x1] = False
            if (ours != theirs)[outside].any():
                raise InputError(f"frame {number} differs from the loop's outside the face: the runs are not alike.")
            if len(found) == checked:
                break
        if len(found) == checked:
            break
    least = LEAST_ALIKE_DB if precision in ("auto", "fp32") else 0.0
    if min(found) < least:
        raise InputError(f"a face is {min(found):.1f} dB from the loop's; less than {least:g} dB is not alike.")
    return found


def shown_at(number: int, template_frames: int) -> int:
    return frame_order(template_frames, range(number, number + 1))[0]


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
    parser.add_argument("--pairs", type=int, default=3, help="how often each renders [3]")
    parser.add_argument("--checked", type=int, default=16, help="frames that are compared first [16]")
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
