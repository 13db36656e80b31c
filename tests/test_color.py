"""Colour against float64 equations written out anew, and against FFmpeg's swscale."""

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurender import nv12_to_rgb, rgb_to_nv12
from gpurender.color import AT_ONCE, WEIGHTS, Matrix, equations, fill_here, planes
from gpurender.color_kernel import kernel_for
from gpurender.jit import Processor

MATRICES: list[Matrix] = ["bt601", "bt709", "bt2020"]


def noise(height: int, width: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def ycbcr(rgb: np.ndarray, matrix: Matrix, full_range: bool) -> np.ndarray:
    """(...,3) float64 RGB in 0..255 to unrounded Y, Cb, Cr; H.273's equations 38 to 46 as they stand."""
    kr, kb = WEIGHTS[matrix]
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = 0.5 * (blue - luma) / (1 - kb), 0.5 * (red - luma) / (1 - kr)
    if full_range:
        return np.stack([255 * luma, 255 * cb + 128, 255 * cr + 128], -1)
    return np.stack([219 * luma + 16, 224 * cb + 128, 224 * cr + 128], -1)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
@settings(max_examples=15)
@given(height=st.integers(1, 9), width=st.integers(1, 9), at_once=st.integers(1, 200), seed=st.integers(0, 99))
def test_nv12_is_the_equations(
    matrix: Matrix, full_range: bool, height: int, width: int, at_once: int, seed: int
) -> None:
    frames = noise(height, width, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AT_ONCE, "cpu", at_once)  # bands of rows, or several frames
        surfaces = rgb_to_nv12(frames, matrix=matrix, full_range=full_range, impl="reference")
    check(surfaces, frames, matrix, full_range)


def check(surfaces: torch.Tensor, frames: torch.Tensor, matrix: Matrix, full_range: bool) -> None:
    luma, chroma = planes(surfaces)
    height, width = frames.shape[2:]
    pixels = np.pad(frames.numpy(), ((0, 0), (0, 0), (0, height % 2), (0, width % 2)), "edge").astype(float)
    pixels = np.moveaxis(pixels, 1, -1)
    means = (pixels[:, ::2, ::2] + pixels[:, 1::2, ::2] + pixels[:, ::2, 1::2] + pixels[:, 1::2, 1::2]) / 4
    exact_luma = ycbcr(pixels, matrix, full_range)[..., 0].clip(0, 255)
    exact_chroma = ycbcr(means, matrix, full_range)[..., 1:].clip(0, 255)
    assert luma.shape == exact_luma.shape
    assert np.abs(luma.numpy() - exact_luma).max() <= 0.5 + 1e-4
    assert np.abs(chroma.numpy() - exact_chroma).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_a_processors_kernel_is_the_equations(processor: Processor, matrix: Matrix, full_range: bool) -> None:
    for height, width in ((2, 32), (6, 34), (40, 62), (10, 96), (2, 98), (33, 40), (40, 35), (4, 30)):
        frames = noise(height, width, seed=width)
        surfaces = rgb_to_nv12(frames, matrix=matrix, full_range=full_range)
        check(surfaces, frames, matrix, full_range)
        reference = rgb_to_nv12(frames, matrix=matrix, full_range=full_range, impl="reference")
        assert (surfaces != reference).sum() <= 1e-3 * surfaces.numel()
        assert kernel_for(width, height) == (width >= 32 and not (width % 2 or height % 2))


def test_a_processors_kernel_takes_any_strides_and_writes_parts(processor: Processor) -> None:
    pixels = noise(50, 120)
    expected = rgb_to_nv12(pixels[..., 3:43, 5:105], impl="reference")
    for frames in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.expand(2, -1, -1, -1)):
        luma, chroma = torch.full((2, 60, 200), 7, dtype=torch.uint8), torch.full((2, 30, 100, 2), 7, dtype=torch.uint8)
        of_luma, of_chroma = luma[:, 10:50, 20:120], chroma[:, 5:25, 10:60]
        fill_here(of_luma, of_chroma, frames[..., 3:43, 5:105], equations("bt709", full_range=False))
        for part, whole, wanted in zip((of_luma, of_chroma), (luma, chroma), planes(expected), strict=True):
            assert (part.int() - wanted.int()).abs().max() <= 1
            part.fill_(7)
            assert (whole == 7).all()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_come_back(device: torch.device, matrix: Matrix, full_range: bool) -> None:
    levels = torch.arange(0, 256, 15)
    colours = torch.cartesian_prod(levels, levels, levels).to(torch.uint8)  # each fills its 2×2 pixels
    frames = colours.T.reshape(1, 3, -1, 1).repeat(1, 1, 1, 2).repeat_interleave(2, 2).to(device)
    surfaces = rgb_to_nv12(frames, matrix=matrix, full_range=full_range)
    assert surfaces.device.type == device.type
    back = nv12_to_rgb(surfaces, matrix=matrix, full_range=full_range)
    # Half a level of luma and half a level of chroma, times the largest factor of the inverse, then rounding.
    assert (back.int() - frames.int()).abs().max() <= 3


@pytest.mark.parametrize("full_range", [False, True])
def test_greys_are_exact_in_full_range_and_keep_their_ends(full_range: bool) -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256).repeat(1, 3, 2, 1).repeat_interleave(2, 3)
    luma, chroma = planes(rgb_to_nv12(frames, full_range=full_range))
    assert (chroma == 128).all()
    assert (luma[0, 0, 0], luma[0, 0, -1]) == ((0, 255) if full_range else (16, 235))
    back = nv12_to_rgb(rgb_to_nv12(frames, full_range=full_range), full_range=full_range)
    assert (back.int() - frames.int()).abs().max() <= (0 if full_range else 1)


def test_swscale_has_the_same_colours() -> None:
    """FFmpeg's conversion, which writes the videos of the CPU path, is one level apart within flat blocks."""
    block = 16  # swscale's chroma reaches over a few rows: looked at in the middle of each block
    frames = noise(3, 40).repeat_interleave(block, 2).repeat_interleave(2, 3)
    luma, chroma = planes(rgb_to_nv12(frames))
    for rgb, y, uv in zip(frames.permute(0, 2, 3, 1).numpy(), luma.numpy(), chroma.numpy(), strict=True):
        theirs = (
            VideoReformatter()
            .reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            .to_ndarray()
            .astype(int)
        )
        assert np.abs(theirs[: len(y)] - y).max() <= 1
        difference = np.abs(theirs[len(y) :].reshape(2, *uv.shape[:2]) - np.moveaxis(uv, -1, 0))
        assert difference.reshape(2, 3, block // 2, -1)[:, :, 2:-2].max() <= 1


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4)],
)
def test_other_shapes_and_types_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"frames are \(B,3,H,W\) uint8, given"):
        rgb_to_nv12(frames)
    with pytest.raises(ValueError, match=r"surfaces are \(B,H\*3/2,W\) uint8 of even H and W, given"):
        nv12_to_rgb(frames)
    with pytest.raises(ValueError, match="surfaces are"):
        nv12_to_rgb(torch.zeros(1, 0, 4, dtype=torch.uint8))
