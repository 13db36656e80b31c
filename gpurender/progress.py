"""Who is told how something long is getting on: nobody, or a person at a terminal or reading a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

from torch import Tensor

LINE_SECONDS = 5.0
T = TypeVar("T")


class Progress(Protocol):
    def stage(self, text: str) -> None:
        """Something begins that may take a while."""
        ...

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterable[Tensor]:
        """Pass batches on, counting their frames."""
        ...

    def each(self, items: Iterable[T], total: int) -> Iterable[T]:
        """Pass items on, counting each as a frame."""
        ...


def say(line: str) -> None:
    with suppress(OSError):  # a log on a full disk is no reason to end
        print(line, file=sys.stderr, flush=True)


def columns() -> int | None:
    """80 on a terminal that does not say how wide it is, where tqdm would show nothing; else what tqdm finds."""
    try:
        return None if os.get_terminal_size(sys.stderr.fileno()).columns else 80
    except (OSError, ValueError):
        return None


class Silent:
    def stage(self, text: str) -> None:
        pass

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterable[Tensor]:
        return batches

    def each(self, items: Iterable[T], total: int) -> Iterable[T]:
        return items


class TerminalProgress:
    """Writes to standard error: frames, rate and time left; a bar on a terminal, now and then a plain line elsewhere.

    Args:
        doing, done: what happens to the frames.
    """

    def __init__(self, doing: str = "rendering", done: str = "rendered") -> None:
        self._interactive = sys.stderr.isatty()
        self._doing, self._done = doing, done

    def stage(self, text: str) -> None:
        say(f"{text} …")

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        return self._counted(((batch, len(batch)) for batch in batches), total)

    def each(self, items: Iterable[T], total: int) -> Iterator[T]:
        return self._counted(((item, 1) for item in items), total)

    def _counted(self, items: Iterable[tuple[T, int]], total: int) -> Iterator[T]:
        return self._bar(items, total) if self._interactive else self._lines(items, total)

    def _bar(self, items: Iterable[tuple[T, int]], total: int) -> Iterator[T]:
        from tqdm import tqdm  # not needed elsewhere

        with tqdm(
            total=total,
            unit=" frames",
            desc=self._doing,
            smoothing=0.1,
            file=sys.stderr,
            ncols=(width := columns()),
            nrows=None if width is None else 24,  # of no rows, tqdm would show none
            dynamic_ncols=width is None,  # else a narrower window would wrap each update onto lines of its own
        ) as bar:
            for item, frames in items:
                yield item
                bar.update(frames)

    def _lines(self, items: Iterable[tuple[T, int]], total: int) -> Iterator[T]:
        began = said = time.monotonic()
        done = 0
        for item, frames in items:
            yield item
            done += frames
            now = time.monotonic()
            if now - said >= LINE_SECONDS or done == total:
                said = now
                rate = done / max(now - began, 1e-9)
                left = f", {(total - done) / rate:.0f} s left" if done < total else ""
                say(f"{self._done} {done} of {total} frames, {rate:.1f} a second{left}")
