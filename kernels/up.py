"""The large `up` blocks of the U-Net on a processor: both inverted residuals of a block, row by row.

A layer at a time, their inner tensors (52 MB in float32, in the last block) would go to memory and back between all
layers. Here a row of each layer is computed as soon as the rows that it needs are there, in a ring of three rows, all
of which stays in the processor's second cache:

    y (h,w)  → 1×1 convolution → ×2 bilinear ┐
    skip (2h,2w) ─────────────→ 1×1 convolution + → ReLU → 3×3 depthwise → ReLU → 1×1 = x
                              x → 1×1 convolution → ReLU → 3×3 depthwise → ReLU → 1×1 + x = out

The upsampling is linear, so y goes through its share of the first convolution before it, at a quarter of the pixels.
Where the processor multiplies in tiles (AMX), 1×1 convolutions take less time than the rows around them do: there y is
upsampled first, which is fewer channels, and what 3×3 windows see is float16 where float32 would be. In the last block
the skip is computed from the face as well (`stem`), the last convolution, to the picture, is multiplied with the one
before it, and the sigmoid is taken. Arithmetic is float32 otherwise; what 1×1 convolutions multiply may be bfloat16,
added up in float32, or bytes, added up in int32: of what goes in, unsigned ones (`Levels`). Skips become bytes by a
function of their own (`write_skip`), once: the template alone is seen in them.

A row of pixels lies in memory as y and skip do, pixel after pixel with its channels (N,H,W,C), or, inside, in blocks of
as many channels as a vector has lanes, float16 or bytes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir

from .up_products import pixels_at_once
from .up_rows import Rows, row_of_windows
from .up_weights import PICTURE, UpShape, places_of, skip_stride, weight_places, y_channels
from .vectors import FLOAT, INDEX, INTEGER, SHORT, Function, Offset, rounded_up, table


def scratch_places(shape: UpShape) -> tuple[dict[str, int], int]:
    """Where the rows lie that are computed on the way, and how much that is: words."""
    inner, out, inner2 = (rounded_up(channels, shape.lanes) for channels in (shape.inner, shape.out, shape.inner2))
    inner_row, inner2_row = (row_of_windows(shape, channels) for channels in (shape.inner, shape.inner2))
    if shape.tiles:
        of_y = {"y packed": shape.width * y_channels(shape) // shape.per_word}
    else:
        of_y = {"below": shape.width * inner, "between": shape.width // 2 * inner}
        if shape.per_word == 4:
            of_y["y packed"] = shape.width // 2 * shape.below_stride // 4
    places = {
        **of_y,
        "zeros": (shape.width + 2) * max(inner, inner2),
        "inner": 3 * inner_row,
        "x": 3 * shape.width * out,
        "x packed": shape.width * out // shape.per_word,
        "inner2": 3 * inner2_row,
        "tile": pixels_at_once(shape, shape.width, 1) * max(inner, inner2),
    }
    if shape.face and shape.per_word != 4:
        places |= stem_rows(shape) | {"skip": shape.width * skip_stride(shape)}
    return places_of(places)


def stem_rows(shape: UpShape) -> dict[str, int]:
    wide = (shape.width + 2) * skip_stride(shape)  # a zero before and after each row
    return {"stem zeros": wide, "stem": 3 * wide}


class Block:
    """A function of a block under construction: pointers to what it is given, to the block's weights, to scratch memory
    that was zeroed once, and to what it writes; the last three lie on multiples of 64 bytes.

    Attributes:
        f: the function.
    """

    def __init__(
        self, module: ir.Module, name: str, shape: UpShape, given: Sequence[str], scratch: dict[str, int]
    ) -> None:
        """
        Args:
            given: names of the first pointers.
            scratch: where what lies in the scratch memory.
        """
        self.f = Function(module, name, [*given, "weights", "scratch", "out"], shape.lanes)
        self._shape = shape
        self._scratch = scratch
        self._weights, _ = weight_places(shape)

    def weights(self, part: str) -> ir.Value:
        return self.f.at(self.f.arguments["weights"], self._weights[part])

    def product_weights(self, part: str) -> list[ir.Value]:
        """What a 1×1 convolution is given; to the skip's in vectors, the bias comes with y."""
        parts = (f"{part}{kind}" for kind in ("", " scale", " bias"))
        return [self.weights(name) for name in parts if name in self._weights]

    def levels(self, number: int) -> ir.Value:
        """How y, the skip, or x become bytes."""
        return self.f.at(self.weights("levels"), 2 * number)

    def scratch(self, part: str, *offsets: Offset) -> ir.Value:
        return self.f.at(self.f.arguments["scratch"], self._scratch[part], *offsets)

    def ring(self, part: str, row: ir.Value, size: int, count: int = 3) -> ir.Value:
        return self.scratch(part, (self.f.builder.urem(row, INDEX(count)), size))

    def around(self, part: str, zeros: str, row: ir.Value, size: int) -> list[ir.Value]:
        """The rows above, at and below; zeros beyond the picture."""
        found = []
        for step in (-1, 0, 1):
            near = self.f.plus(row, step)
            slot = self.ring(part, self.f.plus(near, 3), size)
            found.append(self.f.builder.select(self.f.within(near, self._shape.height), slot, self.scratch(zeros)))
        return found

    def counter(self) -> ir.Value:
        made = self.f.variable(INDEX)
        self.f.set(made, INDEX(0))
        return made

    def up_to(self, made: ir.Value, last: ir.Value, make: Callable[[ir.Value], None]) -> None:
        """Make the rows that are not made yet, up to `last`."""
        first = self.f.get(made, INDEX)
        with self.f.loop(self.f.builder.sub(self.f.plus(last, 1), first)) as more:
            row = self.f.builder.add(first, more)
            make(row)
            self.f.set(made, self.f.plus(row, 1))


