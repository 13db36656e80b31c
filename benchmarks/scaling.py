"""Whether a render's cost grows in proportion to its length: whole programs of 100, 1,000 and 10,000 frames.

    python benchmarks/scaling.py

Each is a `gpurender make` of 1280×720 with a narrow network, sound included. A straight line is fitted to all runs by
least squares, in which a run's distance counts by its share of that run's seconds: its slope is what a frame costs, its
start what a program costs before the first; the residual says how far the runs are from the line.
"""

from pathlib import Path

import numpy as np
from materials import avatar_pictures, small_networks
from records import count, measure_and_keep, options, tell

from gpurender import find_sound
from gpurender.bench.measured import Measured
from gpurender.bench.subject import sound_of
from gpurender.bench.watch import watch_make

FRAMES = (100, 1_000, 10_000)


def measure(folder: Path, lengths: list[int], repeats: int, device: str) -> list[Measured]:
    template = avatar_pictures(folder / "template", 24)
    unet, encoder = small_networks(folder)
    words = ["--template", template, "--model", unet, "--audio-encoder", encoder, "--device", device]
    words += ["--precision", "fp32"]
    watch_make([*words, "--audio", sound_of(find_sound("hello"), 1.0, folder / "short.wav")], device=device)
    runs: dict[int, list[float]] = {}
    parameters = {}
    for repeat in range(repeats):
        for frames in lengths:
            tell(f"rendering {frames} frames, {repeat + 1} of {repeats}")
            sound = sound_of(find_sound("hello"), (frames + 1) / 25 + 0.02, folder / f"{frames}.wav")
            run = watch_make([*words, "--audio", sound], device=device)
            runs.setdefault(run.report["frames"], []).append(run.seconds)
            keys = ("width", "height", "device", "engine", "precision", "decoder", "encoder", "batch")
            parameters = {key: run.report[key] for key in keys}
    slope, start, residuals = fitted(runs)
    whole = [Measured("whole program", {**parameters, "frames": count}, "s", s) for count, s in runs.items()]
    return [
        *whole,
        Measured("a frame, by the fitted line", parameters, "ms a frame", [1000 * slope]),
        Measured("before the first frame, by the fitted line", parameters, "s", [start]),
        Measured("a run's distance from the line, of its length", parameters, "%", residuals),
    ]


def fitted(runs: dict[int, list[float]]) -> tuple[float, float, list[float]]:
    """Slope and start of the line through (frames, seconds), a distance counting by its share of the seconds, and the
    runs' distances from it in percent of what the line says."""
    frames, seconds = np.array([(count, s) for count, times in runs.items() for s in times]).T
    slope, start = np.polyfit(frames, seconds, 1, w=1 / seconds)
    line = start + slope * frames
    return float(slope), float(start), [float(percent) for percent in 100 * np.abs(seconds - line) / line]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--frames", type=count, nargs="+", default=FRAMES, help="lengths [100 1000 10000]")
    parser.add_argument("--repeats", type=count, default=2, help="of each length [2]")
    given = parser.parse_args()
    if len(set(given.frames)) < 3:
        parser.error("a line goes through any two lengths; give three or more.")
    measure_and_keep(
        "scaling", given, lambda folder, device: measure(folder, list(given.frames), given.repeats, device)
    )


if __name__ == "__main__":
    main()
