"""A template directory -> frames on the device, face rectangles and the order in which frames are shown."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

Order = Literal["bounce", "loop", "mirror"]
CPU_MEMORY_BUDGET = 512 * 2**20
PICTURES = (".jpg", ".jpeg", ".png")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a bad file
ORIENTATION = 0x0112  # Exif tag; OpenCV turns pictures by it as it reads them, and so do we


class Template:
    """Frames of a person, with the face rectangle of each.

    Frames are decoded once, when they are first used, and stay on the device while they fit half of `memory_budget`
    bytes; those beyond it are decoded again at each use. What frames leave of the budget is for work on them (`Faces`).

    Attributes:
        path: the directory.
        device: where frames are.
        width, height: of every frame, in pixels.
        rects: (N,4) int64 on the host, `(x0,y0,x1,y1)` half-open pixels, within the frame.
        parsing: whether there are parsing masks and they are used.
        memory_left: bytes of the budget that frames will not take.
        notes: what was unusual about the directory and how it was taken.
    """

    def __init__(
        self,
        path: Path,
        pictures: list[Path],
        rects: Tensor,
        masks: list[Path],
        size: tuple[int, int],
        device: torch.device,
        memory_budget: int,
        notes: list[str],
    ) -> None:
        self.path = path
        self.device = device
        self.width, self.height = size
        self.rects = rects
        self.parsing = bool(masks)
        self.notes = notes
        self._pictures = pictures
        self._masks = masks
        frame_bytes = self.width * self.height * (4 if masks else 3)
        self._resident_limit = min(memory_budget // 2 // frame_bytes, len(pictures))
        self.memory_left = memory_budget - self._resident_limit * frame_bytes
        self._resident: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self._pictures)

    def __repr__(self) -> str:
        parsing = ", with parsing" if self.parsing else ""
        return f"Template({self.path.name}: {len(self)} frames of {self.width}×{self.height}{parsing})"

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Copies of some frames and of their keep masks.

        Returns:
            (B,3,H,W) uint8 RGB, and (B,H,W) bool that is true where the template's pixel stays, or None without
            parsing; on the device.

        Raises:
            InputError: a picture cannot be decoded.
        """
        missing = [i for i in dict.fromkeys(indices) if i not in self._resident]
        decoded = dict(zip(missing, self._decoders.map(self._decode, missing), strict=True))
        for i in missing[: max(self._resident_limit - len(self._resident), 0)]:
            self._resident[i] = decoded[i]
        chosen = [self._resident.get(i) or decoded[i] for i in indices]
        frames = torch.stack([frame for frame, _ in chosen])
        masks = [mask for _, mask in chosen if mask is not None]
        return frames, torch.stack(masks) if masks else None

    def _decode(self, i: int) -> tuple[Tensor, Tensor | None]:
        frame = read_picture(self._pictures[i])
        if frame.shape[1:] != (self.height, self.width):
            raise InputError(f"{self._pictures[i]} is not {self.width}×{self.height} any more.")
        mask = keep_mask(read_picture(self._masks[i])) if self.parsing else None
        return frame.to(self.device), None if mask is None else mask.to(self.device)


