"""NVIDIA's driver libraries for machines without them: enough for PyNvVideoCodec to be imported and asked.

from driver_stub import driver_stub_fixture as driver_stub_fixture  # makes the fixture `driver_stub` known

def test_something(driver_stub: dict[str, str]) -> None:
    done = run_python("import PyNvVideoCodec", driver_stub)            # there is no GPU
    done = run_python("import PyNvVideoCodec", driver_stub, gpus=1)    # one without memory, NVDEC and NVENC
    done = run_python("import PyNvVideoCodec", driver_stub, gpus=1, nvenc=True)    # one that says what it is told
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
UNCHECKED = "NOTHING IS CHECKED AGAINST THE REAL PyNvVideoCodec HERE"


@pytest.fixture(scope="session", name="driver_stub")
def driver_stub_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a Python process finds the stub; see `run_python`."""
    if sys.platform != "linux":
        pytest.skip(f"the driver's stub is for Linux: {UNCHECKED}")
    if importlib.util.find_spec("PyNvVideoCodec") is None:
        pytest.skip(f"PyNvVideoCodec is not installed: {UNCHECKED}")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip(f"no C compiler for the driver's stub: {UNCHECKED}")
    directory = tmp_path_factory.mktemp("driver")
    for library, flags in (("libcuda.so.1", ["-DLIBCUDA"]), ("libnvidia-encode.so.1", [])):
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", directory / library, SOURCE], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(directory)}


def run_python(
    code: str, environment: dict[str, str], gpus: int = 0, nvenc: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run some Python in a process of its own, which stands no risk to end the tests' own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "STUB_GPUS": str(gpus), **({"STUB_NVENC": "1"} if nvenc else {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
