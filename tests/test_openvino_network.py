import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch

import gpurender.openvino_network as module
from gpurender import InputError, openvino_requests, predict
from gpurender.cache import cache_directory, is_whole
from gpurender.export import example_input
from gpurender.openvino_engine import OpenVinoEngine
from gpurender.openvino_network import cached_network, make_ready
from gpurender.openvino_requests import UnderWay, has_bfloat16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "cache"))


def drawn(network: module.OnnxNetwork) -> torch.Tensor:
    return predict(OpenVinoEngine(network, "fp32"), *example_input(2, "ave"))


def kept() -> list[Path]:
    """Networks; kernels are kept beside them."""
    return sorted(cache_directory().glob("*-openvino*"))


def refuse(*given: object) -> None:
    raise AssertionError("it was made anew")


def test_the_second_time_it_comes_from_the_cache(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(make_ready(tiny_onnx, None))
    assert kept() == []
    assert torch.equal(drawn(cached_network(tiny_onnx, None)), expected)
    assert len(kept()) == 1
    monkeypatch.setattr(module, "make_ready", refuse)
    again = cached_network(tiny_onnx, None)
    assert again.mode == "ave"
    assert torch.equal(drawn(again), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_takes_no_more_cores_than_control_groups_allow(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if precision == "bf16" and not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(openvino_requests, "cores_to_run_on", lambda: 2)
    monkeypatch.setattr(openvino_requests, "usable_cores", lambda: 1)
    network = make_ready(tiny_onnx, None)
    assert OpenVinoEngine(network, precision).batch == 2  # while one frame is drawn, the next is prepared
    compiled = openvino_requests.compiled_model(network.decoder, precision)
    assert not compiled.get_property("ENABLE_CPU_PINNING")  # to the cores that other processes are bound to, too
    monkeypatch.setattr(openvino_requests, "usable_cores", lambda: 2)
    assert openvino_requests.own_threads() == {}  # as many as OpenVINO sees


@pytest.mark.parametrize("name", ["decoder.bin", "encoder.bin", "encoder.xml", "decoder.xml"])
def test_what_is_cut_off_is_made_anew(tiny_onnx: Path, name: str) -> None:
    cached_network(tiny_onnx, None)
    (directory,) = kept()
    file = directory / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    network = cached_network(tiny_onnx, None)
    assert torch.equal(drawn(network), drawn(make_ready(tiny_onnx, None)))
    assert is_whole(directory / "SHA256SUMS", directory.glob("*coder.*"))
    assert kept() == [directory]


def zeroed(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def shorter_by_a_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("encoder.xml", Path.unlink),
        ("decoder.xml", Path.unlink),
        ("SHA256SUMS", Path.unlink),
        ("SHA256SUMS", shorter_by_a_line),
        ("encoder.bin", zeroed),
    ],
)
def test_what_is_damaged_is_made_anew(tiny_onnx: Path, name: str, damage: Callable[[Path], None]) -> None:
    cached_network(tiny_onnx, None)
    (directory,) = kept()
    damage(directory / name)
    assert torch.equal(drawn(cached_network(tiny_onnx, None)), drawn(make_ready(tiny_onnx, None)))
    assert is_whole(directory / "SHA256SUMS", directory.glob("*coder.*"))
    assert kept() == [directory]


def test_what_another_program_has_just_made_stays(tiny_onnx: Path) -> None:
    """Somebody may be reading it."""
    cached_network(tiny_onnx, None)
    (directory,) = kept()
    before = directory.stat().st_ino
    module.keep(make_ready(tiny_onnx, None), directory)
    assert directory.stat().st_ino == before


def test_a_network_that_is_replaced_while_it_is_read_is_made_anew(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for one without a first half."""
    cached_network(tiny_onnx, None)
    (directory,) = kept()
    monkeypatch.setattr(module, "is_whole", lambda sums, files: True)  # as it was a moment ago
    (directory / "encoder.xml").unlink()
    assert torch.equal(drawn(cached_network(tiny_onnx, None)), drawn(make_ready(tiny_onnx, None)))
    (directory / "SHA256SUMS").unlink()
    assert torch.equal(drawn(cached_network(tiny_onnx, None)), drawn(make_ready(tiny_onnx, None)))


def test_a_network_that_is_replaced_while_it_is_made_ready_is_not_kept(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for the one before."""

    def replacing(path: Path, mode: None) -> module.OnnxNetwork:
        made = make_ready(path, mode)
        path.write_bytes(path.read_bytes() + b"\0")
        return made

    monkeypatch.setattr(module, "make_ready", replacing)
    cached_network(Path(shutil.copy(tiny_onnx, tmp_path / "a.onnx")), None)
    assert kept() == []


def test_what_a_killed_program_left_is_removed_once_nobody_is_at_it(tiny_onnx: Path) -> None:
    left, fresh = (cache_directory() / f".{digit * 32}-ave-x" for digit in "01")
    for hidden in (left, fresh):
        hidden.mkdir()
    os.utime(left, (0, 0))
    cached_network(tiny_onnx, None)
    assert (left.exists(), fresh.exists()) == (False, True)


def test_a_network_of_another_kind_is_refused_each_time(tiny_onnx: Path) -> None:
    cached_network(tiny_onnx, None)
    for _ in range(2):
        with pytest.raises(InputError, match="hubert"):
            cached_network(tiny_onnx, "hubert")


def test_a_network_whose_weights_lie_beside_it_is_kept_with_them(tiny_onnx: Path, tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    onnx.save(onnx.load(tiny_onnx), file, save_as_external_data=True, location="weights.data", size_threshold=1024)
    before = drawn(cached_network(file, None))
    weights = tmp_path / "weights.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert not torch.equal(drawn(cached_network(file, None)), before)
    assert len(kept()) == 2


def test_without_a_cache_it_works(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPURENDER_CACHE", str(tmp_path / "file"))
    assert drawn(cached_network(tiny_onnx, None)).shape == (2, 3, 320, 320)


@pytest.mark.parametrize("content", [b"", b"no network"])
def test_files_that_are_no_networks(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX network"):
        cached_network(file, None)


class Failing:
    """Stands for a request."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1
        if self.fails:
            raise RuntimeError("no")


def test_a_request_that_fails_does_not_keep_the_others_from_being_awaited() -> None:
    requests = [Failing(False), Failing(True), Failing(False)]
    under_way = UnderWay([])
    under_way.requests = cast(Any, requests)
    with pytest.raises(RuntimeError, match="no"):
        under_way.wait()
    assert [request.waited for request in requests] == [1, 1, 1]
