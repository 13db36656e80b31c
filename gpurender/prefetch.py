"""Runs one stage of a pipeline ahead of the next, on a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 1) -> Generator[T]:
    """Yield `items` as they are, computed by a thread: up to `depth` wait while it is at one more.

    An error in `items` is raised here, where it would have been without the thread. When the caller stops early, the
    thread stops after the item that it is at.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    iterator = iter(items)

    def put(more: bool, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((more, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in iterator:
                if not put(True, item):
                    return
                del item  # as below: it belongs to the caller now
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
            more, value = ready.get()
            if isinstance(value, BaseException):
                raise value
            if not more:
                return
            yield value  # pyright: ignore
            del value  # a batch must not stay alive while the next one is awaited
    finally:
        stopped.set()
        worker.join()
