"""What this machine can do, tried for a moment, and which path a render takes here."""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import av
import numpy as np
import torch

from .choose_engine import load_engine
from .crop import CROP, INNER, crop_faces
from .cuda import driver_version, why_no_cuda
from .decoders import DecoderName
from .encode import EncoderName, write_frames
from .engine import PROBED, EngineName, Precision, Probe
from .errors import DeviceError, InputError, OutputError, first_line
from .export import example_input
from .find import find_network, find_template
from .host import usable_cores
from .jit import this_processor
from .nvdec import find_nvdec
from .ops import why_no_kernels
from .paste import paste_faces
from .pictures import read_picture
from .pynvvideocodec import load_pynvvideocodec
from .render import make
from .report import installed, processor
from .software_encoder import Codec
from .template import open_template
from .tensorrt_build import find_tensorrt

FRAMES = 8
SIZE = 256


@dataclass(frozen=True)
class Check:
    """One path, tried."""

    part: str
    """`decode`, `pixels`, `network` or `encode`"""
    path: str
    device: str
    works: bool
    detail: str
    """how fast it was, or why it does not work and what to do"""


@dataclass(frozen=True)
class Gpu:
    device: str
    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Examination:
    machine: dict[str, Any]
    gpus: list[Gpu]
    no_gpu: str | None
    """why there is none"""
    checks: list[Check]
    render: dict[str, Any]
    """what a render of the bundled avatar used, all choices left to gpurender"""

    def as_dict(self) -> dict[str, Any]:
        """Everything; JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        versions = self.machine["versions"]
        lines = [
            f"gpurender {versions.get('gpurender', '')}, Python {versions['python']}, {self.machine['system']}",
            f"processor  {self.machine['processor']}, {self.machine['cpus']} cores",
            f"driver     {self.machine['driver'] or 'no NVIDIA driver'}",
        ]
        lines += [
            f"{gpu.device:<11}{gpu.name}, compute capability {gpu.compute_capability}, "
            f"{gpu.memory_bytes / 2**30:.0f} GiB"
            for gpu in self.gpus
        ] or [f"GPU        {self.no_gpu}"]
        packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
        lines += ["packages   " + packages, ""]
        width = max(len(f"{check.path} on {check.device}") for check in self.checks)
        for check in self.checks:
            path = f"{check.path} on {check.device}"
            lines.append(f"{check.part:<9}{'works' if check.works else '-':<6}  {path:<{width}}  {check.detail}")
        used = self.render
        if "error" in used:
            lines += ["", f"a render here fails: {used['error']}"]
        else:
            lines += [
                "",
                f"a render here would use: {used['engine']} {used['precision']} on {used['device']}, decoder "
                f"{used['decoder']}, encoder {used['encoder']}",
                *(f"  note: {note}" for note in used["notes"]),
            ]
        return "\n".join(lines)


def examine(notify: Callable[[str], None] = lambda text: None) -> Examination:
    """Try every path on every device, each for about a second once what it needs is loaded or built.

    Args:
        notify: is told what is being tried.
    """
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    checks = []
    for part, path, device, attempt in attempts(devices):
        notify(f"trying {path} on {device}")
        checks.append(tried(part, path, device, attempt))
    notify("rendering")
    return Examination(
        machine={
            "system": platform.platform(),
            "processor": processor(),
            "cpus": usable_cores(),
            "driver": driver_version(),
            "versions": {"python": platform.python_version(), **installed()},
        },
        gpus=[describe_gpu(device) for device in devices[1:]],
        no_gpu=None if devices[1:] else why_no_cuda(),
        checks=checks,
        render=trial_render(),
    )


def describe_gpu(device: str) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        device=device,
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
    )


Attempt = Callable[[Path, str], str]
"""Tries something with a scratch directory on a device, and says how it went."""


def attempts(devices: list[str]) -> Iterator[tuple[str, str, str, Attempt]]:
    """The part, path, device and attempt of everything that there is to try."""
    for device in devices:
        gpu = device != "cpu"
        for decoder in ("dali",) if gpu else ("pillow", "dali"):
            yield "decode", f"pictures, {decoder}", device, decoding_pictures(decoder)
        yield "decode", "video, nvdec" if gpu else "video, pyav", device, decoding_video("nvdec" if gpu else "pyav")
        yield "pixels", "kernels", device, cropping_by_kernels if gpu else pasting_by_kernel
        engines: list[tuple[EngineName, Precision]] = (
            [("tensorrt", "fp16"), ("tensorrt", "fp32"), ("torch", "fp16"), ("torch", "fp32")]
            if gpu
            else [*(("openvino", kind) for kind in ("fp32", "mixed", "bf16", "int8")), ("torch", "fp32")]
        )
        for engine, precision in engines:
            yield "network", f"{engine} {precision}", device, running(engine, precision)
        for codec in get_args(Codec):
            yield (
                "encode",
                f"{codec}, {'nvenc' if gpu else 'software'}",
                device,
                encoding("nvenc" if gpu else "auto", codec),
            )
        yield "encode", "mjpeg", device, encoding("mjpeg", "h264")
    if devices == ["cpu"]:
        for part, path, attempt in (
            ("decode", "video, nvdec", lambda directory, device: find_nvdec()),
            ("pixels", "kernels", cropping_by_kernels),
            ("network", "tensorrt", lambda directory, device: without_gpu(str(find_tensorrt()))),
            ("encode", "nvenc", lambda directory, device: without_gpu(load_pynvvideocodec().__name__)),
        ):
            yield part, path, "cuda", attempt


def tried(part: str, path: str, device: str, attempt: Attempt) -> Check:
    try:
        with tempfile.TemporaryDirectory(prefix="gpurender-") as directory:
            return Check(part, path, device, True, attempt(Path(directory), device))
    except (InputError, DeviceError, OutputError) as error:
        return Check(part, path, device, False, str(error))
    except Exception as error:  # one path that breaks in a way of its own must not hide the others
        return Check(part, path, device, False, f"fails unexpectedly ({unexpected(error)})")


def unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def cropping_by_kernels(directory: Path, device: str) -> str:
    if not torch.cuda.is_available():
        raise DeviceError(why_no_cuda())
    why = why_no_kernels("cuda")
    if why is not None:
        raise DeviceError(f"Kornia and torch take their place: Triton {why}.")
    frames = torch.randint(0, 256, (FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    rects = torch.tensor([[10, 20, 200, 210]] * FRAMES)
    kernel, reference = (crop_faces(frames, rects, impl=impl).int() for impl in ("kernel", "reference"))
    return f"differs from the reference in {(kernel != reference).float().mean().item():.5%} of all values"


def pasting_by_kernel(directory: Path, device: str) -> str:
    here = this_processor()
    if not here.lanes:
        raise DeviceError("this processor has neither AVX2 nor AVX-512: OpenVINO and torch take their place.")
    random = torch.Generator().manual_seed(0)
    frame, crop = (torch.randint(0, 256, (3, n, n), dtype=torch.uint8, generator=random) for n in (SIZE, CROP))
    given = (
        frame[None],
        crop[None],
        torch.rand(1, 3, INNER, INNER, generator=random),
        torch.tensor([[10, 20, 200, 210]]),
    )
    pasted, expected = (paste_faces(*given, impl=impl).int() for impl in (None, "reference"))
    differing = (pasted - expected).abs()
    if differing.max() > 1:
        raise DeviceError(f"they differ from the reference by {differing.max().item()} levels.")
    vectors = "AVX-512" if here.lanes == 16 else "AVX2"
    return f"{vectors}; differ from the reference in {(differing > 0).float().mean().item():.5%} of all values"


def decoding_pictures(decoder: str) -> Attempt:
    def attempt(directory: Path, device: str) -> str:
        avatar = open_template(find_template("avatar"))
        pixels = avatar.frames(range(FRAMES))[0]
        folder = directory / "template" / "full_body_img"
        (directory / "template" / "landmarks").mkdir(parents=True)
        write_frames([pixels], folder / "%d.jpg", fps=25)
        for number in range(1, FRAMES + 1):
            landmarks = "\n".join(["400 100"] * 31 + ["500 100"] * 21 + ["500 500"] * 58)
            (directory / "template" / "landmarks" / f"{number}.lms").write_text(landmarks)
        template = open_template(
            directory / "template", device=device, decoder=cast(DecoderName, decoder), memory_budget=0
        )
        template.frames([0])
        began = time.perf_counter()
        frames, _ = template.frames(range(FRAMES))
        finish(device)
        seconds = time.perf_counter() - began
        expected = torch.stack([read_picture(folder / f"{i}.jpg") for i in range(1, FRAMES + 1)])
        difference = (frames.cpu().int() - expected.int()).abs().float().mean().item()
        if difference > 2:
            raise DeviceError(f"its pixels are {difference:.1f} levels from Pillow's.")
        return f"{1000 * seconds / FRAMES:.1f} ms a picture of {template.width}×{template.height}"

    return attempt


def decoding_video(decoder: DecoderName) -> Attempt:
    def attempt(directory: Path, device: str) -> str:
        template = open_template(find_template("avatar"), device=device, decoder=decoder, parsing=False)
        began = time.perf_counter()
        template.frames(range(4 * FRAMES))
        finish(device)
        seconds = time.perf_counter() - began
        return f"{1000 * seconds / 4 / FRAMES:.1f} ms a frame of {template.width}×{template.height}"

    return attempt


def running(engine: EngineName, precision: Precision) -> Attempt:
    def attempt(directory: Path, device: str) -> str:
        kind = ".pth" if engine == "torch" else ".onnx"
        network = find_network(find_template("avatar"), kind)
        probe = Probe(*example_input(2, "ave")) if precision in PROBED else None
        loaded = load_engine(network, device=device, engine=engine, precision=precision, probe=probe)
        faces, audio = (tensor.to(device) for tensor in example_input(loaded.batch, "ave"))
        for _ in range(2):  # the second captures a CUDA graph where there is one
            loaded.decode(loaded.encode(faces), audio)
        finish(device)
        began = time.perf_counter()
        encoded = loaded.encode(faces)
        finish(device)
        half = time.perf_counter()
        pictures = loaded.decode(encoded, audio)
        finish(device)
        ended = time.perf_counter()
        if not pictures.isfinite().all():
            raise DeviceError("it gives values that are not finite.")
        notes = f"; {'; '.join(loaded.notes)}" if loaded.notes else ""
        once, each = (1000 * seconds / len(pictures) for seconds in (half - began, ended - half))
        return f"{each:.1f} ms a frame with the avatar's network, {once:.1f} once a template frame{notes}"

    return attempt


def encoding(encoder: EncoderName, codec: Codec) -> Attempt:
    def attempt(directory: Path, device: str) -> str:
        ramp = torch.arange(SIZE, dtype=torch.uint8).expand(4 * FRAMES, 3, SIZE, SIZE).to(device)
        out = directory / "out.mkv"
        began = time.perf_counter()
        written = write_frames(iter(ramp.split(FRAMES)), out, fps=25, encoder=encoder, codec=codec)
        seconds = time.perf_counter() - began
        with av.open(str(out)) as container:
            decoded = list(container.decode(video=0))
        middle = decoded[-1].to_ndarray(format="rgb24")[SIZE // 2, SIZE // 2]
        if len(decoded) != len(ramp) or np.abs(middle.astype(int) - SIZE // 2).max() > 6:
            raise DeviceError("what it wrote is not what it was given.")
        return f"{written.encoder}: {len(decoded)} frames of {SIZE}×{SIZE} in {seconds:.2f} s"

    return attempt


def finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def without_gpu(what: str) -> str:
    raise DeviceError(f"{what} is installed, but there is no GPU to run it.")


def trial_render() -> dict[str, Any]:
    """What a render of a moment of the avatar uses, all choices left to gpurender."""
    try:
        with tempfile.TemporaryDirectory(prefix="gpurender-") as directory:
            features = Path(directory) / "features.npy"
            np.save(features, np.zeros((2 * FRAMES, 512), np.float32))
            summary = make("avatar", features, Path(directory) / "out.mp4")
    except (InputError, DeviceError, OutputError) as error:
        return {"error": str(error)}
    except Exception as error:  # the report is wanted most where something breaks
        return {"error": unexpected(error)}
    keys = ("device", "engine", "precision", "measured_psnr_db", "batch", "decoder", "encoder", "notes")
    return {key: value for key, value in summary.as_dict().items() if key in keys}
