"""The large `up` blocks of the U-Net on a processor: both inverted residuals of a block, row by row.

A layer at a time, their inner tensors (52 MB in float32, in the last block) would go to memory and back between all
layers. Here a row of each layer is computed as soon as the rows that it needs are there, in a ring of three rows, all
of which stays in the processor's second cache:

    y (h,w)  → 1×1 convolution → ×2 bilinear ┐
    skip (2h,2w) ─────────────→ 1×1 convolution + → ReLU → 3×3 depthwise → ReLU → 1×1 = x
                              x → 1×1 convolution → ReLU → 3×3 depthwise → ReLU → 1×1 + x = out

The upsampling is linear, so y goes through its share of the first convolution before it, at a quarter of the pixels.
In the last block the skip is computed from the face as well (`stem`), the last convolution, to the picture, is
multiplied with the one before it, and the sigmoid is taken. Arithmetic is float32, or products of bfloat16 that are
added up in float32.

A row of pixels lies in memory as y and skip do, pixel after pixel with its channels (N,H,W,C), or, inside, in blocks of
as many channels as a vector has lanes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir

from .up_weights import PICTURE, UpShape, places_of, weight_places
from .vectors import FLOAT, INDEX, INTEGER, SHORT, Function, Offset, rounded_up, table


def scratch_places(shape: UpShape) -> tuple[dict[str, int], int]:
    """Where the rows lie that are computed on the way, and how much that is: words."""
    inner, out, inner2, skip = (
        rounded_up(channels, shape.lanes) for channels in (shape.inner, shape.out, shape.inner2, shape.skip)
    )
    wide = shape.width + 2  # a zero before and after each row
    return places_of(
        {
            "zeros": wide * max(inner, inner2, skip),
            "inner": 3 * wide * inner,
            "below": shape.width * inner,
            "between": shape.width // 2 * inner,
            "x": 3 * shape.width * out,
            "x half": shape.width * out,
            "inner2": 3 * wide * inner2,
            "stem": 3 * wide * skip,
            "skip": shape.width * skip,
            "tile": pixels_at_once(shape.width, 1, shape.lanes) * max(inner, inner2),
        }
    )


def write_up(module: ir.Module, name: str, shape: UpShape) -> None:
    """Add the function `name` to a module: pointers to y, the skip or the face, the weights, scratch memory that was
    zeroed once, and the output; the last three lie on multiples of 64 bytes."""
    height, width, lanes = shape.height, shape.width, shape.lanes
    inner, out, inner2, skip = (
        rounded_up(channels, lanes) for channels in (shape.inner, shape.out, shape.inner2, shape.skip)
    )
    words = 2 if shape.half else 1
    skip_stride = (skip if shape.face else shape.skip) // words
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
    below_row = rows.product("below", width // 2, shape.below, shape.below_stride, inner, relu=False)
    between_rows = rows.between("between", width // 2 * inner)
    inner_row = rows.product("inner", width, shape.skip, skip_stride, inner, resized=True)
    x_row = rows.window("x", inner, shape.out, half_copy=shape.half)
    inner2_row = rows.product("inner2", width, shape.out, out // words, inner2)
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

    def make_below(row: ir.Value) -> None:
        f.call(
            below_row, f.at(y, (row, width // 2 * shape.below_stride)), weights("below"),
            ring("below", row, width // 2 * inner, 2),
        )  # fmt: skip

    def make_stem(row: ir.Value) -> None:
        assert stem_row is not None
        face = build.gep(seen, [build.mul(row, INDEX(width))], source_etype=SHORT if shape.face_half else FLOAT)
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
                inner_row, scratch("skip") if shape.face else f.at(seen, (row, width * skip_stride)),
                weights("expand"), weights("expand bias"), scratch("between"), left_table, across_table,
                ring("inner", f.plus(row, 3), (width + 2) * inner),
            )  # fmt: skip
        behind = f.plus(row, -1)
        with f.when(f.within(behind, height)):
            x = ring("x", behind, width * out)
            f.call(
                x_row, *around("inner", behind, (width + 2) * inner), weights("depthwise"), weights("project"),
                weights("project bias"), scratch("tile"), x, scratch("x half"),
            )  # fmt: skip
            f.call(
                inner2_row, scratch("x half") if shape.half else x, weights("expand2"), weights("expand2 bias"),
                ring("inner2", f.plus(behind, 3), (width + 2) * inner2),
            )  # fmt: skip
        behind = f.plus(row, -2)
        with f.when(f.within(behind, height)):
            stride = width if shape.picture else width * out // (2 if shape.half_out else 1)
            f.call(
                out_row, *around("inner2", behind, (width + 2) * inner2), weights("depthwise2"), weights("project2"),
                weights("project2 bias"), scratch("tile"), f.at(written, (behind, stride)),
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

    def _function(self, name: str, arguments: Sequence[str]) -> Function:
        f = Function(self._module, f"{self._name}_{name}", arguments, self._lanes)
        f.function.linkage = "internal"
        f.function.attributes.add("noinline")
        return f

    def product(
        self, name: str, width: int, channels: int, stride: int, out: int, relu: bool = True, resized: bool = False
    ) -> ir.Function:
        """A 1×1 convolution of a row of pixels, in blocks of lanes.

        With `relu` also the bias and ReLU, in rows with a zero before and after; with `resized`, a row of half the
        width and `out` channels is resized and added first.
        """
        arguments = ["row", "weights"] + ["bias"] * relu + ["narrow", "left", "across"] * resized + ["out"]
        f = self._function(name, arguments)
        lanes, build = self._lanes, f.builder
        vectors = max(count for count in (4, 2, 1) if out // lanes % count == 0)
        pixels = pixels_at_once(width, vectors, lanes)
        sums = [[f.variable() for _ in range(vectors)] for _ in range(pixels)]
        row_size = (width + 2 if relu else width) * lanes
        with f.loop(out // lanes, vectors) as block, f.loop(width, pixels) as x:
            for p, of_pixel in enumerate(sums):
                part = left = None
                if resized:
                    left = f.load_index(f.arguments["left"], f.plus(x, p))
                    part = f.splat(f.load_word(f.arguments["across"], x, p))
                for v, total in enumerate(of_pixel):
                    start = f.load(f.arguments["bias"], (block, lanes), v * lanes) if relu else f.zeros()
                    if part is not None and left is not None:
                        place = (block, width // 2 * lanes), v * width // 2 * lanes, (left, lanes)
                        before, after = (f.load(f.arguments["narrow"], *place, step) for step in (0, lanes))
                        start = build.fadd(start, f.multiply_add(part, build.fsub(after, before), before))
                    f.set(total, start)
            self._add_products(
                f, sums, f.arguments["row"], [(x, stride)], stride, channels, f.arguments["weights"], [(block, lanes)],
                out,
            )  # fmt: skip
            for p, of_pixel in enumerate(sums):
                for v, total in enumerate(of_pixel):
                    value = f.relu(f.get(total)) if relu else f.get(total)
                    place = (block, row_size), v * row_size, (x, lanes), (p + relu) * lanes
                    f.store(value, f.arguments["out"], *place)
        return f.done()

    def _add_products(
        self, f: Function, sums: Sequence[Sequence[ir.Value]], row: ir.Value, place: Sequence[Offset], stride: int,
        channels: int, weights: ir.Value, of_weights: Sequence[Offset], out: int,
    ) -> None:  # fmt: skip
        """sums[pixel][vector] += row[pixel, channel] · weights[channel, vector]; channels are pairs in bfloat16."""
        steps = channels // 2 if self._shape.half else channels
        multiply_add = f.multiply_add_halves if self._shape.half else f.multiply_add
        unrolled = next(count for count in (2, 1) if steps % count == 0)
        with f.loop(steps, unrolled) as first:
            for k in range(unrolled):
                columns = [
                    f.load(weights, (first, out), k * out + v * self._lanes, *of_weights) for v in range(len(sums[0]))
                ]
                for p, of_pixel in enumerate(sums):
                    word = f.splat(f.load_word(row, first, k + p * stride, *place))
                    for column, total in zip(columns, of_pixel, strict=True):
                        f.set(total, multiply_add(word, column, f.get(total)))

    def stem_product(self, name: str, channels: int, out: int) -> ir.Function:
        """1×1 convolution, bias and ReLU of a row of the face, whose channels are planes."""
        f = self._function(name, ["face", "weights", "bias", "out"])
        shape, lanes = self._shape, self._lanes
        plane, row_size = shape.height * shape.width, (shape.width + 2) * lanes
        with f.loop(out // lanes) as block, f.loop(shape.width, 1) as x:
            total = f.load(f.arguments["bias"], (block, lanes))
            for channel in range(channels):
                place = f.plus(x, channel * plane)
                load = f.load_short if shape.face_half else f.load_word
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

    def _depthwise(self, f: Function, block: ir.Value, x: ir.Value, pixels: int) -> list[ir.Value]:
        """3×3 windows of three rows, weighed and added up, bias and ReLU: a vector for each pixel."""
        lanes, row_size = self._lanes, (self._shape.width + 2) * self._lanes
        weights = [f.load(f.arguments["depthwise"], (block, 10 * lanes), i * lanes) for i in range(10)]
        found = []
        for p in range(pixels):
            total = weights[9]
            for i, row in enumerate(("above", "at", "below")):
                for j in range(3):
                    near = f.load(f.arguments[row], (block, row_size), (x, lanes), (p + j) * lanes)
                    total = f.multiply_add(near, weights[3 * i + j], total)
            found.append(f.relu(total))
        return found

    def depthwise_alone(self, name: str, channels: int) -> ir.Function:
        """Depthwise convolution, bias and ReLU: a row of pixels with their channels."""
        f = self._function(name, ["above", "at", "below", "depthwise", "out"])
        lanes = self._lanes
        pixels = pixels_at_once(self._shape.width, 2, lanes)
        store, words = (f.store_half, 2) if self._shape.half else (f.store, 1)
        with f.loop(channels // lanes) as block, f.loop(self._shape.width, pixels) as x:
            for p, value in enumerate(self._depthwise(f, block, x, pixels)):
                place = (x, channels // words), p * channels // words, (block, lanes // words)
                store(value, f.arguments["out"], *place)
        return f.done()

    def window(self, name: str, inner: int, out: int, residual: bool = False, half_copy: bool = False) -> ir.Function:
        """Depthwise convolution, bias, ReLU and 1×1 convolution with bias: a row of pixels with their channels.

        With `residual`, x is added: as it is, or for the picture through the last convolution. With `half_copy`, the
        row is also stored in bfloat16.
        """
        shape, lanes = self._shape, self._lanes
        arguments = ["above", "at", "below", "depthwise", "project", "bias", "tile", "out"]
        f = self._function(name, arguments + (["x", "last"] if residual else ["half"]))
        picture = residual and shape.picture
        x_channels = rounded_up(shape.out, lanes)
        out = rounded_up(out, lanes)
        pixels = pixels_at_once(shape.width, out // lanes, lanes)
        sums = [[f.variable() for _ in range(out // lanes)] for _ in range(pixels)]
        store, words = (f.store_half, 2) if shape.half else (f.store, 1)
        of_block = pixels * lanes // words
        with f.loop(shape.width, pixels) as x:
            with f.loop(inner // lanes) as block:
                for p, value in enumerate(self._depthwise(f, block, x, pixels)):
                    store(value, f.arguments["tile"], (block, of_block), p * lanes // words)
            for p, of_pixel in enumerate(sums):
                for v, total in enumerate(of_pixel):
                    start = f.load(f.arguments["bias"], v * lanes)
                    if residual and not picture:
                        near = f.load(f.arguments["x"], (x, x_channels), p * x_channels + v * lanes)
                        start = f.builder.fadd(start, near)
                    f.set(total, start)
            with f.loop(inner // lanes) as block:
                self._add_products(
                    f, sums, f.arguments["tile"], [(block, of_block)], lanes // words, lanes, f.arguments["project"],
                    [(block, lanes // words * out)], out,
                )  # fmt: skip
            if picture:
                self._add_picture(f, sums, x, x_channels)
            for p, of_pixel in enumerate(sums):
                for v, total in enumerate(of_pixel):
                    value = f.get(total)
                    place = (x, out), p * out + v * lanes
                    half_place = (x, out // 2), (p * out + v * lanes) // 2
                    if picture:
                        for channel in range(PICTURE):
                            plane = channel * shape.height * shape.width
                            f.store_lane(value, channel, f.arguments["out"], plane, x, p)
                    elif residual and shape.half_out:
                        f.store_half(value, f.arguments["out"], *half_place)
                    else:
                        f.store(value, f.arguments["out"], *place)
                    if half_copy:
                        f.store_half(value, f.arguments["half"], *half_place)
        return f.done()

    def _add_picture(self, f: Function, sums: Sequence[Sequence[ir.Value]], x: ir.Value, x_channels: int) -> None:
        """x through the last convolution, in float32."""
        for k in range(self._shape.out):
            column = f.load(f.arguments["last"], k * self._lanes)
            for p, (total,) in enumerate(sums):
                word = f.splat(f.load_word(f.arguments["x"], (x, x_channels), p * x_channels + k))
                f.set(total, f.multiply_add(word, column, f.get(total)))

    def sigmoid(self, name: str, width: int) -> ir.Function:
        """1 / (1 + e^-x) of a row, in place, to 2 units in the last place."""
        f = self._function(name, ["row"])
        with f.loop(width, self._lanes) as x:
            f.store(f.sigmoid(f.load(f.arguments["row"], x)), f.arguments["row"], x)
        return f.done()
