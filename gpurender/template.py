"""A template directory or package -> frames on the device, face rectangles and the order in which frames are shown."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

from .cuda import resolve_device
from .decoders import DecoderName, Frames, choose_picture_decoder, choose_video_decoder
from .errors import InputError, check_choice, check_no_pipe
from .find import find_template
from .host import check_process, free_memory, refuse_to_travel
from .pictures import SUFFIXES, Pictures, keep_mask, open_pictures
from .rectangles import Rect, check_rect, face_rect, read_rectangles
from .video import FEWEST, VideoFrames

Order = Literal["bounce", "loop", "mirror"]
BESIDE_VIDEO: dict[DecoderName, DecoderName] = {"nvdec": "auto", "pyav": "pillow"}
"""What decodes the masks where this decodes the frames."""
CPU_MEMORY_BUDGET = 512 * 2**20
PICTURES, VIDEO = "full_body_img", "full_body_video.mp4"
LANDMARKS = "landmarks"
AHEAD = 8
"""Frames that are decoded ahead at a time: whoever no longer wants more waits for as many."""
RECTANGLES = ("cache/crop_rectangles.json", "crop_rectangles.json")
MASKS = "parsing"
CONTENTS = (PICTURES, VIDEO, LANDMARKS, *RECTANGLES, MASKS)


class Template:
    """Frames of a person, with the face rectangle of each.

    Pictures are decoded once, when they are first used, and stay on the device while they fit half of `memory_budget`
    bytes; those beyond it are decoded again at each use. So it is with a video's frames on a GPU; on a CPU, they stay
    as the video's decoder made them, half the size. What frames leave of the budget is for work on them (`Faces`,
    `Backdrops`); without `keep_frames`, all of it is.

    Attributes:
        path: the directory.
        device: where frames are.
        width, height: of every frame, in pixels.
        rects: (N,4) int64 on the host, `(x0,y0,x1,y1)` half-open pixels, within the frame.
        parsing: whether there are parsing masks and they are used.
        memory_left: bytes of the budget that frames will not take.
        memory_for_all: bytes of a budget in which all frames fit, that the frames take of it.
        decoder: what decodes the frames: `dali`, `nvdec`, `pillow` or `pyav`.
        landmark_files: each frame's, where the rectangles come from landmarks; else none.
        mask_files: each frame's parsing mask, where they are used; else none.
        notes: what was unusual about the directory and how it was taken; why no GPU decodes; more may come as frames
            are decoded.
    """

    def __init__(
        self,
        path: Path,
        source: Frames,
        rects: Tensor,
        masks: Frames | None,
        device: torch.device,
        memory_budget: int,
        decoder: str,
        notes: list[str],
        landmark_files: Sequence[Path],
        mask_files: Sequence[Path],
        keep_frames: bool,
    ) -> None:
        self._process = os.getpid()
        self.path = path
        self.device = device
        self.decoder = decoder
        self.width, self.height = source.size
        self.rects = rects
        self.parsing = masks is not None
        self.notes = notes
        self.landmark_files = landmark_files
        self.mask_files = mask_files
        pixels = self.width * self.height
        mask_bytes = pixels if masks else 0
        video = source if isinstance(source, VideoFrames) else None
        in_decoder = video is not None and device.type == "cpu"  # which keeps frames as it made them
        frame_bytes, least = (video.frame_bytes, FEWEST) if video is not None and in_decoder else (3 * pixels, 0)

        def taken(count: int) -> int:
            return max(count, least) * frame_bytes + count * mask_bytes

        kept = min((memory_budget // 2 if keep_frames else 0) // (frame_bytes + mask_bytes), len(self))
        self.memory_left = max(memory_budget - taken(kept), 0)
        self.memory_for_all = taken(len(self) if keep_frames else 0)
        if video is not None:  # for a GPU, too, it is on the host, where this budget does not count
            on_host = kept if in_decoder else min(CPU_MEMORY_BUDGET // 2 // video.frame_bytes, len(self) - kept)
            video.cache_limit = max(on_host, FEWEST)
        self._frames = _Resident(source.frames, 0 if in_decoder else kept, device)
        self._masks = _Resident(_keep_masks(masks), kept, device) if masks else None

    def __len__(self) -> int:
        return len(self.rects)

    def __repr__(self) -> str:
        parsing = ", with parsing" if self.parsing else ""
        return f"Template({self.path.name}: {len(self)} frames of {self.width}×{self.height}{parsing})"

    def __reduce__(self) -> NoReturn:
        refuse_to_travel(self)

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Copies of some frames and of their keep masks.

        Args:
            indices: (B,) of frames, 0 to N-1, in any order.

        Returns:
            (B,3,H,W) uint8 RGB, and (B,H,W) bool that is true where the template's pixel stays, or None without
            parsing; on the device.

        Raises:
            InputError: a picture or a frame of the video cannot be decoded.
            ValueError: there are no indices, or no such frames.
        """
        check_process(self._process, "template")
        indices = self._checked(indices)
        return self._frames(indices), self._masks(indices) if self._masks else None

    def keep(self, indices: Sequence[int]) -> None:
        """Decode those of some frames that will stay on the device. Not while `frames` is at work.

        Raises:
            InputError, ValueError: as `frames`.
        """
        check_process(self._process, "template")
        indices = self._checked(indices)
        self._frames.keep(indices)
        if self._masks:
            self._masks.keep(indices)

    def _checked(self, indices: Sequence[int]) -> list[int]:
        indices = [int(index) for index in indices]
        if not indices or not 0 <= min(indices) <= max(indices) < len(self):
            raise ValueError(f"frames are 0 to {len(self) - 1}, at least one of them; given {indices}")
        return indices


