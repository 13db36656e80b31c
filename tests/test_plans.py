"""Plans kept in the user's cache."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender.cache import cache_directory
from gpurender.plans import cached_plan, keep, kept_file, read_kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))
    return cache_directory()


class Builds:
    """Builds plans and loads what begins like one, counting both."""

    def __init__(self) -> None:
        self.built = 0
        self.loaded: list[bytes] = []

    def build(self) -> bytes:
        self.built += 1
        return b"plan %d" % self.built

    def load(self, data: bytes) -> str | None:
        self.loaded.append(data)
        return data.decode()

    def __call__(self, **key: str) -> str | None:
        return cached_plan(key, self.build, self.load, lambda text: None)


def test_a_plan_is_built_once_for_each_key(cache: Path) -> None:
    plans = Builds()
    assert [plans(gpu="a"), plans(gpu="a"), plans(gpu="b"), plans(gpu="a")] == ["plan 1", "plan 1", "plan 2", "plan 1"]
    files = list((cache / "built").glob("*.plan"))
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert (cache / "built").stat().st_mode & 0o777 == 0o700


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_plan_is_never_loaded(data: st.DataObject) -> None:
    key = {"gpu": "damaged"}
    file = kept_file(key, "plan")
    keep(file, key, b"content of a plan", lambda text: None)
    whole = file.read_bytes()
    if data.draw(st.booleans(), "cut"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    file.write_bytes(damaged)
    assert read_kept(file, key) is None
    plans = Builds()
    assert plans(**key) == "plan 1"
    assert plans.loaded == [b"plan 1"]
    assert plans(**key) == "plan 1"


def test_another_keys_file_is_not_loaded(cache: Path) -> None:
    plans = Builds()
    plans(gpu="a")
    kept_file({"gpu": "a"}, "plan").rename(kept_file({"gpu": "b"}, "plan"))
    assert plans(gpu="b") == "plan 2"


def test_a_plan_that_does_not_load_is_built_again(cache: Path) -> None:
    """As one that another driver or another build of TensorRT left: the deserialiser gives None."""
    plans = Builds()
    plans(gpu="a")
    accepted = iter([None, None, "rebuilt"])
    assert cached_plan({"gpu": "a"}, plans.build, lambda data: next(accepted), print) == "rebuilt"
    assert plans.built == 2
    assert cached_plan({"gpu": "a"}, plans.build, lambda data: None, print) is None


def test_a_full_disk_costs_the_plan_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    monkeypatch.setattr(Path, "write_bytes", full)
    assert cached_plan({"gpu": "a"}, lambda: b"plan", bytes.decode, told.append) == "plan"
    assert "cannot be kept for the next time: the disk is full" in told[0]
    assert not list((cache / "built").glob("*.plan"))


def build_slowly(log: Path, started: Any) -> None:
    def build() -> bytes:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        return b"plan"

    started.wait()
    assert cached_plan({"gpu": "two"}, build, bytes.decode, lambda text: None) == "plan"


def test_two_programs_at_once_build_once(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(2)
    programs = [context.Process(target=build_slowly, args=(tmp_path / "log", started)) for _ in range(2)]
    for program in programs:
        program.start()
    for program in programs:
        program.join(60)
    assert [program.exitcode for program in programs] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
