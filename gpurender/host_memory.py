"""How much of the host's memory a program may still take."""

from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may take, those of cached files among them: what the system has, or what the limits of
    the process's control groups leave (containers, systemd; cgroup v1 and v2) where that is less.

    None where the system does not say: it is not Linux.

    Args:
        root: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *what_groups_leave(groups, root / "sys/fs/cgroup")]) if free else None


def what_groups_leave(groups: list[str], mounted: Path) -> Iterator[int]:
    """Of each control group with a limit that the process is in; `groups` are lines of /proc/self/cgroup."""
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        while group.is_relative_to(base):  # a container may see its own group as the topmost one, whatever its path
            yield from what_is_left(group, *names)
            group = group.parent


def what_is_left(group: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        taken = int((group / usage).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(most - taken + int(counts.get(cached, 0)), 0)
    except (OSError, ValueError):  # it has none: there is no such file, or it says `max`
        return