@contextmanager
def decoded_ahead(template: Template, indices: Iterable[int]) -> Iterator[None]:
    """Meanwhile, a thread decodes frames that stay on the device, in this order, as far as it comes. What it cannot
    decode is told when it is used."""
    numbers = list(dict.fromkeys(indices))
    stream = torch.cuda.Stream(template.device) if template.device.type == "cuda" else None

    def keep(some: list[int]) -> None:
        with torch.cuda.stream(stream):
            template.keep(some)

    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        for start in range(0, len(numbers), AHEAD):
            pool.submit(keep, numbers[start : start + AHEAD])
        yield
    finally:
        pool.shutdown(cancel_futures=True)
        if stream is not None:
            torch.cuda.current_stream(template.device).wait_stream(stream)


class _Resident:
    """Reads tensors by number; the first `limit` that are read stay on the device, others are read at each use."""

    def __init__(self, read: Callable[[list[int]], list[Tensor]], limit: int, device: torch.device) -> None:
        self._read = read
        self._limit = limit
        self._device = device
        self._there: dict[int, Tensor] = {}

    def __call__(self, indices: Sequence[int]) -> Tensor:
        self.keep(indices)
        passing = self._tensors([i for i in dict.fromkeys(indices) if i not in self._there])
        return torch.stack([passing[i] if i in passing else self._there[i] for i in indices])

    def keep(self, indices: Sequence[int]) -> None:
        missing = [i for i in dict.fromkeys(indices) if i not in self._there]
        self._there |= self._tensors(missing[: self._limit - len(self._there)])

    def _tensors(self, numbers: list[int]) -> dict[int, Tensor]:
        read = self._read(numbers) if numbers else []
        return {i: tensor.to(self._device) for i, tensor in zip(numbers, read, strict=True)}


def _keep_masks(masks: Frames) -> Callable[[list[int]], list[Tensor]]:
    if isinstance(masks, Pictures):
        return masks.keep_masks
    return lambda indices: [keep_mask(parsing) for parsing in masks.frames(indices)]


