"""A file that appears under its name only when it is complete."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError


def check_output(path: Path, overwrite: bool) -> None:
    """Raise OutputError if `path` cannot be written to, before any work is done for it."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file name in it.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give --overwrite to replace it.")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a directory, so {path.name} cannot be written there.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} is not yours to write to, so {path.name} cannot be written there.")


@contextmanager
def complete_or_absent(path: Path, overwrite: bool) -> Iterator[str]:
    """Yield a file name to write to; what is there when the block ends well appears at `path`, else nothing does.

    Where the system allows it (Linux), the file has no name until then, so that not even a killed process leaves one.

    Raises:
        OutputError: `path` exists (unless `overwrite`), cannot be written, or the disk is full.
    """
    check_output(path, overwrite)
    with _output_errors(path):
        nameless = _open_nameless(path.parent)
        if nameless is None:
            descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
            os.close(descriptor)
            os.chmod(temporary, 0o666 & ~_umask())
        else:
            temporary = f"/proc/self/fd/{nameless}"
        try:
            yield temporary
            if nameless is not None:
                link = path
                if path.exists():
                    link = path.with_name(f".{path.name}.{os.getpid()}")
                # A directory descriptor, unused with an absolute name, makes Python call linkat, which follows links.
                os.link(temporary, link, src_dir_fd=nameless, follow_symlinks=True)
                if link != path:
                    os.replace(link, path)
            elif overwrite:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # unlike a rename, this refuses a file that has come up meanwhile
        finally:
            if nameless is not None:
                os.close(nameless)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)


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
    except FileExistsError:
        raise OutputError(f"{path} has come up during the work; give --overwrite to replace it.") from None
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(describe(path, error)) from None


def describe(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {path} could not be finished, and nothing was left there. Free some space first."
    return f"{path} could not be written ({error.strerror or error}), and nothing was left there."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
