"""The U-Net alone in torch, at full width: what each way to run it gives.

    python benchmarks/network.py

Ways differ in precision, in the order of memory (channels last or first), and in what is launched: torch's layers one
by one (`eager`), from a CUDA graph (`graph`; with cuDNN's search for its fastest kernels before, `searched graph`), or
compiled by `torch.compile`, which has graphs of its own (`compiled`, where `--launch` asks; on a GPU in fp16 with
channels last alone, for each takes a minute; a CPU needs a C++ compiler for it); or, in half precision on a GPU, our
own kernels (`kernels`, which is what the torch engine does in the first half, and `kernels graph`, in the second). The
first half sees the template alone, the second one runs for each output frame. Weights are by rule: PSNR against float32
is the hard case's.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from ops import seconds
from records import count, measure_and_keep, options, tell
from torch import Tensor

from gpurender.bench.measured import Measured
from gpurender.engine import least_psnr
from gpurender.errors import DeviceError
from gpurender.export import example_input
from gpurender.fused_network import FusedUNet
from gpurender.network import UNet
from gpurender.seeds import seeded_weights
from gpurender.torch_engine import TYPES

PRECISIONS = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32", "bf16")}
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
COMPILED = "compiled"
LAUNCHES = {"cuda": ("eager", "graph", "searched graph", "kernels", "kernels graph"), "cpu": ("eager",)}
IN_HALF = {COMPILED: ("fp16",), "kernels": ("fp16", "bf16"), "kernels graph": ("fp16", "bf16")}
"""Of a GPU's ways, those with channels last alone, and the precisions that they are measured in."""

BATCHES = {"cuda": (1, 8, 16, 32), "cpu": (1, 4)}


class Way(NamedTuple):
    precision: str
    layout: str
    launch: str


def ways(device: torch.device, launches: Sequence[str]) -> Iterator[Way]:
    for precision in PRECISIONS[device.type]:
        for layout in LAYOUTS:
            for launch in launches:
                everywhere = device.type == "cpu" or launch not in IN_HALF
                if everywhere or (layout == "channels last" and precision in IN_HALF[launch]):
                    yield Way(precision, layout, launch)


def launched(work: Callable[[], object], launch: str, device: torch.device) -> Callable[[], object]:
    """The work as it is to be launched, after its first run."""
    if launch == COMPILED:
        torch.compiler.reset()  # after eight variants of one function it would give up, and not say so
        work = torch.compile(work, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
    work()
    if "graph" not in launch:
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuDNN makes its choice here, not while it is captured
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def of_layers(network: UNet, faces: Tensor, audio: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "first half", lambda: network.encode(faces)
    levels = network.encode(faces)
    yield "second half", lambda: network.decode(faces, levels, audio)


def of_kernels(fused: FusedUNet, faces: Tensor, audio: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "first half", lambda: fused.encode(faces)
    levels = fused.encode(faces)
    yield "second half", lambda: fused.decode(levels, audio)


def measure(
    network: UNet,
    device: torch.device,
    batches: Sequence[int],
    launches: Sequence[str],
    repeats: int,
    limit: float = math.inf,
) -> tuple[list[Measured], list[str]]:
    """All ways but those that would begin after `limit` seconds, and a note on those."""
    expected: dict[int, Tensor] = {}
    found: list[Measured] = []
    began = time.perf_counter()
    for way in ways(device, launches):
        if found and time.perf_counter() - began > limit:
            return found, [f"after {limit:g} s no further way was begun; the first without figures: {', '.join(way)}"]
        found += measure_way(network, way, device, batches, expected, repeats)
    return found, []


def measure_way(
    network: UNet, way: Way, device: torch.device, batches: Sequence[int], expected: dict[int, Tensor], repeats: int
) -> Iterator[Measured]:
    """For each batch; `expected` has the first way's pictures by batch, which are float32, or is given them."""
    dtype, layout = TYPES[way.precision], LAYOUTS[way.layout]
    network.float().load_state_dict(seeded_weights(network))  # in full, whatever it was rounded to
    fused = FusedUNet(network, device, dtype) if "kernels" in way.launch else None
    network.to(device, dtype, memory_format=layout)  # pyright: ignore[reportCallIssue]
    for batch in batches:
        faces, audio = (tensor.to(device, dtype) for tensor in example_input(batch, network.mode))
        faces = faces.to(memory_format=layout)
        halves = of_layers(network, faces, audio) if fused is None else of_kernels(fused, faces, audio)
        search = way.launch == "searched graph"
        with torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=False):  # fp32 means fp32
            for half, work in halves:
                of = {"at_once": batch, **way._asdict()}
                tell(f"{half}, {batch} at a time, {', '.join(way)}")
                began = time.perf_counter()
                ready = launched(work, way.launch, device)
                drawn = ready()
                taken = time.perf_counter() - began
                picture = drawn.float().cpu() if isinstance(drawn, Tensor) else None  # before later runs write there
                runs = [seconds(ready, device) for _ in range(repeats)]
                yield Measured(half, of, "frames a second", [batch / run for run in runs])
                yield Measured(f"{half}, before its first batch", of, "s", [taken])
                if picture is not None:
                    likeness = least_psnr(picture, expected.setdefault(batch, picture))
                    if math.isfinite(likeness):  # else it is the very same
                        yield Measured(f"{half}, PSNR to float32", of, "dB", [likeness])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--launch",
        action="append",
        choices=(*LAUNCHES["cuda"], COMPILED),
        help="may be repeated; on a CPU eager or compiled; compiled alone is kept as a record of its own",
    )
    parser.add_argument("--batch", type=count, action="append", help="frames at a time; may be repeated")
    parser.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        help="seconds, after which no further way begins",
    )
    parser.add_argument("--repeats", type=count, default=3, help="of each figure, itself a median of many calls [3]")
    given = parser.parse_args()

    def measured(folder: Path, place: str) -> list[Measured]:
        device = torch.device(place)
        launches = given.launch or LAUNCHES[device.type]
        if device.type == "cpu" and not {"eager", COMPILED}.issuperset(launches):
            raise DeviceError("CUDA graphs and kernels need a GPU; on a CPU, --launch is eager or compiled.")
        with torch.no_grad():
            sizes = given.batch or BATCHES[device.type]
            found, left_out = measure(UNet().eval(), device, sizes, launches, given.repeats, given.limit)
        notes.extend(left_out)
        return found

    notes: list[str] = []
    measure_and_keep("network-compiled" if given.launch == [COMPILED] else "network", given, measured, notes)


if __name__ == "__main__":
    main()
