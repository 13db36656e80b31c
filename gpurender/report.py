"""What a render made, which path it took and what that cost: a few lines for a person, JSON for a program."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from .host import usable_cores
from .jit import this_processor
from .output import write_text

PACKAGES = (
    "gpurender",
    *("torch", "openvino", "llvmlite", "tensorrt", "tensorrt_rtx", "onnxruntime", "kornia", "av"),
    *("nvidia-dali-cuda120", "pynvvideocodec", "torchvision"),
)


@dataclass(frozen=True)
class Summary:
    """What a render made, and which path it took."""

    out: Path
    frames: int
    fps: float
    width: int
    height: int
    seconds: float
    """wall clock, all of it"""
    prepare_seconds: float
    """of it, until rendering began: opening the template, hearing the sound, loading the network"""
    first_frame_seconds: float
    """until the first frames went to the encoder"""
    render_seconds: float
    """from the first frame's rendering to the finished file"""
    stage_seconds: dict[str, float]
    """by stage of the rendering, on the host: of work, without waiting; stages overlap"""
    stage_device_seconds: dict[str, float]
    """by stage, on the GPU"""
    template_frames: int
    faces_encoded: int
    """how often the network's first half ran: once for each template frame that was shown, if memory allowed to keep
    what it made; once for each frame of the video, if not; 0 where nothing of it can be kept"""
    device: str
    engine: str
    precision: str
    measured_psnr_db: dict[str, float]
    batch: int
    decoder: str
    encoder: str
    notes: list[str]
    """what was unusual, and where another path was taken than the best one, why"""

    def __str__(self) -> str:
        quality = "".join(
            f" ({kind} is within {psnr:.1f} dB of fp32{'' if kind == self.precision else ': not taken'})"
            for kind, psnr in self.measured_psnr_db.items()
        )
        return (
            f"wrote {self.out}: {self.frames} frames of {self.width}×{self.height}, {self.frames / self.fps:.2f} s at "
            f"{self.fps:g} a second\n"
            f"used {self.engine} {self.precision}{quality} on {self.device}, decoder {self.decoder}, encoder "
            f"{self.encoder}; took {self.seconds:.1f} s, of which {self.render_seconds:.1f} s rendered "
            f"{self.frames / self.render_seconds:.1f} frames a second"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the machine and the versions of the packages that took part; JSON can hold it."""
        return {
            **asdict(self),
            "out": str(self.out),
            "measured_psnr_db": {kind: db if isfinite(db) else None for kind, db in self.measured_psnr_db.items()},
            "frames_per_second": self.frames / self.render_seconds,
            "machine": {
                "system": platform.platform(),
                "processor": processor(),
                "cpus": usable_cores(),
                "gpu": torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else None,
            },
            "versions": {"python": platform.python_version(), **installed()},
        }

    def write(self, file: Path, overwrite: bool) -> None:
        """Write `as_dict` as a JSON file.

        Raises:
            OutputError: it exists, or cannot be written.
        """
        write_text(file, json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", overwrite)


def installed() -> dict[str, str]:
    """The versions of the packages that a render may use, of those that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, as well as the system tells it, with its vectors: virtual machines often tell no more of a
    model than its maker."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    vectors = this_processor().vectors
    return f"{name} ({vectors})" if vectors else name
