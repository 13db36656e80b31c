"""Faces out of frames and back into them on a processor: resized, and what comes before and after, in one pass a face.

The same steps in the same order as torch takes for the reference: 4 taps across, then 4 down, each a product and three
products added with one rounding.
"""

import functools
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from .vectors import INDEX, Function, rounded_up

CROP, BORDER, INNER, TAPS = 328, 4, 320, 4
WIDEST = 16  # lanes of any processor
LEAST_WIDTH = WIDEST  # of the rectangle


class Taps(NamedTuple):
    """Where an axis' pixels come from: (4,size) int32 before it was resized, and what each weighs, float32. Rows are of
    a multiple of 16."""

    places: np.ndarray
    weights: np.ndarray


@functools.lru_cache(64)
def taps(before: int, after: int) -> Taps:
    """Of an axis that is resized: OpenCV's INTER_CUBIC (Keys' kernel with a = -0.75; half-pixel centres, ends
    repeated), in float32 step by step as torch computes it."""
    one, a = np.float32(1), np.float32(-0.75)
    at = multiply_add(
        np.float32(before / after), np.arange(after, dtype=np.float32) + np.float32(0.5), np.float32(-0.5)
    )
    first = np.floor(at)
    part = at - first

    def near(x: np.ndarray) -> np.ndarray:
        return multiply_add(multiply_add(a + 2 * one, x, -(a + 3 * one)) * x, x, one)

    def far(x: np.ndarray) -> np.ndarray:
        return multiply_add(multiply_add(multiply_add(a, x, -5 * a), x, 8 * a), x, -4 * a)

    weights = np.stack([far(part + one), near(part), near(one - part), far((one - part) + one)])
    places = np.clip(first.astype(np.int32) + np.arange(-1, 3)[:, None], 0, before - 1).astype(np.int32)
    beyond = [(0, 0), (0, -after % WIDEST)]
    return Taps(np.pad(places, beyond), np.pad(weights, beyond).astype(np.float32))


def multiply_add(a: np.ndarray | np.float32, b: np.ndarray, c: np.float32) -> np.ndarray:
    """a·b + c of float32, rounded as a processor rounds it, but for rare ties."""
    return (np.float64(a) * b + np.float64(c)).astype(np.float32)


def scratch_words(before: tuple[int, int], width: int) -> int:
    """For a source row, and all rows of a plane, resized across: of a face of (width, height) to a width."""
    return rounded_up(before[0], WIDEST) + before[1] * rounded_up(width, WIDEST)


def write_crop(module: ir.Module, name: str, lanes: int) -> None:
    """Add the function `name` to a module: pointers to

    frame: the rectangle's first byte in a frame (3,H,W) uint8.
    sizes: int64: the rectangle's width, at least 16, and height, bytes from row to row and from plane to plane.
    left, across, top, down: places and weights of `taps` of width and height.
    scratch: see `scratch_words`.
    out: (3,328,328) uint8.
    """
    f = Function(module, name, ["frame", "sizes", "left", "across", "top", "down", "scratch", "out"], lanes)
    build = f.builder
    width, height, of_row, of_plane = (f.load_long(f.arguments["sizes"], i) for i in range(4))
    row = f.arguments["scratch"]
    resized = f.at(row, rounded(f, width))
    words = INDEX(rounded_up(CROP, WIDEST))
    with f.loop(3) as plane:
        with f.loop(height) as y:
            offset = build.add(build.mul(plane, of_plane), build.mul(y, of_row))
            source = f.at_byte(f.arguments["frame"], offset)
            with f.vectors(width) as x:
                f.store(f.load_bytes(source, x), row, x, aligned=False)
            resize_across(f, row, words, f.at(resized, build.mul(y, words)))
        with f.loop(CROP) as y:
            of_taps = taps_of_row(f, y, words, words)
            out = f.at_byte(f.arguments["out"], build.mul(build.add(build.mul(plane, INDEX(CROP)), y), INDEX(CROP)))
            with f.vectors(INDEX(CROP)) as x:
                f.store_bytes(resized_down(f, resized, of_taps, x), out, x)
    f.done()


