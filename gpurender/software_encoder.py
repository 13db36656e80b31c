"""x264, x265 and SVT-AV1: video encoded on the host."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Literal, NamedTuple, cast

import av
import torch
from av.container import OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from torch import Tensor

from .errors import InputError
from .host import cores_to_run_on, usable_cores
from .host_frames import BT709, CENTRED, nv12_frames, yuv_frames
from .segments import encoded_in_segments
from .timings import Timings

Codec = Literal["h264", "hevc", "av1"]
SEGMENT_THREADS = 3  # of x264 for each of several segments
ROWS_A_THREAD = 120
"""Of frames, for each of x264's threads. By itself it has one for each core or for each 64 rows, 11 of 1280×720, and
makes half as many frames then as an encoder of 3 beside it (measured on 2 cores and on 16); with 6, as many."""
MOST_PARALLEL = 6  # SVT-AV1's highest level of parallelism; its levels suit as many cores and more
X265_DELAY = 2  # frames, by which its times for decoding are ahead of those for showing


class Library(NamedTuple):
    name: str  # FFmpeg's
    options: dict[str, str]
    quality: int  # constant quality where none is asked for: visually lossless
    qualities: range  # lower is better
    largest: tuple[int, int] | None = None  # width and height (measured)


LIBRARIES: dict[Codec, Library] = {
    # superfast with veryfast's lookahead: measured 5 % faster end to end than veryfast for files 8 % larger. As with
    # veryfast, the same pictures need not give the same bytes where the width is no multiple of 128.
    "h264": Library(
        "libx264",
        {"preset": "superfast", "x264-params": f"rc-lookahead=10:mbtree=1:{CENTRED}"},
        18,
        range(52),
        (16384, 16384),
    ),
    "hevc": Library("libx265", {"preset": "veryfast", "x265-params": f"log-level=error:{CENTRED}"}, 20, range(52)),
    "av1": Library("libsvtav1", {"preset": "10"}, 24, range(1, 64), (16384, 8704)),
}


class SoftwareEncoder:
    """Frames to a video track by a library on the host.

    Frames on a GPU come as NV12, or are made NV12 there: half the bytes of RGB, and they alone cross to the host, into
    pinned memory, while the batch before is encoded.
    """

    def __init__(
        self,
        container: OutputContainer,
        codec: Codec,
        quality: int | None,
        rate: Fraction,
        device: torch.device,
        nv12: bool,
    ) -> None:
        if codec == "av1":
            os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 would write its settings to the terminal
        library = LIBRARIES[codec]
        self.name = library.name
        self._library = library
        self._device = device
        self._nv12 = nv12
        self._rate = rate
        self._options = {**options_of(codec), "crf": str(library.quality if quality is None else quality)}
        self._stream = cast(VideoStream, container.add_stream(library.name, rate, options=self._options))
        self._at_once = segments_at_once(codec, device)
        # x264 takes NV12 as it is; the others want its chroma in two planes.
        self._pixels = "nv12" if nv12 and codec == "h264" else "yuv420p"
        self._describe(self._stream.codec_context)
        if codec == "hevc" and container.format.name != "matroska":
            self._stream.codec_context.codec_tag = "hvc1"  # the tag that Apple's players ask for

    def packets(self, batches: Iterable[Tensor], timings: Timings) -> Iterator[tuple[int, list[Packet]]]:
        """Encode frames, see `write_frames`: how many went in so far, and the packets that came out."""
        if self._at_once == 1:
            yield from self._encoded(self._stream.codec_context, 0, batches, timings)
            return

        def encode(first: int, frames: Iterator[Tensor]) -> Iterator[Packet]:
            context = self._another_context() if first else self._stream.codec_context
            for _, packets in self._encoded(context, first, frames, timings):
                yield from packets

        yield from encoded_in_segments(batches, encode, self._at_once)

    def _describe(self, context: VideoCodecContext) -> None:
        context.pix_fmt = self._pixels
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG

    def _another_context(self) -> VideoCodecContext:
        """An encoder like that of the track."""
        context = cast(VideoCodecContext, av.CodecContext.create(self._library.name, "w"))
        context.framerate = self._rate
        context.options = self._options
        context.flags = self._stream.codec_context.flags
        context.thread_count = SEGMENT_THREADS
        self._describe(context)
        return context

    def _encoded(
        self, context: VideoCodecContext, first: int, batches: Iterable[Tensor], timings: Timings
    ) -> Iterator[tuple[int, list[Packet]]]:
        """By one encoder, frames of which the first has this number."""
        count = first
        frames = nv12_frames(batches, self._device, timings) if self._nv12 else yuv_frames(batches, timings)

        def encode(frame: av.VideoFrame | None) -> list[Packet]:
            with scheduling_kept():
                packets = timings.measured("encode", lambda: context.encode(frame))
            for packet in packets:
                packet.stream = self._stream
            return packets

        with closing(frames):
            for frame in frames:
                if count == first:
                    context.width, context.height = frame.width, frame.height
                    if self._library.name == "libx264" and context.thread_count == 0:
                        context.thread_count = x264_threads(frame.height)
                if frame.format.name != context.pix_fmt:
                    frame = frame.reformat(format=context.pix_fmt)
                frame.pts, frame.time_base = count, 1 / self._rate
                count += 1
                yield count, encode(frame)
        last = encode(None)
        if self._library.name == "libx265" and count - first < X265_DELAY + 1:
            for number, packet in enumerate(last):  # it says any number then
                packet.dts = first + number - X265_DELAY
        yield count, last


def options_of(codec: Codec) -> dict[str, str]:
    """With threads for the cores that control groups allow: for 64 that they see, x265 and SVT-AV1 take 370 to 630 MB
    more (measured with a stand-in for those cores)."""
    options, cores = dict(LIBRARIES[codec].options), usable_cores()
    if cores < cores_to_run_on():
        if codec == "hevc":
            options["x265-params"] += f":pools={cores}"
        if codec == "av1":
            options["svtav1-params"] = f"lp={min(cores, MOST_PARALLEL)}"
    return options


def check_size(codec: Codec, width: int, height: int) -> None:
    """Raise InputError for frames that are too large for the codec's library."""
    largest = LIBRARIES[codec].largest
    if largest is not None and (width > largest[0] or height > largest[1]):
        raise InputError(
            f"frames of {width}×{height} cannot be made {codec}, whose encoder ends at {largest[0]}×{largest[1]}; "
            "take hevc."
        )


def x264_threads(height: int) -> int:
    """Of an encoder that may have all cores."""
    return min(max(height // ROWS_A_THREAD, SEGMENT_THREADS), usable_cores())


def segments_at_once(codec: Codec, device: torch.device) -> int:
    """How many segments of a video are encoded side by side. On a CPU the network needs the cores itself; by
    measurements on 16 cores."""
    if codec != "h264" or device.type == "cpu":
        return 1
    return max(1, usable_cores() * 3 // 8)


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """SVT-AV1 makes the thread that opens it a real-time one where it may, as root. Threads that come from it later
    would be so too, and would starve each other for good where they wait by spinning, as OpenMP's do."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if (os.sched_getscheduler(0), os.sched_getparam(0)) != before:  # sandboxes may refuse what changes nothing, too
            os.sched_setscheduler(0, *before)
