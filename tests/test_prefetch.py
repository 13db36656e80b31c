import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gpurender.prefetch import prefetch, stage
from gpurender.timings import Timings, write_trace


def workers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    assert workers() == 0
    yield
    assert becomes(lambda: workers() == 0)  # nobody waits for it where another thread took the last item


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true before long."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


class Source:
    """Counts, and remembers how far it got and whether it was closed."""

    def __init__(self, stop: int = 1000, error: BaseException | None = None) -> None:
        self.stop, self.error = stop, error
        self.made = 0
        self.closed = False
        self.thread = ""

    def items(self) -> Generator[int]:
        self.thread = threading.current_thread().name
        try:
            for i in range(self.stop):
                self.made += 1
                yield i
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_items_come_in_order(count: int, depth: int) -> None:
    source = Source(count)
    assert list(prefetch(source.items(), depth)) == list(range(count))
    assert source.closed
    assert source.thread == "prefetch"


def test_any_iterable_will_do() -> None:
    assert list(prefetch([3, None, 2])) == [3, None, 2]
    assert list(prefetch(map(str, range(3)))) == ["0", "1", "2"]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("good", [0, 1, 5])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt("broken")], ids=lambda e: type(e).__name__)
def test_errors_are_raised_at_their_item(good: int, depth: int, error: BaseException) -> None:
    source = Source(good, error)
    ahead = prefetch(source.items(), depth)
    assert [next(ahead) for _ in range(good)] == list(range(good))
    with pytest.raises(type(error), match="broken") as raised:
        next(ahead)
    assert raised.value is error
    assert source.closed
    assert workers() == 0
    with pytest.raises(StopIteration):
        next(ahead)


def test_what_cannot_be_iterated_is_an_error() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        next(prefetch(5))  # pyright: ignore


def test_stopping_early_ends_the_thread_and_closes_the_items() -> None:
    source = Source()
    items = source.items()  # kept here: it is closed, not just dropped
    ahead = prefetch(items)
    assert [next(ahead), next(ahead)] == [0, 1]
    assert workers() == 1
    ahead.close()
    assert workers() == 0
    assert source.closed
    assert source.made <= 4


def test_no_other_item_is_begun_where_the_caller_stops() -> None:
    source = Source()
    ahead = prefetch(source.items())
    next(ahead)
    assert becomes(lambda: source.made == 2)
    time.sleep(0.05)
    ahead.close()
    assert source.made == 2


FORGOTTEN = """
import gc, time, torch
from gpurender.prefetch import UNDER_WAY, stage

def inner(i):
    time.sleep(0.05)
    if i > 4:
        gc.collect()
    return i

def consume():
    cpu = torch.device("cpu")
    stages = stage("b", lambda x: x, stage("a", lambda x: x, stage("in", inner, iter(range(100)), cpu), cpu), cpu)
    try:
        for i in stages:
            if i == 2:
                raise ValueError
    except ValueError as error:
        kept = error  # which holds this frame, which holds it: a cycle, and the stages are in it

gc.disable()
consume()
deadline = time.monotonic() + 20
while UNDER_WAY and time.monotonic() < deadline:
    time.sleep(0.02)
print("threads left:", len(UNDER_WAY))
"""


def test_a_forgotten_render_may_be_collected_on_a_thread_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "threads left: 0\n"


def test_an_error_of_the_caller_ends_the_thread() -> None:
    source = Source()

    def fail() -> None:
        for _ in prefetch(source.items()):
            raise RuntimeError("caller")

    with pytest.raises(RuntimeError, match="caller"):
        fail()
    gc.collect()
    assert becomes(lambda: workers() == 0)
    assert source.closed


LEFT = """
import torch
from gpurender.prefetch import prefetch

def pictures(like):
    for given in like:
        for _ in range(20):
            given = (given + 1) * 0.5
        yield given

some = (torch.zeros(4, 3, 720, 1280) for _ in range(100))
outer = prefetch(pictures(prefetch(pictures(some))))
next(outer)
print("left")
"""


def test_a_program_may_end_before_the_items() -> None:
    """Threads at work in torch would abort it as they are ended."""
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=100)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "left\n", "")


