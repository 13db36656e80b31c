"""PyNvVideoCodec, by which NVDEC and NVENC are used, and its errors."""

import importlib
import logging
import re
from types import ModuleType

from .cuda import CONTAINER, NO_DRIVER, driver_is_here
from .errors import DeviceError, first_line

NO_NVENC, NO_MEMORY = 2, 10  # NVENC's status codes
HAS_NO_NVENC = "this GPU has no NVENC (A100, H100 and H200 have none), or not for this codec."


def load_pynvvideocodec() -> ModuleType:
    """PyNvVideoCodec; imported where it is used, because it needs the driver's libraries.

    Raises:
        DeviceError: it is not installed, or does not find the driver.
    """
    logging.getLogger("PyNvVideoCodec").addHandler(logging.NullHandler())  # what it logs is in its errors as well
    try:
        return importlib.import_module("PyNvVideoCodec")
    except ModuleNotFoundError:
        raise DeviceError("PyNvVideoCodec is not installed; pip install 'gpurender[gpu]'.") from None
    except (ImportError, RuntimeError, OSError) as error:
        raise DeviceError(explained(error)) from None


def explained(error: Exception) -> str:
    """One line on why the video hardware cannot be used, and what to do."""
    text = str(error)
    if "libcuda.so" in text or ("libnvidia-encode.so" in text and not driver_is_here()):
        return NO_DRIVER
    if "libnvidia-encode.so" in text or "libnvcuvid" in text:
        return f"the NVIDIA driver's video libraries are missing; {CONTAINER}"
    if "too old" in text:
        return "the NVIDIA driver is too old for PyNvVideoCodec; update it."
    found = re.search(r"error code : (\d+)", text, re.IGNORECASE)
    code = int(found.group(1)) if found else None
    if code == NO_NVENC:
        return HAS_NO_NVENC
    if code == NO_MEMORY:
        return "NVENC's sessions or memory are used up; end other encoders on this GPU."
    return f"NVENC failed ({reason(error)})."


def reason(error: Exception) -> str:
    """What went wrong, in one line: PyNvVideoCodec's messages have it after `Error Type`."""
    told = re.search(r"Error Type : (.*)", str(error))
    return told.group(1).strip(" :.") if told else first_line(error)
