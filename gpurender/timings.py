"""What the stages of a render cost, and when each was at work."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .output import write_text

T = TypeVar("T")


class Span(NamedTuple):
    """A stage at work on a batch, on the host or the GPU; seconds since the first one began."""

    name: str
    on_gpu: bool
    start_seconds: float
    end_seconds: float


class Running(NamedTuple):
    """A stage's work on a GPU, from one event to the other."""

    start: torch.cuda.Event
    end: torch.cuda.Event


@dataclass
class Timings:
    """What the stages of a render cost: seconds of work, without what they waited for each other.

    Attributes:
        host_seconds: by stage, on its thread; the network's also on the next one's, which waits for it.
        device_seconds: by stage, on its stream of the GPU; empty on a CPU.
        counts: of work that is not done for each frame.
        spans: when each stage was at work on which batch; None: this is not kept.
    """

    host_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    spans: list[Span] | None = None
    _running: dict[str, list[Running]] = field(default_factory=dict, repr=False)
    _first: tuple[float, torch.cuda.Event | None] | None = field(default=None, repr=False)
    _one_thread: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def measured(self, name: str, work: Callable[[], T], device: torch.device) -> T:
        """Do some work of a stage, and add what it cost."""
        if self.spans is not None:
            self._set_first(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        began = time.perf_counter()
        for event in events[:1]:
            event.record()
        done = work()
        for event in events[1:]:
            event.record()
        ended = time.perf_counter()
        with self._one_thread:  # a stage may be worked on by two
            self.host_seconds[name] = self.host_seconds.get(name, 0.0) + ended - began
            if self.spans is not None and self._first is not None:
                first, _ = self._first
                self.spans.append(Span(name, False, began - first, ended - first))
        if events:
            running = self._running.setdefault(name, [])
            running.append(Running(*events))
            while running[0].end.query() and len(running) > 1:
                self._add_device_time(name, running.pop(0))
        return done

    def finish(self) -> None:
        """Wait for the GPU to end what is still under way, and count it."""
        for name, running in self._running.items():
            while running:
                work = running.pop(0)
                work.end.synchronize()
                self._add_device_time(name, work)

    def _set_first(self, device: torch.device) -> None:
        """The moment from which spans are counted; on the GPU's clock too, which is waited for once."""
        with self._one_thread:
            if self._first is None or (self._first[1] is None and device.type == "cuda"):
                event = None
                if device.type == "cuda":
                    event = torch.cuda.Event(enable_timing=True)
                    event.record()
                    event.synchronize()
                self._first = self._first[0] if self._first else time.perf_counter(), event

    def _add_device_time(self, name: str, work: Running) -> None:
        seconds = work.start.elapsed_time(work.end) / 1000
        with self._one_thread:
            self.device_seconds[name] = self.device_seconds.get(name, 0.0) + seconds
            if self.spans is not None and self._first is not None and self._first[1] is not None:
                start = self._first[1].elapsed_time(work.start) / 1000
                self.spans.append(Span(name, True, start, start + seconds))


def write_trace(file: Path, spans: Sequence[Span], overwrite: bool) -> None:
    """Spans as a JSON file in the Trace Event Format, which chrome://tracing and ui.perfetto.dev open: a row a stage.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    places = {True: "GPU", False: "host"}
    rows = list(dict.fromkeys((span.on_gpu, span.name) for span in sorted(spans, key=lambda span: span.start_seconds)))
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": int(on_gpu), "args": {"name": place}}
        for on_gpu, place in places.items()
        if any(row[0] == on_gpu for row in rows)
    ]
    for number, (on_gpu, name) in enumerate(rows):
        of = {"pid": int(on_gpu), "tid": number}
        events.append({"ph": "M", "name": "thread_name", **of, "args": {"name": name}})
    for span in spans:
        of = {"pid": int(span.on_gpu), "tid": rows.index((span.on_gpu, span.name))}
        microseconds = {"ts": 1e6 * span.start_seconds, "dur": 1e6 * (span.end_seconds - span.start_seconds)}
        events.append({"ph": "X", "name": span.name, **of, **microseconds})
    write_text(file, json.dumps({"traceEvents": events}) + "\n", overwrite)
