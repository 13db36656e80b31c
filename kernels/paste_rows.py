"""Faces back into frames on a processor: put together, resized, kept pixels left out; one pass a face.

The same steps in the same order as torch takes for the reference: 4 taps across, then 4 down, each a product and three
products added with one rounding.
"""

import functools
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from .vectors import Function, rounded_up

CROP, BORDER, INNER, TAPS = 328, 4, 320, 4
WIDEST = 16  # lanes of any processor
LEAST_WIDTH = WIDEST  # of the rectangle


class Taps(NamedTuple):
    """Where an axis' pixels come from: (4,size) int32 before it was resized, and what each weighs, float32. Rows are of
    a multiple of 16."""

    places: np.ndarray
    weights: np.ndarray


@functools.lru_cache(64)
def taps(size: int) -> Taps:
    """Of an axis of 328 that becomes `size`: OpenCV's INTER_CUBIC (Keys' kernel with a = -0.75; half-pixel centres,
    ends repeated), in float32 step by step as torch computes it."""
    one, a = np.float32(1), np.float32(-0.75)
    at = multiply_add(np.float32(CROP / size), np.arange(size, dtype=np.float32) + np.float32(0.5), np.float32(-0.5))
    before = np.floor(at)
    part = at - before

    def near(x: np.ndarray) -> np.ndarray:
        return multiply_add(multiply_add(a + 2 * one, x, -(a + 3 * one)) * x, x, one)

    def far(x: np.ndarray) -> np.ndarray:
        return multiply_add(multiply_add(multiply_add(a, x, -5 * a), x, 8 * a), x, -4 * a)

    weights = np.stack([far(part + one), near(part), near(one - part), far((one - part) + one)])
    places = np.clip(before.astype(np.int32) + np.arange(-1, 3)[:, None], 0, CROP - 1).astype(np.int32)
    beyond = [(0, 0), (0, -size % 16)]
    return Taps(np.pad(places, beyond), np.pad(weights, beyond).astype(np.float32))


def multiply_add(a: np.ndarray | np.float32, b: np.ndarray, c: np.float32) -> np.ndarray:
    """a·b + c of float32, rounded as a processor rounds it, but for rare ties."""
    return (np.float64(a) * b + np.float64(c)).astype(np.float32)


def scratch_words(width: int) -> int:
    """For a source row, and all rows of a plane, resized across."""
    return rounded_up(CROP, WIDEST) + CROP * rounded_up(width, WIDEST)


def write_paste(module: ir.Module, name: str, lanes: int, keep: bool) -> None:
    """Add the function `name` to a module: pointers to

    crop: (3,328,328) uint8.
    prediction: (3,320,320) float32 BGR in 0..1.
    sizes: int64: the rectangle's width and height, bytes from row to row and from plane to plane of `out`, and from row
        to row of `kept`.
    left, across, top, down: places and weights of `taps` of width and height.
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
    words = build.mul(build.udiv(f.plus(width, 15), f.index(16)), f.index(16))  # of a row of taps
    tall = build.mul(build.udiv(f.plus(height, 15), f.index(16)), f.index(16))
    row, resized = f.arguments["scratch"], f.at(f.arguments["scratch"], rounded_up(CROP, WIDEST))
    with f.loop(3) as plane:
        crop = f.at_byte(f.arguments["crop"], build.mul(plane, f.index(CROP * CROP)))
        reverse = build.sub(f.index(2), plane)  # BGR
        prediction = f.at(f.arguments["prediction"], (reverse, INNER * INNER))
        with f.loop(CROP) as y:
            of_crop = f.at_byte(crop, build.mul(y, f.index(CROP)))
            for x in [*range(0, CROP - lanes, lanes), CROP - lanes]:  # the last ones end with the row
                f.store(f.load_bytes(of_crop, f.index(x)), row, x, aligned=False)
            inner = f.plus(y, -BORDER)
            with f.when(f.within(inner, INNER)), f.loop(INNER, lanes) as x:
                value = f.load(prediction, (inner, INNER), x, aligned=False)
                value = f.truncated(f.clamped(build.fmul(value, f.constant(255)), 0, 255))
                f.store(value, row, x, BORDER, aligned=False)
            with f.loop(words, lanes) as x:
                total = None
                for tap in range(TAPS):
                    beyond = build.mul(words, f.index(tap))
                    near = f.gather(row, f.load_integers(f.arguments["left"], beyond, x))
                    total = weighed(f, near, f.load(f.arguments["across"], beyond, x, aligned=False), total)
                assert total is not None
                f.store(total, resized, build.mul(y, words), x)
        with f.loop(height) as y:
            of_taps = []
            for tap in range(TAPS):
                place = build.add(build.mul(tall, f.index(tap)), y)
                source = f.load_index(f.arguments["top"], place)
                of_taps.append((build.mul(source, words), f.splat(f.load_word(f.arguments["down"], place))))
            out = f.at_byte(f.arguments["out"], build.add(build.mul(plane, of_plane), build.mul(y, of_row)))
            kept = f.at_byte(f.arguments["kept"], build.mul(y, of_kept))
            with f.loop(width, lanes) as first:
                last = build.sub(width, f.index(lanes))
                x = build.select(build.icmp_signed("<", first, last), first, last)  # the last ones end with the row
                total = None
                for start, weight in of_taps:
                    total = weighed(f, f.load(resized, start, x, aligned=False), weight, total)
                assert total is not None
                value = f.to_bytes(f.clamped(f.rounded(total), 0, 255))
                if keep:
                    value = f.chosen(f.raw_bytes(kept, x), f.raw_bytes(out, x), value)
                f.store_bytes(value, out, x)
    f.done()


def weighed(f: Function, value: ir.Value, weight: ir.Value, total: ir.Value | None) -> ir.Value:
    return f.builder.fmul(value, weight) if total is None else f.multiply_add(value, weight, total)
