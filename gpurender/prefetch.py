"""Runs stages of a pipeline side by side: each on a thread of its own and, on a GPU, a stream of its own."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .timings import Timings

S = TypeVar("S")
T = TypeVar("T")

UNDER_WAY: dict[threading.Thread, Callable[[], None]] = {}
"""Threads and what ends them, outer stages before those that they take from."""


@atexit.register
def end_threads() -> None:
    """A program may end while somebody holds a render that is not over: its threads must not be at work in torch or
    OpenVINO when Python ends them, which would abort the process."""
    for end in list(UNDER_WAY.values()):
        end()


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

    def work() -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            try:
                room.get()
                for item in iterator:
                    if stopped.is_set():
                        return
                    ready.put((True, item, stream.record_event() if stream is not None else None))
                    del item  # as below: it belongs to the caller now
                    room.get()
                    if stopped.is_set():
                        return
                ready.put((False, None, None))
            except BaseException as error:  # handed over, raised by the caller
                ready.put((False, error, None))
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
                UNDER_WAY.pop(worker, None)

    worker = threading.Thread(target=work, name="prefetch", daemon=True)

    def stop() -> None:
        stopped.set()
        room.put(None)

    def end() -> None:
        stop()
        worker.join()

    UNDER_WAY[worker] = end
    worker.start()
    taker = 0
    try:
        while True:
            taker = threading.get_ident()
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
        # Python's collector of cycles closes a forgotten render on any thread, also on one that the worker waits for.
        (end if threading.get_ident() == taker else stop)()
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