def open_template(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    parsing: bool | None = None,
    memory_budget: int | None = None,
    decoder: DecoderName = "auto",
    keep_frames: bool = True,
) -> Template:
    """Open a SyncTalk_2D template directory or a template package, and check all of it but the frames' pixels.

    A directory holds `full_body_img/<i>.jpg` (or .jpeg, .png), `landmarks/<i>.lms` and, optionally,
    `parsing/<i>.png`. Numbers may have gaps and may start at 1 for pictures and at 0 for landmarks; the last frame may
    lack landmarks and is then left out.

    A package holds `full_body_video.mp4`, `cache/crop_rectangles.json` (or that beside the video; or
    `landmarks/<i>.lms`) and, optionally, `parsing/<i>.png`. Its frames are numbered from 0; the last may lack a
    rectangle and is then left out. Where there are pictures too, they are the frames. Other files are ignored.

    Args:
        path: the directory, or `avatar`, the bundled one.
        device: where frames are put; `auto`, `cpu`, `cuda` or `cuda:N`.
        parsing: use the parsing masks; None uses them if they are there.
        memory_budget: bytes to spend on the device on decoded frames and work on them that is worth keeping; None is
            half of the free memory on a GPU. On a CPU it is a quarter, and at least 512 MiB where as much
            remains, for a template whose frames fit 512 MiB as RGB; none for a larger one. A few frames of a video are
            kept whatever it is.
        decoder: of pictures `dali` or `pillow`, of a video `nvdec` or `pyav`; dali works on a CPU too. `auto` is the
            GPU's on a GPU, where it can decode the frames (a note says why not), and the host's on a CPU.
        keep_frames: keep decoded frames, while they fit half of the budget; `render` keeps what it makes of them itself
            where it makes NV12 on a CPU.

    Raises:
        InputError: something in the directory is missing, does not match or cannot be used; the message names it. Or
            the decoder is one of videos, and the frames are pictures, or the other way round.
        DeviceError: there is no such device here, or the decoder that is asked for cannot be used here or for this
            video.
    """
    path = find_template(path)
    if not path.is_dir():
        raise InputError(f"{path}: there is no such template directory. The bundled one is called avatar.")
    check_choice("decoder", decoder, get_args(DecoderName))
    device = resolve_device(device)
    notes: list[str] = []
    landmarks: dict[int, Path] = {}
    if (path / PICTURES).is_dir():
        pictures = numbered(path / PICTURES, SUFFIXES, "frames")
        names = {number: file.name for number, file in pictures.items()}
        landmarks = landmark_files(path, names, notes)
        rects = landmark_rects(landmarks)
        files = open_pictures([pictures[number] for number in rects])
        source, decoded_by = choose_picture_decoder(files, decoder, device, notes)
        whose = names[next(iter(rects))]
        if (path / VIDEO).is_file():
            notes.append(f"the frames are those of {PICTURES}; {VIDEO} is not used")
    elif (path / VIDEO).is_file():
        video = VideoFrames(path / VIDEO)
        source, decoded_by = choose_video_decoder(video, decoder, device, notes)
        names = {number: str(number) for number in range(len(video))}
        table = next((path / name for name in RECTANGLES if (path / name).is_file()), None)
        if table is None and not (path / LANDMARKS).is_dir():
            raise InputError(f"{path} has no face rectangles: {RECTANGLES[0]} is missing, and {LANDMARKS}/0.lms … too.")
        if table is None:
            landmarks = landmark_files(path, names, notes)
        rects = table_rects(table, len(video), notes) if table else landmark_rects(landmarks)
        whose = VIDEO
    else:
        raise InputError(
            f"{path} is no template: it holds neither pictures, {PICTURES}/0.jpg …, nor a package's {VIDEO}."
        )
    for number, rect in rects.items():
        check_rect(names[number], rect, source.size)
    masks = None
    if mask_files := find_masks(path, names, list(rects), parsing):
        masks = open_pictures(mask_files, like=(whose, source.size))
        masks, _ = choose_picture_decoder(masks, BESIDE_VIDEO.get(decoder, decoder), device, notes)
    if memory_budget is None:
        if device.type == "cuda":
            memory_budget = torch.cuda.mem_get_info(device)[0] // 2
        else:
            all_fit = len(rects) * 3 * source.size[0] * source.size[1] <= CPU_MEMORY_BUDGET
            # Work on many frames takes gigabytes, which nobody asked for, and keeping some of it gains little.
            memory_budget = cpu_budget(free_memory()) if all_fit else 0
    return Template(
        path,
        source,
        torch.tensor(list(rects.values()), device="cpu"),
        masks,
        device,
        memory_budget,
        decoded_by,
        notes,
        list(landmarks.values()),
        mask_files,
        keep_frames,
    )