def skip_from_face(block: Block, rows: Rows, shape: UpShape) -> Callable[[ir.Value, ir.Value], None]:
    """What adds code to a block's function that computes a row of the skip from the face, as it is multiplied next: one
    row after another, to a pointer."""
    f, skip = block.f, skip_stride(shape)
    size = (shape.width + 2) * skip
    stem_row, skip_row = rows.stem_product("stem", shape.face, skip), rows.depthwise_alone("skip", skip)
    made = block.counter()

    def make_stem(row: ir.Value) -> None:
        kind = SHORT if shape.seen_bfloat16 else FLOAT
        face = f.builder.gep(f.arguments["skip"], [f.builder.mul(row, INDEX(shape.width))], source_etype=kind)
        f.call(
            stem_row, face, block.weights("stem"), block.weights("stem bias"), block.ring("stem", f.plus(row, 3), size)
        )  # fmt: skip

    def make_skip(row: ir.Value, to: ir.Value) -> None:
        last = f.plus(row, 1)
        block.up_to(made, f.builder.select(f.within(last, shape.height), last, row), make_stem)
        f.call(skip_row, *block.around("stem", "stem zeros", row, size), block.weights("stem depthwise"), to)

    return make_skip


def skip_scratch_places(shape: UpShape) -> tuple[dict[str, int], int]:
    """Where the rows lie of which `write_skip` makes use, and how much that is: words."""
    return places_of(stem_rows(shape) if shape.face else {})


