"""How much of the host's memory a program may still take."""

from collections.abc import Iterator
from pathlib import Path


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


def what_groups_leave(groups: list[str], mounted: Path) -> Iterator[int]:
    """Of each control group with a limit that the process is in; `groups` are lines of /proc/self/cgroup."""
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limits, usage, counts = mounted, ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):
            base, limits = mounted / "memory", ["memory.limit_in_bytes"]
            usage, counts = "memory.usage_in_bytes", "total_"
        else:
            continue
        group = base / path.lstrip("/")
        while group.is_relative_to(base):  # a container may see its own group as the topmost one, whatever its path
            for limit in limits:
                yield from what_is_left(group, limit, usage, [f"{counts}inactive_file", f"{counts}active_file"])
            group = group.parent


def what_is_left(group: Path, limit: str, usage: str, cached: list[str]) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        taken = int((group / usage).read_text())
        counts = dict(line.split() for line in lines_of(group / "memory.stat"))
        yield max(most - taken + sum(int(counts.get(name, 0)) for name in cached), 0)
    except (OSError, ValueError):  # it has none: there is no such file, or it says `max`
        return
