"""The large `up` blocks of the U-Net on a processor: both inverted residuals of a block, row by row.

A layer at a time, their inner tensors (52 MB in float32, in the last block) would go to memory and back between all
layers. Here a row of each layer is computed as soon as the rows that it needs are there, in a ring of three rows, all
of which stays in the processor's second cache:

    y (h,w)  → 1×1 convolution → ×2 bilinear ┐
    skip (2h,2w) ─────────────→ 1×1 convolution + → ReLU → 3×3 depthwise → ReLU → 1×1 = x
                              x → 1×1 convolution → ReLU → 3×3 depthwise → ReLU → 1×1 + x = out

The upsampling is linear, so y goes through its share of the first convolution before it, at a quarter of the pixels.
In the last block the skip is computed from the face as well (`stem`), the last convolution, to the picture, is
multiplied with the one before it, and the sigmoid is taken. Arithmetic is float32; what 1×1 convolutions multiply may
be bfloat16, added up in float32, or bytes, added up in int32: of what goes in, unsigned ones (`Levels`).

A row of pixels lies in memory as y and skip do, pixel after pixel with its channels (N,H,W,C), or, inside, in blocks of
as many channels as a vector has lanes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat

import numpy as np
from llvmlite import ir

from .up_weights import PICTURE, UpShape, places_of, weight_places, windows_in_bytes
from .vectors import FLOAT, INDEX, INTEGER, SHORT, Function, Offset, rounded_up, table

ROWS = "above", "at", "below"
Starts = Callable[[int], Iterator[ir.Value]]
"""What the sums of a pixel begin with, by the pixel's number."""


def scratch_places(shape: UpShape) -> tuple[dict[str, int], int]:
    """Where the rows lie that are computed on the way, and how much that is: words."""
    inner, out, inner2, skip = (
        rounded_up(channels, shape.lanes) for channels in (shape.inner, shape.out, shape.inner2, shape.skip)
    )
    wide = shape.width + 2  # a zero before and after each row
    inner_row, inner2_row = (row_of_windows(shape, channels) for channels in (shape.inner, shape.inner2))
    return places_of(
        {
            "zeros": wide * max(inner, inner2, skip),
            "inner": 3 * inner_row,
            "below": shape.width * inner,
            "between": shape.width // 2 * inner,
            "x": 3 * shape.width * out,
            "x packed": shape.width * out // shape.per_word,
            "inner2": 3 * inner2_row,
            "stem": 3 * wide * skip,
            "y packed": shape.width // 2 * shape.below_stride // 4 if shape.per_word == 4 else 0,
            "skip": shape.width * skip,
            "tile": pixels_at_once(shape.width, 1, shape.lanes) * max(inner, inner2),
        }
    )


def row_of_windows(shape: UpShape, channels: int) -> int:
    """Words of a row that is convolved depthwise."""
    bytes_each = 1 if windows_in_bytes(shape, channels) else 4
    return (shape.width + 2) * rounded_up(channels, shape.lanes) * bytes_each // 4