def open_template(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    parsing: bool | None = None,
    memory_budget: int | None = None,
) -> Template:
    """Open a SyncTalk_2D template directory and check all of it but the pictures' pixels.

    The directory holds `full_body_img/<i>.jpg` (or .jpeg, .png), `landmarks/<i>.lms` and, optionally,
    `parsing/<i>.png`. Numbers may have gaps and may start at 1 for pictures and at 0 for landmarks; the last frame may
    lack landmarks and is then left out. Other files are ignored.

    Args:
        path: the directory.
        device: where frames are decoded to.
        parsing: use the parsing masks; None uses them if they are there.
        memory_budget: bytes to spend on the device on decoded frames and work on them that is worth keeping; None is
            512 MiB on a CPU, half of the free memory on a GPU.

    Raises:
        InputError: something in the directory is missing, does not match or cannot be used; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: there is no such template directory.")
    pictures = numbered(path / "full_body_img", PICTURES, "frames")
    landmarks = numbered(path / "landmarks", (".lms",), "landmark files")
    notes: list[str] = []
    pairs = pair(path, pictures, landmarks, notes)
    masks = find_masks(path, [number for number, _ in pairs], pictures, parsing)
    frames = [pictures[number] for number, _ in pairs]
    size = check_sizes(frames, masks)
    rects = [face_rect(landmarks[number]) for _, number in pairs]
    for frame, rect in zip(frames, rects, strict=True):
        check_rect(frame, rect, size)
    device = torch.device(device)
    if memory_budget is None:
        memory_budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_MEMORY_BUDGET
    return Template(path, frames, torch.tensor(rects), masks, size, device, memory_budget, notes)


# --- which files belong together -------------------------------------------------------------------------------------


def numbered(directory: Path, suffixes: tuple[str, ...], what: str) -> dict[int, Path]:
    """The directory's numbered files by number, in their numbers' order."""
    if not directory.is_dir():
        raise InputError(f"{directory} is missing: a template keeps its {what} there.")
    found: dict[int, Path] = {}
    for file in sorted(directory.iterdir()):
        if file.suffix.lower() in suffixes and re.fullmatch(r"[0-9]+", file.stem):
            number = int(file.stem)
            if number in found:
                raise InputError(f"{file} and {found[number].name} have the same number; remove one.")
            found[number] = file
    if not found:
        raise InputError(f"{directory} holds no {what}: expected 0{suffixes[0]}, 1{suffixes[0]}, …")
    return dict(sorted(found.items()))


def pair(path: Path, pictures: dict[int, Path], landmarks: dict[int, Path], notes: list[str]) -> list[tuple[int, int]]:
    """(picture's number, landmarks' number) of each frame, in order."""
    shift = numbering_shift(pictures, landmarks)
    if shift:
        notes.append("pictures are numbered from 1, landmarks from 0: paired in order")
    pairs = [(number, number - shift) for number in pictures]
    if len(pairs) > 1 and pairs[-1][1] not in landmarks:
        notes.append(f"the last frame, {pictures[pairs[-1][0]].name}, has no landmarks and is left out")
        del pairs[-1]
    without = [pictures[number].name for number, mate in pairs if mate not in landmarks]
    unused = sorted(landmarks.keys() - {mate for _, mate in pairs})
    if without or unused:
        details = []
        if without:
            details.append(f"no landmarks for {listed(without)}")
        if unused:
            details.append(f"no frame for {listed([landmarks[number].name for number in unused])}")
        raise InputError(
            f"{path} has {len(pictures)} frames and {len(landmarks)} landmark files that do not match: "
            + "; ".join(details)
            + "."
        )
    return pairs


def numbering_shift(pictures: dict[int, Path], others: dict[int, Path]) -> int:
    """1 where pictures are counted from 1 beside others counted from 0: the same frames in the same order."""
    return 1 if min(pictures) == 1 and min(others) == 0 else 0


def find_masks(path: Path, numbers: list[int], pictures: dict[int, Path], parsing: bool | None) -> list[Path]:
    directory = path / "parsing"
    if parsing is False or (parsing is None and not directory.is_dir()):
        return []
    masks = numbered(directory, (".png",), "parsing masks")
    shift = numbering_shift(pictures, masks)
    without = [pictures[number].name for number in numbers if number - shift not in masks]
    if without:
        raise InputError(
            f"{directory} has no mask for {listed(without)}; give --no-parsing to render without the masks."
        )
    return [masks[number - shift] for number in numbers]


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- pictures --------------------------------------------------------------------------------------------------------


def check_sizes(frames: list[Path], masks: list[Path]) -> tuple[int, int]:
    """Read the headers only: (width, height), the same for all."""
    size = picture_size(frames[0])
    for file in (*frames[1:], *masks):
        if (other := picture_size(file)) != size:
            raise InputError(
                f"{file} is {other[0]}×{other[1]}, but {frames[0].name} is {size[0]}×{size[1]}: "
                "all frames and masks of a template have one size."
            )
    return size


def picture_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as picture:
            exif = Image.Image.getexif(picture)  # a PNG's own getexif decodes all of the picture
            turned = exif.get(ORIENTATION, 1) >= 5
            width, height = picture.size
    except UNREADABLE as error:
        reason = "not a JPEG or PNG picture" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{file} cannot be read ({reason}).") from None
    return (height, width) if turned else (width, height)


def read_picture(file: Path) -> Tensor:
    """(3,H,W) uint8 RGB on the CPU; the same pixels as OpenCV's."""
    try:
        with Image.open(file) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except UNREADABLE as error:
        raise InputError(f"{file} is corrupt or truncated ({error}).") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def keep_mask(parsing: Tensor) -> Tensor:
    """(H,W) bool: where a parsing picture (3,H,W) RGB is red (255,0,0) or white, the template's pixel stays."""
    red, green, blue = parsing
    return (red == 255) & (green == blue) & ((green == 0) | (green == 255))


