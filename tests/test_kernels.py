"""Kernels against their references and against float64; interpreted on the CPU, compiled for GPUs that are not here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_color import MATRICES, noise, ycbcr
from torch import Tensor

from gpurender import crop_and_mask, crop_faces, face_input, nv12_to_rgb, paste_faces, paste_faces_nv12, rgb_to_nv12
from gpurender.color import BETWEEN, Matrix, Siting, equations, planes
from gpurender.kernels import color as color_kernels
from gpurender.kernels import crop as crop_kernels
from gpurender.kernels import paste as paste_kernels
from gpurender.ops import Impl

few = settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # interpreted kernels are too slow to shrink failures
)
FLOATS = [torch.float64, torch.float32, torch.float16]
if torch.cuda.is_available():
    FLOATS.append(torch.bfloat16)  # to which the interpreter cuts, and GPUs round
TIE = {"cpu": 1e-3, "cuda": 2e-3}  # levels from the middle of two, within which kernel and reference may differ


@pytest.fixture(autouse=True)
def _nothing_is_left_unwritten() -> Iterator[None]:
    """New tensors are filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def rectangles(draw: st.DrawFn, width: int, height: int) -> list[int]:
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return [x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))]


@st.composite
def batches(draw: st.DrawFn, most: int = 3) -> tuple[Tensor, Tensor]:
    """Frames of noise, of odd and even sizes and either layout, and rectangles of different sizes."""
    height, width, count = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, most))
    frames = noise(height, width, count, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        frames = frames.to(memory_format=torch.channels_last)
    return frames, torch.tensor([draw(rectangles(width, height)) for _ in range(count)])


def assert_rounded_alike(kernel: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Bit for bit, but where the exact value is a tie: there, by one level."""
    difference = (kernel.int() - reference.int()).abs()
    assert difference.max() <= 1
    from_tie = (exact.cpu().double() % 1 - 0.5).abs()
    assert (from_tie[difference.cpu() > 0] < TIE[kernel.device.type]).all()


def assert_as_close(kernel: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The kernel's error against float64 is the reference's in the same precision, but for the last bit of a few."""
    if kernel.dtype == torch.float64:
        torch.testing.assert_close(kernel, reference, rtol=0, atol=1e-13)
        return
    of_kernel, of_reference = ((values.double() - exact).abs() for values in (kernel, reference))
    last_bit = torch.finfo(kernel.dtype).eps * exact.abs().max()
    assert of_kernel.max() <= 1.1 * of_reference.max() + last_bit
    assert of_kernel.mean() <= 1.1 * of_reference.mean() + last_bit / 10


# --- crop ------------------------------------------------------------------------------------------------------------


@few
@given(batches(2))
def test_crops_of_8_bits(kernel_device: torch.device, batch: tuple[Tensor, Tensor]) -> None:
    frames, rects = batch[0].to(kernel_device), batch[1]
    kernel = crop_faces(frames, rects, impl="kernel")
    exact = crop_faces(frames.double(), rects, impl="reference").clamp(0, 255)
    assert_rounded_alike(kernel, crop_faces(frames, rects, impl="reference"), exact)


@few
@given(batches(2), st.sampled_from(FLOATS))
def test_crops_in_float_mode(kernel_device: torch.device, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    frames, rects = (batch[0].double() / 255).to(kernel_device, dtype), batch[1]
    kernel, reference = (crop_faces(frames, rects, impl=impl) for impl in ("kernel", "reference"))
    assert kernel.dtype == dtype
    assert_as_close(kernel, reference, crop_faces(frames.double(), rects, impl="reference"))


@pytest.mark.parametrize("dtype", [None, *FLOATS])
@pytest.mark.parametrize("floating", [False, True])
def test_what_the_network_sees(kernel_device: torch.device, dtype: torch.dtype | None, floating: bool) -> None:
    frames, rects = noise(90, 120).to(kernel_device), torch.tensor([[3, 5, 80, 80], [0, 0, 120, 90]])
    if floating:
        frames = frames.float() / 255
    crops, inputs = crop_and_mask(frames, rects, dtype=dtype, impl="kernel")
    assert torch.equal(crops, crop_faces(frames, rects, impl="kernel"))
    assert inputs.dtype == (dtype or torch.float32)
    expected = face_input(crops).to(inputs.dtype)
    if kernel_device.type == "cpu":
        assert torch.equal(inputs, expected)
    else:  # torch divides by 255 by multiplying there
        torch.testing.assert_close(inputs, expected)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_crops_of_nv12(kernel_device: torch.device, matrix: Matrix, full_range: bool) -> None:
    surfaces = torch.randint(0, 256, (2, 60, 54), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    rects = torch.tensor([[1, 3, 50, 38], [0, 0, 54, 40]])
    surfaces = surfaces.to(kernel_device)
    frames = nv12_to_rgb(surfaces, matrix=matrix, full_range=full_range, impl="reference")
    kernel = crop_faces(surfaces, rects, matrix=matrix, full_range=full_range, impl="kernel")
    exact = crop_faces(frames.double(), rects, impl="reference").clamp(0, 255)
    assert_rounded_alike(kernel, crop_faces(frames, rects, impl="reference"), exact)
    reference = crop_faces(surfaces, rects, matrix=matrix, full_range=full_range, impl="reference")
    assert torch.equal(reference, crop_faces(frames, rects, impl="reference"))


@pytest.mark.parametrize("tile", [(64, 128), (128, 64)])
def test_crops_do_not_depend_on_tiles(kernel_device: torch.device, tile: tuple[int, int]) -> None:
    frames, rects = noise(50, 61, 1).to(kernel_device), torch.tensor([[7, 2, 60, 44]])
    crops, inputs = frames.new_empty(1, 3, 328, 328), torch.empty(1, 6, 320, 320, device=kernel_device)
    crop_kernels.crop(frames, rects, crops, inputs, equations("bt709", False), tile)
    expected = crop_and_mask(frames, rects, impl="kernel")
    assert torch.equal(crops, expected[0])
    assert torch.equal(inputs, expected[1])


# --- paste -----------------------------------------------------------------------------------------------------------


def predictions_for(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise, a little beyond 0..1."""
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(len(frames), 3, 320, 320, generator=generator) * 1.1 - 0.05).to(frames.device, dtype)


def keep_for(frames: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return (torch.rand(len(frames), *frames.shape[2:], generator=generator) < 0.3).to(frames.device)


@few
@given(batches(), st.booleans(), st.sampled_from([torch.float32, torch.float16]))
def test_pastes_of_8_bits(
    kernel_device: torch.device, batch: tuple[Tensor, Tensor], kept: bool, dtype: torch.dtype
) -> None:
    frames, rects = batch[0].to(kernel_device), batch[1]
    crops = noise(328, 328, len(frames)).to(kernel_device)
    predictions, keep = predictions_for(frames, dtype), keep_for(frames) if kept else None
    before = frames.clone()
    kernel = paste_faces(frames, crops, predictions, rects, keep, impl="kernel")
    assert torch.equal(frames, before)
    reference = paste_faces(frames, crops, predictions, rects, keep, impl="reference")
    cut = (predictions.float() * 255).clamp(0, 255).floor().double()
    exact = paste_faces(frames.double(), crops.double(), cut, rects, keep, impl="reference").clamp(0, 255)
    assert_rounded_alike(kernel, reference, exact)
    changed = torch.zeros_like(frames, dtype=torch.bool)
    for of_frame, (x0, y0, x1, y1) in zip(changed, rects.tolist(), strict=True):
        of_frame[:, y0:y1, x0:x1] = True
    if keep is not None:
        changed &= ~keep[:, None]
    assert torch.equal(kernel[~changed], frames[~changed])
    in_place = frames.clone()
    assert paste_faces(in_place, crops, predictions, rects, keep, inplace=True, impl="kernel") is in_place
    assert torch.equal(in_place, kernel)


@few
@given(batches(), st.booleans(), st.sampled_from(FLOATS))
def test_pastes_in_float_mode(
    kernel_device: torch.device, batch: tuple[Tensor, Tensor], kept: bool, dtype: torch.dtype
) -> None:
    frames, rects = (batch[0].double() / 255).to(kernel_device, dtype), batch[1]
    crops = (noise(328, 328, len(frames)).double() / 255).to(kernel_device, dtype)
    predictions, keep = predictions_for(frames, dtype), keep_for(frames) if kept else None
    kernel, reference = (
        paste_faces(frames, crops, predictions, rects, keep, impl=impl) for impl in ("kernel", "reference")
    )
    exact = paste_faces(frames.double(), crops.double(), predictions.double(), rects, keep, impl="reference")
    assert_as_close(kernel, reference, exact)


@few
@given(batches(), st.booleans(), st.sampled_from(MATRICES), st.booleans())
def test_pastes_as_nv12(
    kernel_device: torch.device, batch: tuple[Tensor, Tensor], kept: bool, matrix: Matrix, full_range: bool
) -> None:
    frames, rects = batch[0].to(kernel_device), batch[1]
    crops = crop_faces(frames, rects, impl="reference")
    faces = (crops, predictions_for(frames), rects, keep_for(frames) if kept else None)
    surfaces = paste_faces_nv12(frames, *faces, matrix=matrix, full_range=full_range, impl="kernel")
    pasted = paste_faces(frames, *faces, impl="kernel")
    reference = rgb_to_nv12(pasted, matrix=matrix, full_range=full_range, impl="reference")
    assert_rounded_alike(surfaces, reference, exact_nv12(pasted, matrix, full_range))


@pytest.mark.parametrize("size", [(20, 32), (21, 31)])
@pytest.mark.parametrize("tile", [(2, 32), (8, 8), (32, 64)])
def test_pastes_do_not_depend_on_tiles(
    kernel_device: torch.device, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    frames, rects = noise(*size).to(kernel_device), torch.tensor([[5, 7, 23, 18], [0, 0, size[1], 3]])
    crops, predictions = crop_faces(frames, rects, impl="reference"), predictions_for(frames)
    of_rgb, of_bt601 = frames.clone(), equations("bt601", False)
    paste_kernels.paste(of_rgb, crops, predictions, rects, None, tile=tile)
    assert torch.equal(of_rgb, paste_faces(frames, crops, predictions, rects, impl="kernel"))
    surfaces = torch.full((2, 30 if size[0] == 20 else 33, 32), 77, dtype=torch.uint8, device=kernel_device)
    paste_kernels.paste(frames, crops, predictions, rects, None, surfaces, of_bt601, tile)
    expected = paste_faces_nv12(frames, crops, predictions, rects, matrix="bt601", impl="kernel")
    assert torch.equal(surfaces, expected)


def test_inputs_of_any_strides(kernel_device: torch.device) -> None:
    frames = noise(80, 100, 4).to(kernel_device)[1::2, :, 3:60:2, 5:90:3]
    rects = torch.tensor([[2, 1, 25, 27], [0, 0, frames.shape[3], frames.shape[2]]])
    crops = crop_faces(frames, rects, impl="kernel").to(memory_format=torch.channels_last)
    predictions = predictions_for(frames).to(memory_format=torch.channels_last)
    keep = keep_for(frames).transpose(1, 2).contiguous().transpose(1, 2)
    dense = [tensor.contiguous() for tensor in (frames, crops, predictions, keep)]
    assert torch.equal(crops, crop_faces(dense[0], rects, impl="kernel"))
    for op in (paste_faces, paste_faces_nv12):
        strided = op(frames, crops, predictions, rects, keep, impl="kernel")
        assert torch.equal(strided, op(dense[0], dense[1], dense[2], rects, dense[3], impl="kernel"))


# --- colour ----------------------------------------------------------------------------------------------------------


def exact_nv12(frames: Tensor, matrix: Matrix, full_range: bool) -> Tensor:
    """(B,H*3/2,W) float64, unrounded: the equations written out anew."""
    pixels = frames.cpu().double()
    pixels = torch.nn.functional.pad(pixels, (0, pixels.shape[3] % 2, 0, pixels.shape[2] % 2), mode="replicate")
    luma = ycbcr(pixels.permute(0, 2, 3, 1).numpy(), matrix, full_range)[..., 0]
    means = torch.nn.functional.avg_pool2d(pixels, 2).permute(0, 2, 3, 1).numpy()
    chroma = ycbcr(means, matrix, full_range)[..., 1:]
    return torch.cat([torch.from_numpy(luma), torch.from_numpy(chroma).flatten(2)], 1).clamp(0, 255)


@few
@given(batches(), st.sampled_from(MATRICES), st.booleans())
def test_nv12_of_rgb(
    kernel_device: torch.device, batch: tuple[Tensor, Tensor], matrix: Matrix, full_range: bool
) -> None:
    frames = batch[0].to(kernel_device)
    kernel, reference = (
        rgb_to_nv12(frames, matrix=matrix, full_range=full_range, impl=impl) for impl in ("kernel", "reference")
    )
    assert_rounded_alike(kernel, reference, exact_nv12(frames, matrix, full_range))


@pytest.mark.parametrize("siting", [None, *BETWEEN])
@pytest.mark.parametrize("full_range", [False, True])
def test_rgb_of_nv12(kernel_device: torch.device, siting: Siting | None, full_range: bool) -> None:
    surfaces = torch.randint(0, 256, (2, 57, 46), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    surfaces = surfaces.to(kernel_device)
    for matrix in MATRICES:
        options: dict[str, Any] = {"matrix": matrix, "full_range": full_range, "siting": siting}
        kernel, reference = (nv12_to_rgb(surfaces, **options, impl=impl) for impl in ("kernel", "reference"))
        # No oracle is as exact here: equal, but for the few that float32's order of sums rounds otherwise.
        difference = (kernel.int() - reference.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("tile", [(2, 16), (8, 8)])
def test_colours_do_not_depend_on_tiles(kernel_device: torch.device, tile: tuple[int, int]) -> None:
    frames = noise(21, 33).to(kernel_device)
    surfaces = torch.full((2, 33, 34), 77, dtype=torch.uint8, device=kernel_device)
    color_kernels.rgb_to_nv12(frames, surfaces, equations("bt709", False), tile=tile)
    assert torch.equal(surfaces, rgb_to_nv12(frames, impl="kernel"))
    back = torch.full((2, 3, 22, 34), 77, dtype=torch.uint8, device=kernel_device)
    color_kernels.nv12_to_rgb(surfaces, back, equations("bt709", False), None, None, tile)
    assert torch.equal(back, nv12_to_rgb(surfaces, impl="kernel"))


# --- 64-bit offsets --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_batches_beyond_4_gib() -> None:
    frames = torch.zeros(420, 3, 1440, 2560, dtype=torch.uint8, device="cuda")  # 4.6 GB
    frames[-1] = noise(1440, 2560, 1)[0].cuda()
    rects = torch.tensor([[1000, 500, 1400, 900]] * len(frames))
    crops = crop_faces(frames, rects, impl="kernel")
    assert torch.equal(crops[-1:], crop_faces(frames[-1:], rects[-1:], impl="kernel"))
    surfaces = rgb_to_nv12(frames, impl="kernel")
    assert torch.equal(surfaces[-1:], rgb_to_nv12(frames[-1:], impl="kernel"))
    assert planes(surfaces[:1])[0].unique().tolist() == [16]


def test_offsets_beyond_32_bits(kernel_device: torch.device) -> None:
    """Two frames more than 2³¹ bytes apart, in memory that is reserved but never touched in between."""
    apart = 2**31 + 7
    torch.use_deterministic_algorithms(False)  # which would touch it
    try:
        memory = torch.empty(apart + 3 * 20 * 30, dtype=torch.uint8, device=kernel_device)
    except RuntimeError:
        pytest.skip("there are no 2 GiB to reserve")
    frames = memory.as_strided((2, 3, 20, 30), (apart, 600, 30, 1))
    frames.copy_(noise(20, 30))
    near, rects = noise(20, 30).to(kernel_device), torch.tensor([[3, 2, 25, 18]] * 2)
    crops, predictions = crop_faces(near, rects, impl="kernel"), predictions_for(near)
    assert torch.equal(crop_faces(frames, rects, impl="kernel"), crops)
    assert torch.equal(rgb_to_nv12(frames, impl="kernel"), rgb_to_nv12(near, impl="kernel"))
    for op in (paste_faces, paste_faces_nv12):
        expected = op(near, crops, predictions, rects, impl="kernel")
        assert torch.equal(op(frames, crops, predictions, rects, impl="kernel"), expected)
    paste_faces(frames, crops, predictions, rects, inplace=True, impl="kernel")
    assert torch.equal(frames, paste_faces(near, crops, predictions, rects, impl="kernel"))


@pytest.mark.parametrize("impl", ["reference", "kernel"])
def test_no_frames_are_no_error(kernel_device: torch.device, impl: Impl) -> None:
    frames, rects = noise(20, 30, 0).to(kernel_device), torch.empty(0, 4, dtype=torch.int64)
    crops = crop_faces(frames, rects, impl=impl)
    predictions = predictions_for(frames)
    assert paste_faces(frames, crops, predictions, rects, impl=impl).shape == (0, 3, 20, 30)
    assert paste_faces_nv12(frames, crops, predictions, rects, impl=impl).shape == (0, 30, 30)
    assert nv12_to_rgb(rgb_to_nv12(frames, impl=impl), impl=impl).shape == (0, 3, 20, 30)


# --- compiled --------------------------------------------------------------------------------------------------------


CAPABILITIES = (80, 90, 120)


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Side by side: each takes a processor a quarter of a minute."""
    script = Path(__file__).with_name("compile_kernels.py")
    started = {
        capability: subprocess.Popen(
            [sys.executable, script, str(capability)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for capability in CAPABILITIES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_keep_their_values_in_registers(
    compilations: dict[int, subprocess.Popen[str]], capability: int
) -> None:
    """By the whole of Triton and NVIDIA's assembler, without a GPU, as the launchers call them."""
    process = compilations[capability]
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    compiled = json.loads(output)
    of_pixels = {"crop_kernel", "paste_kernel", "to_nv12_kernel", "to_rgb_kernel"}
    of_networks = {"pointwise_kernel", "depthwise_kernel", "depthwise_halving_kernel"}
    assert {name.split()[0] for name in compiled} == of_pixels | of_networks
    for name, needs in compiled.items():
        assert needs["stack"] <= (0 if name.split()[0] in of_pixels else 160), f"{name} spills {needs['stack']} bytes"
        few = name.split()[0] in of_pixels and "float64" not in name
        assert needs["registers"] <= 128 or not few, f"{name} needs {needs['registers']} registers"
        if name.startswith("to_nv12_kernel") and "EVEN" in name:
            assert (needs["byte loads"], needs["byte stores"]) == (0, 0), f"{name} moves single bytes"
