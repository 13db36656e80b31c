"""A video file -> its frames by number: exact, in any order, within a limit of memory."""

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Lock

import av
import av.error
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .errors import InputError

FEWEST = 4
"""Decoded frames that are kept, however little memory there is."""

AS_OPENCV = (0, 2, 5, 6)
"""H.273's numbers of RGB, of no tag, and of BT.601 in its two editions. OpenCV converts these alike in all versions."""

PRECISE = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND)


class VideoFrames:
    """The frames of a video file, numbered 0 to N-1 in the order in which they are shown.

    Opening reads the file once without decoding it, for the frames' times and the keyframes. A frame is then found by
    its time, never by counting: the decoder goes on from where it is, or begins again at the keyframe before. The
    frames that were used or decoded last are kept as the decoder made them (YUV, half the size of RGB for 4:2:0), so
    going backwards decodes a stretch between keyframes once per `cache_limit` frames, and a video that fits is decoded
    once.

    Attributes:
        file: the file.
        size: (width, height) in pixels, as shown: turned if the file says so.
        quarter_turns: how often a frame is turned against the clock to be shown.
        times, keys: of all frames and of the keyframes, rising, in the track's time base.
        stand_alone: whether all that is shown after a keyframe also comes after it in the file.
        pixel_format, colorspace, full_range: the first frame's, by FFmpeg's names and H.273's numbers.
        frame_bytes: what one kept frame takes.
        cache_limit: how many frames are kept; may be set at any time.
    """

    def __init__(self, file: Path, cache_limit: int = FEWEST) -> None:
        """
        Raises:
            InputError: this is no video that can be decoded, or is cut off, or its frames have no times of their own.
        """
        self.file = file
        self.cache_limit = cache_limit
        self._container, self._stream = open_video(file)
        self.times, self.keys, self.stand_alone = frame_times(file, self._container, self._stream)
        self._numbers = {time: number for number, time in enumerate(self.times)}
        self._reformatter = VideoReformatter()
        self._lock = Lock()  # decoder, reformatter and cache are one thread's at a time
        self._cache: OrderedDict[int, VideoFrame] = OrderedDict()
        self._coded_size: tuple[int, int] | None = None
        self._last: int | None = None  # the frame that the running decoder gave last
        self._start: int | None = None  # the time of the keyframe where it began
        self._packets: Iterator[Packet[VideoStream]] = iter(())
        self._decoded: deque[VideoFrame] = deque()
        first = self._frame(0)
        self.frame_bytes = sum(plane.buffer_size for plane in first.planes)
        self.pixel_format = first.format.name
        self.colorspace = int(first.colorspace)
        self.full_range = first.color_range == ColorRange.JPEG
        self.quarter_turns = first.rotation // 90 % 4 if first.rotation % 90 == 0 else 0  # as OpenCV
        self.size = (first.height, first.width) if self.quarter_turns % 2 else (first.width, first.height)

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, indices: Sequence[int]) -> list[Tensor]:
        """(3,H,W) uint8 RGB on the CPU, of each. Any thread may call; one is served at a time.

        Raises:
            InputError: a frame cannot be decoded, or has another size than the first.
        """
        with self._lock:  # in the order of the file, whatever was asked: one pass forwards
            pixels = {i: self._shown(i) for i in sorted(set(indices))}
        return [pixels[i] for i in indices]

    def _shown(self, number: int) -> Tensor:
        frame = self._frame(number)
        try:
            return self.turned(to_rgb(frame, self._reformatter))
        except (MemoryError, BlockingIOError):  # the latter where it can start no threads
            raise
        except av.error.FFmpegError as error:  # of some matrices it knows no way to RGB, YCgCo and ICtCp among them
            raise InputError(
                f"{self.file}: the colours of frame {number} cannot be converted ({error.strerror}); "
                "convert the video to BT.709 first."
            ) from None

    def turned(self, pixels: Tensor) -> Tensor:
        """Pixels (3,H,W) as decoded, turned to be shown."""
        return torch.rot90(pixels, self.quarter_turns, (1, 2)).contiguous() if self.quarter_turns else pixels

    def _frame(self, number: int) -> VideoFrame:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        key = bisect_right(self.keys, self.times[number]) - 1
        if self._last is not None and self._last < number and self.keys[key] <= self.times[self._last + 1]:
            frame = self._decode_to(number)
            if frame is not None:
                return frame
        for start in self._starts(key):
            frame = self._decode_to(number, from_start=start)
            if frame is not None:
                return frame
        raise InputError(
            f"{self.file}: frame {number} of {len(self)} cannot be decoded; the file is damaged there, "
            "or wrong about when frames are shown: then convert it to MP4."
        )

    def _starts(self, key: int) -> Iterator[Callable[[], None]]:
        """Ways to begin decoding, to be tried in turn: at keyframe `key`, at earlier ones, with the file opened anew.

        The first is enough, except after keyframes that do not stand alone, in files where seeking goes too far, and
        after damage.
        """
        back = 1
        while key > 0:
            yield partial(self._seek, self.keys[key])
            key, back = key - back, 2 * back
        yield partial(self._seek, self.keys[0])
        yield self._reopen

    def _seek(self, time: int) -> None:
        self._last = self._start = None
        self._decoded.clear()
        self._container.seek(time, stream=self._stream)
        self._packets = self._container.demux(self._stream)

    def _reopen(self) -> None:
        self._last = self._start = None
        self._decoded.clear()
        self._container.close()
        self._container, self._stream = open_video(self.file)
        self._packets = self._container.demux(self._stream)

    def _decode_to(self, number: int, from_start: Callable[[], None] | None = None) -> VideoFrame | None:
        """Decode up to a frame, from where the decoder is or from another start; None if it does not come.

        What comes on the way is kept.
        """
        try:
            if from_start is not None:
                from_start()
            while (given := self._decode_next()) is not None:
                self._last, frame = given
                self._keep(self._last, frame)
                if self._last >= number:
                    return frame if self._last == number else None
        except BlockingIOError:  # the decoder could start no threads
            raise
        except av.error.FFmpegError:
            pass  # `_frame` raises if every other way fails too
        self._last = None
        return None

    def _decode_next(self) -> tuple[int, VideoFrame] | None:
        while True:
            while not self._decoded:
                packet = next(self._packets, None)
                if packet is None:
                    return None
                if self._start is None and packet.is_keyframe:
                    self._start = packet.pts
                if self._start is not None:
                    self._decoded.extend(packet.decode())
            frame = self._decoded.popleft()
            # Frames shown before the keyframe where decoding began lack what they refer to.
            if frame.pts in self._numbers and self._start is not None and frame.pts >= self._start:
                return self._numbers[frame.pts], frame

    def _keep(self, number: int, frame: VideoFrame) -> None:
        self._coded_size = self._coded_size or (frame.width, frame.height)
        if (frame.width, frame.height) != self._coded_size:
            width, height = self._coded_size
            raise InputError(
                f"{self.file}: frame {number} is {frame.width}×{frame.height}, but the first is {width}×{height}: "
                "all frames of a video have one size here."
            )
        self._cache[number] = frame
        while len(self._cache) > self.cache_limit:
            self._cache.popitem(last=False)


