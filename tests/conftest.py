"""Fixtures: small synthetic templates, sounds and networks, made on the spot; and where the reference's files are."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # two programs of tests: threads that spin would take the other's cores

import av
import cv2
import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; said before any is loaded

from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from click.testing import CliRunner, Result
from materials import SMALL_ENCODER as TINY_ENCODER
from materials import SMALL_UNET as TINY
from onnx import ModelProto
from PIL import Image

from gpurender import AudioEncoder, UNet
from gpurender.cli import main
from gpurender.color_kernel import nv12_function
from gpurender.export import cached_onnx
from gpurender.face_kernels import crop_function, paste_function
from gpurender.jit import Processor, this_processor
from gpurender.network import Mode
from gpurender.pictures import read_mask, read_picture
from gpurender.seeds import save_seeded
from gpurender.tensorrt_build import TensorRt

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""The reference's sample and golden numbers; a real person's, so they are not part of the project."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is no GPU; GPURENDER_REQUIRE_GPU=1 has them fail instead."""
    if torch.cuda.is_available() or os.environ.get("GPURENDER_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU (GPURENDER_REQUIRE_GPU=1 makes this a failure)"))


settings.register_profile("unhurried", settings(), deadline=None)  # machines are shared: seconds say nothing here
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _truth_is_no_number() -> None:
    """Triton 3.9's interpreter makes integers of a scalar's truth as it spreads it over a block, and then takes no such
    mask. Its compiler is right."""
    if "TRITON_INTERPRET" not in os.environ or find_spec("triton") is None:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    spread = cast(Any, InterpreterBuilder.create_splat)

    def create_splat(builder: Any, *given: Any) -> Any:
        made = spread(builder, *given)
        if any(getattr(getattr(value, "data", None), "dtype", None) == np.bool_ for value in given):
            made.data = made.data.astype(np.bool_)
        return made

    cast(Any, InterpreterBuilder).create_splat = create_splat


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all programs of tests: what a network costs once is paid once."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    os.environ["GPURENDER_CACHE"] = str(cache)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: on the GPU, or interpreted on the CPU where there is none."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU: kernels are compiled for it, not interpreted")
    return torch.device(request.param)


PROCESSORS: dict[str, Callable[[Processor], bool]] = {
    "AMX": lambda here: here.tiles,
    "AVX-512, bfloat16": lambda here: here.lanes == 16 and here.bfloat16,
    "AVX-512": lambda here: here.lanes == 16,
    "AVX2, bytes": lambda here: here.bytes,
    "AVX2": lambda here: here.lanes >= 8,
}


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterable[Processor]:
    """This processor, or what it has in common with one that has less: kernels are compiled for it."""
    here = this_processor()
    if not PROCESSORS[request.param](here):
        pytest.skip(f"this processor has no {request.param}: NO SUCH KERNEL RUNS HERE")
    haswell = Processor("haswell", "+avx2,+fma,+f16c,+bmi,+bmi2", 8, bfloat16=False, bytes=False, tiles=False)
    if request.param == "AVX-512, bfloat16":
        here = here._replace(tiles=False)
    elif request.param == "AVX-512":
        here = here._replace(bfloat16=False, bytes=False, tiles=False)
    elif request.param == "AVX2, bytes":  # AVX-512 has the same operation of half its vectors
        vnni = ",+avxvnni" if here.lanes == 8 else ",+avx512vl,+avx512vnni"
        here = haswell._replace(features=haswell.features + vnni, bytes=True)
    elif request.param == "AVX2":
        here = haswell
    for module in ("color_kernel", "face_kernels", "jit", "up_decoder"):
        monkeypatch.setattr(f"gpurender.{module}.this_processor", lambda: here)
    for known in (crop_function, nv12_function, paste_function):
        known.cache_clear()
    yield here
    for known in (crop_function, nv12_function, paste_function):
        known.cache_clear()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the reference's files are not at {SHARED}: NOTHING IS CHECKED AGAINST THE REFERENCE HERE")
    return SHARED


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)

    return call


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seeded_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-width `ave` checkpoint of the golden numbers' weights."""
    return save_seeded(UNet(), tmp_path_factory.mktemp("networks") / "seeded.pth")


@pytest.fixture(scope="session")
def seeded_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeded(AudioEncoder(), tmp_path_factory.mktemp("networks") / "encoder.pth")


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeded(UNet(**TINY), tmp_path_factory.mktemp("networks") / "tiny.pth")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeded(AudioEncoder(TINY_ENCODER), tmp_path_factory.mktemp("networks") / "tiny_encoder.pth")


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], Path]:
    """A checkpoint for a kind of features; always the same file, so that its cached export serves all tests."""
    directory = tmp_path_factory.mktemp("networks")

    def checkpoint(mode: Mode) -> Path:
        path = directory / f"{mode}.pth"
        audio = {"audio": (256, 16, 16, 16, 16)} if mode == "wenet" else {}
        return path if path.exists() else save_seeded(UNet(mode, **(TINY | audio)), path)  # pyright: ignore

    return checkpoint


@pytest.fixture(scope="session")
def tiny_onnx(tiny_unet: Path) -> Path:
    return Path(shutil.copy(cached_onnx(tiny_unet), tiny_unet.with_suffix(".onnx")))


@pytest.fixture(scope="session")
def seeded_onnx(seeded_unet: Path) -> Path:
    return Path(shutil.copy(cached_onnx(seeded_unet), seeded_unet.with_suffix(".onnx")))


@pytest.fixture(scope="session")
def rtx() -> TensorRt:
    """The real TensorRT-RTX, which builds plans without a GPU."""
    api = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installable here: NO PLAN IS BUILT")
    return TensorRt(api, api.__version__)


# --- templates -------------------------------------------------------------------------------------------------------


def run_whole(model: ModelProto, faces: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """A network's pictures, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    feed = {"input": faces.numpy().astype(kind), "audio": audio.numpy().astype(kind)}
    (pictures,) = session.run(None, feed)
    return torch.from_numpy(np.asarray(pictures, np.float32))


def picture(width: int, height: int, number: int) -> np.ndarray:
    """(H,W,3) uint8 RGB: waves that move with the number, and noise."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin((x * (c + 1) + 3 * number) / 23 + y * (c + 2) / 31) for c in range(3)]
    noise = np.random.RandomState(number).uniform(-20, 20, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def landmarks(x0: int, y0: int, x1: int) -> str:
    points = [(200 + 0.5 * i, 100 + i) for i in range(110)]
    points[1], points[31], points[52] = (x0, 77), (x1, 99), (150, y0)
    return "\n".join(f"{x} {y}" for x, y in points) + "\n"


def parsing_mask(width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width, 3), np.uint8)
    mask[:, : width // 3] = 255, 0, 0  # red: kept
    mask[: height // 3] = 255  # white: kept
    mask[-height // 4 :] = 0, 0, 255  # blue: not kept
    return mask


NO_POINTS = [(0.0, 0.0)] * 53


def write_points(path: Path, points: list[Any], line: str = "{} {}", end: str = "\n") -> Path:
    file = path / "0.lms"
    file.write_bytes(end.join(line.format(*point) for point in points).encode())
    return file


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def opencv(file: Path) -> np.ndarray:
    """(3,H,W) RGB, as OpenCV reads it."""
    pixels = cv2.imread(str(file))
    assert pixels is not None
    return pixels[..., ::-1].transpose(2, 0, 1)


IMAGES, LANDMARKS, PARSING = "full_body_img", "landmarks", "parsing"
MakeTemplate = Callable[..., Path]
# With x264's macroblock tree, files of the same pictures are alike only where a row has a multiple of 8 macroblocks:
# its vector code reads memory beyond others that nobody wrote. At 320 pixels most files differed, at 64 one or two of
# a hundred, at 128 and 384 none of 1950.
REPEATABLE_WIDTH = 128  # and its multiples


@pytest.fixture
def make_template(tmp_path: Path) -> MakeTemplate:
    def make(
        name: str = "anna",
        frames: int = 5,
        width: int = 320,
        height: int = 240,
        parsing: bool = False,
        suffix: str = ".jpg",
    ) -> Path:
        path = tmp_path / name
        for directory in ("full_body_img", "landmarks", *(["parsing"] if parsing else [])):
            (path / directory).mkdir(parents=True)
        for i in range(frames):
            Image.fromarray(picture(width, height, i)).save(path / "full_body_img" / f"{i}{suffix}", quality=95)
            x0, y0, side = 90 + 2 * i, 60 + i, 120 + 3 * (i % 3)
            (path / "landmarks" / f"{i}.lms").write_text(landmarks(x0, y0, x0 + side))
            if parsing:
                Image.fromarray(parsing_mask(width, height)).save(path / "parsing" / f"{i}.png")
        return path

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each picture was read, by directory and name."""
    counts: Counter[str] = Counter()

    def counting(read: Callable[[Path], torch.Tensor]) -> Callable[[Path], torch.Tensor]:
        def count(file: Path) -> torch.Tensor:
            counts[f"{file.parent.name}/{file.name}"] += 1
            return read(file)

        return count

    for read in (read_picture, read_mask):
        monkeypatch.setattr(f"gpurender.pictures.{read.__name__}", counting(read))
    return counts


def numbered_picture(width: int, height: int, number: int) -> np.ndarray:
    """`picture`, with its number below 256 in its upper left corner: eight squares, white for 1, lowest bit first."""
    pixels = picture(width, height, number)
    for bit in range(8):
        pixels[:8, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return pixels


def read_number(pixels: np.ndarray) -> int:
    """The number in a `numbered_picture` (3,H,W)."""
    return sum(int(pixels[:, :8, 8 * bit : 8 * bit + 8].mean() > 128) << bit for bit in range(8))


def write_video(
    file: Path,
    frames: int = 40,
    width: int = 96,
    height: int = 80,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    turned: int = 0,
    sound: bool = False,
    title: str = "",
) -> Path:
    """A video of numbered pictures; `times` of frames and of packets are in `time_base`."""
    with av.open(str(file.absolute()), "w", container_options=container_options or {}) as container:
        container.metadata.update({"title": title} if title else {})
        stream = cast(VideoStream, container.add_stream(codec, rate=25, options=options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = time_base
        if turned:
            stream.set_display_rotation(turned)
        track = cast(AudioStream, container.add_stream("aac", rate=16000, layout="mono")) if sound else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_picture(width, height, i)).reformat(format=pixel_format)
            frame.pts, frame.time_base = times[i] if times else i, time_base
            container.mux(stream.encode(frame))
            if track is not None:
                noise = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), "fltp", "mono")
                noise.sample_rate, noise.pts = 16000, 640 * i
                container.mux(track.encode(noise))
        container.mux(stream.encode(None))
        if track is not None:
            container.mux(track.encode(None))
    return file


def write_rectangles(file: Path, rects: Iterable[Sequence[float]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({str(i): {"rect": list(rect), "score": 0.9} for i, rect in enumerate(rects)}))
    return file


@pytest.fixture
def make_package(tmp_path: Path) -> MakeTemplate:
    def make(
        name: str = "vera", frames: int = 12, rects: int | None = None, parsing: bool = False, **video: Any
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        write_video(path / "full_body_video.mp4", frames, **{"width": 160, "height": 120, **video})
        count = frames if rects is None else rects
        write_rectangles(path / "cache/crop_rectangles.json", [(30 + i, 20, 110 + i, 110) for i in range(count)])
        if parsing:
            (path / "parsing").mkdir()
            for i in range(frames):
                Image.fromarray(parsing_mask(160, 120)).save(path / "parsing" / f"{i}.png")
        return path

    return make


# --- sounds ----------------------------------------------------------------------------------------------------------


def tones(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """(n, channels) float32: tones that change, with pauses."""
    t = np.arange(round(seconds * rate)) / rate
    pitch = 200 + 150 * np.sin(2 * np.pi * 0.7 * t)
    wave = 0.4 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) * (np.sin(2 * np.pi * 1.3 * t) > -0.5)
    return np.stack([wave * (1 - 0.3 * c) for c in range(channels)], 1).astype(np.float32)


def noise(count: int, level: float = 0.3) -> np.ndarray:
    return np.random.default_rng(count).uniform(-level, level, count).astype(np.float32)


def corner(mel: torch.Tensor) -> torch.Tensor:
    """An audio encoder that is quick and exact: the first 512 numbers of each window."""
    return mel.flatten(1)[:, :512]


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, tones(1.5, 22050, 2), 22050)
    return path
