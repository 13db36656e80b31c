"""How 1×1 convolutions of a row multiply: in vectors, or in tiles where the processor multiplies matrices (AMX)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

from llvmlite import ir

from .up_weights import UpShape
from .vectors import Function, Offset

Starts = Callable[[int], Iterator[ir.Value]]
"""What the sums of a pixel begin with, by the pixel's number."""
TILE = 16  # rows of a tile, of 64 bytes each


def pixels_at_once(shape: UpShape, width: int, vectors: int) -> int:
    """How many pixels of a row are computed together: their sums stay in registers, with some to spare, or are the rows
    of a tile. In vectors, it divides the width."""
    if shape.tiles:
        return TILE
    registers = 32 if shape.lanes == 16 else 16
    return max(count for count in range(1, max(registers * 5 // 8 // vectors, 1) + 1) if width % count == 0)


def products_of(
    f: Function, shape: UpShape, pixels: int, vectors: int, words: Sequence[int]
) -> "Products | TileProducts":
    """How a function multiplies so many pixels and vectors at once; `words` of a pixel, in its calls of `add`."""
    return TileProducts(f, shape, vectors, words) if shape.tiles else Products(f, shape, pixels, vectors)


def in_tile(words: int) -> int:
    """How many of a pixel's words are multiplied at once: as many as the rows of a tile have, if that divides them."""
    return max(count for count in range(1, TILE + 1) if words % count == 0)


class Products:
    """sums[pixel][vector] += row[pixel, channel] · weights[channel, vector], for some pixels and vectors of a function.

    Bytes are added up in int32, which are multiplied with `scale` when they are done.
    """

    def __init__(self, f: Function, shape: UpShape, pixels: int, vectors: int) -> None:
        self._f = f
        self._per_word = shape.per_word
        self._in_bytes = shape.per_word == 4
        self._kind = f.integers if self._in_bytes else f.vector
        self._multiply_add = {1: f.multiply_add, 2: f.multiply_add_bfloat16, 4: f.multiply_add_bytes}[shape.per_word]
        self._sums = [[f.variable(self._kind) for _ in range(vectors)] for _ in range(pixels)]

    def begin(self, starts: Starts) -> None:
        """Sums begin with what `starts` gives; of bytes, that is added when they are done."""
        for p, of_pixel in enumerate(self._sums):
            none = repeat(self._f.no_levels())
            for total, start in zip(of_pixel, none if self._in_bytes else starts(p), strict=False):
                self._f.set(total, start)

    def add(
        self, row: ir.Value, place: Sequence[Offset], stride: int, channels: int, weights: ir.Value,
        of_weights: Sequence[Offset], out: int,
    ) -> None:  # fmt: skip
        """`per_word` channels at once.

        Args:
            row, place: where the first pixel's channels are.
            stride: words from one pixel to the next.
            weights, of_weights: where the first vector's weights are: a word for each lane.
            out: words from a channel's weights, or a few channels' together, to the next ones'.
        """
        f = self._f
        steps = -(-channels // self._per_word)
        unrolled = next(count for count in (2, 1) if steps % count == 0)
        with f.loop(steps, unrolled) as first:
            for k in range(unrolled):
                columns = [
                    f.load(weights, (first, out), k * out + v * f.lanes, *of_weights) for v in range(len(self._sums[0]))
                ]
                for p, of_pixel in enumerate(self._sums):
                    word = f.splat(f.load_word(row, first, k + p * stride, *place))
                    for column, total in zip(columns, of_pixel, strict=True):
                        f.set(total, self._multiply_add(word, column, f.get(total, self._kind)))

    def done(self, starts: Starts, *scale: Offset) -> Iterator[list[ir.Value]]:
        """The sums of each pixel."""
        f = self._f
        for p, of_pixel in enumerate(self._sums):
            if not self._in_bytes:
                yield [f.get(total) for total in of_pixel]
                continue
            scales = (f.load(f.arguments["scale"], v * f.lanes, *scale) for v in range(len(of_pixel)))
            added = zip(of_pixel, scales, starts(p), strict=True)
            yield [f.multiply_add(f.to_float(f.get(total, f.integers)), one, start) for total, one, start in added]

    def end(self) -> None:
        """At the function's end."""


class TileProducts:
    """The same in tiles: 16 pixels of up to 16 words, by up to 16 words of a vector each. Sums begin with 0; what
    `starts` gives is added when they are done. There are two kinds of `words` at most."""

    def __init__(self, f: Function, shape: UpShape, vectors: int, words: Sequence[int]) -> None:
        self._f = f
        self._in_bytes = shape.per_word == 4
        self._per_word = shape.per_word
        self._vectors = vectors
        self._tiles = {n: vectors + 2 * i for i, n in enumerate(dict.fromkeys(map(in_tile, words)))}
        sizes = [(TILE, TILE)] * vectors
        for n in self._tiles:
            sizes += [(TILE, n), (n, TILE)]
        self._sums_in_memory = f.array(TILE * vectors)
        f.configure_tiles(sizes)

    def begin(self, starts: Starts) -> None:
        for v in range(self._vectors):
            self._f.zero_tile(v)

    def add(
        self, row: ir.Value, place: Sequence[Offset], stride: int, channels: int, weights: ir.Value,
        of_weights: Sequence[Offset], out: int,
    ) -> None:  # fmt: skip
        f = self._f
        words = -(-channels // self._per_word)
        at_once = in_tile(words)
        of_pixels = self._tiles[at_once]
        of_vector = of_pixels + 1
        with f.loop(words, at_once) as first:
            f.load_tile(of_pixels, stride, row, first, *place)
            for v in range(self._vectors):
                f.load_tile(of_vector, out, weights, (first, out), v * f.lanes, *of_weights)
                f.multiply_add_tiles(self._in_bytes, v, of_pixels, of_vector)

    def done(self, starts: Starts, *scale: Offset) -> Iterator[list[ir.Value]]:
        f = self._f
        for v in range(self._vectors):
            f.store_tile(v, f.lanes, self._sums_in_memory, v * TILE * f.lanes)
        for p in range(TILE):
            totals = []
            for v, start in enumerate(starts(p)):
                place = (v * TILE + p) * f.lanes
                if self._in_bytes:
                    one = f.load(f.arguments["scale"], v * f.lanes, *scale)
                    total = f.to_float(f.load_integers(self._sums_in_memory, place))
                    totals.append(f.multiply_add(total, one, start))
                else:
                    totals.append(f.builder.fadd(f.load(self._sums_in_memory, place), start))
            yield totals

    def end(self) -> None:
        self._f.release_tiles()
