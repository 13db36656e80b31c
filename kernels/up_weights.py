"""What an `up` block on a processor is given: its shape, and its weights in the order in which they are read."""

from typing import NamedTuple

import numpy as np

from .vectors import rounded_up

PICTURE = 3  # channels
FLOAT16_MAX = 65504.0


class UpShape(NamedTuple):
    """What of a block the code depends on; numbers of channels are of the network, not rounded up.

    Attributes:
        height, width: of the output, even; the picture's width is a multiple of lanes.
        below: channels of y.
        below_stride: words from one pixel of y to the next; what is beyond its channels is 0.
        face: channels of the face, if the skip is computed from it; else 0.
        skip: channels of the skip.
        inner, out, inner2: of x's inner tensor, x, and the output's inner tensor.
        picture: whether the output is the picture, (3,height,width); else (height,width, `out` rounded up to lanes).
        per_word: how many numbers are multiplied in a word: 1 float32, 2 bfloat16, which y is then in, or 4 bytes.
        seen_bfloat16: whether the face, or the skip, is bfloat16; the skip is if products are of bfloat16.
        out_bfloat16: whether the output is bfloat16.
        lanes: float32 values in a vector of this processor.
        tiles: whether matrices are multiplied as tiles (AMX), see `fits_tiles`.
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
    per_word: int
    seen_bfloat16: bool
    out_bfloat16: bool
    lanes: int
    tiles: bool


def fits(shape: UpShape) -> bool:
    """Whether words are whole: of a pixel's channels, and of bytes also vectors of a row."""
    skip = 0 if shape.face else shape.skip
    if shape.per_word == 2:
        return not any(channels % 2 for channels in (shape.below, shape.skip, shape.out))
    rows = shape.width // 2 * shape.below_stride, shape.width * skip
    return shape.per_word == 1 or not (shape.below_stride % 4 or skip % 4 or any(words % shape.lanes for words in rows))


def fits_tiles(shape: UpShape) -> bool:
    """Whether tiles of 16 pixels suit a block: there are such of two bytes and of one, a row has as many, y's channels
    are whole vectors or followed by zeros, and sums of a pixel are no more tiles than there are besides two."""
    stride = shape.below_stride * (2 if shape.per_word == 2 else 1)
    whole = stride >= rounded_up(shape.below, shape.lanes)
    return shape.per_word > 1 and shape.width >= 16 and whole and shape.out <= 6 * 16


def y_channels(shape: UpShape) -> int:
    """Channels of y as it is multiplied."""
    return rounded_up(shape.below, shape.lanes) if shape.tiles else shape.below


def skip_stride(shape: UpShape) -> int:
    """Channels from one pixel of the skip to the next, as it is multiplied."""
    return rounded_up(shape.skip, shape.lanes) if shape.face else shape.skip


