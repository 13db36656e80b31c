"""The batched ops alone: milliseconds, bytes a second, and how much of the device's copy bandwidth that is.

    python benchmarks/ops.py

Each op runs with each implementation that the device has (the Triton kernels on CUDA alone: interpreted, they show
nothing but that they are right; those that LLVM compiles for a processor on a CPU), on frames of noise with faces of
two sizes: on a GPU eight frames at a time, up to 3840×2160; on a CPU, which would take too long for those, two, up to
1920×1080. Bytes are those that an op cannot do without: what it reads and writes, once. On a GPU, its cache is emptied
before each call; where a call keeps the GPU busy for less time than it takes to launch, about 0.1 ms, what is measured
is the launch: take larger batches.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from records import count, measure_and_keep, options, tell
from torch import Tensor

import gpurender as gr
from gpurender.bench.limits import COPIED_BYTES, copy_bandwidth
from gpurender.bench.measured import Measured
from gpurender.ops import Impl

SIZES = {"cuda": ((1280, 720), (1920, 1080), (3840, 2160)), "cpu": ((1280, 720), (1920, 1080))}
BATCH = {"cuda": 8, "cpu": 2}
FACES = (184, 480)
CROPPED, SEEN, BORDER = 3 * 328**2, 6 * 320**2, 3 * (328**2 - 320**2)


def cases(width: int, height: int, face: int, batch: int, device: torch.device) -> Iterator[tuple[str, int, Callable]]:
    """Each op's name, the bytes of a frame that it reads and writes, and the call, given an implementation."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # the network's there
    value = dtype.itemsize
    frames = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
    predictions = torch.rand(batch, 3, 320, 320, dtype=dtype, device=device)
    corners = torch.stack([torch.arange(batch) * 7 + 11, torch.arange(batch) * 3 + 5], 1)  # odd and even
    rects = torch.cat([corners, corners + face], 1)
    crops = gr.crop_faces(frames, rects)
    surfaces = gr.rgb_to_nv12(frames)
    pixels, of_face = width * height, 3 * face**2
    pasted = BORDER + 3 * 320**2 * value

    def in_place(impl: Impl | None) -> Tensor:
        return gr.paste_faces(frames, crops, predictions, rects, inplace=True, impl=impl)

    yield "crop_faces", of_face + CROPPED, lambda impl: gr.crop_faces(frames, rects, impl=impl)
    yield (
        "crop_and_mask",
        of_face + CROPPED + SEEN * value,
        lambda impl: gr.crop_and_mask(frames, rects, dtype=dtype, impl=impl),
    )
    yield "paste_faces, in place", pasted + of_face, in_place
    yield (
        "paste_faces_nv12",
        pasted + 9 * pixels // 2,
        lambda impl: gr.paste_faces_nv12(frames, crops, predictions, rects, impl=impl),
    )
    yield "rgb_to_nv12", 9 * pixels // 2, lambda impl: gr.rgb_to_nv12(frames, impl=impl)
    yield "nv12_to_rgb", 9 * pixels // 2, lambda impl: gr.nv12_to_rgb(surfaces, impl=impl)
    yield (
        "nv12_to_rgb, chroma interpolated",
        9 * pixels // 2,
        lambda impl: gr.nv12_to_rgb(surfaces, siting="left", impl=impl),
    )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the median of many."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return cast(float, do_bench(work, warmup=50, rep=200, return_mode="median")) / 1000
    work()
    taken = []
    until = time.perf_counter() + 0.5
    while len(taken) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure(device: torch.device, batch: int | None, repeats: int) -> Iterator[Measured]:
    batch = BATCH[device.type] if batch is None else batch
    bandwidth = copy_bandwidth(device, repeats)
    yield Measured("copy bandwidth", {"device": str(device), "bytes": COPIED_BYTES}, "bytes a second", bandwidth)
    impls: dict[str, Impl | None] = {"reference": "reference", "kernel": "kernel"}
    if device.type == "cpu":
        impls = {"reference": "reference", "LLVM kernel": None}
    for width, height in SIZES[device.type]:
        for face in FACES:
            tell(f"{width}×{height}, faces of {face}×{face}")
            for name, of_frame, call in cases(width, height, face, batch, device):
                for kind, impl in impls.items():
                    if impl is None and name.startswith("nv12_to_rgb"):
                        continue  # there is none: it would be the reference again
                    runs = [seconds(lambda: call(impl), device) for _ in range(repeats)]  # noqa: B023
                    of: dict[str, Any] = {"width": width, "height": height, "face": face, "batch": batch, "impl": kind}
                    moved = of_frame * batch
                    yield Measured(name, of, "ms a frame", [1000 * run / batch for run in runs])
                    yield Measured(name, of, "bytes a second", [moved / run for run in runs])
                    share = [moved / run / statistics.median(bandwidth) for run in runs]
                    yield Measured(name, of, "of copy bandwidth", share)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=count, help="frames at a time [8 on a GPU, 2 on a CPU]")
    parser.add_argument("--repeats", type=count, default=3, help="of each figure, itself a median of many calls [3]")
    given = parser.parse_args()

    def measured(folder: Path, device: str) -> list[Measured]:
        return [*measure(torch.device(device), given.batch, given.repeats)]

    measure_and_keep("ops", given, measured)


if __name__ == "__main__":
    main()
