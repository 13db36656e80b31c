"""Reference sets: sample frames of a render with the numbers behind them, for other implementations to be checked by.

A reference set is a directory:

    metadata.json         what the samples are
    frames/00012.png      output frame 12: 8-bit RGB, the whole frame
    samples/00012.npz     what went into the network for it, and what came out

Output frames are counted from 0. `metadata.json` is UTF-8 JSON:

    format                "gpurender reference set"
    version               1; a reader refuses a higher one
    frames                how many frames the whole render has
    fps, width, height    of the render
    mode                  ave, hubert or wenet: the kind of audio features
    precision, engine     what ran the network: fp32
    template              name, number of frames, order and start_frame (which template frame is shown when), parsing
    model, audio          name and sha256 of the file; so audio_encoder, or null for features computed before
    arrays                shape and dtype of each array of a sample
    versions              of the packages that made it
    samples               by rising index, each:
        index             of the output frame
        template_frame    index of the template frame under it
        rect              [x0, y0, x1, y1], the face rectangle: pixels, half-open, y down
        frame, frame_sha256      file in the set, "/" between directories; hash of its bytes in hexadecimal
        arrays, arrays_sha256    likewise

A `.npz` is a ZIP archive, stored without compression, of `.npy` files (NumPy's format 1.0). Here these are
little-endian float32 in C order, the last axis running fastest, without a batch axis:

    input.npy     (6,320,320)  the network's picture: B,G,R of the face's inner 320×320, then B,G,R of the same with the
                               mouth black; 0..1
    audio.npy     (32,16,16)   the network's window of audio features; (32,32,32) for hubert, (256,16,32) for wenet
    output.npy    (3,320,320)  what the network drew: B,G,R in 0..1, before it is cut to 8 bits

An implementation that writes a set of its own, to be held against one of ours, needs `format`, `version` and, of each
sample, `index` and `frame`. What else it gives is used: `frames` to compare the lengths, `rect` to judge the face
alone, `arrays` (with any of the three) to compare what went in and came out, hashes to find damaged files.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from .cache import hash_of
from .errors import InputError, first_line
from .pictures import picture_size, read_picture
from .rectangles import Rect

FORMAT, VERSION = "gpurender reference set", 1
METADATA = "metadata.json"
ARRAYS = ("input", "audio", "output")


@dataclass(frozen=True)
class Sample:
    """One output frame of a reference set."""

    index: int
    frame: str
    frame_sha256: str | None
    arrays: str | None
    arrays_sha256: str | None
    rect: Rect | None


class ReferenceSet:
    """A reference set that is there.

    Attributes:
        path: its directory.
        metadata: all of `metadata.json`.
        samples: by rising index.
        size: (width, height) of the frames, in pixels.
        total: frames of the whole render, None if it is not said.
        fps: None if it is not said.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], samples: list[Sample]) -> None:
        self.path = path
        self.metadata = metadata
        self.samples = samples
        self.total: int | None = metadata.get("frames")
        self.fps: float | None = metadata.get("fps")
        self.size = picture_size(path / samples[0].frame)
        for sample in samples:
            if (other := picture_size(path / sample.frame)) != self.size:
                raise InputError(
                    f"{path / sample.frame} is {other[0]}×{other[1]}, but {samples[0].frame} is "
                    f"{self.size[0]}×{self.size[1]}: all frames of a reference set have one size."
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"ReferenceSet({self.path.name}: {len(self)} frames of {self.size[0]}×{self.size[1]})"

    def position(self, index: int) -> int:
        """Where the sample of an output frame is among the samples.

        Raises:
            ValueError: there is none of this frame.
        """
        place = bisect_left(self.samples, index, key=lambda sample: sample.index)
        if place == len(self) or self.samples[place].index != index:
            raise ValueError(f"{self.path} has no sample of frame {index}")
        return place

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB on the CPU, of samples, by their place among the samples.

        Raises:
            InputError: a picture cannot be decoded, or is not the one that the metadata means.
        """
        return [read_picture(self._checked(self.samples[i].frame, self.samples[i].frame_sha256)) for i in indices]

    def arrays(self, position: int) -> dict[str, np.ndarray]:
        """The arrays that there are of a sample, by name: `input`, `audio`, `output`.

        Raises:
            InputError: the file cannot be read, or is not the one that the metadata means.
        """
        sample = self.samples[position]
        if sample.arrays is None:
            return {}
        file = self._checked(sample.arrays, sample.arrays_sha256)
        try:
            with np.load(file, allow_pickle=False) as stored:
                found = {name: stored[name] for name in ARRAYS if name in stored.files}
        except Exception as error:  # of ZIP, zlib and NumPy, of Python's tokenizer, and of memory for untrue shapes
            raise InputError(f"{file} is not an .npz file of arrays ({first_line(error)[:100]}).") from None
        for name, array in found.items():
            if array.dtype.kind not in "fiu" or array.size == 0:
                raise InputError(f"{file}: {name} does not hold real numbers, but {array.shape} of {array.dtype}.")
        return found

    def _checked(self, name: str, expected: str | None) -> Path:
        file = self.path / name
        try:
            found = hash_of(file) if expected is not None else None
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}).") from None
        if found != expected:
            raise InputError(
                f"{file} is not the file that {METADATA} means: its sha256 is {found}. Copy the set again; if it was "
                "changed on purpose, say so there or remove the hash."
            )
        return file


def open_reference(path: str | Path) -> ReferenceSet:
    """Open a reference set, and check all of it but the contents of its pictures and arrays.

    Raises:
        InputError: this is no reference set, or files of it are missing.
    """
    path = Path(path)
    file = path / METADATA
    try:
        metadata = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}).") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f'{file} is not that of a reference set: it does not say "format": "{FORMAT}".')
    if metadata.get("version") != VERSION:
        raise InputError(f"{file} is of version {metadata.get('version')!r}; this program reads version {VERSION}.")
    for key, least in (("frames", 1), ("fps", 0.01)):
        value = metadata.get(key)
        if value is not None and not (is_number(value, int if key == "frames" else float) and value >= least):
            raise InputError(f'{file}: "{key}" is {value!r:.60}, not a number of at least {least}.')
    entries = metadata.get("samples")
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{file} lists no "samples".')
    samples = [read_sample(file, entry, metadata.get("frames")) for entry in entries]
    for sample, following in pairwise(samples):
        if following.index <= sample.index:
            raise InputError(f"{file}: sample {following.index} comes after {sample.index}; indices are to rise.")
    return ReferenceSet(path, metadata, samples)


def read_sample(file: Path, entry: Any, total: int | None) -> Sample:
    if not isinstance(entry, dict) or not is_number(entry.get("index"), int) or entry["index"] < 0:
        raise InputError(f'{file}: a sample is {entry!r:.60}, without an "index" from 0.')
    index = entry["index"]
    if total is not None and index >= total:
        raise InputError(f"{file}: sample {index} is not within the render's {total} frames.")
    for key in ("frame", "frame_sha256", "arrays", "arrays_sha256"):
        if not isinstance(entry.get(key), str | None) or (key == "frame" and key not in entry):
            raise InputError(f'{file}: sample {index} has {entry.get(key)!r:.60} as its "{key}", not text.')
    for key in ("frame", "arrays"):
        name = entry.get(key)
        if name is None and key == "arrays":
            continue
        if name is None or not is_inside(name) or not os.path.isfile(file.parent / name):
            raise InputError(f'{file}: the "{key}" of sample {index}, {name!r:.60}, is not a file in this set.')
    rect = entry.get("rect")
    if rect is not None and not (isinstance(rect, list) and len(rect) == 4 and all(is_number(x, int) for x in rect)):
        raise InputError(f'{file}: the "rect" of sample {index} is {rect!r:.60}, not four integers x0, y0, x1, y1.')
    return Sample(
        index,
        entry["frame"],
        entry.get("frame_sha256"),
        entry.get("arrays"),
        entry.get("arrays_sha256"),
        None if rect is None else (rect[0], rect[1], rect[2], rect[3]),
    )


def is_number(value: Any, kind: type) -> bool:
    kinds = int if kind is int else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**53  # NaN is not


def is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def array_differences(a: ReferenceSet, b: ReferenceSet, index: int) -> dict[str, float]:
    """The largest absolute difference of two numbers in each array that both sets have of an output frame.

    NaN where one of them is NaN.

    Raises:
        InputError: an array cannot be read, or has another shape in the other set.
    """
    of_a, of_b = (stored.arrays(stored.position(index)) for stored in (a, b))
    largest = {}
    for name in ARRAYS:
        if name in of_a and name in of_b:
            if of_a[name].shape != of_b[name].shape:
                raise InputError(
                    f"frame {index}: {name} is {of_a[name].shape} in {a.path}, but {of_b[name].shape} in {b.path}."
                )
            largest[name] = float(np.abs(of_a[name].astype(np.float64) - of_b[name]).max())
    return largest