def write_up(module: ir.Module, name: str, shape: UpShape) -> None:
    """Add the function `name` to a module: pointers to y, the skip or the face, the weights, scratch memory that was
    zeroed once, and the output; the last three lie on multiples of 64 bytes."""
    height, width, lanes = shape.height, shape.width, shape.lanes
    inner, out, inner2, skip = (
        rounded_up(channels, lanes) for channels in (shape.inner, shape.out, shape.inner2, shape.skip)
    )
    in_bytes = shape.per_word == 4
    inner_size, inner2_size = (row_of_windows(shape, channels) for channels in (shape.inner, shape.inner2))
    skip_stride = skip if shape.face else shape.skip
    of_weights, _ = weight_places(shape)
    of_scratch, _ = scratch_places(shape)

    left, across = bilinear(width)
    top, down = bilinear(height)
    left_table, top_table = (
        table(module, f"{name}_{axis}", INTEGER, places) for axis, places in (("left", left), ("top", top))
    )
    across_table, down_table = (
        table(module, f"{name}_{axis}", FLOAT, parts) for axis, parts in (("across", across), ("down", down))
    )
    rows = Rows(module, name, shape)
    y_row = rows.to_bytes("y", width // 2 * shape.below_stride) if in_bytes else None
    seen_row = rows.to_bytes("seen", width * skip_stride, half=shape.seen_half) if in_bytes and not shape.face else None
    below_stride = shape.below_stride // 4 if in_bytes else shape.below_stride
    below_row = rows.product("below", width // 2, shape.below, below_stride, inner, relu=False)
    between_rows = rows.between("between", width // 2 * inner)
    inner_row = rows.product("inner", width, shape.skip, skip_stride // shape.per_word, inner, resized=True)
    x_row = rows.window("x", inner, shape.out, packed_copy=shape.per_word > 1)
    inner2_row = rows.product("inner2", width, shape.out, out // shape.per_word, inner2)
    out_row = rows.window("out", inner2, PICTURE if shape.picture else shape.out, residual=True)
    stem_row = rows.stem_product("stem", shape.face, skip) if shape.face else None
    skip_row = rows.depthwise_alone("skip", skip) if shape.face else None
    sigmoid_row = rows.sigmoid("sigmoid", width) if shape.picture else None

    f = Function(module, name, ["y", "skip", "weights", "scratch", "out"], lanes)
    y, seen, written = (f.arguments[key] for key in ("y", "skip", "out"))
    build = f.builder

    def weights(part: str) -> ir.Value:
        return f.at(f.arguments["weights"], of_weights[part])

    def scratch(part: str, *offsets: Offset) -> ir.Value:
        return f.at(f.arguments["scratch"], of_scratch[part], *offsets)

    def ring(part: str, row: ir.Value, size: int, count: int = 3) -> ir.Value:
        return scratch(part, (build.urem(row, INDEX(count)), size))

    def around(part: str, row: ir.Value, size: int) -> list[ir.Value]:
        """The rows above, at and below; zeros beyond the picture."""
        found = []
        for step in (-1, 0, 1):
            near = f.plus(row, step)
            slot = ring(part, f.plus(near, 3), size)
            found.append(build.select(f.within(near, height), slot, scratch("zeros")))
        return found

    def up_to(made: ir.Value, last: ir.Value, make: Callable[[ir.Value], None]) -> None:
        """Make the rows that are not made yet, up to `last`."""
        first = f.get(made, INDEX)
        with f.loop(build.sub(f.plus(last, 1), first)) as more:
            row = build.add(first, more)
            make(row)
            f.set(made, f.plus(row, 1))

    below_made, stem_made = f.variable(INDEX), f.variable(INDEX)
    for made in (below_made, stem_made):
        f.set(made, INDEX(0))

    def product_weights(part: str) -> list[ir.Value]:
        kinds = ["", *[" scale"] * in_bytes, *[" bias"] * (part != "expand")]
        return [weights(part + kind) for kind in kinds]

    def levels(number: int) -> ir.Value:
        return f.at(weights("levels"), 2 * number)

    def make_below(row: ir.Value) -> None:
        y_of_row = f.at(y, (row, width // 2 * shape.below_stride))
        if y_row is not None:
            f.call(y_row, y_of_row, levels(0), scratch("y packed"))
            y_of_row = scratch("y packed")
        f.call(below_row, y_of_row, *product_weights("below"), ring("below", row, width // 2 * inner, 2))

    def skip_of(row: ir.Value) -> ir.Value:
        if shape.face:
            return scratch("skip")
        given = f.at(seen, (row, width * skip_stride // (2 if shape.seen_half else 1)))
        if seen_row is None:
            return given
        f.call(seen_row, given, levels(1), scratch("skip"))
        return scratch("skip")

    def make_stem(row: ir.Value) -> None:
        assert stem_row is not None
        face = build.gep(seen, [build.mul(row, INDEX(width))], source_etype=SHORT if shape.seen_half else FLOAT)
        f.call(
            stem_row, face, weights("stem"), weights("stem bias"), ring("stem", f.plus(row, 3), (width + 2) * skip)
        )  # fmt: skip

    with f.loop(height + 2) as row:
        with f.when(f.within(row, height)):
            above = f.load_index(top_table, row)
            up_to(below_made, f.plus(above, 1), make_below)
            f.call(
                between_rows,
                *(ring("below", near, width // 2 * inner, 2) for near in (above, f.plus(above, 1))),
                f.at(down_table, row), scratch("between"),
            )  # fmt: skip
            if skip_row is not None:
                last = f.plus(row, 1)
                up_to(stem_made, build.select(f.within(last, height), last, row), make_stem)
                f.call(skip_row, *around("stem", row, (width + 2) * skip), weights("stem depthwise"), scratch("skip"))
            f.call(
                inner_row, skip_of(row), *product_weights("expand"), scratch("between"), left_table, across_table,
                ring("inner", f.plus(row, 3), inner_size),
            )  # fmt: skip
        behind = f.plus(row, -1)
        with f.when(f.within(behind, height)):
            x = ring("x", behind, width * out)
            f.call(
                x_row, *around("inner", behind, inner_size), weights("depthwise"),
                *product_weights("project"), scratch("tile"), x,
                *([scratch("x packed")] if shape.per_word > 1 else []), *([levels(2)] if in_bytes else []),
            )  # fmt: skip
            f.call(
                inner2_row, scratch("x packed") if shape.per_word > 1 else x, *product_weights("expand2"),
                ring("inner2", f.plus(behind, 3), inner2_size),
            )  # fmt: skip
        behind = f.plus(row, -2)
        with f.when(f.within(behind, height)):
            stride = width if shape.picture else width * out // (2 if shape.half_out else 1)
            f.call(
                out_row, *around("inner2", behind, inner2_size), weights("depthwise2"),
                *product_weights("project2"), scratch("tile"), f.at(written, (behind, stride)),
                ring("x", behind, width * out), weights("last") if shape.picture else scratch("zeros"),
            )  # fmt: skip
            if sigmoid_row is not None:
                for channel in range(PICTURE):
                    f.call(sigmoid_row, f.at(written, (behind, width), channel * height * width))
    f.done()


def bilinear(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `size` pixels lies among half as many, the first and last of which meet (`align_corners`): the
    pixel before it, int32, and how far it is from there, float32."""
    half = size // 2
    places = np.arange(size, dtype=np.float32) * np.float32((half - 1) / (size - 1))
    before = np.minimum(places.astype(np.int32), half - 2)
    return before, (places - before).astype(np.float32)


def pixels_at_once(width: int, vectors: int, lanes: int) -> int:
    """How many pixels of a row are computed together: their sums stay in registers, with some to spare."""
    registers = 32 if lanes == 16 else 16
    return max(count for count in range(1, max(registers * 5 // 8 // vectors, 1) + 1) if width % count == 0)


class Rows:
    """The functions that compute one row."""

    def __init__(self, module: ir.Module, name: str, shape: UpShape) -> None:
        self._module = module
        self._name = name
        self._shape = shape
        self._lanes = shape.lanes
        self._in_bytes = shape.per_word == 4

    def _function(self, name: str, arguments: Sequence[str]) -> Function:
        f = Function(self._module, f"{self._name}_{name}", arguments, self._lanes)
        f.function.linkage = "internal"
        f.function.attributes.add("noinline")
        return f

    def product(
        self, name: str, width: int, channels: int, stride: int, out: int, relu: bool = True, resized: bool = False
    ) -> ir.Function:
        """A 1×1 convolution of a row of pixels, in blocks of lanes.

        With `relu` also ReLU, in rows with a zero before and after. A bias is added; with `resized` it is in a row of
        half the width and `out` channels, which is resized and added.
        """
        added = ["narrow", "left", "across"] if resized else ["bias"]
        f = self._function(name, ["row", "weights", *["scale"] * self._in_bytes, *added, "out"])
        lanes, build = self._lanes, f.builder
        vectors = max(count for count in (4, 2, 1) if out // lanes % count == 0)
        pixels = pixels_at_once(width, vectors, lanes)
        sums = self._sums(f, pixels, vectors)
        row_size = (width + 2 if relu else width) * lanes
        with f.loop(out // lanes, vectors) as block, f.loop(width, pixels) as x:

            def starts(p: int) -> Iterator[ir.Value]:
                if not resized:
                    yield from (f.load(f.arguments["bias"], (block, lanes), v * lanes) for v in range(vectors))
                    return
                left = f.load_index(f.arguments["left"], f.plus(x, p))
                part = f.splat(f.load_word(f.arguments["across"], x, p))
                for v in range(vectors):
                    place = (block, width // 2 * lanes), v * width // 2 * lanes, (left, lanes)
                    before, after = (f.load(f.arguments["narrow"], *place, step) for step in (0, lanes))
                    yield f.multiply_add(part, build.fsub(after, before), before)

            self._begin(f, sums, starts)
            self._add_products(
                f, sums, f.arguments["row"], [(x, stride)], stride, channels, f.arguments["weights"], [(block, lanes)],
                out,
            )  # fmt: skip
            for p, of_pixel in enumerate(self._finished(f, sums, starts, (block, lanes))):
                if relu and windows_in_bytes(self._shape, out):
                    place = (block, row_size // 4), (x, lanes), (p + 1) * lanes
                    f.store_levels_together(of_pixel, f.arguments["out"], *place)
                    continue
                for v, total in enumerate(of_pixel):
                    value = f.relu(total) if relu else total
                    place = (block, row_size), v * row_size, (x, lanes), (p + relu) * lanes
                    f.store(value, f.arguments["out"], *place)
        return f.done()

    def _sums(self, f: Function, pixels: int, vectors: int) -> list[list[ir.Value]]:
        kind = f.integers if self._in_bytes else f.vector
        return [[f.variable(kind) for _ in range(vectors)] for _ in range(pixels)]

    def _begin(self, f: Function, sums: Sequence[Sequence[ir.Value]], starts: Starts) -> None:
        """Sums are to begin with what `starts` gives; sums of bytes are added to that when they are done."""
        for p, of_pixel in enumerate(sums):
            for total, start in zip(of_pixel, repeat(f.no_levels()) if self._in_bytes else starts(p), strict=False):
                f.set(total, start)

    def _add_products(
        self, f: Function, sums: Sequence[Sequence[ir.Value]], row: ir.Value, place: Sequence[Offset], stride: int,
        channels: int, weights: ir.Value, of_weights: Sequence[Offset], out: int,
    ) -> None:  # fmt: skip
        """sums[pixel][vector] += row[pixel, channel] · weights[channel, vector], `per_word` channels at once."""
        steps = -(-channels // self._shape.per_word)
        multiply_add = {1: f.multiply_add, 2: f.multiply_add_halves, 4: f.multiply_add_bytes}[self._shape.per_word]
        kind = f.integers if self._in_bytes else f.vector
        unrolled = next(count for count in (2, 1) if steps % count == 0)
        with f.loop(steps, unrolled) as first:
            for k in range(unrolled):
                columns = [
                    f.load(weights, (first, out), k * out + v * self._lanes, *of_weights) for v in range(len(sums[0]))
                ]
                for p, of_pixel in enumerate(sums):
                    word = f.splat(f.load_word(row, first, k + p * stride, *place))
                    for column, total in zip(columns, of_pixel, strict=True):
                        f.set(total, multiply_add(word, column, f.get(total, kind)))

    def _finished(
        self, f: Function, sums: Sequence[Sequence[ir.Value]], starts: Starts, *scale: Offset
    ) -> Iterator[list[ir.Value]]:
        """The sums of each pixel."""
        for p, of_pixel in enumerate(sums):
            if not self._in_bytes:
                yield [f.get(total) for total in of_pixel]
                continue
            scales = (f.load(f.arguments["scale"], v * self._lanes, *scale) for v in range(len(of_pixel)))
            added = zip(of_pixel, scales, starts(p), strict=True)
            yield [f.multiply_add(f.to_float(f.get(total, f.integers)), one, start) for total, one, start in added]

    def to_bytes(self, name: str, size: int, half: bool = False) -> ir.Function:
        """A row of float32 or bfloat16 as levels."""
        f = self._function(name, ["row", "levels", "out"])
        load, words = (f.load_half, self._lanes // 2) if half else (partial(f.load, aligned=False), self._lanes)
        step, zero = (f.splat(f.load_word(f.arguments["levels"], i)) for i in range(2))
        with f.loop(size // self._lanes) as i:
            value = f.multiply_add(load(f.arguments["row"], (i, words)), step, zero)
            f.store_levels(value, f.arguments["out"], (i, self._lanes // 4))
        return f.done()

    def stem_product(self, name: str, channels: int, out: int) -> ir.Function:
        """1×1 convolution, bias and ReLU of a row of the face, whose channels are planes."""
        f = self._function(name, ["face", "weights", "bias", "out"])
        shape, lanes = self._shape, self._lanes
        plane, row_size = shape.height * shape.width, (shape.width + 2) * lanes
        with f.loop(out // lanes) as block, f.loop(shape.width, 1) as x:
            total = f.load(f.arguments["bias"], (block, lanes))
            for channel in range(channels):
                place = f.plus(x, channel * plane)
                load = f.load_short if shape.seen_half else f.load_word
                word = f.splat(load(f.arguments["face"], place))
                total = f.multiply_add(word, f.load(f.arguments["weights"], (block, lanes), channel * out), total)
            f.store(f.relu(total), f.arguments["out"], (block, row_size), (x, lanes), lanes)
        return f.done()

    def between(self, name: str, size: int) -> ir.Function:
        """a + part · (b - a) of two rows."""
        f = self._function(name, ["a", "b", "part", "out"])
        part = f.splat(f.load_word(f.arguments["part"]))
        with f.loop(size, self._lanes) as i:
            a, b = (f.load(f.arguments[key], i) for key in "ab")
            f.store(f.multiply_add(part, f.builder.fsub(b, a), a), f.arguments["out"], i)
        return f.done()

    def _store(self, f: Function) -> Callable[..., None]:
        """Of what is multiplied next."""
        return {1: f.store, 2: f.store_half, 4: f.store_levels}[self._shape.per_word]

    def _depthwise(self, f: Function, block: ir.Value, x: ir.Value, pixels: int) -> list[ir.Value]:
        """3×3 windows of three rows, weighed and added up, bias and ReLU: a vector for each pixel."""
        lanes, row_size = self._lanes, (self._shape.width + 2) * self._lanes
        weights = [f.load(f.arguments["depthwise"], (block, 10 * lanes), i * lanes) for i in range(10)]
        found = []
        for p in range(pixels):
            total = weights[9]
            for i, row in enumerate(ROWS):
                for j in range(3):
                    near = f.load(f.arguments[row], (block, row_size), (x, lanes), (p + j) * lanes)
                    total = f.multiply_add(near, weights[3 * i + j], total)
            found.append(f.relu(total))
        return found

    def _depthwise_of_bytes(self, f: Function, group: ir.Value, x: ir.Value, pixels: int, of_group: int) -> None:
        """The same of bytes, four vectors of channels at once, to the tile."""
        lanes, row_size = self._lanes, (self._shape.width + 2) * self._lanes

        def given(number: int) -> list[ir.Value]:
            return [f.load(f.arguments["depthwise"], (group, 20 * lanes), (4 * number + j) * lanes) for j in range(4)]

        def column(pixel: ir.Value, ahead: int) -> list[ir.Value]:
            place = (group, row_size), (x, lanes), (pixel, lanes), ahead * lanes
            return f.interleaved(*(f.load(f.arguments[row], *place) for row in ROWS))

        weights, scales, biases = [given(number) for number in range(3)], given(3), given(4)
        kept = [[f.variable() for _ in range(4)] for _ in range(2)]  # columns, of which each is one of three windows
        for ahead, variables in enumerate(kept):
            for variable, words in zip(variables, column(INDEX(0), ahead), strict=True):
                f.set(variable, words)
        with f.loop(pixels) as pixel:
            columns = [*([f.get(variable) for variable in variables] for variables in kept), column(pixel, 2)]
            values = []
            for j, (scale, bias) in enumerate(zip(scales, biases, strict=True)):
                total = f.no_levels()
                for near, weight in zip(columns, weights, strict=True):
                    total = f.multiply_add_bytes(near[j], weight[j], total)
                values.append(f.multiply_add(f.to_float(total), scale, bias))
            f.store_levels_together(values, f.arguments["tile"], (group, of_group), (pixel, lanes))
            for variables, words in zip(kept, columns[1:], strict=True):
                for variable, word in zip(variables, words, strict=True):
                    f.set(variable, word)

    def depthwise_alone(self, name: str, channels: int) -> ir.Function:
        """Depthwise convolution, bias and ReLU: a row of pixels with their channels."""
        f = self._function(name, ["above", "at", "below", "depthwise", "out"])
        lanes = self._lanes
        pixels = pixels_at_once(self._shape.width, 2, lanes)
        store, words = self._store(f), self._shape.per_word
        with f.loop(channels // lanes) as block, f.loop(self._shape.width, pixels) as x:
            for p, value in enumerate(self._depthwise(f, block, x, pixels)):
                place = (x, channels // words), p * channels // words, (block, lanes // words)
                store(value, f.arguments["out"], *place)
        return f.done()

    def window(self, name: str, inner: int, out: int, residual: bool = False, packed_copy: bool = False) -> ir.Function:
        """Depthwise convolution, bias, ReLU and 1×1 convolution with bias: a row of pixels with their channels.

        With `residual`, x is added: as it is, or for the picture through the last convolution. With `packed_copy`, the
        row is also stored as it is multiplied next.
        """
        shape, lanes, words = self._shape, self._lanes, self._shape.per_word
        arguments = [*ROWS, "depthwise", "project", *["scale"] * self._in_bytes, "bias", "tile", "out"]
        copied = ["packed", *["levels"] * self._in_bytes] * packed_copy
        f = self._function(name, arguments + (["x", "last"] if residual else copied))
        picture = residual and shape.picture
        x_channels = rounded_up(shape.out, lanes)
        out = rounded_up(out, lanes)
        pixels = pixels_at_once(shape.width, out // lanes, lanes)
        sums = self._sums(f, pixels, out // lanes)
        of_block = pixels * lanes // words
        store = self._store(f)
        together = 4 if windows_in_bytes(shape, inner) else 1  # blocks
        of_block *= together
        with f.loop(shape.width, pixels) as x:

            def starts(p: int) -> Iterator[ir.Value]:
                for v in range(out // lanes):
                    start = f.load(f.arguments["bias"], v * lanes)
                    if residual and not picture:
                        near = f.load(f.arguments["x"], (x, x_channels), p * x_channels + v * lanes)
                        start = f.builder.fadd(start, near)
                    yield start

            with f.loop(inner // lanes // together) as block:
                if together > 1:
                    self._depthwise_of_bytes(f, block, x, pixels, of_block)
                else:
                    for p, value in enumerate(self._depthwise(f, block, x, pixels)):
                        store(value, f.arguments["tile"], (block, of_block), p * lanes // words)
            self._begin(f, sums, starts)
            channels = together * lanes
            with f.loop(inner // channels) as block:
                self._add_products(
                    f, sums, f.arguments["tile"], [(block, of_block)], channels // words, channels,
                    f.arguments["project"], [(block, channels // words * out)], out,
                )  # fmt: skip
            totals = list(self._finished(f, sums, starts))
            if picture:
                totals = self._with_picture(f, totals, x, x_channels)
            for p, of_pixel in enumerate(totals):
                for v, value in enumerate(of_pixel):
                    place = p * out + v * lanes
                    if picture:
                        for channel in range(PICTURE):
                            plane = channel * shape.height * shape.width
                            f.store_lane(value, channel, f.arguments["out"], plane, x, p)
                    elif residual and shape.half_out:
                        f.store_half(value, f.arguments["out"], (x, out // 2), place // 2)
                    else:
                        f.store(value, f.arguments["out"], (x, out), place)
                    if packed_copy:
                        if self._in_bytes:
                            step, zero = (f.splat(f.load_word(f.arguments["levels"], i)) for i in range(2))
                            value = f.multiply_add(value, step, zero)
                        store(value, f.arguments["packed"], (x, out // words), place // words)
        return f.done()

    def _with_picture(
        self, f: Function, totals: Sequence[Sequence[ir.Value]], x: ir.Value, x_channels: int
    ) -> list[list[ir.Value]]:
        """And x through the last convolution, in float32."""
        sums = [f.variable() for _ in totals]
        for total, (value,) in zip(sums, totals, strict=True):
            f.set(total, value)
        with f.loop(self._shape.out) as k:  # not unrolled: LLVM would keep all weights in registers that sums need
            column = f.load(f.arguments["last"], (k, self._lanes))
            for p, total in enumerate(sums):
                word = f.splat(f.load_word(f.arguments["x"], (x, x_channels), p * x_channels, k))
                f.set(total, f.multiply_add(word, column, f.get(total)))
        return [[f.get(total)] for total in sums]

    def sigmoid(self, name: str, width: int) -> ir.Function:
        """1 / (1 + e^-x) of a row, in place, to 2 units in the last place."""
        f = self._function(name, ["row"])
        with f.loop(width, self._lanes) as x:
            f.store(f.sigmoid(f.load(f.arguments["row"], x)), f.arguments["row"], x)
        return f.done()
