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
as many channels as a vector has lanes, or bytes.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from .up_rows import Rows, pixels_at_once, row_of_windows
from .up_weights import PICTURE, UpShape, places_of, weight_places
from .vectors import FLOAT, INDEX, INTEGER, SHORT, Function, Offset, rounded_up, table


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
