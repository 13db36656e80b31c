"""Progress for a person: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

from torch import Tensor
from tqdm import tqdm

LINE_SECONDS = 5.0


class TerminalProgress:
    """Writes to standard error: frames, rate and time left."""

    def __init__(self) -> None:
        self._interactive = sys.stderr.isatty()

    def stage(self, text: str) -> None:
        print(f"{text} …", file=sys.stderr, flush=True)

    def frames(self, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        return self._bar(batches, total) if self._interactive else self._lines(batches, total)

    def _bar(self, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        with tqdm(total=total, unit=" frames", desc="rendering", smoothing=0.1, file=sys.stderr) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def _lines(self, batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
        began = said = time.monotonic()
        done = 0
        for batch in batches:
            yield batch
            done += len(batch)
            now = time.monotonic()
            if now - said >= LINE_SECONDS or done == total:
                said = now
                rate = done / max(now - began, 1e-9)
                left = f", {(total - done) / rate:.0f} s left" if done < total else ""
                print(f"rendered {done} of {total} frames, {rate:.1f} a second{left}", file=sys.stderr, flush=True)
