"""RGB to NV12 on a processor: two rows of pixels at a time, each read once.

The same steps in the same order as torch takes for the reference.
"""

from collections.abc import Sequence

from llvmlite import ir

from .vectors import INDEX, Function

LEAST_WIDTH = 32  # pixels: two vectors of any processor


def write_nv12(
    module: ir.Module,
    name: str,
    lanes: int,
    kr: float,
    kb: float,
    low: int,
    luma_span: int,
    chroma_span: int,
) -> None:
    """Add the function `name` to a module: pointers to

    pixels: (3,H,W) uint8 RGB.
    sizes: int64: W, at least 32, and H, both even; bytes from row to row and from plane to plane of `pixels`, and from
        row to row of `luma` and of `chroma`.
    luma: (H,W) uint8.
    chroma: (H/2,W/2,2) uint8.

    The other arguments: see `Equations`.
    """
    f = Function(module, name, ["pixels", "sizes", "luma", "chroma"], lanes)
    build = f.builder
    width, height, of_row, of_plane, of_luma, of_chroma = (f.load_long(f.arguments["sizes"], i) for i in range(6))

    def weigh(red: ir.Value, green: ir.Value, blue: ir.Value) -> ir.Value:
        grey = f.multiply_add(green, f.constant(1 - kr - kb), build.fmul(red, f.constant(kr)))
        return f.multiply_add(blue, f.constant(kb), grey)

    def scaled(value: ir.Value, span: float, least: float) -> ir.Value:
        value = build.fadd(build.fmul(value, f.constant(span)), f.constant(least))
        return f.to_bytes(f.clamped(f.rounded(value), 0, 255))

    def added(a: Sequence[ir.Value], b: Sequence[ir.Value]) -> list[ir.Value]:
        return [build.fadd(*pair) for pair in zip(a, b, strict=True)]

    with f.loop(height, 2) as top:
        of_pair = build.mul(build.udiv(top, INDEX(2)), of_chroma)
        chroma = f.at_byte(f.arguments["chroma"], of_pair)
        with f.vectors(width, 2) as x:
            sums = None
            for y in (top, f.plus(top, 1)):
                colours = []
                for channel in range(3):
                    row = f.at_byte(f.arguments["pixels"], build.mul(INDEX(channel), of_plane))
                    colours.append(f.load_pairs(f.at_byte(row, build.mul(y, of_row)), x))
                halves = list(zip(*colours, strict=True))  # even pixels and odd ones
                greys = [scaled(weigh(*half), luma_span / 255, low) for half in halves]
                f.store_pairs(*greys, f.at_byte(f.arguments["luma"], build.mul(y, of_luma)), x)
                both = added(*halves)
                sums = both if sums is None else added(sums, both)
            assert sums is not None
            means = [build.fmul(total, f.constant(0.25)) for total in sums]
            grey = weigh(*means)
            differences = [
                scaled(build.fsub(means[channel], grey), chroma_span / 255 / (2 * (1 - weight)), 128)
                for channel, weight in ((2, kb), (0, kr))
            ]
            f.store_pairs(*differences, chroma, x)
    f.done()