def cpu_budget(free: int | None) -> int:
    """Bytes to keep of so many. A render takes others besides, the avatar's 400 MiB once its template is open: in a
    container of 1 GiB the system would end it."""
    if free is None:
        return CPU_MEMORY_BUDGET
    return max(min(CPU_MEMORY_BUDGET, free - CPU_MEMORY_BUDGET), free // 4)


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
            check_no_pipe(file)
            found[number] = file
    if not found:
        raise InputError(f"{directory} holds no {what}: expected 0{suffixes[0]}, 1{suffixes[0]}, …")
    return dict(sorted(found.items()))


def landmark_rects(landmarks: dict[int, Path]) -> dict[int, Rect]:
    return {number: face_rect(file) for number, file in landmarks.items()}


def landmark_files(path: Path, names: dict[int, str], notes: list[str]) -> dict[int, Path]:
    """The landmark file of each frame, by the frame's number."""
    landmarks = numbered(path / LANDMARKS, (".lms",), "landmark files")
    shift = numbering_shift(names, landmarks)
    if shift:
        notes.append("pictures are numbered from 1, landmarks from 0: paired in order")
    mates = {number: number - shift for number in names}
    last = max(names)
    if len(names) > 1 and mates[last] not in landmarks:
        notes.append(f"the last frame, {names[last]}, has no landmarks and is left out")
        del mates[last]
    without = [names[number] for number, mate in mates.items() if mate not in landmarks]
    unused = sorted(landmarks.keys() - set(mates.values()))
    if without or unused:
        details = []
        if without:
            details.append(f"no landmarks for {listed(without)}")
        if unused:
            details.append(f"no frame for {listed([landmarks[number].name for number in unused])}")
        raise InputError(
            f"{path} has {len(names)} frames and {len(landmarks)} landmark files that do not match: "
            + "; ".join(details)
            + "."
        )
    return {number: landmarks[mate] for number, mate in mates.items()}


def table_rects(file: Path, frames: int, notes: list[str]) -> dict[int, Rect]:
    """The face rectangle of each frame of a package, from its table."""
    rects = read_rectangles(file)
    if frames not in (len(rects), len(rects) + 1):
        raise InputError(f"{file} has {len(rects)} rectangles, but {VIDEO} has {frames} frames: they do not match.")
    if frames > len(rects):
        notes.append(f"the last frame, {len(rects)}, has no rectangle and is left out")
    return dict(enumerate(rects))


def numbering_shift(pictures: Iterable[int], others: Iterable[int]) -> int:
    """1 where pictures are counted from 1 beside others counted from 0: the same frames in the same order."""
    return 1 if min(pictures) == 1 and min(others) == 0 else 0


def find_masks(path: Path, names: dict[int, str], used: list[int], parsing: bool | None) -> list[Path]:
    """The mask of each frame that is used: of the same number, if all frames have one."""
    directory = path / MASKS
    if parsing is False or (parsing is None and not os.path.lexists(directory)):
        return []
    if os.path.lexists(directory) and not directory.is_dir():
        raise InputError(f"{directory} is not a directory of parsing masks; give --no-parsing to render without them.")
    if directory.is_dir() and not any(directory.iterdir()):
        raise InputError(f"{directory} holds no parsing masks; give --no-parsing to render without them.")
    masks = numbered(directory, (".png",), "parsing masks")
    shift = 0 if names.keys() <= masks.keys() else numbering_shift(names, masks)
    without = [names[number] for number in used if number - shift not in masks]
    if without:
        raise InputError(
            f"{directory} has no mask for {listed(without)}; give --no-parsing to render without the masks."
        )
    return [masks[number - shift] for number in used]


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
        InputError: `start` is not within the template, or there is no such order.
    """
    check_choice("order of frames", order, get_args(Order))
    if not 0 <= start < count:
        raise InputError(f"start frame {start} is not within the template's frames 0 to {count - 1}.")
    if order == "loop" or count == 1:
        return [(i + start) % count for i in outputs]
    if order == "mirror":
        return [min(k, 2 * count - 1 - k) for k in ((i + start) % (2 * count) for i in outputs)]
    period = 2 * (count - 1)
    return [min(k, period - k) for k in ((i + start + 1) % period for i in outputs)]
