"""Runs stages of a pipeline side by side: each on a thread of its own and, on a GPU, a stream of its own."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Timings:
    """What the stages of a render cost: seconds of work, without what they waited for each other.

    Attributes:
        host_seconds: by stage, on its thread; the network's also on the next one's, which waits for it.
        device_seconds: by stage, on its stream of the GPU; empty on a CPU.
        counts: of work that is not done for each frame.
    """

    host_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _running: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(default_factory=dict, repr=False)
    _one_thread: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def measured(self, name: str, work: Callable[[], T], device: torch.device) -> T:
        """Do some work of a stage, and add what it cost."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        began = time.perf_counter()
        for event in events[:1]:
            event.record()
        done = work()
        for event in events[1:]:
            event.record()
        seconds = time.perf_counter() - began
        with self._one_thread:  # a stage may be worked on by two
            self.host_seconds[name] = self.host_seconds.get(name, 0.0) + seconds
        if events:
            running = self._running.setdefault(name, [])
            running.append((events[0], events[1]))
            while running[0][1].query() and len(running) > 1:
                self._add_device_time(name, *running.pop(0))
        return done

    def finish(self) -> None:
        """Wait for the GPU to end what is still under way, and count it."""
        for name, running in self._running.items():
            while running:
                start, end = running.pop(0)
                end.synchronize()
                self._add_device_time(name, start, end)

    def _add_device_time(self, name: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self.device_seconds[name] = self.device_seconds.get(name, 0.0) + start.elapsed_time(end) / 1000


def stage(
    name: str, work: Callable[[S], T], items: Iterable[S], device: torch.device, timings: Timings | None = None
) -> Generator[T]:
    """One stage of a pipeline: `work` on each item, ahead of the caller as `prefetch` is."""
    timings = timings or Timings()

    def worked() -> Iterator[T]:
        with closing(items) if isinstance(items, Generator) else nullcontext():
            for item in items:
                if device.type == "cuda":  # items may be from the caller's stream: see `prefetch`
                    for tensor in tensors_in(item):
                        tensor.record_stream(torch.cuda.current_stream(device))
                done = timings.measured(name, lambda item=item: work(item), device)
                del item  # its memory is the next stage's to free
                yield done
                del done

    # Batches take memory: on a CPU, whose cores are busy anyhow, one ahead will do; a GPU should find work waiting.
    return prefetch(worked(), 1 if device.type == "cpu" else 2, device)


def prefetch(items: Iterable[T], depth: int = 1, device: torch.device | None = None) -> Generator[T]:
    """Yield `items` as they are, computed by a thread: up to `depth` ahead of the caller are ready or under way.

    On a GPU the thread has a stream of its own. Tensors in an item (a tensor, or tuples and lists of them) are ready
    on the caller's stream when they are given: streams wait for each other by events, the host for none of them.

    An error in `items` is raised here, where it would have been without the thread. When the caller stops early, the
    thread stops after the item that it is at.
    """
    # Simple queues: an interrupt in the midst of a `Queue` or a `Semaphore` may leave it locked, the thread waiting.
    ready: queue.SimpleQueue[tuple[bool, Any, torch.Event | None]] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(depth):
        room.put(None)
    stopped = threading.Event()
    iterator = iter(items)
    stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # what was prepared before may be under way still

    def put(more: bool, value: Any) -> None:
        ready.put((more, value, stream.record_event() if stream is not None else None))

    def work() -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            try:
                room.get()
                for item in iterator:
                    if stopped.is_set():
                        return
                    put(True, item)
                    del item  # as below: it belongs to the caller now
                    room.get()
                    if stopped.is_set():
                        return
                put(False, None)
            except BaseException as error:  # handed over, raised by the caller
                put(False, error)
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()

    worker = threading.Thread(target=work, name="prefetch", daemon=True)
    worker.start()
    try:
        while True:
            more, value, event = ready.get()
            room.put(None)
            if isinstance(value, BaseException):
                try:
                    raise value
                finally:
                    del value  # else error and traceback would hold each other, and all tensors of the stages
            if not more:
                return
            if event is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(event)
                for tensor in tensors_in(value):
                    tensor.record_stream(current)  # freed memory is not given out again while this stream reads it
            yield value
            del value  # a batch must not stay alive while the next one is awaited
    finally:
        stopped.set()
        room.put(None)
        worker.join()
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)


def tensors_in(item: object) -> Iterator[Tensor]:
    """The GPU's tensors in an item, which may be nested tuples and lists."""
    if isinstance(item, Tensor):
        if item.is_cuda:
            yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from tensors_in(part)
