"""Memory: its peak with a large template, and whether it stays flat while a long sound is rendered.

    python benchmarks/memory.py

The peak is that of whole `gpurender make` programs, as they come, with the full-width network, a template of 520
pictures of 1280×720 and enough sound to show some of them again: of the first, which exports the network, and of later
ones. Flatness is one render of ten minutes of sound with a narrow network and 24 pictures: resident memory when each
minute of the video is done, taking the render's speed as even.
"""

from pathlib import Path

from materials import avatar_pictures, seeded_networks, small_networks
from records import count, measure_and_keep, options, tell

from gpurender import find_sound
from gpurender.bench.measured import Measured
from gpurender.bench.subject import sound_of
from gpurender.bench.watch import Watched, watch_make

TEMPLATE_FRAMES, FEW_PICTURES = 520, 24


def peak(folder: Path, frames: int, repeats: int, device: str) -> list[Measured]:
    """Of programs that show nearly every frame of a template, a quarter of them twice."""
    template = avatar_pictures(folder / "large", frames)
    unet, encoder = seeded_networks(folder)
    sound = sound_of(find_sound("hello"), 1.25 * frames / 25, folder / "speech.wav")
    words = ["--template", template, "--audio", sound, "--model", unet, "--audio-encoder", encoder, "--device", device]
    runs: list[Watched] = []
    for number in range(repeats + 1):
        tell(f"rendering a template of {frames} frames, {number} of {repeats}")
        runs.append(watch_make(words, device=device))
    report = runs[-1].report
    keys = ("width", "height", "device", "engine", "precision", "decoder", "encoder", "frames")
    parameters = {**{key: report[key] for key in keys}, "pictures": frames, "networks": "full width"}
    first, *resident = [float(run.peak_resident_bytes) for run in runs]
    figures = [
        Measured("peak resident memory, nothing cached", parameters, "bytes", [first]),
        Measured("peak resident memory", parameters, "bytes", resident),
    ]
    if device != "cpu":
        on_device = [float(run.peak_device_bytes) for run in runs[1:]]
        figures.append(Measured("peak device memory", parameters, "bytes", on_device))
    return figures


def flatness(folder: Path, minutes: int, device: str) -> list[Measured]:
    """Resident memory after each minute of video, and how much more the most after the first is than the first."""
    template = avatar_pictures(folder / "small", FEW_PICTURES)
    unet, encoder = small_networks(folder)
    words = ["--template", template, "--model", unet, "--audio-encoder", encoder, "--device", device]
    words += ["--precision", "fp32"]
    watch_make([*words, "--audio", sound_of(find_sound("hello"), 1.0, folder / "short.wav")], device=device)
    tell(f"rendering {minutes} minutes of sound")
    sound = sound_of(find_sound("hello"), 60.0 * minutes, folder / "long.wav")
    run = watch_make([*words, "--audio", sound], device=device)
    began, ended = run.rendering_seconds
    ends = [began + (ended - began) * minute / minutes for minute in range(1, minutes + 1)]
    at = [float(max(sample for sample in run.resident if sample[0] <= end)[1]) for end in ends]
    keys = ("width", "height", "device", "engine", "precision", "decoder", "encoder", "frames")
    parameters = {**{key: run.report[key] for key in keys}, "pictures": FEW_PICTURES, "networks": "narrow"}
    parameters["minutes"] = minutes
    return [
        Measured("resident memory when each minute is done", parameters, "bytes", at),
        Measured("growth after the first minute", parameters, "bytes", [max(at) - at[0]]),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--template-frames", type=count, default=TEMPLATE_FRAMES, help=f"[{TEMPLATE_FRAMES}]")
    parser.add_argument("--minutes", type=count, default=10, help="of sound, for flatness [10]")
    parser.add_argument("--repeats", type=count, default=3, help="of the peak [3]")
    given = parser.parse_args()

    def measure(folder: Path, device: str) -> list[Measured]:
        at_most = peak(folder, given.template_frames, given.repeats, device)
        return at_most + flatness(folder, given.minutes, device)

    measure_and_keep("memory", given, measure)


if __name__ == "__main__":
    main()