def write_paste(module: ir.Module, name: str, lanes: int, keep: bool) -> None:
    """Add the function `name` to a module: pointers to

    crop: (3,328,328) uint8.
    prediction: (3,320,320) float32 BGR in 0..1.
    sizes: int64: the rectangle's width, at least 16, and height, bytes from row to row and from plane to plane of
        `out`, and from row to row of `kept`.
    left, across, top, down: places and weights of `taps` to width and height.
    scratch: see `scratch_words`.
    out: the rectangle's first byte in a frame (3,H,W) uint8.
    kept: the rectangle's first byte in a mask (H,W): where it is not 0, `out` stays. Not read unless `keep`.
    """
    f = Function(
        module,
        name,
        ["crop", "prediction", "sizes", "left", "across", "top", "down", "scratch", "out", "kept"],
        lanes,
    )
    build = f.builder
    width, height, of_row, of_plane, of_kept = (f.load_long(f.arguments["sizes"], i) for i in range(5))
    words, tall = rounded(f, width), rounded(f, height)
    row, resized = f.arguments["scratch"], f.at(f.arguments["scratch"], rounded_up(CROP, WIDEST))
    with f.loop(3) as plane:
        crop = f.at_byte(f.arguments["crop"], build.mul(plane, INDEX(CROP * CROP)))
        reverse = build.sub(INDEX(2), plane)  # BGR
        prediction = f.at(f.arguments["prediction"], (reverse, INNER * INNER))
        with f.loop(CROP) as y:
            of_crop = f.at_byte(crop, build.mul(y, INDEX(CROP)))
            with f.vectors(INDEX(CROP)) as x:
                f.store(f.load_bytes(of_crop, x), row, x, aligned=False)
            inner = f.plus(y, -BORDER)
            with f.when(f.within(inner, INNER)), f.loop(INNER, lanes) as x:
                value = f.load(prediction, (inner, INNER), x, aligned=False)
                value = f.truncated(f.clamped(build.fmul(value, f.constant(255)), 0, 255))
                f.store(value, row, x, BORDER, aligned=False)
            resize_across(f, row, words, f.at(resized, build.mul(y, words)))
        with f.loop(height) as y:
            of_taps = taps_of_row(f, y, tall, words)
            out = f.at_byte(f.arguments["out"], build.add(build.mul(plane, of_plane), build.mul(y, of_row)))
            kept = f.at_byte(f.arguments["kept"], build.mul(y, of_kept))
            with f.vectors(width) as x:
                value = resized_down(f, resized, of_taps, x)
                if keep:
                    value = f.chosen(f.raw_bytes(kept, x), f.raw_bytes(out, x), value)
                f.store_bytes(value, out, x)
    f.done()


def rounded(f: Function, size: ir.Value) -> ir.Value:
    """Up to a multiple of 16: of a row of taps."""
    return f.builder.mul(f.builder.udiv(f.plus(size, WIDEST - 1), INDEX(WIDEST)), INDEX(WIDEST))


def resize_across(f: Function, row: ir.Value, words: ir.Value, out: ir.Value) -> None:
    """A row of so many words, from a row by the taps `left` and `across`."""
    with f.loop(words, f.lanes) as x:
        total = None
        for tap in range(TAPS):
            beyond = f.builder.mul(words, INDEX(tap))
            near = f.gather(row, f.load_integers(f.arguments["left"], beyond, x))
            total = weighed(f, near, f.load(f.arguments["across"], beyond, x, aligned=False), total)
        assert total is not None
        f.store(total, out, x)


OfTaps = list[tuple[ir.Value, ir.Value]]
"""Where the rows begin that a row is made of, and what they weigh."""


def taps_of_row(f: Function, y: ir.Value, tall: ir.Value, words: ir.Value) -> OfTaps:
    """By the taps `top` and `down`, whose rows are `tall`, of rows of so many words."""
    found = []
    for tap in range(TAPS):
        place = f.builder.add(f.builder.mul(tall, INDEX(tap)), y)
        source = f.load_index(f.arguments["top"], place)
        found.append((f.builder.mul(source, words), f.splat(f.load_word(f.arguments["down"], place))))
    return found


def resized_down(f: Function, resized: ir.Value, of_taps: OfTaps, x: ir.Value) -> ir.Value:
    """Bytes of a row at x."""
    total = None
    for start, weight in of_taps:
        total = weighed(f, f.load(resized, start, x, aligned=False), weight, total)
    assert total is not None
    return f.to_bytes(f.clamped(f.rounded(total), 0, 255))


def weighed(f: Function, value: ir.Value, weight: ir.Value, total: ir.Value | None) -> ir.Value:
    return f.builder.fmul(value, weight) if total is None else f.multiply_add(value, weight, total)
