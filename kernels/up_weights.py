"""What an `up` block on a processor is given: its shape, and its weights in the order in which they are read."""

from typing import NamedTuple

import numpy as np

from .vectors import rounded_up

PICTURE = 3  # channels


class UpShape(NamedTuple):
    """What of a block the code depends on; numbers of channels are of the network, not rounded up.

    Attributes:
        height, width: of the output, even; the picture's width is a multiple of lanes.
        below: channels of y.
        below_stride: words from one pixel of y to the next.
        face: channels of the face, if the skip is computed from it; else 0.
        skip: channels of the skip.
        inner, out, inner2: of x's inner tensor, x, and the output's inner tensor.
        picture: whether the output is the picture, (3,2h,2w); else (2h,2w, `out` rounded up to lanes).
        half: whether products are of bfloat16, which y and the skip are then in.
        face_half: whether the face is bfloat16.
        half_out: whether the output is bfloat16.
        lanes: float32 values in a vector of this processor.
    """

    height: int
    width: int
    below: int
    below_stride: int
    face: int
    skip: int
    inner: int
    out: int
    inner2: int
    picture: bool
    half: bool
    face_half: bool
    half_out: bool
    lanes: int


class UpWeights(NamedTuple):
    """float32, as the network has them: 1×1 convolutions (out,in), depthwise ones (channels,3,3), biases (out,).

    `expand` takes y's channels, then the skip's. `stem` is what computes the skip from the face: 1×1 convolution, bias,
    3×3 depthwise, bias. `last` is the last convolution, to the picture, and its bias.
    """

    expand: np.ndarray
    expand_bias: np.ndarray
    depthwise: np.ndarray
    depthwise_bias: np.ndarray
    project: np.ndarray
    project_bias: np.ndarray
    expand2: np.ndarray
    expand2_bias: np.ndarray
    depthwise2: np.ndarray
    depthwise2_bias: np.ndarray
    project2: np.ndarray
    project2_bias: np.ndarray
    stem: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None
    last: tuple[np.ndarray, np.ndarray] | None


def packed(weights: UpWeights, shape: UpShape) -> np.ndarray:
    """The weights in the order in which the kernel reads them: words, as float32."""
    parts = {
        "below": product_weights(weights.expand[:, : shape.below], shape, shape.half),
        "expand": product_weights(weights.expand[:, shape.below :], shape, shape.half),
        "expand bias": padded(weights.expand_bias, shape),
        "depthwise": depthwise_weights(weights.depthwise, weights.depthwise_bias, shape),
        "project": product_weights(weights.project, shape, shape.half, by_lanes=True),
        "project bias": padded(weights.project_bias, shape),
        "expand2": product_weights(weights.expand2, shape, shape.half),
        "expand2 bias": padded(weights.expand2_bias, shape),
        "depthwise2": depthwise_weights(weights.depthwise2, weights.depthwise2_bias, shape),
    }
    project2, bias = weights.project2, weights.project2_bias
    if weights.last is not None:
        last, last_bias = weights.last
        project2, bias = last @ project2, last @ bias + last_bias
        parts["last"] = product_weights(last, shape, False)
    parts["project2"] = product_weights(project2, shape, shape.half, by_lanes=True)
    parts["project2 bias"] = padded(bias, shape)
    if weights.stem is not None:
        stem, stem_bias, depthwise, depthwise_bias = weights.stem
        parts["stem"] = product_weights(stem, shape, False)
        parts["stem bias"] = padded(stem_bias, shape)
        parts["stem depthwise"] = depthwise_weights(depthwise, depthwise_bias, shape)
    places, size = weight_places(shape)
    assert {name: len(part) for name, part in parts.items()} == weight_sizes(shape)
    words = np.zeros(size, np.float32)
    for name, part in parts.items():
        words[places[name] : places[name] + len(part)] = part
    return words


def padded(channels: np.ndarray, shape: UpShape) -> np.ndarray:
    """(C,...) with zeros up to a multiple of lanes."""
    beyond = rounded_up(len(channels), shape.lanes) - len(channels)
    return np.pad(channels, [(0, beyond)] + [(0, 0)] * (channels.ndim - 1)).astype(np.float32)


def product_weights(weights: np.ndarray, shape: UpShape, half: bool, by_lanes: bool = False) -> np.ndarray:
    """(out,in) as (in,out), or for bfloat16 as (in/2,out,2); `by_lanes`: in is rounded up to lanes."""
    rows = padded(weights, shape).T
    if by_lanes:
        rows = padded(rows, shape)
    if not half:
        return rows.ravel()
    pairs = rows.reshape(-1, 2, rows.shape[1]).transpose(0, 2, 1)
    return nearest_bfloat16(pairs).view(np.float32).ravel()


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to nearest, ties to even: uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def depthwise_weights(kernels: np.ndarray, bias: np.ndarray, shape: UpShape) -> np.ndarray:
    """Blocks of lanes, each nine weights and the bias."""
    columns = np.concatenate([padded(kernels, shape).reshape(-1, 9), padded(bias, shape)[:, None]], 1)
    return columns.reshape(-1, shape.lanes, 10).transpose(0, 2, 1).ravel()


def weight_sizes(shape: UpShape) -> dict[str, int]:
    inner, out, inner2, last = (
        rounded_up(channels, shape.lanes) for channels in (shape.inner, shape.out, shape.inner2, PICTURE)
    )
    words = 2 if shape.half else 1
    sizes = {
        "below": shape.below * inner // words,
        "expand": shape.skip * inner // words,
        "expand bias": inner,
        "depthwise": 10 * inner,
        "project": inner * out // words,
        "project bias": out,
        "expand2": shape.out * inner2 // words,
        "expand2 bias": inner2,
        "depthwise2": 10 * inner2,
        "project2": inner2 * (last if shape.picture else out) // words,
        "project2 bias": last if shape.picture else out,
    }
    if shape.picture:
        sizes["last"] = shape.out * last
    if shape.face:
        skip = rounded_up(shape.skip, shape.lanes)
        sizes |= {"stem": shape.face * skip, "stem bias": skip, "stem depthwise": 10 * skip}
    return sizes


def weight_places(shape: UpShape) -> tuple[dict[str, int], int]:
    return places_of(weight_sizes(shape))


def places_of(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where parts of these sizes lie, each on a multiple of 64 bytes, and how much that is: words."""
    places, size = {}, 0
    for name, words in sizes.items():
        places[name] = size
        size += rounded_up(words, 16)
    return places, size
