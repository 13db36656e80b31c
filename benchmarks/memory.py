"""Memory: its peak with a large template, and whether it stays flat while a long sound is rendered.

    python benchmarks/memory.py

The peak is that of whole `gpurender make` programs with the full-width network and a template of 520 pictures of
1280×720. Flatness is one render of ten minutes of sound with a narrow network: resident memory when each minute of the
video is done, taking the render's speed as even.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from materials import avatar_pictures, seeded_networks, small_networks
from records import OTHERS, RESULTS, print_results, save

from gpurender import find_sound
from gpurender.bench.measured import Measured, record
from gpurender.bench.run import own_caches
from gpurender.bench.subject import sound_of
from gpurender.bench.watch import OtherWork, Watched, watch_make
from gpurender.engine import resolve_device
from gpurender.errors import DeviceError, InputError, OutputError

TEMPLATE_FRAMES = 520


def peak(folder: Path, frames: int, repeats: int, device: str) -> list[Measured]:
    """Of programs that show every frame of a template."""
    template = avatar_pictures(folder / "large", frames)
    unet, encoder = seeded_networks(folder)
    sound = sound_of(find_sound("hello"), frames / 25 + 0.2, folder / "speech.wav")
    words = ["--template", template, "--audio", sound, "--model", unet, "--audio-encoder", encoder, "--device", device]
    words += ["--precision", "fp32"]
    runs: list[Watched] = []
    for number in range(repeats + 1):  # the first exports the network, which takes memory of its own
        tell(f"rendering a template of {frames} frames, {number} of {repeats}")
        runs.append(watch_make(words, device=device))
    report = runs[-1].report
    keys = ("width", "height", "device", "engine", "precision", "decoder", "encoder", "frames")
    parameters = {**{key: report[key] for key in keys}, "template_frames": frames}
    resident = [float(run.peak_resident_bytes) for run in runs[1:]]
    figures = [Measured("peak resident memory", parameters, "bytes", resident)]
    if device != "cpu":
        on_device = [float(run.peak_device_bytes) for run in runs[1:]]
        figures.append(Measured("peak device memory", parameters, "bytes", on_device))
    return figures


def flatness(folder: Path, minutes: int, device: str) -> list[Measured]:
    """Resident memory after each minute of video, and how much more the most after the first is than the first."""
    template = avatar_pictures(folder / "small", 24)
    unet, encoder = small_networks(folder)
    words = ["--template", template, "--model", unet, "--audio-encoder", encoder, "--device", device]
    words += ["--precision", "fp32"]
    watch_make([*words, "--audio", sound_of(find_sound("hello"), 1.0, folder / "short.wav")], device=device)
    tell(f"rendering {minutes} minutes of sound")
    sound = sound_of(find_sound("hello"), 60.0 * minutes, folder / "long.wav")
    run = watch_make([*words, "--audio", sound], device=device)
    began, ended = run.rendering_seconds
    ends = [began + (ended - began) * minute / minutes for minute in range(1, minutes + 1)]
    at = [float(min(run.resident, key=lambda sample: abs(sample[0] - end))[1]) for end in ends]
    keys = ("width", "height", "device", "engine", "precision", "decoder", "encoder", "frames")
    parameters = {**{key: run.report[key] for key in keys}, "minutes": minutes}
    return [
        Measured("resident memory when each minute is done", parameters, "bytes", at),
        Measured("growth after the first minute", parameters, "bytes", [max(at) - at[0]]),
    ]


def tell(words: str) -> None:
    print(f"{words} …", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template-frames", type=int, default=TEMPLATE_FRAMES, help=f"[{TEMPLATE_FRAMES}]")
    parser.add_argument("--minutes", type=int, default=10, help="of sound, for flatness [10]")
    parser.add_argument("--repeats", type=int, default=3, help="of the peak [3]")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record goes [benchmarks/results]")
    given = parser.parse_args()
    try:
        device = str(resolve_device(given.device))
        others = OtherWork()
        with tempfile.TemporaryDirectory(prefix="gpurender-memory-") as name, own_caches(Path(name) / "cache"):
            folder = Path(name)
            results = peak(folder, given.template_frames, given.repeats, device)
            results += flatness(folder, given.minutes, device)
    except (InputError, DeviceError, OutputError) as error:
        sys.exit(f"Error: {error}")
    results.append(Measured(OTHERS, {}, "%", [others.percent() or 0.0]))
    made = record("memory", results, command=["python", *sys.argv], device=device)
    print_results(made)
    print(f"wrote {save(made, given.results)}")


if __name__ == "__main__":
    main()
