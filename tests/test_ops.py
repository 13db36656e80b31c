"""The batched ops as a researcher has them: compiled, exported, differentiated, fed from other libraries."""

import functools
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_color import noise
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from gpurender import (
    crop_and_mask,
    crop_faces,
    face_input,
    nv12_to_rgb,
    ops,
    paste_faces,
    paste_faces_nv12,
    rgb_to_nv12,
)
from gpurender.color import nv12_to_rgb_op, rgb_to_nv12_op
from gpurender.crop import crop_op, crop_transposed
from gpurender.ops import DLPack, Impl
from gpurender.paste import paste_in_place_op, paste_nv12_op, paste_op, paste_transposed

CPU = torch.device("cpu")
RECTS = torch.tensor([[3, 4, 20, 30], [0, 1, 44, 31]])
FRAMES = noise(31, 44)
CROPS = noise(328, 328)
PREDICTIONS = torch.rand(2, 3, 320, 320, generator=torch.Generator().manual_seed(1))
KEEP = torch.rand(2, 31, 44, generator=torch.Generator().manual_seed(2)) < 0.3
IMPLS: list[Impl] = ["reference", "kernel"]


def floats(count: int = 2, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, crops and predictions that want gradients."""
    values = FRAMES.double() / 255, CROPS.double() / 255, PREDICTIONS.double()
    frames, crops, predictions = (tensor[:count].to(device).requires_grad_() for tensor in values)
    return frames, crops, predictions


def count_for(impl: Impl, device: torch.device) -> int:
    """Frames: one does for the interpreter, which is slow."""
    return 1 if impl == "kernel" and device.type == "cpu" else 2


# --- which implementation --------------------------------------------------------------------------------------------


def test_none_is_the_reference_on_a_cpu_and_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(ops, "why_no_kernels", lambda device_type: None)
    assert (ops.runs_kernel(None, cpu), ops.runs_kernel(None, gpu)) == (False, True)
    assert (ops.runs_kernel("reference", gpu), ops.runs_kernel("kernel", gpu)) == (False, True)
    monkeypatch.setattr(ops, "why_no_kernels", lambda device_type: "needs Triton; pip install triton")
    assert not ops.runs_kernel(None, gpu)
    with pytest.raises(ValueError, match="impl='kernel' needs Triton; pip install triton; or give impl='reference'"):
        ops.runs_kernel("kernel", gpu)


def test_an_explicit_kernel_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpurender.kernels import cubic

    monkeypatch.setattr(cubic, "INTERPRETED", False)
    ops.why_no_kernels.cache_clear()
    for call in (
        lambda: crop_faces(FRAMES, RECTS, impl="kernel"),
        lambda: crop_and_mask(FRAMES, RECTS, impl="kernel"),
        lambda: paste_faces(FRAMES, CROPS, PREDICTIONS, RECTS, impl="kernel"),
        lambda: paste_faces_nv12(FRAMES, CROPS, PREDICTIONS, RECTS, impl="kernel"),
        lambda: rgb_to_nv12(FRAMES, impl="kernel"),
        lambda: nv12_to_rgb(noise(6, 6)[:, 0], impl="kernel"),
    ):
        with pytest.raises(
            ValueError, match="impl='kernel' runs on CUDA, not on cpu; set .*; or give impl='reference'"
        ):
            call()
    ops.why_no_kernels.cache_clear()


def test_kernels_that_cannot_start_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C compiler: Triton compiles its launcher when it is first used."""

    class NoDriver:
        @property
        def active(self) -> object:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    import triton

    monkeypatch.setattr(triton.runtime, "driver", NoDriver())
    ops.why_no_kernels.cache_clear()
    why = ops.why_no_kernels("cuda")
    ops.why_no_kernels.cache_clear()
    assert why is not None
    assert why.startswith("does not start (Failed to find C compiler); Triton needs gcc and Python's headers")


def test_tensors_on_different_devices_are_refused() -> None:
    elsewhere = PREDICTIONS.to("meta")
    with pytest.raises(ValueError, match="predictions are on meta, but frames on cpu; bring them together"):
        paste_faces(FRAMES, CROPS, elsewhere, RECTS)


def test_other_names_are_refused() -> None:
    wrong: Any = "fast"
    with pytest.raises(ValueError, match="impl is None, 'reference' or 'kernel', given 'fast'"):
        crop_faces(FRAMES, RECTS, impl=wrong)
    with pytest.raises(ValueError, match="matrix is one of bt601, bt709, bt2020, given 'fast'"):
        rgb_to_nv12(FRAMES, matrix=wrong)
    with pytest.raises(ValueError, match="siting is None or one of left, centre, top left, top, given 'fast'"):
        nv12_to_rgb(noise(6, 6)[:, 0], siting=wrong)
    for op in (crop_faces, crop_and_mask):
        with pytest.raises(ValueError, match="matrix is one of bt601, bt709, bt2020, given 'fast'"):
            op(noise(45, 44)[:, 0], RECTS, matrix=wrong)


# --- torch.library, torch.compile, torch.export ----------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_ops_are_registered_as_they_behave(impl: Impl, kernel_device: torch.device) -> None:
    device, count = kernel_device, count_for(impl, kernel_device)
    of_all = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    # Gradients are the same functions of both implementations, and the interpreter is slow.
    tests = of_all[:3] if impl == "kernel" and device.type == "cpu" else of_all
    check = functools.partial(opcheck, test_utils=tests)
    frames, crops, predictions = floats(count, device)
    rects, keep, eight = RECTS[:count], KEEP[:count].to(device), FRAMES[:count].to(device)
    surfaces = rgb_to_nv12(FRAMES[:count]).to(device)
    check(crop_op, (frames, rects, None, "bt709", False, impl))
    check(crop_op, (frames, rects, torch.float32, "bt709", False, impl))
    check(crop_op, (eight, rects, torch.float16, "bt709", False, impl))
    check(crop_op, (surfaces, torch.tensor([[1, 2, 20, 22]] * count), torch.float32, "bt601", True, impl))
    check(paste_op, (frames, crops, predictions, rects, keep, impl))
    check(paste_in_place_op, (frames.detach(), crops.detach(), predictions.detach(), rects, None, impl))
    faces = (CROPS[:count].to(device), predictions.detach(), rects, keep)
    check(paste_nv12_op, (eight, *faces, "bt2020", True, impl))
    check(rgb_to_nv12_op, (eight, "bt601", True, impl))
    check(nv12_to_rgb_op, (surfaces, "bt601", True, "left", impl))
    check(crop_transposed, (crops, rects, 31, 44))
    check(paste_transposed, (frames, rects, keep))


class Rendering(torch.nn.Module):
    """What a frame goes through, with a network of one layer."""

    def __init__(self, impl: Impl) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(6, 3, 1)
        self.impl: Impl = impl

    def forward(self, frames: Tensor, rects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        crops, inputs = crop_and_mask(frames, rects, impl=self.impl)
        faces = self.network(inputs).sigmoid()
        pasted = paste_faces(frames, crops, faces, rects, impl=self.impl)
        surfaces = paste_faces_nv12(frames, crops, faces, rects, impl=self.impl)
        return pasted, surfaces, nv12_to_rgb(rgb_to_nv12(pasted, impl=self.impl), impl=self.impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_graphs_compile_without_a_break_and_export(impl: Impl, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    module = Rendering(impl).to(kernel_device).eval()
    frames = FRAMES.to(kernel_device)
    with torch.no_grad():
        expected = module(frames, RECTS)
        graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(module, (frames, RECTS)).module()
        for made in (graph(frames, RECTS), exported(frames, RECTS)):
            for tensor, one in zip(made, expected, strict=True):
                assert torch.equal(tensor, one)


@pytest.mark.gpu
def test_inductor_compiles_the_graph() -> None:
    module = Rendering("kernel").cuda().eval()
    with torch.no_grad():
        expected = module(FRAMES.cuda(), RECTS)
        made = torch.compile(module, fullgraph=True)(FRAMES.cuda(), RECTS)
    assert [tensor.shape for tensor in made] == [tensor.shape for tensor in expected]
    assert (made[0].int() - expected[0].int()).abs().max() <= 1


@pytest.mark.gpu
def test_a_captured_graph_crops_where_its_rectangles_are() -> None:
    """They are read on the host: torch must not put the op into a CUDA graph, which would have those of the first."""

    def brightened(frames: Tensor, rects: Tensor) -> Tensor:
        return crop_faces(frames + 1, rects) * 2

    compiled = torch.compile(brightened, mode="reduce-overhead")
    frames = FRAMES.cuda().float()
    for _ in range(3):
        for rects in (RECTS, RECTS + 1):
            made = compiled(frames, rects.clamp(max=31)).clone()
            torch.testing.assert_close(made, brightened(frames, rects.clamp(max=31)), atol=1e-3, rtol=0)


def test_ops_that_read_the_host_are_not_for_cuda_graphs() -> None:
    for op in (crop_op, paste_op, paste_in_place_op, paste_nv12_op, crop_transposed, paste_transposed):
        assert torch.Tag.cudagraph_unsafe in op.tags
        assert torch.Tag.pt2_compliant_tag in op.tags


# --- gradients -------------------------------------------------------------------------------------------------------


def in_one(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_crops(impl: Impl, kernel_device: torch.device) -> None:
    count = count_for(impl, kernel_device)
    frames = floats(count, kernel_device)[:1]

    def crop(frames: Tensor) -> Tensor:
        return crop_faces(frames, RECTS[:count], impl=impl)

    def both(frames: Tensor) -> Tensor:
        return in_one(*crop_and_mask(frames, RECTS[:count], impl=impl))

    assert gradcheck(crop, frames, fast_mode=True)
    assert gradcheck(both, frames, fast_mode=True)
    assert gradgradcheck(crop, frames, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keep", [None, KEEP])
def test_gradients_of_pastes(impl: Impl, keep: Tensor | None, kernel_device: torch.device) -> None:
    count = count_for(impl, kernel_device)
    inputs = floats(count, kernel_device)
    keep = None if keep is None else keep[:count].to(kernel_device)

    def paste(frames: Tensor, crops: Tensor, predictions: Tensor) -> Tensor:
        return paste_faces(frames, crops, predictions, RECTS[:count], keep, impl=impl)

    assert gradcheck(paste, inputs, fast_mode=True)
    assert gradgradcheck(paste, inputs, fast_mode=True)


def test_gradients_are_those_of_torchs_own_ops() -> None:
    """Of each op's definition, by slices and `interpolate` alone."""
    frames, crops, predictions = floats()
    x0, y0, x1, y1 = RECTS[0].tolist()
    weights = torch.rand(1, 3, 328, 328, dtype=torch.float64)

    def cubic(picture: Tensor, *size: int) -> Tensor:
        return torch.nn.functional.interpolate(picture, size, mode="bicubic")

    ours, theirs = (
        torch.autograd.grad((cropped * weights).sum(), frames)[0]
        for cropped in (crop_faces(frames[:1], RECTS[:1]), cubic(frames[:1, :, y0:y1, x0:x1], 328, 328))
    )
    torch.testing.assert_close(ours, theirs)

    border = torch.ones(328, 328, dtype=torch.bool)
    border[4:324, 4:324] = False
    face = torch.where(border, crops[:1], torch.nn.functional.pad(predictions[:1].flip(1), (4, 4, 4, 4)))
    pasted = frames[:1].clone()
    pasted[..., y0:y1, x0:x1] = cubic(face, y1 - y0, x1 - x0)
    ours = paste_faces(frames[:1], crops[:1], predictions[:1], RECTS[:1])
    torch.testing.assert_close(ours, pasted)
    weights = torch.rand_like(pasted)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), (frames, crops, predictions)),
        torch.autograd.grad((pasted * weights).sum(), (frames, crops, predictions)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_network_trains_through_crop_and_paste(kernel_device: torch.device) -> None:
    """To draw a face whose mouth it does not see, judged in the whole frame: the loss falls to a tenth."""
    torch.manual_seed(0)
    frames = torch.from_numpy(picture(80, 60, 1)).permute(2, 0, 1)[None].to(kernel_device).float() / 255
    rects = torch.tensor([[20, 10, 60, 50]])
    goal = paste_faces(frames, crop_faces(frames, rects), torch.full((1, 3, 320, 320), 0.8).to(frames), rects)
    network = torch.nn.Conv2d(6, 3, 1).to(kernel_device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        crops = crop_faces(frames, rects)
        pasted = paste_faces(frames, crops, network(face_input(crops)).sigmoid(), rects)
        loss = (pasted - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_frames_that_share_memory_are_not_pasted_in_place() -> None:
    shared = FRAMES[:1].clone().expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="frames that share memory cannot be pasted in place"):
        paste_faces(shared, CROPS, PREDICTIONS, RECTS, inplace=True)
    expected = paste_faces(FRAMES[:1].repeat(2, 1, 1, 1), CROPS, PREDICTIONS, RECTS)
    assert torch.equal(paste_faces(shared, CROPS, PREDICTIONS, RECTS), expected)


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_frames_that_a_gradient_needs_are_not_pasted_over_in_silence(
    impl: Impl | None, kernel_device: torch.device
) -> None:
    frames = FRAMES[:1].float().to(kernel_device)
    weight = torch.ones_like(frames, requires_grad=True)
    loss = (frames * weight).sum()
    crops, predictions = CROPS[:1].float().to(kernel_device), PREDICTIONS[:1].to(kernel_device)
    with torch.no_grad():
        paste_faces(frames, crops, predictions, RECTS[:1], inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_leaves_gradients_exact() -> None:
    frames, _, _ = floats()
    frames = frames.detach().float().requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (gradient,) = torch.autograd.grad(crop_faces(frames, RECTS).square().sum(), frames)
        found.append(gradient)
    assert torch.equal(*found)


def test_forward_mode_is_refused() -> None:
    """torch would take the derivatives for zero."""
    frames, crops, predictions = (tensor.detach() for tensor in floats())
    with pytest.raises(ValueError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda f: crop_faces(f, RECTS), (frames,), (frames,))
    with pytest.raises(ValueError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda p: paste_faces(frames, crops, p, RECTS), (predictions,), (predictions,))


def test_forward_mode_is_not_zero_where_it_is_compiled() -> None:
    frames = floats()[0].detach().float()

    @torch.compile(backend="eager", fullgraph=True)
    def derivative(frames: Tensor) -> Tensor:
        return torch.func.jvp(lambda f: crop_faces(f, RECTS), (frames,), (torch.ones_like(frames),))[1]

    with pytest.raises(Exception, match="no forward-mode derivatives"):
        derivative(frames)


def test_gradients_in_place_are_refused() -> None:
    frames, crops, predictions = floats()
    with pytest.raises(ValueError, match="pasting in place has no gradients; leave out inplace=True"):
        paste_faces(frames.detach(), crops.detach(), predictions, RECTS, inplace=True)
    with torch.no_grad():
        paste_faces(frames.detach().clone(), crops, predictions, RECTS, inplace=True)


# --- other libraries' tensors ----------------------------------------------------------------------------------------


def test_numpy_arrays_are_read_and_written_where_they_are() -> None:
    frames = FRAMES.numpy().copy()
    assert torch.equal(crop_faces(frames, RECTS), crop_faces(FRAMES, RECTS))
    pasted = paste_faces(frames, CROPS, PREDICTIONS, RECTS, inplace=True)
    np.testing.assert_array_equal(frames, paste_faces(FRAMES, CROPS, PREDICTIONS, RECTS))
    assert pasted.data_ptr() == frames.ctypes.data
    surfaces: np.ndarray = np.from_dlpack(rgb_to_nv12(FRAMES.numpy()))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(surfaces, rgb_to_nv12(FRAMES))
    assert torch.equal(nv12_to_rgb(cast(DLPack, surfaces)), nv12_to_rgb(torch.from_numpy(surfaces)))


def test_reversed_arrays_are_told() -> None:
    with pytest.raises(ValueError, match=r"no negative strides, .*: copy\(\) it"):
        crop_faces(FRAMES.numpy()[:, ::-1], RECTS)


def test_what_is_no_array_is_told() -> None:
    with pytest.raises(ValueError, match="frames are a tensor or an array with DLPack, given list"):
        crop_faces(cast(DLPack, FRAMES.tolist()), RECTS)


def test_shapes_alone_are_pasted_in_place() -> None:
    frames, crops, predictions = (tensor.to("meta") for tensor in (FRAMES, CROPS, PREDICTIONS))
    assert paste_faces(frames, crops, predictions, RECTS, inplace=True) is frames


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint64])
def test_rectangles_of_any_integers(impl: Impl | None, dtype: torch.dtype, kernel_device: torch.device) -> None:
    frames, crops, predictions = (t[:1].to(kernel_device) for t in (FRAMES, CROPS, PREDICTIONS))
    rects = RECTS[:1].to(dtype)
    assert torch.equal(crop_faces(frames, rects, impl=impl), crop_faces(frames, RECTS[:1], impl=impl))
    pasted = paste_faces(frames, crops, predictions, rects, impl=impl)
    assert torch.equal(pasted, paste_faces(frames, crops, predictions, RECTS[:1], impl=impl))


@pytest.mark.parametrize("size", [(0, 6), (4, 0)])
def test_frames_without_pixels_are_told(size: tuple[int, int]) -> None:
    frames = torch.zeros(1, 3, *size, dtype=torch.uint8)
    for op in (lambda: rgb_to_nv12(frames), lambda: crop_faces(frames, RECTS[:1])):
        with pytest.raises(ValueError, match=r"frames are \(B,3,H,W\)"):
            op()


@pytest.mark.skipif(sys.platform != "linux", reason="DALI is for Linux only")
def test_frames_of_dali_are_read_where_they_are(tmp_path: Path) -> None:
    import nvidia.dali.experimental.dynamic as dali

    file = tmp_path / "0.png"
    Image.fromarray(picture(100, 80, 1)).save(file)
    decoded = dali.imread([str(file)], device="cpu").tensors[0]
    pixels = torch.from_dlpack(decoded)  # (80,100,3)
    frames = pixels.permute(2, 0, 1)[None]
    rects = torch.tensor([[10, 5, 70, 65]])
    expected = crop_faces(torch.from_numpy(picture(100, 80, 1)).permute(2, 0, 1)[None], rects)
    assert torch.equal(crop_faces(frames, rects), expected)
    assert frames.data_ptr() == torch.from_dlpack(decoded).data_ptr()


@pytest.mark.gpu
def test_frames_on_the_gpu_are_read_where_they_are() -> None:
    frames = FRAMES.cuda()

    class OfAnotherLibrary:
        def __dlpack__(self, **options: Any) -> object:
            return frames.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[Any, int]:
            return frames.__dlpack_device__()

    assert torch.equal(crop_faces(OfAnotherLibrary(), RECTS), crop_faces(frames, RECTS))
    pasted = paste_faces(OfAnotherLibrary(), CROPS.cuda(), PREDICTIONS.cuda(), RECTS, inplace=True)
    assert pasted.data_ptr() == frames.data_ptr()
