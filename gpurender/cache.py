"""The user's cache: what is made once of a network, and kept between runs."""

import mmap
import os
from collections.abc import Iterable
from hashlib import file_digest, sha256
from pathlib import Path

from .errors import OutputError
from .output import write_text


def cache_directory() -> Path:
    """`$GPURENDER_CACHE`, or `gpurender` in `$XDG_CACHE_HOME` or `~/.cache`: private to the user."""
    given = os.environ.get("GPURENDER_CACHE")
    try:
        path = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpurender")
    except RuntimeError:  # a user whom the system does not know
        raise OutputError("there is no home directory for a cache; set GPURENDER_CACHE.") from None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = hasattr(os, "getuid") and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022)
    except OSError as error:
        raise OutputError(f"cache directory {path} cannot be made ({error.strerror}); set GPURENDER_CACHE.") from None
    if foreign:  # somebody else could put a network there for us to run
        raise OutputError(f"cache directory {path} is not yours alone to write; set GPURENDER_CACHE to another.")
    return path


def seal(sums: Path, files: Iterable[Path]) -> None:
    """Write the SHA-256 of files beside `sums` into it, as sha256sum does; `is_whole` checks them. All become the
    user's alone, as the cache must be."""
    files = [*files]
    write_text(sums, sums_of(files), overwrite=True)
    for file in (*files, sums):
        file.chmod(0o600)


def is_whole(sums: Path, files: Iterable[Path]) -> bool:
    """Whether these are the files that were sealed, all of them and as they were: a full disk or a lost power supply
    may have cut them off, or left zeros in them, and a network would draw wrongly without a word."""
    try:
        written = sums.read_text("utf-8")
        return bool(written) and written == sums_of(files)
    except (OSError, ValueError):
        return False


def sums_of(files: Iterable[Path]) -> str:
    return "".join(f"{hash_of(file)}  {file.name}\n" for file in sorted(files))


def hash_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def hash_of_network(file: Path) -> str:
    """The same of an ONNX file together with those beside it in which its weights may lie.

    Raises:
        OSError, ValueError: the file cannot be read, or is empty.
    """
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"location") < 0:  # as ONNX calls where weights lie; most files hold them, and are not parsed
            return hash_of(file)
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except DecodeError:  # whoever reads it will say so
        return hash_of(file)
    tensors = (*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute))
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    beside = [path for name in sorted(names) if (path := file.parent / name).is_file()]
    return sha256("".join(map(hash_of, [file, *beside])).encode()).hexdigest()
