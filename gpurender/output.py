"""A file or directory that appears under its name only when it is complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from .errors import OutputError

T = TypeVar("T")


def errors_passed(items: Iterable[T]) -> Iterator[T]:
    """Items for a block of `complete_or_absent`. An error in making them goes through the block, and those around it,
    as it is: a reset connection of a caller's progress is no disk that cannot be written to."""
    try:
        yield from items
    except Exception as error:
        error.of_source = True  # pyright: ignore[reportAttributeAccessIssue]
        raise


def is_of_source(error: Exception) -> bool:
    """Whether it came through `errors_passed`."""
    return getattr(error, "of_source", False)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise OutputError if `path` cannot be written to, before any work is done for it."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file name in it.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a pipe or a device, which is not replaced; give a file name.")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; give --overwrite to replace it.")
    check_place(Path(os.path.realpath(path)) if path.is_symlink() else path)


def check_place(place: Path) -> None:
    """Raise OutputError if the directory where something is to be made is not there, or not to be written to."""
    if not place.parent.is_dir():
        raise OutputError(f"{place.parent} is not a directory, so {place.name} cannot be written there.")
    if not os.access(place.parent, os.W_OK):
        raise OutputError(f"{place.parent} is not yours to write to, so {place.name} cannot be written there.")


SUFFIXES_READ = (".png", ".jpg", ".jpeg", ".lms", ".npz")
"""Of files that are read by their numbers, whatever a directory holds besides."""


def is_pattern(out: Path) -> bool:
    """Whether this names numbered pictures, not one file."""
    return "%" in out.name


def check_outputs(
    paths: Iterable[str | Path | None], overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """The same of several files; None is none. Two that are one are refused, too, and what would replace something that
    is read. Of patterns of numbered pictures it is looked whether they lie in a directory that is read; their names are
    not looked at.

    Args:
        inputs: files that are read, and directories whose numbered files are.
    """
    files = [Path(path) for path in paths if path is not None]
    places, read = ([Path(os.path.realpath(path)) for path in some if path is not None] for some in (files, inputs))
    for i, (file, place) in enumerate(zip(files, places, strict=True)):
        if place in read:
            raise OutputError(f"{file} is what is read, and would be replaced; give another name.")
        numbered = file.suffix.lower() in SUFFIXES_READ and (is_pattern(file) or place.exists())
        if numbered and place.parent in read:
            raise OutputError(f"{file} is among what is read; give a name outside of {file.parent}.")
        if place in places[:i]:
            raise OutputError(f"{file} is named for two results, of which one would replace the other; give two names.")
        if not (is_pattern(file) and file.suffix.lower() in SUFFIXES_READ):
            check_output(file, overwrite)


@contextmanager
def complete_or_absent(path: Path, overwrite: bool) -> Iterator[str]:
    """Yield a file name to write to; what is there when the block ends well appears at `path`, or where that links to,
    else nothing does.

    Where the system allows it (Linux), the file has no name until then, so that not even a killed process leaves one.

    Raises:
        OutputError: `path` exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    check_output(path, overwrite)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    with _output_errors(path):
        nameless = _open_nameless(path.parent)
        if nameless is None:
            descriptor, hidden = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
            os.close(descriptor)
            os.chmod(hidden, 0o666 & ~umask())
            source = hidden
        else:
            hidden = path.with_name(f".{uuid4().hex}{path.suffix}")
            source = f"/proc/self/fd/{nameless}"
        try:
            yield source
            if not overwrite:
                _link(source, path, nameless)  # unlike a rename, this refuses a file that has come up meanwhile
            else:
                if nameless is not None:
                    _link(source, hidden, nameless)
                os.replace(hidden, path)
        finally:
            if nameless is not None:
                os.close(nameless)
            with suppress(FileNotFoundError):
                os.unlink(hidden)


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Write a small file in UTF-8, complete or not at all; of names that are not UTF-8, the bytes as JSON has them."""
    with complete_or_absent(path, overwrite) as name:
        Path(name).write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def complete_or_absent_directory(path: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """Yield a directory to fill, hidden beside `path`; when the block ends well it becomes `path`, else it goes.

    Only a directory of the same kind is replaced: one that has the file `mark`, or an empty one. A killed process
    leaves the hidden directory, or `path` replaced but the old one not yet deleted, under a hidden name, too.

    Raises:
        OutputError: `path` exists (unless `overwrite`) or is something else, cannot be written, or the disk is full.
    """
    check_output_directory(path, overwrite, mark)
    place = Path(os.path.abspath(path))  # of `.`, too
    with _output_errors(path):
        hidden = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}-", dir=place.parent))
        old = hidden.with_name(hidden.name + ".old")
        try:
            os.chmod(hidden, 0o777 & ~umask())
            yield hidden
            check_output_directory(path, overwrite, mark)  # it may have come meanwhile
            if place.is_dir():
                os.rename(place, old)
            try:
                os.rename(hidden, place)
            except OSError:
                if old.exists():
                    os.rename(old, place)
                raise
        except OutputError as error:
            raise OutputError(str(error).replace(str(hidden), str(path))) from None
        finally:
            for leftover in (hidden, old):
                shutil.rmtree(leftover, ignore_errors=True)


def check_output_directory(path: Path, overwrite: bool, mark: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise OutputError if a directory cannot be made at `path`, before any work is done for it; or if it would replace
    one that holds what is read, `inputs`."""
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return  # nothing is lost
        if not (path / mark).is_file():
            raise OutputError(f"{path} has no {mark}: it is something else, and is not replaced. Give another name.")
        if not overwrite:
            raise OutputError(f"{path} exists; give --overwrite to replace it.")
    elif os.path.lexists(path):
        raise OutputError(f"{path} exists and is not a directory of its own; give another name.")
    for read in inputs:
        if read is not None and Path(os.path.realpath(read)).is_relative_to(os.path.realpath(path)):
            raise OutputError(f"{path} holds {read}, which is read and would be gone; give another name.")
    check_place(Path(os.path.abspath(path)))  # of `.`, too


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What a file system says that has no links: ENOTSUP on macOS, where it is another number, and EINVAL on Windows."""


def _link(source: str, path: str | Path, nameless: int | None) -> None:
    # A directory descriptor, unused with an absolute name, makes Python call linkat, which follows links. Windows has
    # neither, and Python 3.14 refuses there even to be asked for it.
    followed = {} if nameless is None else {"src_dir_fd": nameless, "follow_symlinks": True}
    try:
        os.link(source, path, **followed)
    except OSError as error:
        if nameless is not None or error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(source, path)  # exFAT and its like have no links


def _open_nameless(directory: Path) -> int | None:
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):  # this file system cannot
            return None
        raise


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError) or is_of_source(error):
            raise
        if isinstance(error, FileExistsError):
            raise OutputError(f"{path} has come up during the work; give --overwrite to replace it.") from None
        raise OutputError(describe(path, error)) from None


def describe(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {path} could not be finished, and nothing was left there. Free some space first."
    return f"{path} could not be written ({error.strerror or error}), and nothing was left there."


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