def open_video(file: Path) -> tuple[InputContainer, VideoStream]:
    """Open a file and find its video track."""
    try:
        # absolute: FFmpeg would take `a:b.mp4` for a protocol a; tags need not be UTF-8
        container = av.open(str(file.absolute()), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise InputError(f"{file} is not a video that can be read ({error.strerror}).") from None
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        container.close()
        raise InputError(f"{file} has no video track that can be decoded.")
    stream.thread_type = "AUTO"  # pyright: ignore  # frames in parallel, where the codec can
    return container, stream


def frame_times(file: Path, container: InputContainer, stream: VideoStream) -> tuple[list[int], list[int], bool]:
    """Times of all frames that are shown, and of all keyframes, both rising, in the track's time base.

    Also whether no frame that comes after a keyframe is shown before it: such a frame may need what came earlier.
    Frames before the first keyframe are left out, as no decoder gives them, and so are those that an edit list hides.
    """
    times: list[int] = []
    keys: list[int] = []
    stand_alone = True
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or not (keys or packet.is_keyframe):
                continue
            if packet.is_corrupt:
                raise InputError(f"{file} is cut off or damaged at frame {len(times)}; copy it again.")
            if packet.pts is None:
                raise InputError(f"{file} does not say when frame {len(times)} is shown; convert it to MP4.")
            if packet.is_keyframe:
                keys.append(packet.pts)
            stand_alone &= packet.pts >= keys[-1]
            if not packet.is_discard:
                times.append(packet.pts)
    except av.error.FFmpegError as error:
        raise InputError(f"{file} cannot be read from frame {len(times)} on ({error.strerror}).") from None
    times = sorted(time for time in times if time >= keys[0])
    if not times:
        raise InputError(f"{file} holds no frames.")
    for number, (time, following) in enumerate(pairwise(times)):
        if time == following:
            raise InputError(f"{file} shows frames {number} and {number + 1} at one time; convert it to MP4.")
    return times, sorted(keys), stand_alone


def to_rgb(frame: VideoFrame, reformatter: VideoReformatter) -> Tensor:
    """(3,H,W) uint8 RGB of a decoded frame, by the matrix and range that it is tagged with.

    BT.601 and frames without a tag become the very pixels of OpenCV's `VideoCapture`, which are up to 4 levels from
    exact; other matrices, which OpenCV learnt late, are rounded exactly.
    """
    pixels = np.empty((3, frame.height, frame.width), np.uint8)
    if frame.colorspace in AS_OPENCV:
        packed = reformatter.reformat(frame, format="bgr24", interpolation=Interpolation.BICUBIC).to_ndarray()
        blue, green, red = packed[..., 0], packed[..., 1], packed[..., 2]
    else:
        planar = reformatter.reformat(frame, format="gbrp", interpolation=PRECISE)
        green, blue, red = (
            np.frombuffer(plane, np.uint8).reshape(frame.height, -1)[:, : frame.width]  # pyright: ignore
            for plane in planar.planes
        )
    # By numpy: torch's threads wait for FFmpeg's at each of these small copies, measured at 20 ms instead of 1.
    pixels[0], pixels[1], pixels[2] = red, green, blue
    return torch.from_numpy(pixels)
