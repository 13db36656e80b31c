"""RGB <-> NV12, the pictures that video encoders take and decoders give; matrix and range explicit."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import DLPack, Impl, as_tensor, check_impl, custom_op, fake_of, runs_kernel

Matrix = Literal["bt601", "bt709", "bt2020"]
Siting = Literal["left", "centre", "top left", "top"]

WEIGHTS: dict[Matrix, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
"""What red and blue weigh in luma (ITU-T H.273, table 4: KR and KB); green is what is left of 1."""


Equations = tuple[float, float, int, int, int]
"""KR, KB, luma's lowest level, and the spans of luma and chroma."""

BETWEEN: dict[Siting, tuple[bool, bool]] = {
    "left": (False, True),
    "centre": (True, True),
    "top left": (False, False),
    "top": (True, False),
}
"""Whether chroma samples lie between pixels, across and down, or on even ones."""

AT_ONCE = {"cpu": 100_000, "cuda": 4_000_000}
"""Pixels that are made NV12 together. Each takes some 30 bytes meanwhile: on a CPU, few enough for its cache."""


def rgb_to_nv12(
    frames: Tensor | DLPack, *, matrix: Matrix = "bt709", full_range: bool = False, impl: Impl | None = None
) -> Tensor:
    """Convert RGB frames to NV12 surfaces: H rows of luma, then H/2 rows of chroma, Cb and Cr alternating.

    Convention: H.273's equations for 8 bits. Luma is 16..235 and chroma 16..240 around 128 in limited range, 0..255 in
    full range. A chroma sample is that of the mean colour of its 2×2 pixels (sited in their centre). Everything is
    computed in float32 and rounded once. An odd width or height is made even by repeating the last column or row.

    Args:
        frames: (B,3,H,W) uint8 RGB of any strides; torch's or any library's that has DLPack.
        matrix, full_range: what the surfaces are to be; BT.709 limited is what video players take HD to be.
        impl: `reference` is torch, on any device; `kernel` is one Triton kernel. None is that on CUDA, and on a CPU
            another, compiled for this processor. Where the exact value lies within 0.0001 of two levels' middle, they
            may differ by one level.

    Returns:
        (B,H*3/2,W) uint8 on the device of `frames`, H and W rounded up to even.

    Raises:
        ValueError: shape or dtype are not these, or the kernel was asked for and cannot run.

    >>> import torch
    >>> from gpurender import rgb_to_nv12
    >>> surfaces = rgb_to_nv12(torch.full((1, 3, 4, 6), 255, dtype=torch.uint8))
    >>> surfaces.shape, surfaces[0, 0, 0].item(), surfaces[0, 4, 0].item()
    (torch.Size([1, 6, 6]), 235, 128)
    """
    frames = as_tensor(frames)
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or min(frames.shape[2:]) == 0:
        raise ValueError(f"frames are (B,3,H,W) uint8, given {tuple(frames.shape)} {frames.dtype}")
    check_matrix(matrix)
    check_impl(impl)
    return rgb_to_nv12_op(frames, matrix, full_range, impl)


