"""The facade of other implementations, called as their quick start calls it."""

import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import REPEATABLE_WIDTH, MakeTemplate

from gpurender import FrameGenerationPipeline, InputError, OutputError, compare_frames, make
from gpurender.network import Mode


@pytest.fixture
def aud_ave(tmp_path: Path) -> Path:
    np.save(tmp_path / "aud_ave.npy", np.random.RandomState(3).uniform(0, 2, (20, 512)).astype(np.float32))
    return tmp_path / "aud_ave.npy"


def pictures(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def test_the_quick_start(
    make_template: MakeTemplate, aud_ave: Path, speech: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    template, out = make_template(width=3 * REPEATABLE_WIDTH, parsing=True), tmp_path / "result.mp4"
    pipeline = FrameGenerationPipeline(checkpoint_path=str(tiny_onnx), mode="ave")
    written = pipeline.generate_video(
        audio_features_path=str(aud_ave), template_dir=str(template), audio_path=str(speech), output_path=str(out)
    )
    assert written == str(out)
    make(template, aud_ave, tmp_path / "made.mp4", model=tiny_onnx, sound=speech, parsing=False)
    assert out.read_bytes() == (tmp_path / "made.mp4").read_bytes()
    with av.open(str(out)) as container:
        assert container.streams.audio[0].rate == 22050
    assert len(pictures(out)) == 20


def test_reference_outputs(make_template: MakeTemplate, aud_ave: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    template, pipeline = make_template(), FrameGenerationPipeline(tiny_onnx)
    stored = pipeline.generate_reference_outputs(
        audio_features_path=str(aud_ave), template_dir=str(template), output_dir=str(tmp_path / "reference")
    )
    assert len(stored) == 5
    make(template, aud_ave, tmp_path / "frames/%05d.png", model=tiny_onnx, precision="fp32")
    assert compare_frames(tmp_path / "reference", tmp_path / "frames", min_psnr_db=100).alike


def test_what_may_be_chosen(
    make_template: MakeTemplate, aud_ave: Path, speech: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    template = make_template(width=3 * REPEATABLE_WIDTH, parsing=True)
    pipeline = FrameGenerationPipeline(tiny_onnx, device="cpu")
    options = {"start_frame": 2, "use_parsing": True, "crf": 30, "fps": 30}
    pipeline.generate_video(aud_ave, template, None, tmp_path / "a.mp4", **options)
    make(
        *(template, aud_ave, tmp_path / "b.mp4"),
        model=tiny_onnx,
        start_frame=2,
        parsing=True,
        quality=30,
        fps=30,
    )
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 30
        assert not container.streams.audio
    with pytest.raises(OutputError, match=r"a\.mp4 exists; give --overwrite"):
        pipeline.generate_video(aud_ave, template, None, tmp_path / "a.mp4")
    pipeline.generate_video(aud_ave, template, speech, tmp_path / "a.mp4", overwrite=True)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.audio


def test_another_mode(
    make_template: MakeTemplate, tiny_of: Callable[[Mode], Path], tmp_path: Path, aud_ave: Path
) -> None:
    np.save(tmp_path / "wenet.npy", np.zeros((5, 16, 512), np.float32))
    pipeline = FrameGenerationPipeline(tiny_of("wenet"), mode="wenet")
    pipeline.generate_video(tmp_path / "wenet.npy", make_template(), None, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 20
    with pytest.raises(InputError, match=r"aud_ave\.npy holds ave features, but the pipeline was made for wenet"):
        pipeline.generate_video(aud_ave, make_template("bea"), None, tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()


def test_bad_input(tmp_path: Path, tiny_onnx: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pth: there is no such network file"):
        FrameGenerationPipeline(tmp_path / "none.pth")
    with pytest.raises(InputError, match="'deepspeech' is no kind of features; choose ave, hubert, wenet"):
        FrameGenerationPipeline(tiny_onnx, mode="deepspeech")  # pyright: ignore
    with pytest.raises(InputError, match="no such sound or feature file"):
        FrameGenerationPipeline(tiny_onnx).generate_video(tmp_path / "no.npy", tmp_path, None, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []
