"""The U-Net by kernels: each kernel against torch in float64, the whole against the module."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from driver_stub import run_python
from torch import Tensor
from torch.torch_version import TorchVersion

from gpurender import DeviceError, cuda_graphs, torch_engine
from gpurender.engine import least_psnr
from gpurender.export import example_input
from gpurender.fused_network import FusedUNet
from gpurender.kernels.residual import Activation, depthwise, depthwise_halving, pointwise
from gpurender.network import WINDOW_SHAPES, Mode, UNet
from gpurender.seeds import seeded_weights
from gpurender.torch_engine import Replays, TorchEngine

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first(x: Tensor) -> Tensor:
    """Channels first."""
    return x.permute(0, 3, 1, 2)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def unwritten(like: Tensor, device: torch.device) -> Tensor:
    return torch.full(like.shape, torch.nan, device=device)


def ready(device: torch.device, *exact: Tensor) -> list[Tensor]:
    return [tensor.to(device, torch.float32).contiguous() for tensor in exact]


def assert_near(given: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(given.cpu().double(), exact, rtol=1e-5, atol=2e-5)


# --- kernels ---------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("blocks", [None, (32, 16, 16, 4)])
@pytest.mark.parametrize(("channels", "made"), [(6, 12), (20, 3), (70, 130)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pointwise(
    kernel_device: torch.device,
    activation: Activation,
    channels: int,
    made: int,
    blocks: tuple[int, int, int, int] | None,
) -> None:
    x, weight, bias, added = noise(2, 5, 7, channels), noise(channels, made), noise(made), noise(2, 5, 7, made)
    exact = ACTIVATIONS[activation](x @ weight + bias + added)
    out = unwritten(exact, kernel_device)
    x, weight, bias, added = ready(kernel_device, x, weight, bias, added)
    pointwise(x, weight, bias, out, activation, added=added, blocks=blocks)
    assert_near(out, exact)


@pytest.mark.parametrize("blocks", [None, (32, 16, 16, 4)])
def test_pointwise_into_planes(kernel_device: torch.device, blocks: tuple[int, int, int, int] | None) -> None:
    x, weight, bias = noise(3, 6, 5, 9), noise(9, 3), noise(3)
    exact = first(torch.sigmoid(x @ weight + bias))
    out = unwritten(exact, kernel_device)
    x, weight, bias = ready(kernel_device, x, weight, bias)
    pointwise(x, weight, bias, out, "sigmoid", planes=True, blocks=blocks)
    assert_near(out, exact)


@pytest.mark.parametrize("blocks", [None, (16, 16, 16, 4)])
@pytest.mark.parametrize("size", [(6, 10), (20, 4)])
def test_pointwise_on_what_is_upsampled(
    kernel_device: torch.device, size: tuple[int, int], blocks: tuple[int, int, int, int] | None
) -> None:
    height, width = size
    x, weight, bias = noise(2, height, width, 12), noise(12, 24), noise(24)
    below = noise(2, height // 2, width // 2, 24)
    upsampled = F.interpolate(first(below), scale_factor=2, mode="bilinear", align_corners=True)
    exact = F.relu(x @ weight + bias + last(upsampled))
    out = unwritten(exact, kernel_device)
    x, weight, bias, below = ready(kernel_device, x, weight, bias, below)
    pointwise(x, weight, bias, out, "relu", below, blocks=blocks)
    assert_near(out, exact)


def convolved(x: Tensor, taps: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    weight = taps.T.reshape(-1, 1, 3, 3)
    return last(F.relu(F.conv2d(first(x), weight, bias, stride, padding=1, groups=len(weight))))


@pytest.mark.parametrize("blocks", [None, (3, 16, 16, 4)])
@pytest.mark.parametrize("size", [(10, 10), (7, 19), (1, 1)])
def test_depthwise(
    kernel_device: torch.device, size: tuple[int, int], blocks: tuple[int, int, int, int] | None
) -> None:
    x, taps, bias = noise(2, *size, 20), noise(9, 20), noise(20)
    exact = convolved(x, taps, bias)
    out = unwritten(exact, kernel_device)
    x, taps, bias = ready(kernel_device, x, taps, bias)
    depthwise(x, taps, bias, out, blocks=blocks)
    assert_near(out, exact)


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("residual", [False, True])
def test_depthwise_and_projected(kernel_device: torch.device, residual: bool, rows: int | None) -> None:
    x, taps, bias, weight, shift = noise(2, 9, 21, 24), noise(9, 24), noise(24), noise(24, 10), noise(10)
    added = noise(2, 9, 21, 10)
    exact = convolved(x, taps, bias) @ weight + shift + residual * added
    out = unwritten(exact, kernel_device)
    x, taps, bias, weight, shift, added = ready(kernel_device, x, taps, bias, weight, shift, added)
    blocks = None if rows is None else (rows, 16, 32, 4)
    depthwise(x, taps, bias, out, (weight, shift), added if residual else None, blocks=blocks)
    assert_near(out, exact)


@pytest.mark.parametrize("blocks", [None, (2, 8, 16, 16, 4)])
def test_depthwise_of_stride_2(kernel_device: torch.device, blocks: tuple[int, int, int, int, int] | None) -> None:
    x, taps, bias, weight, shift = noise(2, 10, 14, 40), noise(9, 40), noise(40), noise(40, 20), noise(20)
    exact = convolved(x, taps, bias, 2) @ weight + shift
    out = unwritten(exact, kernel_device)
    x, taps, bias, weight, shift = ready(kernel_device, x, taps, bias, weight, shift)
    depthwise_halving(x, taps, bias, out, (weight, shift), blocks=blocks)
    assert_near(out, exact)


@pytest.fixture(autouse=True)
def fp32_means_fp32() -> Iterator[None]:
    """cuDNN would round the two dense convolutions' factors to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# --- the network -----------------------------------------------------------------------------------------------------


def tiny(mode: Mode) -> UNet:
    network = UNet(mode, **({**TINY, "audio": (256, *TINY["audio"][1:])} if mode == "wenet" else TINY)).eval()
    network.load_state_dict(seeded_weights(network))
    return network


def test_it_is_the_module(kernel_device: torch.device) -> None:
    """In float32, where rounding hides nothing."""
    network = tiny("ave")
    faces, audio = example_input(1, "ave")
    fused = FusedUNet(network, kernel_device, torch.float32)
    with torch.inference_mode():
        drawn = fused.decode(fused.encode(faces.to(kernel_device)), audio.to(kernel_device))
        expected = network(faces, audio)
    assert (drawn.shape, drawn.dtype) == ((1, 3, 320, 320), torch.float32)
    torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["ave", "hubert", "wenet"])
def test_what_it_hears_is_what_the_module_hears(kernel_device: torch.device, mode: Mode) -> None:
    network = tiny(mode)
    audio = torch.randn(2, *WINDOW_SHAPES[mode], generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        heard = FusedUNet(network, kernel_device, torch.float32)._audio(last(audio).contiguous().to(kernel_device))
        torch.testing.assert_close(first(heard).cpu(), network.audio_model(audio), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_width_in_half_precision(precision: str) -> None:
    network = UNet().eval()
    network.load_state_dict(seeded_weights(network))
    device = torch.device("cuda")
    faces, audio = example_input(3, "ave")
    with torch.inference_mode():
        expected = network(faces, audio)
    engine = TorchEngine(network, device, precision)
    assert isinstance(engine._network, FusedUNet), engine.notes
    encoded = engine.encode(faces.to(device))
    drawn = [engine.decode(encoded, audio.to(device)).cpu() for _ in range(3)]  # plain, captured, replayed
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert least_psnr(drawn[0], expected) >= (40 if precision == "fp16" else 20)  # a network that amplifies rounding
    assert engine.notes == []


def test_kernels_that_do_not_start_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: object) -> FusedUNet:
        raise RuntimeError("out of resource: shared memory\nand more")

    said: list[str] = []
    engine = TorchEngine(tiny("ave"), CPU, "bf16")
    engine.device = torch.device("cuda")
    monkeypatch.setattr(torch_engine, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(torch_engine, "FusedUNet", breaks)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert engine._fused(tiny("ave"), said.append) is None
    assert engine.notes == [
        "torch's layers run the network, not kernels, which do not start (out of resource: shared memory)"
    ]
    assert "half a minute the first time" in said[0]


def test_gpus_without_tensor_cores_for_triton_run_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny("ave"), CPU, "bf16")
    engine.device = torch.device("cuda")
    monkeypatch.setattr(torch_engine, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert engine._fused(tiny("ave"), lambda text: None) is None
    assert engine.notes == ["torch's layers run the network: its kernels are for compute capability 8.0 and newer"]


# --- replays ---------------------------------------------------------------------------------------------------------


def decoded(levels: tuple[Tensor, ...], audio: Tensor) -> Tensor:
    return levels[0] * 2 + levels[1] + audio


def batch(frames: int, seed: int) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    levels = noise(frames, 4, seed=seed), noise(frames, 4, seed=seed + 1)
    return list(zip(*levels, strict=True)), noise(frames, 4, seed=seed + 2)


def void(result: object) -> None:
    pass


def test_batches_of_a_size_that_comes_again_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    replays = Replays(decoded, CPU, [])

    def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
        """Stands in for a capture: what is replayed computes from the same memory into the same memory."""
        launch(0)
        captures.append(1)
        pictures, levels, audio = replays._pictures, replays._levels, replays._audio
        pictures.fill_(torch.nan)  # a capture runs nothing
        return lambda: void(pictures.copy_(decoded(levels, audio)))

    monkeypatch.setattr(torch_engine, "captured", captured)
    given = []
    for seed, frames in enumerate((3, 3, 3, 2, 3, 3)):
        encoded, audio = batch(frames, 10 * seed)
        expected = decoded(tuple(torch.stack(level) for level in zip(*encoded, strict=True)), audio)
        given.append((replays(encoded, audio), expected))
    assert len(captures) == 2  # the third size is the first one again, whose graph was let go
    for ours, expected in given:  # checked at last: none is the memory of another
        assert torch.equal(ours, expected)


def test_memory_that_does_not_do_for_a_graph_may_do_for_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
        if len(replays._audio) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        launch(0)
        pictures, levels, audio = replays._pictures, replays._levels, replays._audio
        sizes.append(len(audio))
        return lambda: void(pictures.copy_(decoded(levels, audio)))

    monkeypatch.setattr(torch_engine, "captured", captured)
    sizes: list[int] = []
    notes: list[str] = []
    replays = Replays(decoded, CPU, notes)
    for seed, frames in enumerate((4, 4, 4, 2, 2, 2)):
        encoded, audio = batch(frames, seed)
        expected = decoded(tuple(torch.stack(level) for level in zip(*encoded, strict=True)), audio)
        assert torch.equal(replays(encoded, audio), expected)
        assert (replays._levels == ()) == (seed not in (4, 5))  # nothing is kept for a graph that is not there
    assert (sizes, notes) == ([2], [])


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2.13.0", "^operation failed due to a previous error"),
        (
            "2.11.0+cu128",
            r"captured \(operation failed .*\), and torch 2.11.0\+cu128 frees no memory .* update torch to 2.13",
        ),
    ],
)
def test_a_capture_that_fails_leaves_the_current_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, version: str, words: str
) -> None:
    """torch's own context manager stays on the capture's."""
    now = ["the stage's"]

    class Graph:
        def __init__(self, graph: object, **options: object) -> None:
            pass

        def __enter__(self) -> None:
            now.append("the capture's")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    with pytest.raises(RuntimeError, match=words):
        cuda_graphs.captured(lambda stream: None, torch.device("cuda"))
    assert now == ["the stage's", "the capture's", "the stage's"]
    assert not cuda_graphs.CAPTURING.locked()


AFTER_A_CAPTURE = """
import torch
from gpurender.cuda_graphs import captured

device = torch.device("cuda", 0)
stream = torch.cuda.Stream(device)
with torch.cuda.stream(stream):
    try:
        captured(lambda handle: torch.cuda.synchronize(), device)
    except RuntimeError:
        print("failed")
    print(torch.cuda.current_stream(device) == stream, torch.ones(3, device=device).sum().item() == 3)
"""


@pytest.mark.gpu
def test_after_a_capture_that_fails_the_gpu_works_on() -> None:
    """In a program of its own: before 2.13, torch captures nothing after that."""
    done = run_python(AFTER_A_CAPTURE, dict(os.environ))
    assert done.stdout.split() == ["failed", "True", "True"], done.stderr


def test_where_torch_cannot_go_on_after_a_capture_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(launch: object, device: torch.device) -> Callable[[], None]:
        raise cuda_graphs.CaptureError("update torch")

    monkeypatch.setattr(torch_engine, "captured", refuses)
    replays = Replays(decoded, CPU, notes := [])
    replays(*batch(2, 0))
    with pytest.raises(DeviceError, match="update torch"):
        replays(*batch(2, 1))
    assert notes == []


def test_without_graphs_it_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(launch: object, device: torch.device) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhile capturing")

    monkeypatch.setattr(torch_engine, "captured", refuses)
    notes: list[str] = []
    replays = Replays(decoded, CPU, notes)
    for seed in range(4):
        encoded, audio = batch(2, seed)
        expected = decoded(tuple(torch.stack(level) for level in zip(*encoded, strict=True)), audio)
        assert torch.equal(replays(encoded, audio), expected)
    assert notes == ["torch's launches could not be captured in a CUDA graph (operation not permitted)"]