def nv12_to_rgb(
    surfaces: Tensor | DLPack,
    *,
    matrix: Matrix = "bt709",
    full_range: bool = False,
    siting: Siting | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Convert NV12 surfaces to RGB frames: the inverse of `rgb_to_nv12`, but for what subsampling and 8 bits lost.

    Convention: H.273's equations. Each chroma sample serves its 2×2 pixels, or with `siting` is interpolated
    bicubically, as FFmpeg's scaler does it: within 2 levels of its pixels (`video.to_rgb`), 0.006 on average, for
    decoded videos. Everything is computed in float32, clamped to 0..255 and rounded once.

    Args:
        surfaces: (B,H*3/2,W) uint8 of any strides, H and W even; torch's or any library's that has DLPack.
        matrix, full_range: what the surfaces are.
        siting: where a chroma sample lies among its 2×2 pixels (H.264 and its successors say `left` if nothing else);
            None does not interpolate.
        impl: `reference` is torch, on any device; `kernel` is one Triton kernel. None is that on CUDA, else torch.

    Returns:
        (B,3,H,W) uint8 RGB on the device of `surfaces`.

    Raises:
        ValueError: shape or dtype are not these, or the kernel was asked for and cannot run.

    >>> import torch
    >>> from gpurender import nv12_to_rgb, rgb_to_nv12
    >>> frames = torch.full((1, 3, 4, 6), 200, dtype=torch.uint8)
    >>> torch.equal(nv12_to_rgb(rgb_to_nv12(frames)), frames)
    True
    """
    surfaces = as_tensor(surfaces)
    check_surfaces(surfaces)
    check_matrix(matrix)
    if siting is not None and siting not in BETWEEN:
        raise ValueError(f"siting is None or one of {', '.join(BETWEEN)}, given {siting!r}")
    check_impl(impl)
    return nv12_to_rgb_op(surfaces, matrix, full_range, siting, impl)


# --- the ops ---------------------------------------------------------------------------------------------------------


@custom_op("rgb_to_nv12")
def rgb_to_nv12_op(frames: Tensor, matrix: str, full_range: bool, impl: str | None) -> Tensor:
    surfaces = surfaces_for(frames)
    if runs_kernel(impl, frames.device):
        from .kernels import color as kernels  # Triton takes a while to load, and is not everywhere

        kernels.rgb_to_nv12(frames, surfaces, equations(matrix, full_range))
    else:
        fill = fill_here if impl is None and frames.device.type == "cpu" else fill_reference
        fill(*planes(surfaces), frames, equations(matrix, full_range))
    return surfaces


@fake_of("rgb_to_nv12")
def _(frames: Tensor, matrix: str, full_range: bool, impl: str | None) -> Tensor:
    return surfaces_for(frames)


@custom_op("nv12_to_rgb")
def nv12_to_rgb_op(surfaces: Tensor, matrix: str, full_range: bool, siting: str | None, impl: str | None) -> Tensor:
    if not runs_kernel(impl, surfaces.device):
        return rgb_reference(surfaces, matrix, full_range, siting)
    from .kernels import color as kernels

    frames = frames_for(surfaces)
    across, down = (
        (None, None) if siting is None else (chroma_weights(between) for between in BETWEEN[cast(Siting, siting)])
    )
    kernels.nv12_to_rgb(surfaces, frames, equations(matrix, full_range), across, down)
    return frames


@fake_of("nv12_to_rgb")
def _(surfaces: Tensor, matrix: str, full_range: bool, siting: str | None, impl: str | None) -> Tensor:
    return frames_for(surfaces)


def surfaces_for(frames: Tensor) -> Tensor:
    batch, _, height, width = frames.shape
    return frames.new_empty(batch, (height + height % 2) // 2 * 3, width + width % 2, dtype=torch.uint8)


def frames_for(surfaces: Tensor) -> Tensor:
    return surfaces.new_empty(surfaces.shape[0], 3, surfaces.shape[1] * 2 // 3, surfaces.shape[2])


def fill_here(luma: Tensor, chroma: Tensor, frames: Tensor, equations: Equations) -> None:
    """`fill_reference` on a CPU, in less time where there is a kernel for this processor."""
    from .color_kernel import fill_frame, kernel_for  # LLVM takes a while to load

    if kernel_for(frames.shape[3], frames.shape[2]):
        for planes_and_frame in zip(luma, chroma, frames, strict=True):
            fill_frame(*planes_and_frame, equations)
    else:
        fill_reference(luma, chroma, frames, equations)


# --- the references --------------------------------------------------------------------------------------------------


def fill_reference(luma: Tensor, chroma: Tensor, frames: Tensor, equations: Equations) -> None:
    """Write frames (B,3,H,W) as luma (B,H,W) and chroma (B,H/2,W/2,2), H and W rounded up to even, of any strides."""
    height, width = luma.shape[1:]
    at_once = AT_ONCE.get(frames.device.type, AT_ONCE["cuda"])
    count = max(at_once // (height * width), 1)
    rows = max(at_once // width // 2 * 2, 2)
    for of_luma, of_chroma, some in zip(luma.split(count), chroma.split(count), frames.split(count), strict=True):
        if some.shape[2:] != (height, width):
            beyond = (0, width - some.shape[3], 0, height - some.shape[2])
            some = F.pad(some.float(), beyond, mode="replicate")  # which 8 bits lack
        for band in zip(of_luma.split(rows, 1), of_chroma.split(rows // 2, 1), some.split(rows, 2), strict=True):
            fill_nv12(*band, *equations)


def fill_nv12(
    luma: Tensor, chroma: Tensor, pixels: Tensor, kr: float, kb: float, low: int, luma_span: int, chroma_span: int
) -> None:
    pixels = pixels.float()
    luma.copy_(to_8_bits(weigh(pixels, kr, kb).mul_(luma_span / 255).add_(low)))
    rows = pixels[:, :, ::2] + pixels[:, :, 1::2]
    means = (rows[..., ::2] + rows[..., 1::2]).div_(4)  # exact; five times as fast as avg_pool2d
    grey = weigh(means, kr, kb)
    for k, (channel, weight) in enumerate(((2, kb), (0, kr))):
        difference = (means[:, channel] - grey).mul_(chroma_span / 255 / (2 * (1 - weight)))
        chroma[..., k].copy_(to_8_bits(difference.add_(128)))


def rgb_reference(surfaces: Tensor, matrix: str, full_range: bool, siting: str | None) -> Tensor:
    kr, kb, low, luma_span, chroma_span = equations(matrix, full_range)
    luma, chroma = planes(surfaces)
    grey = (luma.float() - low).mul_(255 / luma_span)
    blue, red = (
        (chroma[..., k].float() - 128).mul_(255 / chroma_span * 2 * (1 - weight)) for k, weight in ((0, kb), (1, kr))
    )
    blue, red = (doubled(plane, siting) for plane in (blue, red))
    green = (red * kr + blue * kb).div_(kr + kb - 1)
    return torch.stack([to_8_bits(difference.add_(grey)) for difference in (red, green, blue)], 1)


def equations(matrix: str, full_range: bool) -> Equations:
    kr, kb = WEIGHTS[cast(Matrix, matrix)]
    return (kr, kb, 0, 255, 255) if full_range else (kr, kb, 16, 219, 224)


def planes(surfaces: Tensor) -> tuple[Tensor, Tensor]:
    """Views of NV12 surfaces: luma (B,H,W) and chroma (B,H/2,W/2,2)."""
    height = surfaces.shape[1] * 2 // 3
    return surfaces[:, :height], surfaces[:, height:].unflatten(2, (-1, 2))


def check_matrix(matrix: str) -> None:
    if matrix not in WEIGHTS:
        raise ValueError(f"matrix is one of {', '.join(WEIGHTS)}, given {matrix!r}")


def check_surfaces(surfaces: Tensor) -> None:
    even = surfaces.ndim == 3 and surfaces.shape[1] % 3 == surfaces.shape[2] % 2 == 0 and min(surfaces.shape[1:]) > 0
    if not even or surfaces.dtype != torch.uint8:
        raise ValueError(
            f"surfaces are (B,H*3/2,W) uint8 of even H and W, given {tuple(surfaces.shape)} {surfaces.dtype}"
        )


def doubled(plane: Tensor, siting: str | None) -> Tensor:
    """(B,2*H,2*W) of a chroma plane (B,H,W)."""
    if siting is None:
        return plane.repeat_interleave(2, 1).repeat_interleave(2, 2)
    across, down = (chroma_weights(between) for between in BETWEEN[cast(Siting, siting)])
    return interpolated(interpolated(plane, across).transpose(1, 2), down).transpose(1, 2)


def interpolated(rows: Tensor, weights: tuple[tuple[float, ...], ...]) -> Tensor:
    """(B,H,2*W) float32 of (B,H,W), by `chroma_weights`. Ends are repeated."""
    width = rows.shape[2]
    padded = F.pad(rows, (2, 2), mode="replicate")
    pixels = [sum(padded[..., k : k + width] * weight for k, weight in enumerate(taps) if weight) for taps in weights]
    return torch.stack(cast(list[Tensor], pixels), 3).flatten(2)


def chroma_weights(between: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the samples from two before to two after weigh, for even and for odd pixels, if samples lie on even pixels
    or between even and odd ones."""
    even, odd = (
        tuple(cubic(abs(tap - place)) for tap in range(-2, 3)) for place in ((-0.25, 0.25) if between else (0.0, 0.5))
    )
    return even, odd


def cubic(distance: float) -> float:
    """The weight of a sample at a distance: Keys' kernel with FFmpeg's parameter."""
    a = -0.6
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return (((distance - 5) * distance + 8) * distance - 4) * a if distance < 2 else 0.0


def weigh(pixels: Tensor, kr: float, kb: float) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return (red * kr).add_(green, alpha=1 - kr - kb).add_(blue, alpha=kb)


def to_8_bits(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
