"""What is free of the host's memory and cores, by files like those of Linux, and on the machine that runs the tests."""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from gpurender import host
from gpurender.host import check_threads, free_memory, usable_cores

V1, V2 = "4:memory:/jobs/one\n0::/", "0::/jobs/one"
NO_LIMIT = 2**63 - 4096  # as v1 says it


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def system(groups: str) -> dict[str, object]:
    return {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nBuffers: 1 kB", "proc/self/cgroup": groups}


def group(path: str, limit: object, used: int, cached: int, v1: bool = False) -> dict[str, object]:
    names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file") if v1 else ("max", "current", "inactive_file")
    return {
        f"{path}/memory.{names[0]}": limit,
        f"{path}/memory.{names[1]}": used,
        f"{path}/memory.stat": f"anon 5\n{names[2]} {cached - 20_000}\n{names[2].replace('in', '', 1)} 20000\nfile 7",
    }


def test_what_the_system_has_where_nothing_limits_it(tmp_path: Path) -> None:
    assert free_memory(write(tmp_path, system(V2))) == 8000 * 1024
    write(tmp_path, group("sys/fs/cgroup/jobs/one", "max", 50_000, 20_000))
    write(tmp_path, group("sys/fs/cgroup/memory", NO_LIMIT, 50_000, 20_000, v1=True))
    assert free_memory(tmp_path) == 8000 * 1024


@pytest.mark.parametrize("where", ["jobs/one", "jobs", "."])  # its own group, the one above, a container's topmost
@pytest.mark.parametrize("v1", [False, True])
def test_what_a_control_group_leaves(tmp_path: Path, where: str, v1: bool) -> None:
    mounted = "sys/fs/cgroup/memory" if v1 else "sys/fs/cgroup"
    write(tmp_path, system(V1 if v1 else V2) | group(f"{mounted}/{where}", 1_000_000, 300_000, 50_000, v1))
    assert free_memory(tmp_path) == 750_000


def test_the_tightest_limit_counts_and_none_leaves_less_than_nothing(tmp_path: Path) -> None:
    write(tmp_path, system(V2) | group("sys/fs/cgroup/jobs", 100_000, 40_000, 20_000))
    assert free_memory(tmp_path) == 80_000
    write(tmp_path, group("sys/fs/cgroup/jobs/one", 1000, 40_000, 20_000))
    assert free_memory(tmp_path) == 0


def test_where_systemd_slows_down_what_takes_more(tmp_path: Path) -> None:
    files = system(V2) | group("sys/fs/cgroup/jobs/one", 1_000_000, 300_000, 50_000)
    assert free_memory(write(tmp_path, files | {"sys/fs/cgroup/jobs/one/memory.high": 500_000})) == 250_000


def test_a_group_of_any_name_and_none(tmp_path: Path) -> None:
    write(tmp_path, system(V2))
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/j\xffobs\n")
    assert free_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc/self/cgroup").unlink()
    assert free_memory(tmp_path) == 8000 * 1024


def test_a_name_with_colons(tmp_path: Path) -> None:
    """As Kubernetes' containers have them under systemd."""
    groups = "0::/kubepods-burstable.slice:cri-containerd:9f2"
    write(tmp_path, system(groups) | group(f"sys/fs/cgroup/{groups[4:]}", 1_000_000, 300_000, 50_000))
    assert free_memory(tmp_path) == 750_000


def test_another_system_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB", "proc/self/cgroup": "0::/"})) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says")
def test_this_machine() -> None:
    free = free_memory()
    assert free is not None
    assert 2**26 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores(root: Path, path: str, limit: str, v1: bool = False) -> Path:
    quota, period = limit.split()
    both = {f"{path}/cpu.cfs_quota_us": quota, f"{path}/cpu.cfs_period_us": period}
    return write(root, both if v1 else {f"{path}/cpu.max": limit})


@pytest.mark.parametrize("where", ["jobs/one", "jobs", "."])
@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize(("limit", "found"), [("250000 100000", 3), ("50000 100000", 1), ("900000 50000", 8)])
def test_cores_that_a_control_group_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, v1: bool, limit: str, found: int
) -> None:
    monkeypatch.setattr(host, "cores_to_run_on", lambda: 8)
    write(tmp_path, {"proc/self/cgroup": "1:cpu,cpuacct:/jobs/one\n0::/" if v1 else V2})
    cores(tmp_path, f"sys/fs/cgroup/cpu/{where}" if v1 else f"sys/fs/cgroup/{where}", limit, v1)
    assert usable_cores(tmp_path) == found


def test_cores_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cores_to_run_on", lambda: 8)
    assert usable_cores(tmp_path / "nowhere") == 8
    write(tmp_path, {"proc/self/cgroup": f"2:cpu:/jobs\n{V2}", "sys/fs/cgroup/jobs/cpu.max": "max 100000"})
    assert usable_cores(cores(tmp_path, "sys/fs/cgroup/cpu/jobs", "-1 100000", v1=True)) == 8


def test_the_group_of_another_controller_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cores_to_run_on", lambda: 8)
    write(tmp_path, {"proc/self/cgroup": "2:cpuset:/others\n1:cpu:/ours"})
    for of, limit in (("others", "100000 100000"), ("ours", "400000 100000")):
        cores(tmp_path, f"sys/fs/cgroup/cpu/{of}", limit, v1=True)
    assert usable_cores(tmp_path) == 4


def test_renders_that_overlap_leave_torch_its_threads() -> None:
    def threads_of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    def other() -> None:
        with host.one_torch_thread():
            assert torch.get_num_threads() == 1
            entered.set()
            may_end.wait(10)

    before = torch.get_num_threads()
    entered, may_end = threading.Event(), threading.Event()
    try:
        torch.set_num_threads(2)
        with host.one_torch_thread():
            thread = threading.Thread(target=other)
            thread.start()
            assert entered.wait(10)
        may_end.set()
        thread.join()
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)
        torch.set_num_threads(3)
        with host.one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3  # what it was before these, not before the first
    finally:
        torch.set_num_threads(before)


def test_too_few_threads_are_told_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    check_threads()
    assert threading.active_count() == before
    start, started = threading.Thread.start, []

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        check_threads()
    assert len(started) == 2
    assert threading.active_count() == before
