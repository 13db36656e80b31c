"""What was built for this machine, kept in the user's cache: TensorRT's plans and timings, and LLVM's kernels.

A kept file begins with what it is: the key that it was made for and a checksum. A file that is cut off, damaged, of
another format or for another key is as good as none: nothing of it reaches a deserialiser.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .cache import cache_directory
from .errors import OutputError
from .output import complete_or_absent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
Key = Mapping[str, str]
FORMAT = b"gpurender built 1\n"


def cached_plan(
    key: Key, build: Callable[[], bytes], load: Callable[[bytes], T | None], notify: Callable[[str], None]
) -> T | None:
    """Load the plan that is kept for `key`, else build, keep and load it.

    Of programs that want the same plan at once, one builds and the others wait for it.

    Args:
        key: all that the plan depends on.
        build: makes the plan.
        load: returns None for a plan that does not run here, for instance one from before a driver update; it is then
            built again.
        notify: is told of a wait, and if the plan cannot be kept.

    Returns:
        what `load` gave; None if it refuses even the plan that was built just now.
    """
    file = kept_file(key, "plan")
    if (loaded := loaded_from(file, key, load)) is not None:
        return loaded
    with alone(file.with_suffix(".lock"), notify):
        if (loaded := loaded_from(file, key, load)) is not None:  # another program has built it meanwhile
            return loaded
        plan = build()
        keep(file, key, plan, notify)
        return load(plan)


def loaded_from(file: Path, key: Key, load: Callable[[bytes], T | None]) -> T | None:
    plan = read_kept(file, key)
    return None if plan is None else load(plan)


def kept_file(key: Key, suffix: str) -> Path:
    """Where the file for `key` is or would be."""
    directory = cache_directory() / "built"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be made ({error.strerror}); set GPURENDER_CACHE.") from None
    return directory / f"{hashlib.sha256(written(key)).hexdigest()[:32]}.{suffix}"


def written(key: Key) -> bytes:
    return json.dumps(dict(key), sort_keys=True).encode()


def read_kept(file: Path, key: Key) -> bytes | None:
    """The file's content; None if there is none, or not the whole of one for this key."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    head = FORMAT + written(key) + b"\n"
    digest, data = content[len(head) : len(head) + 32], content[len(head) + 32 :]
    return data if content.startswith(head) and hashlib.sha256(data).digest() == digest else None


def keep(file: Path, key: Key, data: bytes, notify: Callable[[str], None]) -> None:
    """Write the file, readable by its owner alone. Where that fails, the work is lost, not the render."""
    try:
        with complete_or_absent(file, overwrite=True) as name:
            os.chmod(name, 0o600)
            Path(name).write_bytes(FORMAT + written(key) + b"\n" + hashlib.sha256(data).digest() + data)
    except OutputError as error:
        notify(f"it cannot be kept for the next time: {error}")


@contextmanager
def alone(lock: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """One program at a time; a program that ends in any way lets the next one in."""
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise OutputError(f"{lock} cannot be made ({error.strerror}); set GPURENDER_CACHE.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another program that builds the same plan")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two programs may build at once, and either's plan will do
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)
