"""NVENC: our side against a stand-in for PyNvVideoCodec whose bytes are x264's; the real thing where there is one."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from av.video.codeccontext import VideoCodecContext
from driver_stub import driver_stub_fixture as driver_stub_fixture
from driver_stub import run_python
from torch.utils.dlpack import from_dlpack
from videos import clicks, smooth

from gpurender import DeviceError, nvenc, pynvvideocodec, rgb_to_nv12, write_frames
from gpurender.encode import open_encoder
from gpurender.nvenc import session_settings
from gpurender.pynvvideocodec import explained
from gpurender.software_encoder import Codec


class PyNvVCException(Exception):
    """As the real one's text is."""

    def __init__(self, code: int) -> None:
        super().__init__(f"PyNvEncoderCaps : \nError code : {code}\nError Type : NvEncOpen returned error {code}\nat …")


class StandIn:
    """What we use of PyNvVideoCodec, on host memory: it takes surfaces by `cuda()` and `__dlpack__(stream)`, checks
    no width, and gives pictures in the order in which they are decoded."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.abilities = {"num_max_bframes": 3, "width_max": 4096, "height_max": 4096}
        self.refusal: Exception | None = None
        self.unable: Exception | None = None
        self.broken: Exception | None = None
        self.settings: dict[str, Any] = {}
        self.surfaces: list[torch.Tensor] = []

    NV_ENC_PIC_PARAMS = SimpleNamespace

    def GetEncoderCaps(self, gpuid: int, codec: str) -> dict[str, int]:
        self.asked.append((gpuid, codec))
        if self.unable is not None:
            raise self.unable
        return self.abilities

    def CreateEncoder(self, width: int, height: int, kind: str, on_host: bool, **settings: Any) -> "StandIn":
        assert (kind, on_host) == ("NV12", False)
        if self.refusal is not None:
            raise self.refusal
        self.settings = settings
        self.context = cast(VideoCodecContext, av.CodecContext.create("libx264", "w"))
        self.context.width, self.context.height, self.context.pix_fmt = width, height, "nv12"
        self.context.framerate = Fraction(settings["fps"])
        self.context.time_base = 1 / self.context.framerate
        options = {"bf": settings["bf"], "g": settings["gop"], "crf": settings["cq"], "b-pyramid": "none"}
        self.context.options = {**options, "b_strategy": "0"}
        return self

    def Encode(self, frame: Any, picture: SimpleNamespace) -> list[dict[str, Any]]:
        surface = from_dlpack(frame.cuda().__dlpack__(None)).clone()
        self.surfaces.append(surface)
        video_frame = av.VideoFrame.from_ndarray(surface.numpy(), "nv12")
        video_frame.pts = picture.inputTimeStamp
        return self._given(self.context.encode(video_frame))

    def EndEncode(self) -> list[dict[str, Any]]:
        if self.broken is not None:
            raise self.broken
        return self._given(self.context.encode(None))

    def _given(self, packets: list[av.Packet]) -> list[dict[str, Any]]:
        return [{"data": bytearray(bytes(p)), "timestamp": p.pts, "picture_type": None} for p in packets]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """PyNvVideoCodec's stand-in, and streams that a machine without a GPU lacks."""
    codec = StandIn()
    monkeypatch.setattr(nvenc, "load_pynvvideocodec", lambda: codec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "a GPU")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=1234))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    nvenc.told_abilities.cache_clear()
    yield codec
    nvenc.told_abilities.cache_clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the encoder chosen for frames on the CPU as it is for frames on a GPU."""

    def chosen(encoder: Any, container: Any, codec: Any, quality: Any, rate: Any, first: torch.Tensor) -> Any:
        on_gpu = SimpleNamespace(device=torch.device("cuda:0"), shape=first.shape, ndim=first.ndim)
        made, notes = open_encoder(encoder, container, codec, quality, rate, cast(torch.Tensor, on_gpu))
        made._device = first.device  # pyright: ignore[reportAttributeAccessIssue]
        return made, notes

    monkeypatch.setattr("gpurender.encode.open_encoder", chosen)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("b_frames", [0, 2])
def test_frames_go_through_nvenc_into_a_video(tmp_path: Path, stand_in: StandIn, b_frames: int) -> None:
    stand_in.abilities["num_max_bframes"] = b_frames
    frames = smooth(60)
    sound = clicks(tmp_path / "a.wav", 48000, 2, seconds=2.4)
    out = tmp_path / "a.mp4"
    written = write_frames(iter(frames.split([7, 1, 20, 32])), out, fps=25, sound=sound)
    assert written == (60, "nvenc h264", [])
    assert torch.equal(torch.stack(stand_in.surfaces), rgb_to_nv12(frames))
    assert stand_in.settings["bf"] == str(b_frames)
    assert stand_in.settings["cudastream"] != 0
    with av.open(str(out)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.index, audio.index) == (0, 1)
        assert float(audio.duration * audio.time_base) == pytest.approx(2.4, abs=0.03)  # pyright: ignore
        decoded = list(container.decode(video))
    assert [frame.time for frame in decoded] == pytest.approx([i / 25 for i in range(60)])
    for frame, original in zip(decoded, frames, strict=True):
        difference = frame.to_ndarray(format="rgb24").astype(int) - original.permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_odd_sizes_are_made_even(tmp_path: Path, stand_in: StandIn) -> None:
    write_frames([smooth(3, width=33, height=17)], tmp_path / "a.mp4", fps=25, encoder="nvenc")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (34, 18)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_abilities_are_asked_once(tmp_path: Path, stand_in: StandIn) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_frames([smooth(3)], tmp_path / name, fps=25)
    assert stand_in.asked == [(0, "h264")]


@pytest.mark.parametrize(("code", "times"), [(2, 1), (10, 3)])
def test_a_gpu_without_nvenc_is_asked_once_and_one_whose_sessions_are_taken_again(
    stand_in: StandIn, code: int, times: int
) -> None:
    """Each question that fails leaves a CUDA context behind."""
    stand_in.unable = PyNvVCException(code)
    for _ in range(3):
        with pytest.raises(DeviceError, match=re.escape(explained(stand_in.unable))):
            nvenc.encoder_abilities(0, "h264")
    assert len(stand_in.asked) == times


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_gpus_that_are_known_to_have_no_nvenc_are_not_asked(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    with pytest.raises(DeviceError, match="this GPU has no NVENC"):
        nvenc.encoder_abilities(0, "h264")
    assert stand_in.asked == []


def test_among_unlike_gpus_the_first_one_is_asked(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyNvVideoCodec asks GPU 0, whatever number it is given."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: ["NVIDIA A100", "NVIDIA L4", "NVIDIA A100"][gpu])
    nvenc.encoder_abilities(2, "h264")
    with pytest.raises(DeviceError, match=r"CUDA_VISIBLE_DEVICES=1 and give --device cuda:0"):
        nvenc.encoder_abilities(1, "h264")
    assert stand_in.asked == [(2, "h264")]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_encoder_that_fails_at_the_end_is_explained(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.broken = PyNvVCException(20)
    with pytest.raises(DeviceError, match=r"NVENC failed \(NvEncOpen returned error 20\)"):
        write_frames([smooth(3)], tmp_path / "a.mp4", fps=25, encoder="nvenc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (PyNvVCException(2), "this GPU has no NVENC"),
        (PyNvVCException(10), "NVENC's sessions or memory are used up; end other encoders"),
        (PyNvVCException(20), r"NVENC failed \(NvEncOpen returned error 20\)"),
        (RuntimeError("something else\nand more"), r"NVENC failed \(something else\)"),
    ],
)
def test_without_nvenc_auto_goes_to_x264_and_says_why(
    tmp_path: Path, stand_in: StandIn, refusal: Exception, words: str
) -> None:
    stand_in.refusal = refusal
    frames = smooth(5)
    with pytest.raises(DeviceError, match=words):
        write_frames([frames], tmp_path / "a.mp4", fps=25, encoder="nvenc")
    assert list(tmp_path.iterdir()) == []
    written = write_frames([frames], tmp_path / "a.mp4", fps=25)
    assert (written.frames, written.encoder) == (5, "libx264")
    assert len(written.notes) == 1
    assert written.notes[0].startswith("NVENC is not used: ")
    assert re.search(words, written.notes[0])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_picture_too_large_for_nvenc(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.abilities["width_max"] = 32
    with pytest.raises(DeviceError, match=r"NVENC makes h264 up to 32×4096 here, not 96×64"):
        write_frames([smooth(1)], tmp_path / "a.mp4", fps=25, encoder="nvenc")


def test_frames_on_the_cpu_are_not_nvencs(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the nvenc encoder takes frames on a GPU"):
        write_frames([smooth(1)], tmp_path / "a.mp4", fps=25, encoder="nvenc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_settings(codec: Codec) -> None:
    settings = session_settings(codec, 21, Fraction(30000, 1001), 2)
    assert settings["codec"] == codec
    assert (settings["rc"], settings["cq"], settings["bitrate"]) == ("vbr", "21", 0)
    assert (settings["fps"], settings["gop"], settings["bf"]) == ("30000/1001", "120", "2")
    assert settings.get("use_ivf_container") == ("0" if codec == "av1" else None)
    assert session_settings(codec, 0, Fraction(25), 2)["cq"] == "1"  # NVENC takes 0 for "as you like"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("libcuda.so.1: cannot open shared object file", "there is no NVIDIA driver here"),
        ("libnvidia-encode.so.1: cannot open shared object file", "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"),
        ("Driver version is too old", "too old for PyNvVideoCodec; update it"),
    ],
)
def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, message: str, words: str) -> None:
    monkeypatch.setattr(pynvvideocodec, "driver_is_here", lambda: True)
    line = explained(RuntimeError(message + "\n\n=== TROUBLESHOOTING STEPS ===\n…"))
    assert words in line
    assert "\n" not in line


ON_THE_STUB = """
import ctypes
from fractions import Fraction
import PyNvVideoCodec, torch
from gpurender.nvenc import Surface, session_settings