def write_skip(module: ir.Module, name: str, shape: UpShape) -> None:
    """Add the function `name`, which makes the skip bytes, to a module: pointers to the skip or the face, the block's
    weights, scratch memory that was zeroed once, and the output, (H,W,C) bytes with C of `skip_stride`; the last three
    lie on multiples of 64 bytes."""
    rows = Rows(module, name, shape)
    of_row = shape.width * skip_stride(shape)
    to_bytes = None if shape.face else rows.to_bytes("seen", of_row, bfloat16=shape.seen_bfloat16)
    places, _ = skip_scratch_places(shape)
    block = Block(module, name, shape, ["skip"], places)
    f = block.f
    make_skip = skip_from_face(block, rows, shape) if shape.face else None
    with f.loop(shape.height) as row:
        out = f.at_byte(f.arguments["out"], f.builder.mul(row, INDEX(of_row)))
        if make_skip is not None:
            make_skip(row, out)
        else:
            seen = f.at(f.arguments["skip"], (row, of_row // (2 if shape.seen_bfloat16 else 1)))
            f.call(to_bytes, seen, block.levels(1), out)
    f.done()


def inner_from_product(
    block: Block, rows: Rows, shape: UpShape, skip_of: Callable[[ir.Value], ir.Value]
) -> Callable[[ir.Value], None]:
    """What adds code to a block's function that computes a row of x's inner tensor: y's share of the convolution is
    resized."""
    f, scratch, ring = block.f, block.scratch, block.ring
    width, inner, in_bytes = shape.width, rounded_up(shape.inner, shape.lanes), shape.per_word == 4
    size, half_size = row_of_windows(shape, inner), width // 2 * inner
    y_row = rows.to_bytes("y", width // 2 * shape.below_stride) if in_bytes else None
    below_stride = shape.below_stride // 4 if in_bytes else shape.below_stride
    below_row = rows.product("below", width // 2, [(shape.below, below_stride)], inner, relu=False)
    between_rows = rows.between("between", half_size)
    of_skip = shape.skip, skip_stride(shape) // shape.per_word
    inner_row = rows.product("inner", width, [of_skip], inner, resized=True)
    tables, made = resizing(f, shape), block.counter()

    def make_below(row: ir.Value) -> None:
        y_of_row = f.at(f.arguments["y"], (row, width // 2 * shape.below_stride))
        if y_row is not None:
            f.call(y_row, y_of_row, block.levels(0), scratch("y packed"))
            y_of_row = scratch("y packed")
        f.call(below_row, y_of_row, *block.product_weights("below"), ring("below", row, half_size, 2))

    def make_inner(row: ir.Value) -> None:
        above = f.load_index(tables["top"], row)
        below = f.plus(above, 1)
        block.up_to(made, below, make_below)
        near = (ring("below", one, half_size, 2) for one in (above, below))
        f.call(between_rows, *near, f.at(tables["down"], row), scratch("between"))
        f.call(
            inner_row, skip_of(row), *block.product_weights("expand"), scratch("between"), tables["left"],
            tables["across"], ring("inner", f.plus(row, 3), size),
        )  # fmt: skip

    return make_inner


def inner_from_resized(
    block: Block, rows: Rows, shape: UpShape, skip_of: Callable[[ir.Value], ir.Value]
) -> Callable[[ir.Value], None]:
    """The same in tiles, which multiply faster than a row of so many channels is resized: y is resized before."""
    f, scratch, ring = block.f, block.scratch, block.ring
    inner = rounded_up(shape.inner, shape.lanes)
    size = row_of_windows(shape, inner)
    resized_row = rows.resized("resized")
    of_y, of_skip = (
        (channels, stride // shape.per_word)
        for channels, stride in ((y_channels(shape), y_channels(shape)), (shape.skip, skip_stride(shape)))
    )
    inner_row = rows.product("inner", shape.width, [of_y, of_skip], inner)
    tables = resizing(f, shape)

    def make_inner(row: ir.Value) -> None:
        above = f.load_index(tables["top"], row)
        near = (
            f.at(f.arguments["y"], (one, shape.width // 2 * shape.below_stride)) for one in (above, f.plus(above, 1))
        )
        f.call(
            resized_row, *near, f.at(tables["down"], row), tables["left"], tables["across"],
            *([block.levels(0)] if shape.per_word == 4 else []), scratch("y packed"),
        )  # fmt: skip
        f.call(
            inner_row, scratch("y packed"), skip_of(row), *block.product_weights("expand"),
            ring("inner", f.plus(row, 3), size),
        )  # fmt: skip

    return make_inner


def write_up(module: ir.Module, name: str, shape: UpShape) -> None:
    """Add the function `name` to a module: pointers to y, the skip (in bytes: what `write_skip` makes) or the face, the
    weights, scratch memory that was zeroed once, and the output; the last three lie on multiples of 64 bytes."""
    height, width, lanes = shape.height, shape.width, shape.lanes
    inner, out, inner2 = (rounded_up(channels, lanes) for channels in (shape.inner, shape.out, shape.inner2))
    in_bytes = shape.per_word == 4
    inner_size, inner2_size = (row_of_windows(shape, channels) for channels in (shape.inner, shape.inner2))
    of_skip = skip_stride(shape) // shape.per_word

    places, _ = scratch_places(shape)
    block = Block(module, name, shape, ["y", "skip"], places)
    rows = Rows(module, name, shape)
    f, weights, scratch, ring = block.f, block.weights, block.scratch, block.ring
    seen, written = (f.arguments[key] for key in ("skip", "out"))
    make_skip = skip_from_face(block, rows, shape) if shape.face and not in_bytes else None

    def skip_of(row: ir.Value) -> ir.Value:
        if make_skip is None:
            return f.at(seen, (row, width * of_skip))
        make_skip(row, scratch("skip"))
        return scratch("skip")

    make_inner = (inner_from_resized if shape.tiles else inner_from_product)(block, rows, shape, skip_of)
    x_row = rows.window("x", inner, shape.out, packed_copy=shape.per_word > 1)
    inner2_row = rows.product("inner2", width, [(shape.out, out // shape.per_word)], inner2)
    out_row = rows.window("out", inner2, PICTURE if shape.picture else shape.out, residual=True)
    sigmoid_row = rows.sigmoid("sigmoid", width) if shape.picture else None

    with f.loop(height + 2) as row:
        with f.when(f.within(row, height)):
            make_inner(row)
        behind = f.plus(row, -1)
        with f.when(f.within(behind, height)):
            x = ring("x", behind, width * out)
            f.call(
                x_row, *block.around("inner", "zeros", behind, inner_size), weights("depthwise"),
                *block.product_weights("project"), scratch("tile"), x,
                *([scratch("x packed")] if shape.per_word > 1 else []), *([block.levels(2)] if in_bytes else []),
            )  # fmt: skip
            f.call(
                inner2_row, scratch("x packed") if shape.per_word > 1 else x, *block.product_weights("expand2"),
                ring("inner2", f.plus(behind, 3), inner2_size),
            )  # fmt: skip
        behind = f.plus(row, -2)
        with f.when(f.within(behind, height)):
            stride = width if shape.picture else width * out // (2 if shape.out_bfloat16 else 1)
            f.call(
                out_row, *block.around("inner2", "zeros", behind, inner2_size), weights("depthwise2"),
                *block.product_weights("project2"), scratch("tile"), f.at(written, (behind, stride)),
                ring("x", behind, width * out), weights("last") if shape.picture else scratch("zeros"),
            )  # fmt: skip
            if sigmoid_row is not None:
                for channel in range(PICTURE):
                    f.call(sigmoid_row, f.at(written, (behind, width), channel * height * width))
    f.done()


def resizing(f: Function, shape: UpShape) -> dict[str, ir.Value]:
    """`bilinear` of the width (`left`, `across`) and of the height (`top`, `down`), as tables."""
    left, across = bilinear(shape.width)
    top, down = bilinear(shape.height)
    parts = {"left": (INTEGER, left), "across": (FLOAT, across), "top": (INTEGER, top), "down": (FLOAT, down)}
    return {key: table(f.module, f"{f.function.name}_{key}", *part) for key, part in parts.items()}


def bilinear(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `size` pixels lies among half as many, the first and last of which meet (`align_corners`): the
    pixel before it, int32, and how far it is from there, float32."""
    half = size // 2
    places = np.arange(size, dtype=np.float32) * np.float32((half - 1) / (size - 1))
    before = np.minimum(places.astype(np.int32), half - 2)
    return before, (places - before).astype(np.float32)