class Levels(NamedTuple):
    """Numbers as bytes: each is (byte - zero) · step. Affine quantisation, as ONNX's QuantizeLinear has it."""

    step: float
    zero: int

    @classmethod
    def between(cls, low: float, high: float) -> "Levels":
        """For numbers in this range; 0 is one of them exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        return cls(step, round(-low / step))


class ChannelLevels(NamedTuple):
    """Levels of each channel, (channels,)."""

    step: np.ndarray
    zero: np.ndarray


class UpLevels(NamedTuple):
    """The levels of what is multiplied: y, the skip, the inner tensors before and after their depthwise convolutions
    (at least 0), and x."""

    y: Levels
    skip: Levels
    inner: Levels
    filtered: Levels
    x: Levels
    inner2: Levels
    filtered2: Levels


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


def packed(weights: UpWeights, shape: UpShape, levels: UpLevels | None) -> np.ndarray:
    """The weights in the order in which the kernel reads them: words, as float32. Bytes need levels."""
    y, skip, inner, filtered, x, inner2, filtered2 = levels or [None] * 7
    project2, bias2 = weights.project2, weights.project2_bias
    last, stem = weights.last, weights.stem
    if last is not None:
        project2, bias2 = last[0] @ project2, last[0] @ bias2 + last[1]
    of_window, of_window2 = (window_bytes(shape, channels) for channels in (shape.inner, shape.inner2))
    given = inner if of_window == 1 else None
    given2 = inner2 if of_window2 == 1 else None
    parts = {
        **expand_parts(weights, shape, y, skip, given),
        "depthwise": depthwise_weights(weights.depthwise, weights.depthwise_bias, shape, of_window, given, filtered),
        **product_parts("project", weights.project, weights.project_bias, shape, filtered, by_lanes=True),
        **product_parts("expand2", weights.expand2, weights.expand2_bias, shape, x, gives=given2, rounds=True),
        "depthwise2": depthwise_weights(
            weights.depthwise2, weights.depthwise2_bias, shape, of_window2, given2, filtered2
        ),
        **product_parts("project2", project2, bias2, shape, filtered2, by_lanes=True),
    }
    if last is not None:
        parts["last"] = words_of(padded(last[0], shape).T, 1)
    if stem is not None:
        parts["stem"] = words_of(padded(stem[0], shape).T, 1)
        parts["stem bias"] = padded(stem[1], shape)
        parts["stem depthwise"] = depthwise_weights(*stem[2:], shape, 4, None, skip)
    if levels is not None:
        parts["levels"] = np.array([(1 / of.step, of.zero + 0.5) for of in (levels.y, levels.skip, levels.x)])
    places, size = weight_places(shape)
    assert {name: part.size for name, part in parts.items()} == weight_sizes(shape)
    words = np.zeros(size, np.float32)
    for name, part in parts.items():
        words[places[name] : places[name] + part.size] = part.ravel()
    return words


def expand_parts(
    weights: UpWeights, shape: UpShape, y: Levels | None, skip: Levels | None, gives: Levels | None
) -> dict[str, np.ndarray]:
    """What the first 1×1 convolution is given: y's share and the skip's, or in tiles both as one."""
    of_y, of_skip = weights.expand[:, : shape.below], weights.expand[:, shape.below :]
    if shape.tiles:
        more = y_channels(shape) - shape.below
        both = np.concatenate([np.pad(of_y, [(0, 0), (0, more)]), of_skip], 1)
        levels = None
        if y is not None and skip is not None:
            of_channels = zip(y, skip, strict=True)
            levels = ChannelLevels(*(np.repeat(pair, [shape.below + more, shape.skip]) for pair in of_channels))
        return product_parts("expand", both, weights.expand_bias, shape, levels, gives=gives, rounds=True)
    below = product_parts("below", of_y, np.zeros(len(of_y)), shape, y, gives=gives)
    expand = product_parts("expand", of_skip, weights.expand_bias, shape, skip, gives=gives, rounds=True)
    below["below bias"] += expand.pop("expand bias")  # resizing leaves it as it is
    return below | expand


def product_parts(
    name: str,
    weights: np.ndarray,
    bias: np.ndarray,
    shape: UpShape,
    levels: Levels | ChannelLevels | None,
    by_lanes: bool = False,
    gives: Levels | None = None,
    rounds: bool = False,
) -> dict[str, np.ndarray]:
    """What a 1×1 convolution (out,in) is given; `by_lanes`: in is rounded up to lanes.

    In bytes, sums of products are multiplied with `scale`, and the bias makes up for the levels' zero. With `gives`,
    the results are levels, which with `rounds` are yet to be cut off behind the point, and woven.
    """
    scale = None
    if levels is not None:
        weights, scale = whole_weights(weights * levels.step)
        bias = bias - scale * (weights * levels.zero).sum(1)
        if gives is not None:
            scale, bias = scale / gives.step, bias / gives.step + 0.5 * rounds
    parts = {name: padded(weights, shape), f"{name} bias": padded(bias, shape)}
    if scale is not None:
        parts[f"{name} scale"] = padded(scale, shape)
    if gives is not None:
        parts = {key: part[woven(len(part), shape)] for key, part in parts.items()}
    rows = padded(parts[name].T, shape, shape.lanes if by_lanes else shape.per_word)
    return parts | {name: words_of(rows, shape.per_word)}


def whole_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (out,...) as whole numbers in -127..127, and how much one is: (out,)."""
    steps = np.abs(weights).reshape(len(weights), -1).max(1) / 127
    steps[steps == 0] = 1
    return np.rint(weights / steps.reshape(-1, *[1] * (weights.ndim - 1))), steps


