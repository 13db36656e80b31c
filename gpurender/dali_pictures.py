"""Picture files -> pixels on the device, by DALI: on a GPU nvJPEG decodes JPEG, the host's cores decode PNG."""

import importlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cuda import is_out_of_memory
from .errors import DeviceError, InputError, first_line
from .host import usable_cores
from .pictures import Pictures, read_picture
from .streams import hand_over

AT_ONCE = 32
"""Pictures that are decoded together at most; they are in memory twice while they are brought from HWC to CHW."""

TOLERANCE = 2.0  # levels on average, for a picture of noise; nvJPEG's rounding is its own


class DaliPictures:
    """Picture files of one size, decoded by DALI at each use.

    The pixels are Pillow's and OpenCV's: the same on a CPU, within rounding on a GPU. A picture that DALI cannot
    decode goes to Pillow, then and later, which reads it or says what is wrong with it; so do those of `unfit`.

    Attributes:
        size: (width, height) in pixels.
        notes: is told which pictures Pillow decodes.
    """

    def __init__(self, pictures: Pictures, device: torch.device, notes: list[str]) -> None:
        """
        Raises:
            DeviceError: DALI cannot be used on the device; the message says why and what to do.
        """
        self.size = pictures.size
        self.notes = notes
        self._files = pictures.files
        self._device = device
        self._dali = load_dali()
        self._types = importlib.import_module("nvidia.dali.types")
        self._lock = Lock()  # a context is one thread's at a time
        try:
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self._context = self._dali.EvalContext(
                num_threads=usable_cores(),
                device_id=self._stream.device.index if self._stream else None,
                cuda_stream=self._stream,
            )
            difference = self._difference_from_pillow()
        except Exception as error:
            raise DeviceError(f"DALI does not decode on {device} ({first_line(error)}).") from None
        if difference > TOLERANCE:
            raise DeviceError(f"DALI's pixels on {device} are {difference:.1f} levels from Pillow's.")
        self._pillows: set[Path] = set()
        for file in self._files:
            if why := unfit(file):
                self._set_aside(file, why)

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB on the device, of each; ready on torch's current stream. Any thread may call.

        Raises:
            InputError: a picture cannot be decoded, or has another size by now.
        """
        frames: list[Tensor] = []
        with self._lock:
            for start in range(0, len(indices), AT_ONCE):
                frames += self._decode([self._files[i] for i in indices[start : start + AT_ONCE]])
        width, height = self.size
        for i, frame in zip(indices, frames, strict=True):
            if frame.shape[1:] != (height, width):
                raise InputError(f"{self._files[i]} is not {width}×{height} any more.")
        return frames

    def _decode(self, files: list[Path]) -> list[Tensor]:
        by_dali = [file for file in files if file not in self._pillows]
        decoded: dict[Path, Tensor] = {}
        try:
            decoded = dict(zip(by_dali, self._decode_by_dali(by_dali), strict=True))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise
            # It does not say which: one by one, then.
            for file in by_dali:
                try:
                    (decoded[file],) = self._decode_by_dali([file])
                except (RuntimeError, MemoryError) as error:
                    if is_out_of_memory(error):
                        raise
                    decoded[file] = read_picture(file).to(self._device)  # or it says what is wrong with the file
                    self._set_aside(file, first_line(error))
        return [decoded[file] if file in decoded else read_picture(file).to(self._device) for file in files]

    def _decode_by_dali(self, files: list[Path]) -> list[Tensor]:
        # Absolute: DALI would take `s3://` for a place to read from.
        return self._pixels(self._dali.imread, [str(file.absolute()) for file in files]) if files else []

    def _set_aside(self, file: Path, why: str) -> None:
        self._pillows.add(file)
        if len(self._pillows) == 1:
            self.notes.append(f"{file.name} is decoded by Pillow, not by DALI ({why}); so may others be")

    def _pixels(self, decode: Callable[..., Any], encoded: Any) -> list[Tensor]:
        """(3,H,W) uint8 RGB of each: what DALI decoded, brought into torch's memory without leaving the device."""
        with self._context, self._dali.EvalMode.sync_cpu, torch.cuda.stream(self._stream):
            batch = decode(
                encoded,
                device="gpu" if self._stream else "cpu",
                output_type=self._types.RGB,
                jpeg_fancy_upsampling=True,
            )
            pixels = [self._taken(picture).permute(2, 0, 1).contiguous() for picture in batch.tensors]
        hand_over(pixels, self._stream)
        return pixels

    def _taken(self, picture: Any) -> Tensor:
        """(H,W,3) where DALI has it. A GPU's not by DLPack: once that is let go of, a thread of DALI's waits for the
        whole GPU, which breaks a capture of a CUDA graph on any thread. By the array interface, its memory is given
        back on the stream on which it is read here, so not before."""
        if self._stream is None:
            return torch.from_dlpack(picture)
        return torch.as_tensor(picture, device=self._stream.device)

    def _difference_from_pillow(self) -> float:
        """Levels on average, for a picture made here."""
        made = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(made).resize((64, 48), Image.Resampling.BICUBIC).save(stream, "JPEG", subsampling="4:2:0")
        with self._context:
            encoded = self._dali.batch([self._dali.tensor(np.frombuffer(stream.getvalue(), np.uint8).copy())])
        (pixels,) = self._pixels(self._dali.decoders.image, encoded)
        expected = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1).to(pixels.device)
        return (pixels.float() - expected.float()).abs().mean().item()


def load_dali() -> ModuleType:
    """DALI's imperative interface; imported where it is used, because it takes over a second.

    Raises:
        DeviceError: it cannot be used here; the message says why and what to do.
    """
    try:
        return importlib.import_module("nvidia.dali.experimental.dynamic")
    except ModuleNotFoundError as error:
        if error.name in ("nvidia", "nvidia.dali"):
            raise DeviceError("DALI is not installed; on Linux, pip install 'gpurender[gpu]'.") from None
        raise DeviceError(f"DALI is too old or incomplete ({error}); pip install -U 'gpurender[gpu]'.") from None
    except Exception as error:  # the loader's, or its own check of the driver
        raise DeviceError(f"DALI does not load ({first_line(error)}); pip install -U 'gpurender[gpu]'.") from None


def unfit(file: Path) -> str | None:
    """Why a picture is Pillow's to decode, or None.

    16 bits become 8 in another way by DALI than by OpenCV; and where a JPEG is cut off, a GPU may fill in the rest
    without a word. Padding with zeros after its end is common.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(25)
            stream.seek(max(stream.seek(0, os.SEEK_END) - 4096, 0))
            tail = stream.read().rstrip(b"\0")
    except OSError:
        return None  # decoding it will say what is wrong
    if head.startswith(b"\x89PNG") and head[24:] == b"\x10":
        return "16 bits a channel"
    if head.startswith(b"\xff\xd8") and not tail.endswith(b"\xff\xd9"):
        return "it does not end as a JPEG ends"
    return None
