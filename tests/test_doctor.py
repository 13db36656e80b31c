"""`gpurender doctor` tries for real what is here; a stand-in only for a path that breaks."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gpurender import doctor
from gpurender.cli import main
from gpurender.doctor import Examination, examine, tried
from gpurender.errors import DeviceError


@pytest.fixture(scope="module")
def examination() -> Examination:
    return examine()


def test_everything_that_the_cpu_can_do_is_tried(examination: Examination) -> None:
    on_cpu = {check.path: check for check in examination.checks if check.device == "cpu"}
    expected = {
        *("pictures, pillow", "pictures, dali", "video, pyav"),
        *("openvino fp32", "openvino mixed", "openvino bf16", "openvino int8", "torch fp32"),
        *("kernels", "h264, software", "hevc, software", "av1, software", "mjpeg"),
    }
    assert set(on_cpu) == expected
    for path in expected - {
        "openvino mixed",
        "openvino bf16",
        "openvino int8",
        "kernels",
    }:  # which not every processor has
        assert on_cpu[path].works, on_cpu[path]
    assert "ms a picture of 1280×720" in on_cpu["pictures, dali"].detail
    assert on_cpu["h264, software"].detail.startswith("libx264: 32 frames")
    assert "AVX" in on_cpu["kernels"].detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_and_what_a_render_uses(examination: Examination) -> None:
    assert examination.gpus == []
    assert examination.no_gpu is not None
    on_gpu = {check.path: check for check in examination.checks if check.device == "cuda"}
    assert set(on_gpu) == {"video, nvdec", "kernels", "tensorrt", "nvenc"}
    assert not any(check.works for check in on_gpu.values())
    assert "there is no GPU to run it" in on_gpu["tensorrt"].detail
    used = examination.render
    assert (used["device"], used["engine"], used["decoder"], used["encoder"]) == ("cpu", "openvino", "pyav", "libx264")
    text = str(examination)
    assert f"a render here would use: openvino {used['precision']} on cpu, decoder pyav, encoder libx264" in text
    assert f"GPU        {examination.no_gpu}" in text
    assert max(len(line) for line in text.splitlines() if "works" in line) <= 120


def test_its_json_is_its_text(examination: Examination) -> None:
    loaded = json.loads(json.dumps(examination.as_dict()))
    assert len(loaded["checks"]) == len(examination.checks)
    assert loaded["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_path_that_breaks_does_not_hide_the_others() -> None:
    def refuses(directory: Path, device: str) -> str:
        raise DeviceError("all sessions are taken.")

    def breaks(directory: Path, device: str) -> str:
        raise KeyError("odd")

    assert tried("encode", "nvenc", "cuda:0", refuses).detail == "all sessions are taken."
    broken = tried("encode", "nvenc", "cuda:0", breaks)
    assert (broken.works, broken.detail) == (False, "fails unexpectedly (KeyError: 'odd')")


def test_without_a_temporary_directory_it_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**given: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", none)
    assert "No usable temporary directory" in doctor.trial_render()["error"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, examination: Examination) -> None:
    monkeypatch.setattr("gpurender.doctor.examine", lambda notify: examination)
    plain = CliRunner().invoke(main, ["doctor"])
    assert (plain.exit_code, plain.stdout) == (0, f"{examination}\n")
    as_json = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(as_json.stdout)["render"] == examination.render


@pytest.mark.gpu
def test_the_gpus_paths_are_tried(examination: Examination) -> None:
    checks = {check.path: check for check in examination.checks if check.device == "cuda:0"}
    assert checks["torch fp32"].works
    assert checks["torch fp16"].works
    assert not [check for check in checks.values() if "unexpectedly" in check.detail]
    assert examination.render["device"] in ("cuda", "cuda:0")