# --- landmarks -------------------------------------------------------------------------------------------------------

LEFT, RIGHT, BOTTOM = 1, 31, 52
"""Landmarks that bound the face: x0 from 1, x1 from 31, y0 from 52."""

Rect = tuple[int, int, int, int]


def face_rect(file: Path) -> Rect:
    """The face rectangle `(x0,y0,x1,y1)`, half-open, from a landmark file: x0 = lms[1].x, y0 = lms[52].y, square."""
    try:
        lines = file.read_text("ascii").split("\n")
    except (UnicodeDecodeError, OSError):
        raise InputError(f"{file} is not a text file of landmarks, one `x y` a line.") from None
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x, y = (int(np.float32(value)) for value in line.split())  # read as float32 and cut, as the reference does
        except (ValueError, OverflowError):
            raise InputError(f"{file}, line {number}: {line.strip()[:40]!r} is not a point `x y`.") from None
        points.append((x, y))
    if len(points) <= BOTTOM:
        raise InputError(f"{file} has {len(points)} points; at least {BOTTOM + 1} are needed.")
    x0, x1, y0 = points[LEFT][0], points[RIGHT][0], points[BOTTOM][1]
    return x0, y0, x1, y0 + (x1 - x0)


def check_rect(frame: Path, rect: Rect, size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = rect
    width, height = size
    if x1 <= x0:
        kind = "empty" if x1 == x0 else "inverted"
        raise InputError(f"frame {frame.name}: the face rectangle {rect} is {kind}; landmark 31 must be right of 1.")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise InputError(f"frame {frame.name}: the face rectangle {rect} leaves the frame of {width}×{height}.")


# --- the order of frames ---------------------------------------------------------------------------------------------


def frame_order(count: int, outputs: range, order: Order = "bounce", start: int = 0) -> list[int]:
    """The template frame of each output frame.

    Args:
        count: N template frames.
        outputs: which output frames.
        order: `bounce` goes 1,2,…,N-1,…,1,0,1,… and does not repeat the ends (SyncTalk_2D's, which begins at 1);
            `loop` goes 0,1,…,N-1,0,…; `mirror` goes 0,1,…,N-1,N-1,…,0,0,… and repeats them.
        start: template frames to skip at the beginning.

    Raises:
        InputError: `start` is not within the template.
    """
    if not 0 <= start < count:
        raise InputError(f"start frame {start} is not within the template's frames 0 to {count - 1}.")
    if order == "loop" or count == 1:
        return [(i + start) % count for i in outputs]
    if order == "mirror":
        return [min(k, 2 * count - 1 - k) for k in ((i + start) % (2 * count) for i in outputs)]
    period = 2 * (count - 1)
    return [min(k, period - k) for k in ((i + start + 1) % period for i in outputs)]
