"""Video in segments, side by side, each by an encoder of its own: one x264 keeps no more than four cores at work.

On 16 cores, one made 430 frames a second at 1280×720, six side by side 1,280. A segment is as long as x264 lets a
keyframe wait, so that it costs no keyframe more; behind one another, segments are one video.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from av.packet import Packet
from torch import Tensor

SEGMENT = 250
"""Frames: x264's `keyint`."""

COPIED_BYTES = 2**24
"""Frames of so many bytes, but at least one, are copied to the host together: each segment keeps a few such copies in
page-locked memory."""

WAITING_BYTES = 2**32
"""The most memory for frames that wait for an encoder; on a GPU also at most an eighth of what is free."""

Part = tuple[Tensor, torch.Event | None]
"""Frames of a segment, and when they are there."""


class Segment:
    """Frames that one encoder takes, as they come, and the packets that it made of them."""

    def __init__(self, first: int, room: queue.SimpleQueue[None]) -> None:
        """
        Args:
            first: the number of the first frame.
            room: is told of each part that no longer waits.
        """
        self.first = first
        self.packets: Future[list[Packet]]
        self._room = room
        self._parts: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._ended = False

    def put(self, frames: Tensor) -> None:
        there = torch.cuda.current_stream(frames.device).record_event() if frames.is_cuda else None
        self._parts.put((frames, there))

    def close(self, stop: bool = False) -> None:
        """No more frames come; on `stop`, those that wait are not wanted either."""
        if stop:
            self._stopped.set()
        self._parts.put(None)

    def frames(self) -> Iterator[Tensor]:
        """Each part when it is there, for the current stream of whoever takes it."""
        for frames, there in self._taken():
            if self._stopped.is_set():
                return
            if there is not None:
                stream = torch.cuda.current_stream(frames.device)
                stream.wait_event(there)
                frames.record_stream(stream)
            self._room.put(None)
            yield from frames.split(max(COPIED_BYTES // frames[0].nbytes, 1))

    def drop(self) -> None:
        """Take what is still to come: its encoder failed."""
        for _ in self._taken():
            self._room.put(None)

    def _taken(self) -> Iterator[Part]:
        """Parts as they come; none, once the last has."""
        while not self._ended:
            part = self._parts.get()
            self._ended = part is None
            if part is not None:
                yield part


def encoded_in_segments(
    batches: Iterable[Tensor], encode: Callable[[int, Iterator[Tensor]], Iterator[Packet]], at_once: int
) -> Iterator[tuple[int, list[Packet]]]:
    """Encode frames; packets come in the frames' order.

    Args:
        batches: of frames, (B,...).
        encode: a segment by an encoder of its own: given the number of its first frame and its frames as they come,
            yields a packet for each. Runs on a thread, which ends when it is done.
        at_once: how many segments are worked on.

    Yields:
        how many frames are encoded so far, and their next packet.
    """
    open_segments: deque[Segment] = deque()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()
    count = 0

    def work(segment: Segment) -> list[Packet]:
        try:
            return list(encode(segment.first, segment.frames()))
        except BaseException:
            segment.drop()
            raise

    def finished() -> Iterator[tuple[int, list[Packet]]]:
        for number, packet in enumerate(open_segments[0].packets.result(), open_segments[0].first + 1):
            yield number, [packet]
        open_segments.popleft()

    with ThreadPoolExecutor(at_once, thread_name_prefix="segment") as pool:
        try:
            for batch in filter(len, batches):
                if count == 0:
                    for _ in range(most_that_wait(batch, at_once)):
                        room.put(None)
                for part in split(batch, SEGMENT - count % SEGMENT):
                    if count % SEGMENT == 0:
                        if open_segments:
                            open_segments[-1].close()
                        segment = Segment(count, room)
                        segment.packets = pool.submit(work, segment)
                        open_segments.append(segment)
                    room.get()
                    open_segments[-1].put(part)
                    count += len(part)
                    del part
                del batch
                while len(open_segments) > 1 and open_segments[0].packets.done():
                    yield from finished()
            if open_segments:
                open_segments[-1].close()
            while open_segments:
                yield from finished()
        finally:
            for segment in open_segments:
                segment.close(stop=True)


def most_that_wait(batch: Tensor, at_once: int) -> int:
    """How many batches like this one may wait: enough to keep all encoders at work, or as many as fit the memory."""
    wanted = at_once * SEGMENT * batch[0].nbytes
    free = 8 * wanted if batch.device.type == "cpu" else torch.cuda.mem_get_info(batch.device)[0]
    return max(2, min(wanted, WAITING_BYTES, free // 8) // batch.nbytes)


def split(batch: Tensor, first: int) -> list[Tensor]:
    """A batch in parts, of which the first has at most so many frames, and others a segment's."""
    return [batch[:first], *batch[first:].split(SEGMENT)] if len(batch) > first else [batch]
