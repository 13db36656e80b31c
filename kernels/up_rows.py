"""The steps of an `up` block's kernel, each a function that computes a row of pixels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from llvmlite import ir

from .up_products import pixels_at_once, products_of
from .up_weights import FLOAT16_MAX, PICTURE, UpShape, window_bytes, y_channels
from .vectors import INDEX, Function, rounded_up

ROWS = "above", "at", "below"


def row_of_windows(shape: UpShape, channels: int) -> int:
    """Words of a row that is convolved depthwise."""
    return (shape.width + 2) * rounded_up(channels, shape.lanes) * window_bytes(shape, channels) // 4


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
        self,
        name: str,
        width: int,
        given: Sequence[tuple[int, int]],
        out: int,
        relu: bool = True,
        resized: bool = False,
    ) -> ir.Function:
        """A 1×1 convolution of a row of pixels, in blocks of lanes.

        With `relu` also ReLU, in rows with a zero before and after. A bias is added; with `resized` it is in a row of
        half the width and `out` channels, which is resized and added.

        Args:
            given: channels of rows, one after another in the weights, and words from one pixel to the next.
        """
        added = ["narrow", "left", "across"] if resized else ["bias"]
        names = [f"row {i}" for i in range(len(given))]
        f = self._function(name, [*names, "weights", *["scale"] * self._in_bytes, *added, "out"])
        lanes, build = self._lanes, f.builder
        vectors = max(count for count in (4, 2, 1) if out // lanes % count == 0)
        pixels = pixels_at_once(self._shape, width, vectors)
        words = [-(-channels // self._shape.per_word) for channels, _ in given]
        products = products_of(f, self._shape, pixels, vectors, words)
        row_size = (width + 2 if relu else width) * lanes
        of_window = window_bytes(self._shape, out) if relu else 4
        with f.loop(out // lanes, vectors) as block, f.strips(width, pixels) as x:

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

            products.begin(starts)
            for i, (channels, stride) in enumerate(given):
                place = (block, lanes), sum(words[:i]) * out
                products.add(f.arguments[names[i]], [(x, stride)], stride, channels, f.arguments["weights"], place, out)
            for p, of_pixel in enumerate(products.done(starts, (block, lanes))):
                if of_window == 1:
                    place = (block, row_size // 4), (x, lanes), (p + 1) * lanes
                    f.store_levels_together(of_pixel, f.arguments["out"], *place)
                    continue
                if of_window == 2:
                    values = [f.clamped(total, 0.0, FLOAT16_MAX) for total in of_pixel]
                    for v, value in enumerate(values):
                        place = (block, row_size // 2), v // 2 * row_size, (x, lanes), (p + 1) * lanes
                        f.store_float16(value, f.arguments["out"], *place, v % 2 * lanes // 2)
                    continue
                for v, total in enumerate(of_pixel):
                    value = f.relu(total) if relu else total
                    place = (block, row_size), v * row_size, (x, lanes), (p + relu) * lanes
                    f.store(value, f.arguments["out"], *place)
        products.end()
        return f.done()

    def resized(self, name: str) -> ir.Function:
        """A row of y in the output's size, as it is multiplied: between two rows, and between their pixels."""
        f = self._function(name, ["a", "b", "down", "left", "across", *["levels"] * self._in_bytes, "out"])
        shape, lanes = self._shape, self._lanes
        load = f.load_bfloat16 if shape.per_word == 2 else partial(f.load, aligned=False)
        channels, store = y_channels(shape), self._store(f)
        down = f.splat(f.load_word(f.arguments["down"]))
        with f.loop(shape.width) as x:
            left = f.load_index(f.arguments["left"], x)
            part = f.splat(f.load_word(f.arguments["across"], x))
            for channel in range(0, channels, lanes):
                vector = channel // 2 if shape.per_word == 2 else channel
                rows = []
                for row in "ab":
                    place = (left, shape.below_stride), vector
                    before, after = (load(f.arguments[row], *place, step) for step in (0, shape.below_stride))
                    rows.append(f.multiply_add(part, f.builder.fsub(after, before), before))
                value = f.multiply_add(down, f.builder.fsub(rows[1], rows[0]), rows[0])
                if self._in_bytes:
                    step, zero = (f.splat(f.load_word(f.arguments["levels"], i)) for i in range(2))
                    value = f.multiply_add(value, step, zero)
                store(value, f.arguments["out"], (x, channels // shape.per_word), channel // shape.per_word)
        return f.done()

    def to_bytes(self, name: str, size: int, bfloat16: bool = False) -> ir.Function:
        """A row of float32 or bfloat16 as levels."""
        f = self._function(name, ["row", "levels", "out"])
        load, words = (f.load_bfloat16, self._lanes // 2) if bfloat16 else (partial(f.load, aligned=False), self._lanes)
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
                load = f.load_short if shape.seen_bfloat16 else f.load_word
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
        return {1: f.store, 2: f.store_bfloat16, 4: f.store_levels}[self._shape.per_word]

    def _depthwise(
        self, f: Function, block: ir.Value, x: ir.Value, pixels: int, in_float16: bool = False
    ) -> list[list[ir.Value]]:
        """3×3 windows of three rows, weighed and added up, bias and ReLU: for each pixel a vector, or in float16 two,
        of twice as many channels."""
        lanes, row_size = self._lanes, (self._shape.width + 2) * self._lanes
        load, add = (f.load_float16, f.multiply_add_float16) if in_float16 else (f.load, f.multiply_add)
        weights = [load(f.arguments["depthwise"], (block, 10 * lanes), i * lanes) for i in range(10)]
        found = []
        for p in range(pixels):
            total = weights[9]
            for i, row in enumerate(ROWS):
                for j in range(3):
                    near = load(f.arguments[row], (block, row_size), (x, lanes), (p + j) * lanes)
                    total = add(near, weights[3 * i + j], total)
            found.append(f.from_float16(f.clamped(total, 0.0, FLOAT16_MAX)) if in_float16 else [f.relu(total)])
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
        f = self._function(name, [*ROWS, "depthwise", "out"])
        lanes = self._lanes
        pixels = pixels_at_once(self._shape, self._shape.width, 2)
        store, words = self._store(f), self._shape.per_word
        with f.loop(channels // lanes) as block, f.strips(self._shape.width, pixels) as x:
            for p, (value,) in enumerate(self._depthwise(f, block, x, pixels)):
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
        pixels = pixels_at_once(shape, shape.width, out // lanes)
        store = self._store(f)
        of_window = window_bytes(shape, inner)
        together = 4 // of_window  # blocks
        of_block = together * pixels * lanes // words
        products = products_of(f, shape, pixels, out // lanes, [together * lanes // words])
        with f.strips(shape.width, pixels) as x:

            def starts(p: int) -> Iterator[ir.Value]:
                for v in range(out // lanes):
                    start = f.load(f.arguments["bias"], v * lanes)
                    if residual and not picture:
                        near = f.load(f.arguments["x"], (x, x_channels), p * x_channels + v * lanes)
                        start = f.builder.fadd(start, near)
                    yield start

            with f.loop(inner // lanes // together) as block:
                values = []
                if of_window == 1:
                    self._depthwise_of_bytes(f, block, x, pixels, of_block)
                else:
                    values = self._depthwise(f, block, x, pixels, in_float16=of_window == 2)
                for p, of_pixel in enumerate(values):
                    for v, value in enumerate(of_pixel):
                        place = (block, of_block), (together * p + v) * lanes // words
                        store(value, f.arguments["tile"], *place)
            products.begin(starts)
            channels = together * lanes
            with f.loop(inner // channels) as block:
                products.add(
                    f.arguments["tile"], [(block, of_block)], channels // words, channels,
                    f.arguments["project"], [(block, channels // words * out)], out,
                )  # fmt: skip
            totals = list(products.done(starts))
            if picture:
                totals = self._with_picture(f, totals, x, x_channels)
            for p, of_pixel in enumerate(totals):
                for v, value in enumerate(of_pixel):
                    place = p * out + v * lanes
                    if picture:
                        for channel in range(PICTURE):
                            plane = channel * shape.height * shape.width
                            f.store_lane(value, channel, f.arguments["out"], plane, x, p)
                    elif residual and shape.out_bfloat16:
                        f.store_bfloat16(value, f.arguments["out"], (x, out // 2), place // 2)
                    else:
                        f.store(value, f.arguments["out"], (x, out), place)
                    if packed_copy:
                        if self._in_bytes:
                            step, zero = (f.splat(f.load_word(f.arguments["levels"], i)) for i in range(2))
                            value = f.multiply_add(value, step, zero)
                        store(value, f.arguments["packed"], (x, out // words), place // words)
        products.end()
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
