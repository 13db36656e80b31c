"""What an engine is: something that runs the network, in two halves; and how fast types are held against fp32.

Engines take and give torch tensors on their device; which runtime is behind one shows in its attributes alone.
`choose_engine.py` takes the one that suits a machine.
"""

from collections.abc import Callable, Sequence
from math import inf, log10
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .network import FACE_SHAPE, WINDOW_SHAPES, Encoded, Mode

EngineName = Literal["auto", "tensorrt", "openvino", "torch"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "mixed", "int8"]
NO_FIRST_HALF = "nothing that the network computes from the face alone can be kept, so all of it runs for each frame"
"""The note of engines on networks that are not cut."""
LEAST_PSNR_DB = 40.0  # of a fast type against fp32, in the worst of the probed frames
LEAST_INT8_DB = 43.0  # of int8, which loses more where a sound goes beyond the ranges: 3 dB in the worst of 300 frames
PROBED: tuple[Precision, ...] = ("auto", "int8")
"""The precisions for which `load_engine` needs a probe."""


class Probe(NamedTuple):
    """Network inputs of a few typical frames, on which a fast type is held against fp32.

    Attributes:
        faces: (B,6,320,320).
        audio: (B,*window), what is heard with these faces.
        others: (N,*window), more sounds: `int8` takes the ranges of its numbers from them, and the faces in turn; None
            is `audio`.
        frames: how many will be rendered; 0: not known, which is taken for few. On a CPU, `auto` skips types that would
            save less time over so many frames than trying them takes.
    """

    faces: Tensor
    audio: Tensor
    others: Tensor | None = None
    frames: int = 0


class Engine(Protocol):
    """Runs one network, in two halves: `encode` sees the template alone, `decode` also hears the audio.

    Attributes:
        name: the runtime.
        precision: the type that it computes in: `fp32`, `fp16`, `bf16`; `mixed`, bf16 in the largest layers alone;
            `int8`, 8-bit integers in the second half's convolutions.
        measured_psnr_db: of types against fp32, the worst frame of the probe; empty where none was measured.
        notes: what it does otherwise than was asked for, and why.
        mode: the kind of audio features it takes.
        device: where its inputs and outputs are.
        batch: the batch that suits it.
    """

    name: str
    precision: str
    measured_psnr_db: dict[str, float]
    notes: list[str]
    mode: Mode
    device: torch.device
    batch: int

    def encode(self, faces: Tensor) -> list[Encoded]:
        """(B,6,320,320) float32 in 0..1 to B encodings; any B ≥ 1. They may share the faces' memory."""
        ...

    def decode(self, encoded: Sequence[Encoded], audio: Tensor) -> Tensor:
        """B encodings and (B,*WINDOW_SHAPES[mode]) float32 to (B,3,320,320) float32 BGR in 0..1."""
        ...

    def begin(self, encoded: Sequence[Encoded], audio: Tensor) -> Callable[[], Tensor]:
        """Start `decode` and return a function that waits for its pictures and returns them. Until then, what is given
        may still be read, and is not to be changed."""
        ...


def predict(engine: Engine, faces: Tensor, audio: Tensor) -> Tensor:
    """The whole network, both halves.

    Args:
        engine: see `load_engine`.
        faces: (B,6,320,320) floating point in 0..1 on its device, see `face_input`; B at least 1.
        audio: (B,*WINDOW_SHAPES[mode]) floating point on its device, see `Features.windows`.

    Returns:
        (B,3,320,320) float32 BGR in 0..1.

    Raises:
        ValueError: shapes or dtypes are not these.
    """
    window = WINDOW_SHAPES[engine.mode]
    if faces.shape[1:] != FACE_SHAPE or len(faces) == 0 or audio.shape != (len(faces), *window):
        raise ValueError(
            f"faces are (B,6,320,320) and audio (B,{','.join(map(str, window))}), B at least 1; "
            f"given {tuple(faces.shape)} and {tuple(audio.shape)}"
        )
    if not (faces.is_floating_point() and audio.is_floating_point()):
        raise ValueError(f"faces and audio are floating point, given {faces.dtype} and {audio.dtype}")
    faces, audio = faces.float(), audio.float()
    return engine.decode(engine.encode(faces), audio)


class Choice(NamedTuple):
    """What an engine offers for a network on a device."""

    precisions: list[str]
    """the exact one first"""
    faster: list[str]
    """those that are worth a try instead, the fastest first"""
    build: Callable[[str], Engine]
    """the engine in a precision"""
    exact: Callable[[], Engine]
    """whose pictures a faster one is held against; not always the engine itself, whose exact one may take minutes"""
    where: str = "on this processor"


def fastest_that_agrees(choice: Choice, probe: Probe) -> Engine:
    """The engine in the first of the faster precisions that is close enough to the exact one, else in that."""
    exact = choice.exact()
    # cuDNN would choose an algorithm for each layer first, which takes longer than a few frames do without it.
    with torch.backends.cudnn.flags(enabled=False):
        expected = predict_probe(exact, probe)
    measured: dict[str, float] = {}
    for precision in choice.faster:
        candidate = choice.build(precision)
        candidate.measured_psnr_db = measured
        if candidate.precision != precision:  # TensorRT could only run the exact one
            return candidate
        measured[precision] = least_psnr(predict_probe(candidate, probe), expected)
        if measured[precision] >= (LEAST_INT8_DB if precision == "int8" else LEAST_PSNR_DB):
            return candidate
        del candidate  # its memory, before another is built
    chosen = choice.build(choice.precisions[0])
    chosen.measured_psnr_db = measured
    return chosen


def predict_probe(engine: Engine, probe: Probe) -> Tensor:
    faces, audio = (tensor.to(engine.device) for tensor in (probe.faces, probe.audio))
    return engine.decode(engine.encode(faces), audio).cpu()


def least_psnr(pictures: Tensor, expected: Tensor) -> float:
    """The worst picture's PSNR in decibels, both cut to 8 bits as frames are."""
    difference = (pictures.float() * 255).floor() - (expected.float() * 255).floor()
    error = difference.square().flatten(1).mean(1).max().item()
    return 10 * log10(255**2 / error) if error else inf