def woven(channels: int, shape: UpShape) -> np.ndarray:
    """The order of channels in the vectors of which `Function.store_levels_together` makes bytes, and in those that
    `Function.interleaved` makes: of 16, each of four vectors has four."""
    groups, of_16, vector, within = np.ix_(*map(range, (channels // (4 * shape.lanes), shape.lanes // 4, 4, 4)))
    order = 4 * shape.lanes * groups + 16 * of_16 + 4 * vector + within
    return order.transpose(0, 2, 1, 3).ravel()


def window_bytes(shape: UpShape, channels: int) -> int:
    """Of a number that a depthwise convolution of these channels multiplies: 1 a byte, 2 float16, 4 float32; the
    smaller ones, if there are as many channels as vectors have of them at once.

    float16 is finer than bfloat16; what is beyond its largest number, sums on the way included, becomes that
    (`FLOAT16_MAX`).
    """
    vectors = rounded_up(channels, shape.lanes) // shape.lanes
    if shape.per_word == 4 and vectors % 4 == 0:
        return 1
    return 2 if shape.tiles and vectors % 2 == 0 else 4


def padded(channels: np.ndarray, shape: UpShape, step: int | None = None) -> np.ndarray:
    """(C,...) with zeros up to a multiple of `step`, which is lanes if not given."""
    beyond = rounded_up(len(channels), step or shape.lanes) - len(channels)
    return np.pad(channels, [(0, beyond)] + [(0, 0)] * (channels.ndim - 1)).astype(np.float32)


def words_of(rows: np.ndarray, per_word: int) -> np.ndarray:
    """(in,out) as (in/n,out,n), with n of them in a word."""
    if per_word == 1:
        return rows
    together = rows.reshape(-1, per_word, rows.shape[1]).transpose(0, 2, 1)
    narrow = nearest_bfloat16(together) if per_word == 2 else np.ascontiguousarray(together).astype(np.int8)
    return narrow.view(np.float32)


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to nearest, ties to even: uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def depthwise_weights(
    kernels: np.ndarray,
    bias: np.ndarray,
    shape: UpShape,
    of_window: int,
    levels: Levels | None,
    gives: Levels | None,
) -> np.ndarray:
    """Blocks of lanes, or of twice as many in float16, each nine weights and the bias; with `gives` such that the
    results are levels, yet to be cut off behind the point.

    In bytes, with `levels` of what goes in, blocks of four times as many channels, woven: a word for each column of a
    kernel, scales and biases. `of_window`: see `window_bytes`.
    """
    if gives is not None:
        bias = bias / gives.step + 0.5
    kernels, bias = padded(kernels, shape), padded(bias, shape)
    if levels is None or gives is None:
        kernels = kernels / gives.step if gives is not None else kernels
        columns = np.concatenate([kernels.reshape(-1, 9), bias[:, None]], 1)
        if of_window == 2:
            columns = np.clip(columns, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
        blocks = columns.reshape(-1, 4 * shape.lanes // of_window, 10).transpose(0, 2, 1)
        return np.ascontiguousarray(blocks).view(np.float32)
    kernels, steps = whole_weights(kernels)
    scales = steps * levels.step / gives.step
    columns = np.zeros((len(kernels), 3, 4), np.int8)
    columns[:, :, :3] = kernels.transpose(0, 2, 1)
    words = np.stack([*columns.view(np.float32)[..., 0].T, scales, bias]).astype(np.float32)
    return words[:, woven(len(kernels), shape)].reshape(5, -1, 4 * shape.lanes).transpose(1, 0, 2)


def weight_sizes(shape: UpShape) -> dict[str, int]:
    inner, out, inner2, skip, last = (
        rounded_up(channels, shape.lanes) for channels in (shape.inner, shape.out, shape.inner2, shape.skip, PICTURE)
    )
    last = last if shape.picture else out
    of_products = {
        **({} if shape.tiles else {"below": (shape.below, inner)}),
        "expand": (y_channels(shape) + shape.skip if shape.tiles else shape.skip, inner),
        "project": (inner, out),
        "expand2": (shape.out, inner2),
        "project2": (inner2, last),
    }
    sizes = {}
    for name, (channels, into) in of_products.items():
        sizes[name] = rounded_up(channels, shape.per_word) // shape.per_word * into
        if name != "expand" or shape.tiles:
            sizes[f"{name} bias"] = into
        if shape.per_word == 4:
            sizes[f"{name} scale"] = into
    for name, channels in (("depthwise", inner), ("depthwise2", inner2)):
        sizes[name] = (10 if window_bytes(shape, channels) == 4 else 5) * channels
    if shape.picture:
        sizes["last"] = shape.out * last
    if shape.face:
        sizes |= {"stem": shape.face * skip, "stem bias": skip, "stem depthwise": 10 * skip}
    if shape.per_word == 4:
        sizes["levels"] = 6
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
