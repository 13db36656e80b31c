"""How much of the host's memory this process may still take, how many of its cores and threads, and whether it was
forked."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may take, those of cached files among them: what the system has, or what the limits of
    the process's control groups leave (containers, systemd; cgroup v1 and v2) where that is less.

    None where the system does not say, as others than Linux do not.

    Args:
        root: where `proc` and `sys` are.
    """
    of_system = [line.split()[1] for line in lines_of(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    groups = lines_of(root / "proc/self/cgroup")
    free = [1024 * int(kilobytes) for kilobytes in of_system]
    return min([*free, *what_groups_leave(groups, root / "sys/fs/cgroup")]) if free else None


def lines_of(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def groups_of(lines: list[str], controller: str, mounted: Path) -> Iterator[tuple[Path, bool]]:
    """The control groups that the process is in, and whether they are cgroup v1's; `lines` of /proc/self/cgroup."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mounted / controller if controllers else mounted
        group = base / path.lstrip("/")
        while group.is_relative_to(base):  # a container may see its own group as the topmost one, whatever its path
            yield group, bool(controllers)
            group = group.parent


def what_groups_leave(lines: list[str], mounted: Path) -> Iterator[int]:
    """Bytes of memory, of each control group that limits it."""
    for group, v1 in groups_of(lines, "memory", mounted):
        limits = ["memory.limit_in_bytes"] if v1 else ["memory.max", "memory.high"]
        usage, counts = ("memory.usage_in_bytes", "total_") if v1 else ("memory.current", "")
        for limit in limits:
            yield from what_is_left(group, limit, usage, [f"{counts}inactive_file", f"{counts}active_file"])


def what_is_left(group: Path, limit: str, usage: str, cached: list[str]) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        taken = int((group / usage).read_text())
        counts = dict(line.split() for line in lines_of(group / "memory.stat"))
        yield max(most - taken + sum(int(counts.get(name, 0)) for name in cached), 0)
    except (OSError, ValueError):  # it has none: there is no such file, or it says `max`
        return


def usable_cores(root: Path = Path("/")) -> int:
    """How many cores this process may keep busy: those that it may run on, or fewer where its control groups limit its
    time (`docker run --cpus`, Kubernetes' limits).

    Args:
        root: where `proc` and `sys` are.
    """
    allowed = what_groups_allow(lines_of(root / "proc/self/cgroup"), root / "sys/fs/cgroup")
    return max(1, math.ceil(min([cores_to_run_on(), *allowed])))


def cores_to_run_on() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def what_groups_allow(lines: list[str], mounted: Path) -> Iterator[float]:
    """Cores, of each control group that limits the time of its processes."""
    for group, v1 in groups_of(lines, "cpu", mounted):
        try:
            if v1:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (group / "cpu.max").read_text().split()
            if int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or it says `max`
            continue


def check_threads() -> None:
    """Raise RuntimeError if the system gives this process too few threads for two pools of as many as it has cores."""
    may_end = threading.Event()
    tried = [threading.Thread(target=may_end.wait, daemon=True) for _ in range(2 * usable_cores() + 2)]
    try:
        for thread in tried:
            thread.start()
    finally:
        may_end.set()
        for thread in tried:
            if thread.ident is not None:  # it was started
                thread.join()


ONE_THREAD = threading.Lock()
threads_before: list[int] = []
"""How many threads torch had before the first of those that work on one core now, once for each of them."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch works on one core meanwhile, in threads that begin meanwhile and in this one. How it rounds depends on how
    many it works on."""
    import torch  # here, for the command line counts cores before torch is loaded

    with ONE_THREAD:
        before = threads_before[0] if threads_before else torch.get_num_threads()
        threads_before.append(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        with ONE_THREAD:
            threads_before.pop()


def refuse_to_travel(loaded: object) -> NoReturn:
    """Raise TypeError where something is pickled that could not be: what pickling says by itself is a riddle."""
    raise TypeError(f"{type(loaded).__name__} cannot be copied or sent to another process: load it there.")


def check_process(made_in: int, what: str) -> None:
    """Raise RuntimeError in a forked process: it has not the threads that `what` needs, and would wait for ever."""
    if os.getpid() != made_in:
        raise RuntimeError(
            f"a {what} cannot be used in a process that was forked since: load it there, or start processes by spawn."
        )
