import platform
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from conftest import MakeTemplate, read_number, write_video
from driver_stub import driver_stub_fixture as driver_stub_fixture
from driver_stub import run_python

from gpurender import DeviceError, InputError, open_template
from gpurender.decoders import choose_video_decoder
from gpurender.find import find_template
from gpurender.nvdec import AT_ONCE, NvdecFrames, as_opencv, check_fit, find_nvdec, open_nvdec
from gpurender.video import VideoFrames, to_rgb

CPU = torch.device("cpu")
COLOURS = {
    "untagged": "keyint=12",
    "bt601": "colormatrix=smpte170m:range=tv",
    "bt470": "colormatrix=bt470bg:range=tv",
    "full": "colormatrix=smpte170m",
    "bt709": "colormatrix=bt709:range=tv",
    "bt709 full": "colormatrix=bt709",
    "bt709 centre": "colormatrix=bt709:range=tv:chromaloc=1",
    "bt709 top left": "colormatrix=bt709:range=tv:chromaloc=2",
    "bt709 top": "colormatrix=bt709:range=tv:chromaloc=3",
    "bt2020": "colormatrix=bt2020nc:range=tv",
}


def video(path: Path, colours: str = "untagged", **options: Any) -> Path:
    file = path / "video.mp4"
    if "full" in colours:
        options["pixel_format"] = "yuvj420p"
    return write_video(file, options={"x264-params": f"{COLOURS[colours]}:keyint=12:open-gop=0"}, **options)


def nv12(frame: av.VideoFrame) -> torch.Tensor:
    """(H*3/2,W) uint8 of a 4:2:0 frame's own samples."""
    planes = torch.from_numpy(frame.to_ndarray())
    height = frame.height
    blue, red = planes[height:].reshape(2, -1)
    chroma = torch.stack([blue, red], 1).reshape(height // 2, frame.width)
    return torch.cat([planes[:height], chroma])


class Stub:
    """Stands in for PyNvVideoCodec's decoder: hands out the surfaces that it has, and writes over them later."""

    def __init__(self, file: Path, shift: int = 0) -> None:
        with av.open(str(file)) as container:
            self._frames = [nv12(frame) for frame in container.decode(video=0)]
        self._surfaces = torch.empty(AT_ONCE, *self._frames[0].shape, dtype=torch.uint8)
        self.shift = shift
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def get_batch_frames_by_index(self, indices: list[int]) -> list[torch.Tensor]:
        assert indices == sorted(set(indices))
        self.asked.append(indices)
        self._surfaces.fill_(99)
        for surface, i in zip(self._surfaces, indices, strict=False):
            surface.copy_(self._frames[min(i + self.shift, len(self) - 1)])
        return list(self._surfaces[: len(indices)])


def nvdec(file: Path) -> NvdecFrames:
    return NvdecFrames(VideoFrames(file), Stub(file), CPU)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", COLOURS)
def test_pixels_are_pyavs(tmp_path: Path, colours: str) -> None:
    file = video(tmp_path, colours, frames=14)
    assert VideoFrames(file).full_range == ("full" in colours)
    order = [13, 2, 2, 0, *range(14)]
    for ours, theirs in zip(nvdec(file).frames(order), VideoFrames(file).frames(order), strict=True):
        assert ours.is_contiguous()
        off = (ours.int() - theirs.int()).abs()
        if colours.startswith("bt709") or colours == "bt2020":
            assert off.max() <= 2
            assert off.float().mean() <= 0.02
        else:  # elsewhere than on x86 FFmpeg's fast conversion is another
            assert off.max() <= (0 if platform.machine() in ("x86_64", "AMD64") else 4)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="FFmpeg's fast conversion is another here")
