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
HOST = torch.device("cpu")


class Span(NamedTuple):
    """A stage at work on a batch, on the host or the GPU; seconds since the first one began."""

    name: str
    on_gpu: bool
    thread: int
    """of the host: a stage may be worked on by two"""
    start_seconds: float
    end_seconds: float


class Running(NamedTuple):
    """A stage's work on a GPU, from one event to the other, and the thread that asked for it."""

    thread: int
    start: torch.cuda.Event
    end: torch.cuda.Event


@dataclass
class Timings:
    """What the stages of a render cost: seconds of work, without what they waited for each other.

    Attributes:
        host_seconds: by stage, on its thread; the network's also on the next one's, which waits for it; an encoder's on
            those of all its segments.
        device_seconds: by stage, on its stream of the GPU; empty on a CPU.
        counts: of work that is not done for each frame.
        spans: when each stage was at work on which batch; None: this is not kept.
    """

    host_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    spans: list[Span] | None = None
    _running: dict[str, list[Running]] = field(default_factory=dict, repr=False)
    _first: float | None = field(default=None, repr=False)
    _gpu_clock: tuple[torch.cuda.Event, float] | None = field(default=None, repr=False)
    _one_thread: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def measured(self, name: str, work: Callable[[], T], device: torch.device = HOST) -> T:
        """Do some work of a stage, and add what it cost."""
        if self.spans is not None:
            self._set_clocks(device)
        thread = threading.get_ident()
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
                self.spans.append(Span(name, False, thread, began - self._first, ended - self._first))
            if events:
                running = self._running.setdefault(name, [])
                running.append(Running(thread, *events))
                while len(running) > 1 and running[0].end.query():
                    self._add_device_time(name, running.pop(0))
        return done

    def finish(self) -> None:
        """Wait for the GPU to end what is still under way, and count it."""
        with self._one_thread:
            for name, running in self._running.items():
                while running:
                    work = running.pop(0)
                    work.end.synchronize()
                    self._add_device_time(name, work)

    def _set_clocks(self, device: torch.device) -> None:
        """The moment from which spans are counted, and an event on the GPU whose moment is known: it is waited for."""
        with self._one_thread:
            if self._first is None:
                self._first = time.perf_counter()
            if device.type == "cuda" and self._gpu_clock is None:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                event.synchronize()
                self._gpu_clock = event, time.perf_counter() - self._first

    def _add_device_time(self, name: str, work: Running) -> None:
        seconds = work.start.elapsed_time(work.end) / 1000
        self.device_seconds[name] = self.device_seconds.get(name, 0.0) + seconds
        if self.spans is not None and self._gpu_clock is not None:
            event, moment = self._gpu_clock
            start = moment + event.elapsed_time(work.start) / 1000
            self.spans.append(Span(name, True, work.thread, start, start + seconds))


def write_trace(file: Path, spans: Sequence[Span], overwrite: bool) -> None:
    """Spans as a JSON file in the Trace Event Format, which chrome://tracing and ui.perfetto.dev open: a row for each
    thread of each stage.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    places = {True: "GPU", False: "host"}
    row_of = lambda span: (span.on_gpu, span.name, span.thread)  # noqa: E731
    rows = list(dict.fromkeys(map(row_of, sorted(spans, key=lambda span: span.start_seconds))))
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": int(on_gpu), "args": {"name": place}}
        for on_gpu, place in places.items()
        if any(row[0] == on_gpu for row in rows)
    ]
    for number, (on_gpu, name, _) in enumerate(rows):
        of = {"pid": int(on_gpu), "tid": number}
        events.append({"ph": "M", "name": "thread_name", **of, "args": {"name": name}})
    for span in spans:
        of = {"pid": int(span.on_gpu), "tid": rows.index(row_of(span))}
        microseconds = {"ts": 1e6 * span.start_seconds, "dur": 1e6 * (span.end_seconds - span.start_seconds)}
        events.append({"ph": "X", "name": span.name, **of, **microseconds})
    write_text(file, json.dumps({"traceEvents": events}) + "\n", overwrite)
