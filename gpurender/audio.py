"""Sound or a feature file -> what the network hears at each frame.

mel rows of a sound -> audio encoder -> one feature a frame -> windows of 16 features
"""

import json
from collections.abc import Callable, Sequence
from math import isfinite, prod
from pathlib import Path
from tokenize import TokenError
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda import exact_products, resolve_device, without_autocast
from .errors import InputError, check_no_pipe, first_line
from .find import find_sound
from .host import refuse_to_travel
from .network import FRAME_RATES, WINDOW_SHAPES, Mode
from .sound import MEL_RATE, damage, decode_sound, mel_blocks

MEL_WINDOW = 16  # mel rows behind one feature: 0.2 s
WINDOW = 16  # features behind one frame: 8 before it, itself and 7 after
ENCODE_CHUNK = {"cpu": 16, "cuda": 64}  # features computed at a time: many take memory, few take launches
TRAINED_FPS = FRAME_RATES["ave"]
FEATURE_SIZES: dict[int, Mode] = {512: "ave", 2048: "hubert", 8192: "wenet"}

FEATURE_FILES = (".npy", ".bin")

AudioEncoderLike = Callable[[Tensor], Tensor]
"""(B,1,80,16) float32 mel windows to (B,512) float32 features, on one device."""


class Features:
    """What the network hears, frame by frame.

    Attributes:
        mode: the kind of features, `ave`, `hubert` or `wenet`.
        shape: of a feature file of them: (N,512) for sound at 25 frames a second, ready windows (N,32,16,16) at other
            rates, else the file's own.
        fps: frames a second that the features stand for.
        source: the file they come from.
        sound: that file where it is sound (to be heard in the video), None for a feature file.
        notes: what was unusual about it.
    """

    def __init__(
        self,
        mode: Mode,
        shape: tuple[int, ...],
        read: Callable[[int, int], Tensor],
        *,
        windows_ready: bool,
        fps: float,
        source: Path,
        sound: Path | None,
        notes: Sequence[str] = (),
    ) -> None:
        self.mode: Mode = mode
        self.shape = shape
        self.fps = fps
        self.source = source
        self.sound = sound
        self.notes = list(notes)
        self._read = read
        self._windows_ready = windows_ready

    def __len__(self) -> int:
        """The number of frames."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Features({self.source.name}: {len(self)} frames of {self.mode} at {self.fps:g} a second)"

    def __reduce__(self) -> NoReturn:
        refuse_to_travel(self)

    def rows(self, start: int, stop: int) -> Tensor:
        """What a feature file holds for frames start..stop-1: (stop-start, *shape[1:]) float32 on the device.

        Raises:
            ValueError: there are no such frames, or none between them.
        """
        self._check(start, stop)
        return self._read(start, stop).reshape(-1, *self.shape[1:])

    def windows(self, start: int, stop: int) -> Tensor:
        """The network's audio input for frames start..stop-1: (stop-start, *WINDOW_SHAPES[mode]) float32.

        Frame i gets features [i-8, i+8), zeros where that leaves the sound.

        Raises:
            ValueError: as `rows`.
        """
        self._check(start, stop)
        if self._windows_ready:
            return self._read(start, stop)
        first, end = start - WINDOW // 2, stop + WINDOW // 2 - 1
        rows = self._read(max(first, 0), min(end, len(self)))  # (n, D)
        rows = F.pad(rows, (0, 0, max(-first, 0), max(end - len(self), 0)))
        windows = rows.unfold(0, WINDOW, 1).transpose(1, 2)  # (stop-start, 16, D)
        return windows.reshape(-1, *WINDOW_SHAPES[self.mode])

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"frames {start}..{stop} are not within 0..{len(self)}")


@without_autocast()
def load_features(
    path: str | Path,
    *,
    encoder: AudioEncoderLike | None = None,
    fps: float | None = None,
    device: torch.device | str = "cpu",
) -> Features:
    """Load sound, or features computed before, as the network's audio input.

    Args:
        path: any sound file or video with sound, or `hello`, the bundled recording; `.npy` of (N,512) `ave`,
            (N,2,1024) `hubert` or (N,16,512) `wenet` features (trailing axes may be flat) or of ready windows
            (N,32,16,16), (N,32,32,32), (N,256,16,32); `.bin` of float32 with its shape in a `.bin.json` beside it.
        encoder: turns mel windows into features; needed for sound only, see `load_audio_engine`.
        fps: frames a second; None is the rate that the mode was trained at. Of sound, each frame hears what it would
            at 25, about its own moment; a feature file is taken to be at this rate.
        device: where windows are computed and returned; `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: nothing usable is at `path`, its shape or values are wrong, or `fps` is no rate.
        DeviceError: there is no such device here.
    """
    path = find_sound(path)
    device = resolve_device(device)
    if fps is not None and not (isfinite(fps) and fps > 0):
        raise InputError(f"{fps} frames a second cannot be rendered; give a number above 0.")
    if not path.exists():
        raise InputError(f"{path}: there is no such sound or feature file.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a sound or feature file.")
    check_no_pipe(path)
    if path.suffix.lower() in FEATURE_FILES:
        return _stored_features(path, fps, device)
    if encoder is None:
        raise InputError(f"{path} is sound, which needs an audio encoder: give --audio-encoder (.onnx or .pth).")
    if not callable(encoder):
        raise InputError(f"{encoder} is no audio encoder yet: load_audio_engine makes one of its file.")
    return _speech_features(path, encoder, fps or TRAINED_FPS, device)


# --- feature files ---------------------------------------------------------------------------------------------------


def _stored_features(path: Path, fps: float | None, device: torch.device) -> Features:
    array = _read_npy(path) if path.suffix.lower() == ".npy" else _read_bin(path)
    shape = array.shape
    mode, windows_ready = _recognise(path, shape)
    if not windows_ready:
        array = array.reshape(len(array), -1)
    for start in range(0, len(array), 64):  # in pieces: the file may be larger than memory
        with np.errstate(over="ignore"):  # doubles may be too large for what they are used as
            piece = np.array(array[start : start + 64], np.float32)
        finite = np.isfinite(piece).reshape(len(piece), -1).all(1)
        if not finite.all():
            raise InputError(f"{path}: features of frame {start + int(finite.argmin())} hold NaN or infinity.")

    def read(start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(array[start:stop], np.float32)).to(device)

    return Features(
        mode,
        shape,
        read,
        windows_ready=windows_ready,
        fps=fps or FRAME_RATES[mode],
        source=path,
        sound=None,
    )


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # neither unpickles nor opens .npz, as np.load may
    except (ValueError, TypeError, EOFError, OSError, OverflowError, MemoryError, RecursionError, TokenError) as error:
        raise InputError(f"{path} is not a NumPy array file ({first_line(error)[:100]}).") from None
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} does not hold real numbers, but {array.dtype}.")
    return array


def _read_bin(path: Path) -> np.ndarray:
    header = path.with_name(path.name + ".json")
    if not header.is_file():
        raise InputError(f"{path} needs {header.name} beside it, with its shape.")
    try:
        shape = json.loads(header.read_text("utf-8-sig"))["shape"]
        shape = tuple(int(n) for n in shape)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise InputError(f'{header} does not give a shape, such as {{"shape": [80, 512]}}.') from None
    size = path.stat().st_size
    _recognise(path, shape)  # NumPy has no arrays of some shapes
    if prod(shape) * 4 != size:
        raise InputError(f"{path} has {size} bytes, but shape {list(shape)} of float32 takes {prod(shape) * 4}.")
    return np.memmap(path, "<f4", "r", shape=shape)


def _recognise(path: Path, shape: tuple[int, ...]) -> tuple[Mode, bool]:
    """The mode, and whether these are ready windows."""
    for mode, window in WINDOW_SHAPES.items():
        if shape[1:] == window and shape[0] > 0:
            return mode, True
    if len(shape) in (2, 3) and min(shape) > 0 and prod(shape[1:]) in FEATURE_SIZES:
        return FEATURE_SIZES[prod(shape[1:])], False
    raise InputError(
        f"{path} has shape {shape!r:.60}. Features are (N,512) for ave, (N,2,1024) for hubert or (N,16,512) for wenet, "
        "ready windows (N,32,16,16), (N,32,32,32) or (N,256,16,32), with N of at least 1."
    )


# --- sound -----------------------------------------------------------------------------------------------------------


def _speech_features(path: Path, encoder: AudioEncoderLike, fps: float, device: torch.device) -> Features:
    left_out: list[None] = []
    samples = decode_sound(path, lambda: left_out.append(None))
    mel = torch.cat(list(mel_blocks(samples, device)))  # (T,80): 25 KB a second of sound
    if len(mel) < MEL_WINDOW:  # shorter than 0.2 s: silence follows
        mel = F.pad(mel, (0, 0, 0, MEL_WINDOW - len(mel)), value=-4.0)
    rows = torch.arange(MEL_WINDOW, device=device)

    def encode(starts: Tensor) -> Tensor:
        """The mel windows that begin at some rows, (n,) int64, to (n,512)."""
        windows = mel[starts[:, None] + rows].transpose(1, 2)[:, None].contiguous()
        with torch.inference_mode(), exact_products():
            return encoder(windows).float()

    starts = mel_starts(len(mel))
    count = len(starts) + 2
    if fps == TRAINED_FPS:
        shape, read = (count, 512), one_after_another(encode, starts.to(device), device)
    else:
        frames = max(1, round(count * fps / TRAINED_FPS))
        shape, read = (frames, *WINDOW_SHAPES["ave"]), in_between(encode, starts, fps, device)
    notes = damage(len(left_out))
    return Features("ave", shape, read, windows_ready=fps != TRAINED_FPS, fps=fps, source=path, sound=path, notes=notes)


def one_after_another(
    encode: Callable[[Tensor], Tensor], starts: Tensor, device: torch.device
) -> Callable[[int, int], Tensor]:
    """Reads features (n,512) by number: the reference's, of which the first and the last are repeated once each."""
    size = ENCODE_CHUNK[device.type]
    recent = 0, torch.empty(0, 512, dtype=torch.float32, device=device)  # the last ones: windows share 15 features

    def read(start: int, stop: int) -> Tensor:
        nonlocal recent
        index = torch.arange(start - 1, stop - 1, device="cpu").clamp(0, len(starts) - 1)  # feature i is mel window i-1
        first, last = int(index[0]), int(index[-1])
        begin, kept = recent
        kept = kept[first - begin :] if begin <= first <= begin + len(kept) else kept[:0]
        missing = range(first + len(kept), last + 1, size)
        features = torch.cat([kept, *(encode(starts[number : number + size]) for number in missing)])
        recent = first, features
        return features[(index - first).to(device, non_blocking=True)]

    return read


def in_between(
    encode: Callable[[Tensor], Tensor], starts: Tensor, fps: float, device: torch.device
) -> Callable[[int, int], Tensor]:
    """Reads windows (n,*WINDOW_SHAPES["ave"]) by frame at another rate than the network was trained at.

    A frame hears sixteen features a trained frame apart, as always, about its own moment: frame i has those of numbers
    i·25/fps + (-8…7), which need not be whole. Feature k is the mel window that begins at row int(80·(k-1)/25).
    """
    size = ENCODE_CHUNK[device.type]
    last, last_row = len(starts) - 1, int(starts[-1])
    known_rows = np.empty(0, np.int64)  # sorted; with their features, of the last call
    known = torch.empty(0, 512, dtype=torch.float32, device=device)

    def read(start: int, stop: int) -> Tensor:
        nonlocal known_rows, known
        numbers = (np.arange(start, stop) * TRAINED_FPS / fps)[:, None] + np.arange(-WINDOW // 2, WINDOW // 2)
        rows = (MEL_RATE * ((numbers - 1).clip(0, last) / TRAINED_FPS)).astype(np.int64).clip(0, last_row)
        needed = np.unique(rows)
        new = np.setdiff1d(needed, known_rows)
        kept = np.isin(known_rows, needed)
        parts = [known[torch.from_numpy(np.flatnonzero(kept)).to(device)]]
        for k in range(0, len(new), size):
            parts.append(encode(torch.from_numpy(new[k : k + size]).to(device)))
        unsorted = np.concatenate([known_rows[kept], new])
        order = np.argsort(unsorted)
        known_rows, known = unsorted[order], torch.cat(parts)[torch.from_numpy(order).to(device)]
        windows = known[torch.from_numpy(np.searchsorted(known_rows, rows)).to(device)]
        beyond = (numbers < 0) | (numbers >= len(starts) + 2)
        windows[torch.from_numpy(beyond).to(device)] = 0
        return windows.reshape(-1, *WINDOW_SHAPES["ave"])

    return read


def mel_starts(mel_rows: int) -> Tensor:
    """The first mel row of each feature's window, (n,) int64; past the end, the last 16 rows."""
    count = int((mel_rows - MEL_WINDOW) / MEL_RATE * TRAINED_FPS) + 2
    starts = (MEL_RATE * (np.arange(count) / TRAINED_FPS)).astype(np.int64)
    return torch.from_numpy(np.minimum(starts, mel_rows - MEL_WINDOW))
