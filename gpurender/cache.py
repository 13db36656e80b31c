"""The user's cache: what is made once of a network, and kept between runs."""

import os
from hashlib import file_digest
from pathlib import Path

from .errors import OutputError


def cache_directory() -> Path:
    """`$GPURENDER_CACHE`, or `gpurender` in `$XDG_CACHE_HOME` or `~/.cache`: private to the user."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("GPURENDER_CACHE") or home / "gpurender")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = hasattr(os, "getuid") and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022)
    except OSError as error:
        raise OutputError(f"cache directory {path} cannot be made ({error.strerror}); set GPURENDER_CACHE.") from None
    if foreign:  # somebody else could put a network there for us to run
        raise OutputError(f"cache directory {path} is not yours alone to write; set GPURENDER_CACHE to another.")
    return path


def hash_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