@pytest.mark.parametrize("size", [(64, 64), (98, 82), (6, 4), (1282, 34)])
@pytest.mark.parametrize("colour_range", [1, 2])
def test_all_colours_are_opencvs(size: tuple[int, int], colour_range: int) -> None:
    width, height = size
    samples = np.random.default_rng(0).integers(0, 256, (height * 3 // 2, width), np.uint8)
    frame = av.VideoFrame.from_ndarray(samples, "nv12").reformat(format="yuv420p")
    frame.colorspace, frame.color_range = 5, colour_range
    ours = as_opencv(torch.from_numpy(samples)[None], full_range=colour_range == 2)
    assert torch.equal(ours[0], to_rgb(frame, VideoReformatter()))


def test_the_avatars_frames_are_pyavs() -> None:
    file = find_template("avatar") / "full_body_video.mp4"
    theirs = VideoFrames(file)
    first = NvdecFrames(theirs, Stub(file), CPU).frames([0])[0]
    off = (first.int() - theirs.frames([0])[0].int()).abs()
    assert off.max() <= 1
    assert off.float().mean() <= 0.01


@pytest.mark.parametrize("angle", [90, 180, -90, 45])
def test_turned_videos(tmp_path: Path, angle: int) -> None:
    file = video(tmp_path, frames=3, turned=angle)
    ours, theirs = nvdec(file), VideoFrames(file)
    assert ours.size == theirs.size
    assert torch.equal(ours.frames([2])[0], theirs.frames([2])[0])


def test_surfaces_are_copied_before_the_decoder_writes_over_them(tmp_path: Path) -> None:
    file = video(tmp_path)
    decoder = Stub(file)
    frames = NvdecFrames(VideoFrames(file), decoder, CPU)
    decoder.asked.clear()
    given = frames.frames([*range(39, -1, -1), 7])
    assert [read_number(frame.numpy()) for frame in given] == [*range(39, -1, -1), 7]
    assert decoder.asked == [list(range(i, i + AT_ONCE)) for i in range(0, 40, AT_ONCE)]
    assert frames.frames([]) == []


def test_going_backwards_decodes_a_stretch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurender.nvdec.STRETCH_BYTES", 12 * 96 * 80 * 3 // 2)
    file = video(tmp_path)
    decoder = Stub(file)
    frames = NvdecFrames(VideoFrames(file), decoder, CPU)
    decoder.asked.clear()
    batches = [[34, 35, 36, 37], [38, 39, 38, 37], *([i, i - 1, i - 2, i - 3] for i in range(36, 2, -4))]
    for batch in [*batches, [0, 1, 2, 3], [2, 3, 4, 5]]:
        assert [read_number(frame.numpy()) for frame in frames.frames(batch)] == batch
        assert len(frames._stretch) <= 12
    assert [asked[0] for asked in decoder.asked[:2]] == [34, 37]
    assert sum(len(asked) for asked in decoder.asked) <= 4 + 3 + 37 + 4 + 4


# --- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 5, -1])
def test_other_frames_than_asked_for_are_noticed(tmp_path: Path, shift: int) -> None:
    file = video(tmp_path)
    with pytest.raises(DeviceError, match=r"NVDEC gives frame \d+ of video\.mp4 where frame \d+ is asked for"):
        NvdecFrames(VideoFrames(file), Stub(file, shift), CPU)


def test_another_number_of_frames_is_noticed(tmp_path: Path) -> None:
    file = video(tmp_path)
    decoder = Stub(file)
    decoder._frames.pop()
    with pytest.raises(DeviceError, match=r"NVDEC counts 39 frames in video\.mp4, but it shows 40"):
        NvdecFrames(VideoFrames(file), decoder, CPU)


@pytest.mark.parametrize("colours", ["untagged", "bt709"])
def test_other_pixels_are_noticed(tmp_path: Path, colours: str) -> None:
    file = video(tmp_path, colours, frames=1)
    decoder = Stub(file)
    decoder._frames[0][:80] += 3
    with pytest.raises(DeviceError, match=r"NVDEC's frame 0 of video\.mp4 is [34]\.\d levels from PyAV's"):
        NvdecFrames(VideoFrames(file), decoder, CPU)


@pytest.mark.parametrize("colours", ["untagged", "bt709"])
@pytest.mark.parametrize("rows", [-3, 3])
def test_other_sizes_are_noticed(tmp_path: Path, colours: str, rows: int) -> None:
    file = video(tmp_path, colours, frames=3)
    decoder = Stub(file)
    decoder._frames = [torch.nn.functional.pad(frame, (0, 0, 0, rows)) for frame in decoder._frames]
    decoder._surfaces = torch.empty(AT_ONCE, *decoder._frames[0].shape, dtype=torch.uint8)
    with pytest.raises(DeviceError, match=r"NVDEC cannot decode video\.mp4 \(.*size"):
        NvdecFrames(VideoFrames(file), decoder, CPU)


class Failure(Exception):
    """As PyNvVideoCodec's."""


@pytest.mark.parametrize("colours", ["untagged", "bt709"])
def test_a_failure_at_opening_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colours: str) -> None:
    def fail(self: Stub, indices: list[int]) -> list[torch.Tensor]:
        raise Failure("HandleVideo : \nError code : 801\nError Type : Codec not supported on this GPU\nat a.cpp:1")

    monkeypatch.setattr(Stub, "get_batch_frames_by_index", fail)
    file = video(tmp_path, colours, frames=1)
    with pytest.raises(DeviceError, match=r"cannot decode video\.mp4 \(Codec not supported on this GPU\)\.$"):
        NvdecFrames(VideoFrames(file), Stub(file), CPU)


def test_a_failure_later_is_told_with_what_to_do(tmp_path: Path) -> None:
    file = video(tmp_path, frames=20)
    decoder = Stub(file)
    frames = NvdecFrames(VideoFrames(file), decoder, CPU)
    decoder._frames[11] = torch.zeros(1)[:0]
    with pytest.raises(InputError, match=r"NVDEC cannot decode some of the frames 9 to 12 \(.*--decoder pyav"):
        frames.frames([12, 11, 9])


def test_too_little_memory_later_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A render halves its batch then."""

    def fail(self: Stub, indices: list[int]) -> list[torch.Tensor]:
        raise Failure(
            "Decode : \nError code : 2\nError Type : CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY\nat a.cpp:1"
        )

    file = video(tmp_path, frames=20)
    frames = NvdecFrames(VideoFrames(file), Stub(file), CPU)
    monkeypatch.setattr(Stub, "get_batch_frames_by_index", fail)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        frames.frames([1])


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "ten bits": ({"pixel_format": "yuv420p10le"}, "NVDEC is used for 8-bit 4:2:0, but .* is yuv420p10le"),
    "4:4:4": ({"pixel_format": "yuv444p"}, "is yuv444p"),
    "odd": ({"codec": "mpeg4", "width": 97}, "NVDEC is used for even sizes, but .* is 97×80"),
    "odd and turned": ({"codec": "mpeg4", "width": 97, "turned": 90}, "is 80×97"),
    "uneven": (
        {"times": [i * i for i in range(40)]},
        "is used for evenly spaced frames, but those of .* are not",
    ),
    "one gap": ({"times": [*range(39), 40]}, "evenly spaced"),
    "open": (
        {"options": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"}},
        r"keyframes stand alone, but .* \(open GOP\)",
    ),
    "matrix": ({"options": {"x264-params": "colormatrix=smpte240m"}}, "has matrix 7 of H.273"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_videos_are_told(tmp_path: Path, name: str) -> None:
    options, words = UNFIT[name]
    with pytest.raises(DeviceError, match=words):
        check_fit(VideoFrames(write_video(tmp_path / "video.mp4", **options)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_ordinary_videos_are_fit(tmp_path: Path, suffix: str) -> None:
    check_fit(VideoFrames(write_video(tmp_path / f"video{suffix}", options={"g": "12", "bf": "2"})))


# --- who decodes -----------------------------------------------------------------------------------------------------


def test_a_cpu_has_pyav(make_package: MakeTemplate) -> None:
    assert open_template(make_package()).decoder == "pyav"


def test_masks_beside_a_video_are_pillows_if_pyav_is_asked_for(make_package: MakeTemplate) -> None:
    template = open_template(make_package(parsing=True), decoder="pyav")
    assert (template.decoder, template.notes) == ("pyav", [])
    assert template.frames([3])[1] is not None


def test_nvdec_needs_a_cuda_device(make_package: MakeTemplate) -> None:
    with pytest.raises(DeviceError, match="NVDEC decodes on a CUDA GPU, but the device is cpu"):
        open_template(make_package(), decoder="nvdec")


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_a_video_is_no_pictures_to_decode(make_package: MakeTemplate, decoder: str) -> None:
    with pytest.raises(InputError, match=rf"{decoder} decodes pictures, .* are a video: auto, nvdec or pyav do"):
        open_template(make_package(), decoder=decoder)  # pyright: ignore


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_pyav_decodes_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no CUDA GPU for NVDEC"):
        find_nvdec()
    ours = VideoFrames(video(tmp_path, frames=2))
    source, name = choose_video_decoder(ours, "auto", torch.device("cuda"), notes := [])
    assert (source, name) == (ours, "pyav")
    assert notes == ["the video is decoded by PyAV on the CPU: there is no CUDA GPU for NVDEC."]
    with pytest.raises(DeviceError, match="there is no CUDA GPU"):
        choose_video_decoder(ours, "nvdec", torch.device("cuda"), [])


# --- the real package, without its hardware --------------------------------------------------------------------------

USED = """
import PyNvVideoCodec as codec
print(codec.__version__)
for name in ("SimpleDecoder", "CreateEncoder", "GetEncoderCaps", "GetDecoderCaps", "NV_ENC_PIC_PARAMS"):
    assert callable(getattr(codec, name)), name
assert issubclass(codec.PyNvVCException, Exception) and not issubclass(codec.PyNvVCException, RuntimeError)
assert {"NATIVE", "RGB", "RGBP"} <= set(codec.OutputColorType.__members__)
assert {"NV12", "P016", "YUV444"} <= set(codec.Pixel_Format.__members__)
assert codec.NV_ENC_PIC_PARAMS().inputTimeStamp == 0
assert callable(codec.DecodedFrame.__dlpack__) and callable(codec.DecodedFrame.__dlpack_device__)
import inspect
decoder = inspect.signature(codec.SimpleDecoder.__init__).parameters
assert {"gpu_id", "cuda_stream", "use_device_memory", "output_color_type"} <= set(decoder)
assert list(inspect.signature(codec.SimpleDecoder.get_batch_frames_by_index).parameters) == ["self", "indices"]
assert "gpuid: int = 0, codec: str = 'h264'" in codec.GetEncoderCaps.__doc__
encoder = list(inspect.signature(codec.CreateEncoder).parameters)
assert encoder == ["width", "height", "fmt", "usecpuinputbuffer", "kwargs"]
"""


def test_the_packages_names_are_those_we_use(driver_stub: dict[str, str]) -> None:
    done = run_python(USED, driver_stub)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(".")[0]) >= 2


OPEN = """
from pathlib import Path
from gpurender.errors import DeviceError
from gpurender.nvdec import open_decoder
from gpurender.video import VideoFrames
video = VideoFrames(Path({file!r}))
try:
    open_decoder(video, 0, 0)
except DeviceError as error:
    print(error)
"""


def test_a_driver_without_its_video_part_is_told(driver_stub: dict[str, str], tmp_path: Path) -> None:
    done = run_python(OPEN.format(file=str(video(tmp_path, frames=2))), driver_stub, gpus=1)
    assert done.stdout == (
        "the NVIDIA driver's video libraries are missing; a container gets the host's with --gpus all and "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video.\n"
    ), done.stderr


def test_a_file_that_the_package_cannot_read_is_told(driver_stub: dict[str, str], tmp_path: Path) -> None:
    file = video(tmp_path, frames=2)
    code = OPEN.format(file=str(file)).replace("try:", "video.file = Path('/nothing.mp4')\ntry:")
    done = run_python(code, driver_stub, gpus=1)
    assert done.stdout.startswith("NVDEC cannot decode nothing.mp4 (avformat_open_input"), done.stderr
    assert "No such file or directory" in done.stdout


def test_without_a_gpu_the_package_ends_the_process(driver_stub: dict[str, str], tmp_path: Path) -> None:
    """Why `find_nvdec` asks torch for a GPU before the package is asked for anything."""
    done = run_python(OPEN.format(file=str(video(tmp_path, frames=2))), driver_stub, gpus=0)
    assert done.returncode == 1
    assert "CUDA_ERROR_NO_DEVICE" in done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="there may be a driver")
def test_without_a_driver_that_is_told(driver_stub: dict[str, str]) -> None:
    code = (
        "from gpurender.pynvvideocodec import load_pynvvideocodec\n"
        "try: load_pynvvideocodec()\nexcept Exception as error: print(repr(error))"
    )
    done = run_python(code, {**driver_stub, "LD_LIBRARY_PATH": ""})
    assert done.stdout.startswith("DeviceError("), done.stderr
    assert "driver" in done.stdout


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("colours", ["untagged", "full", "bt709", "bt2020"])
def test_nvdecs_frames_are_pyavs_in_any_order(tmp_path: Path, colours: str) -> None:
    theirs = VideoFrames(video(tmp_path, colours, width=320, height=240))
    try:
        ours = open_nvdec(theirs, torch.device("cuda"))
    except DeviceError as error:
        pytest.skip(f"NVDEC IS NOT CHECKED HERE: {error}")
    random = np.random.default_rng(0)
    for _ in range(20):
        indices = random.integers(0, 40, random.integers(1, 12)).tolist()
        for frame, expected in zip(ours.frames(indices), theirs.frames(indices), strict=True):
            assert frame.device.type == "cuda"
            assert (frame.cpu().int() - expected.int()).abs().max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
def test_nvdec_or_a_note(make_package: MakeTemplate, codec: str) -> None:
    options = {"libx265": {"x265-params": "open-gop=0:log-level=error"}}.get(codec, {})
    template = open_template(make_package(codec=codec, options=options), device="cuda")
    frames, _ = template.frames([11, 0, 5])
    assert [read_number(frame) for frame in frames.cpu().numpy()] == [11, 0, 5]
    assert template.decoder == "nvdec" or "is decoded by PyAV" in template.notes[0]


@pytest.mark.gpu
def test_nvdecs_frames_are_ready_on_any_stream(tmp_path: Path) -> None:
    theirs = VideoFrames(video(tmp_path, width=320, height=240))
    try:
        ours = open_nvdec(theirs, torch.device("cuda"))
    except DeviceError as error:
        pytest.skip(f"NVDEC IS NOT CHECKED HERE: {error}")

    def read() -> list[int]:
        return [int(frame.sum(dtype=torch.int64)) for frame in ours.frames(range(40))]

    expected = read()
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert read() == expected