def test_an_error_is_told_where_a_gpu_gives_no_event_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one that every later call gives again."""

    class Broken:
        def wait_stream(self, other: object) -> None:
            pass

        def record_event(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Broken())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Broken())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(prefetch(range(3), 1, torch.device("cuda")))


def test_nothing_runs_before_the_first_item_is_asked_for() -> None:
    source = Source()
    ahead = prefetch(source.items())
    assert workers() == 0
    ahead.close()
    assert source.made == 0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_bounds_how_far_ahead_it_runs(depth: int) -> None:
    source = Source()
    ahead = prefetch(source.items(), depth)
    for taken in range(1, 4):
        next(ahead)
        assert becomes(lambda bound=taken + depth: source.made == bound)
        time.sleep(0.12)
        assert source.made == taken + depth
    ahead.close()


def test_stages_run_at_the_same_time() -> None:
    """The second item is made while the first is in use: it would wait for ever otherwise."""
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    for i in prefetch(items()):
        assert i or made.wait(5)


def test_nested_stages_keep_order_and_end_together() -> None:
    source = Source(40)

    def double(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            yield 2 * item

    assert list(prefetch(double(prefetch(source.items())))) == list(range(0, 80, 2))


def test_closing_the_outer_stage_ends_the_inner_ones() -> None:
    source = Source()
    ahead = prefetch(prefetch(prefetch(source.items()), 2))
    assert next(ahead) == 0
    assert workers() == 3
    ahead.close()
    assert workers() == 0
    assert source.closed


def test_errors_pass_nested_stages() -> None:
    ahead = prefetch(prefetch(Source(3, OSError("disk")).items()))
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk"):
        next(ahead)


class Batch:
    pass


def test_an_item_is_dropped_while_the_next_is_awaited() -> None:
    go_on = threading.Event()
    alive: list[weakref.ref[Batch]] = []

    def items() -> Iterator[Batch]:
        batch = Batch()
        alive.append(weakref.ref(batch))
        yield batch
        del batch
        assert go_on.wait(5)
        yield Batch()

    ahead = prefetch(items())
    next(ahead)
    assert alive[0]() is not None
    waiting = threading.Thread(target=next, args=(ahead,))
    waiting.start()
    dropped = becomes(lambda: alive[0]() is None)
    go_on.set()
    waiting.join()
    ahead.close()
    assert dropped


def test_what_a_failed_item_held_is_freed_with_its_error() -> None:
    class Memory:
        pass

    held: list[weakref.ref[Memory]] = []

    def fails() -> Iterator[int]:
        memory = Memory()
        held.append(weakref.ref(memory))
        yield 1
        raise ValueError("no more")

    gc.disable()  # a GPU's memory does not make Python collect its garbage
    try:
        with suppress(ValueError):
            list(prefetch(fails()))
        assert becomes(lambda: held[0]() is None)
    finally:
        gc.enable()


# --- stages ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_stages_work_side_by_side_and_are_timed() -> None:
    timings = Timings()

    def slow(x: int) -> int:
        time.sleep(0.05)
        return x + 1

    began = time.perf_counter()
    first = stage("first", slow, range(10), CPU, timings)
    assert list(stage("second", slow, first, CPU, timings)) == list(range(2, 12))
    elapsed = time.perf_counter() - began
    assert timings.host_seconds["first"] >= 0.5
    assert timings.host_seconds["second"] >= 0.5  # its own work only: what it waited for the first is not in it
    assert sum(timings.host_seconds.values()) > elapsed
    assert timings.device_seconds == {}


def test_a_trace_shows_when_stages_worked(tmp_path: Path) -> None:
    timings = Timings(spans=[])
    slow = lambda x: time.sleep(0.02) or x  # noqa: E731
    assert list(stage("second", slow, stage("first", slow, range(5), CPU, timings), CPU, timings)) == list(range(5))
    assert timings.spans is not None
    of = {name: sorted(span[3:] for span in timings.spans if span.name == name) for name in ("first", "second")}
    for spans in of.values():
        assert len(spans) == 5
        assert all(0 <= start < end for start, end in spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))  # one batch after another
    assert of["first"][1][0] < of["second"][0][1]  # the first is at the next batch while the second has this one
    write_trace(tmp_path / "trace.json", timings.spans, overwrite=False)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"host", "first", "second"}
    drawn = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    assert len(drawn) == 10
    for name, start, end in drawn:
        assert any(abs(start - 1e6 * a) < 1 and abs(end - 1e6 * b) < 1 for a, b in of[name])
    assert Timings().spans is None  # unless asked for, a long render would keep more and more


def test_a_stage_that_is_left_closes_those_before_it() -> None:
    source = Source()
    last = stage("last", str, stage("first", abs, source.items(), CPU), CPU)
    assert next(last) == "0"
    last.close()
    assert source.closed


def test_a_stage_closes_items_that_somebody_else_holds() -> None:
    source = Source()
    items = source.items()
    ahead = stage("first", abs, items, CPU)
    next(ahead)
    ahead.close()
    assert source.closed


def test_a_stage_of_the_cpu_is_one_item_ahead() -> None:
    source = Source()
    ahead = stage("first", abs, source.items(), CPU)
    for taken in range(1, 4):
        next(ahead)
        assert becomes(lambda bound=taken + 1: source.made == bound)
        time.sleep(0.12)
        assert source.made == taken + 1
    ahead.close()


def test_a_stage_drops_what_it_took_and_made_while_it_awaits_the_next() -> None:
    go_on = threading.Event()
    taken: list[weakref.ref[Batch]] = []
    made: list[weakref.ref[Batch]] = []

    def items() -> Iterator[Batch]:
        batch = Batch()
        taken.append(weakref.ref(batch))
        yield batch
        del batch
        assert go_on.wait(5)
        yield Batch()

    def work(batch: Batch) -> Batch:
        result = Batch()
        made.append(weakref.ref(result))
        return result

    ahead = stage("first", work, items(), CPU)
    next(ahead)
    waiting = threading.Thread(target=next, args=(ahead,))
    waiting.start()
    dropped = becomes(lambda: taken[0]() is None and made[0]() is None)
    go_on.set()
    waiting.join()
    ahead.close()
    assert dropped


@pytest.mark.gpu
def test_stages_of_a_gpu_are_ordered_and_timed() -> None:
    device = torch.device("cuda")
    timings = Timings(spans=[])
    heavy = torch.randn(2048, 2048, device=device)

    def double(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            _ = heavy @ heavy  # keeps this stream busy, so that a stage that did not wait would read too early
        return x * 2

    items = (torch.full((1 << 20,), i, device=device) for i in range(30))
    sums = [x.sum() for x in stage("b", double, stage("a", double, items, device, timings), device, timings)]
    assert [int(x) for x in sums] == [4 * i << 20 for i in range(30)]
    timings.finish()
    assert timings.device_seconds["a"] > 0
    assert timings.device_seconds["b"] > 0
    assert timings.spans is not None
    assert {span.name for span in timings.spans if span.on_gpu} == {"a", "b"}
    assert sum(end - start for _, on_gpu, _, start, end in timings.spans if on_gpu) == pytest.approx(
        sum(timings.device_seconds.values())
    )
