"""The project as a whole: what the wheel holds, that the tree is clean, that the README is true."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gpurender

ROOT = Path(__file__).resolve().parents[1]
AS_TEXT: Any = {"capture_output": True, "text": True, "check": False}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"gpurender/{file.name}" for file in (ROOT / "gpurender").glob("*.py")}
    assert modules <= set(names)
    demo = ROOT / "gpurender" / "demo"
    bundled = [file for file in demo.rglob("*") if file.is_file() and not {"training", "__pycache__"} & {*file.parts}]
    assert {str(file.relative_to(ROOT)) for file in bundled} <= set(names)
    assert {f"gpurender/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")} <= set(names)
    assert "gpurender/py.typed" in names
    assert not any("training" in name for name in names)
    assert all(name.startswith(("gpurender/", "gpurender-")) for name in names)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_an_archive_without_links_installs(tmp_path: Path) -> None:
    """A ZIP of the repository, as pip unpacks it: links are text files there."""
    subprocess.run(["git", "archive", "--format=zip", "-o", tmp_path / "a.zip", "HEAD"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path / "a.zip"]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "gpurender/kernels/crop.py" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]])
def test_the_tree_is_clean(command: list[str]) -> None:
    tool = [sys.executable, "-m", *command]
    options = ["--pythonpath", sys.executable] if command[0] == "pyright" else ["."]
    result = subprocess.run([*tool, *options], cwd=ROOT, **AS_TEXT)
    assert result.returncode == 0, result.stdout


def test_public_names_are_documented() -> None:
    for name in gpurender.__all__:
        assert (getattr(gpurender, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_kernels_are_in_the_package_and_in_nobodys_way(tmp_path: Path) -> None:
    """The name `kernels` belongs to another package. From a checkout it is a namespace at most, which gives way to it;
    from a wheel it is nothing, see above."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True")
    asks = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; from gpurender.kernels import crop"
    done = subprocess.run([sys.executable, "-c", f"{asks}; print(kernels.theirs, crop.__name__)"], **AS_TEXT, cwd="/")
    assert done.stdout.split() == ["True", "gpurender.kernels.crop"], done.stderr


def test_the_readmes_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = [file for file in (ROOT / "gpurender").glob("*/[a-z]*.py") if "training" not in file.parts]
    for file in [*(ROOT / "gpurender").glob("*.py"), *folders]:
        assert re.search(rf"^\s+{re.escape(file.name)}\s", readme, re.MULTILINE), f"{file.name} is not in the README"
