"""The errors that a user can act on. Each message says what was given, what is allowed and what to do next."""

import os
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """What was given cannot be used: a template, a sound, features, a network, an output path."""


class DeviceError(RuntimeError):
    """The device or engine that was asked for is not here."""


class OutputError(OSError):
    """The result could not be written: the disk is full, or the path cannot be written to."""


def check_choice(what: str, given: object, choices: Iterable[str]) -> None:
    """Raise InputError for what is none of the choices: a wrong word must not choose for itself."""
    if given not in (known := list(choices)):
        raise InputError(f"{given!r} is no {what}; choose {', '.join(known)}.")


def check_no_pipe(path: Path) -> None:
    """Raise InputError for a pipe or a device: reading it could go on for ever."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # raise nothing, unlike Path's
        raise InputError(f"{path} is a pipe or a device; save it to a file first.")


def first_line(error: Exception) -> str:
    """What a library's error says, without the lines behind the first; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :.")