class OnGpu(Surface):
    def __dlpack__(self, stream=None):
        print("asked for stream", stream, flush=True)
        capsule = self._tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2  # kDLCUDA
        return capsule

    def __dlpack_device__(self):
        return 2, 0

caps = PyNvVideoCodec.GetEncoderCaps(gpuid=0, codec="{codec}")
print("abilities", caps["num_max_bframes"], caps["width_max"], caps["height_max"])
settings = session_settings("{codec}", 21, Fraction(30000, 1001), 2)
session = PyNvVideoCodec.CreateEncoder(64, 48, "NV12", False, gpu_id=0, cudastream=4660, **settings)
pictures = []
for number in range(9):
    about = PyNvVideoCodec.NV_ENC_PIC_PARAMS()
    about.inputTimeStamp = number
    pictures += session.Encode(OnGpu(torch.zeros(72, 64, dtype=torch.uint8)), about)
pictures += session.EndEncode()
print("pictures", [(bytes(p["data"]).decode(), p["timestamp"]) for p in pictures])
"""


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_the_real_package_understands_us(driver_stub: dict[str, str], codec: str) -> None:
    """PyNvVideoCodec itself, on a stub of the driver: it takes our settings for what we mean, and our surfaces."""
    done = run_python(ON_THE_STUB.format(codec=codec), driver_stub, gpus=1, nvenc=True)
    assert done.returncode == 0, done.stderr
    told = sorted(set(done.stdout.splitlines()))
    session = (  # P pictures 3 apart have 2 B-frames between them; rate control 1 is variable
        "session 64x48, 30000/1001 a second, gop 120, interval of P 3, rate control 1, bitrate 0, at most 0, quality 21"
    )
    assert session in told
    assert "abilities 3 4096 4096" in told
    assert "asked for stream 4660" in told
    assert "copy 64x48 on stream 4660" in told
    assert "copy 64x24 on stream 4660" in told
    assert f"pictures {[(f'picture {i}', i) for i in range(9)]}" in told


def test_the_real_package_without_nvenc_is_explained(driver_stub: dict[str, str]) -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_capability = torch.cuda.get_device_name = lambda gpu: (8, 9)\n"
        "from gpurender.nvenc import encoder_abilities\n"
        "try: encoder_abilities(0, 'h264')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = run_python(code, driver_stub, gpus=1)
    assert done.stdout == (
        "DeviceError this GPU has no NVENC (A100, H100 and H200 have none), or not for this codec.\n"
    ), done.stderr
    assert "PyNvVideoCodec" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_the_gpus_nvenc(tmp_path: Path, codec: Codec) -> None:
    try:
        nvenc.encoder_abilities(0, codec)
    except DeviceError as error:
        pytest.skip(f"NOTHING OF NVENC IS CHECKED HERE: {error}")
    frames = smooth(60, 320, 240)
    out = tmp_path / "a.mp4"
    written = write_frames(iter(frames.cuda().split(8)), out, fps=25, codec=codec, encoder="nvenc")
    assert written == (60, f"nvenc {codec}", [])
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)
        decoded = list(container.decode(video=0))
    assert [frame.time for frame in decoded] == pytest.approx([i / 25 for i in range(60)])
    for frame, original in zip(decoded, frames, strict=True):
        difference = frame.to_ndarray(format="rgb24").astype(int) - original.permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 4
