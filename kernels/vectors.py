"""What kernels for processors are written with: functions of vectors and loops, compiled by LLVM.

Memory is counted in words of 4 bytes, one float32, two bfloat16 or float16, or four bytes, unless it says otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from llvmlite import ir

FLOAT, POINTER = ir.FloatType(), ir.PointerType()
INDEX, INTEGER, SHORT, BYTE = (ir.IntType(bits) for bits in (64, 32, 16, 8))
LARGEST_POWER = 80.0  # e^80 and e^-80 are within float32's range; 1 + e^-80 is 1
Offset = int | ir.Value | tuple[ir.Value, int]
"""Words; or a number and how many words one counts for."""


class BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


class Function:
    """A function of pointers under construction; nothing else of the arguments' memory overlaps what it writes.

    Attributes:
        lanes: float32 values in a vector.
        arguments: the pointers, by name.
        builder: LLVM's, at the place where code is added.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[str], lanes: int) -> None:
        self.module = module
        self.lanes = lanes
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER] * len(arguments)), name)
        self.arguments = dict(zip(arguments, self.function.args, strict=True))
        for argument in self.function.args:
            argument.add_attribute("noalias")
        self.vector, self.integers = ir.VectorType(FLOAT, lanes), ir.VectorType(INTEGER, lanes)
        self.float16 = ir.VectorType(ir.HalfType(), 2 * lanes)
        self._variables = ir.IRBuilder(self.function.append_basic_block("variables"))
        self._start = self.function.append_basic_block("start")
        self.builder = ir.IRBuilder(self._start)

    def done(self) -> ir.Function:
        self.builder.ret_void()
        self._variables.branch(self._start)
        return self.function

    # --- control flow ------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: int | ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """0, step, … below `count`."""
        build = self.builder
        head, body, after = (build.append_basic_block(name) for name in ("head", "body", "after"))
        before = build.block
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(INDEX)
        index.add_incoming(INDEX(0), before)
        stop = INDEX(count) if isinstance(count, int) else count
        build.cbranch(build.icmp_signed("<", index, stop), body, after)
        build.position_at_end(body)
        yield index
        index.add_incoming(build.add(index, INDEX(step)), build.block)
        build.branch(head)
        build.position_at_end(after)

    @contextmanager
    def strips(self, width: int, pixels: int) -> Iterator[ir.Value]:
        """0, pixels, … below `width`, which is as large at least; the last strip ends with it, over the one before."""
        with self.loop(width, pixels) as first:
            if not width % pixels:
                yield first
                return
            yield self.least(first, INDEX(width - pixels))

    @contextmanager
    def vectors(self, count: ir.Value, vectors: int = 1) -> Iterator[ir.Value]:
        """0, lanes, … for `count` values, or some vectors at once; the last ones end with the values, of which there
        are as many at least."""
        lanes = vectors * self.lanes
        with self.loop(count, lanes) as first:
            yield self.least(first, self.builder.sub(count, INDEX(lanes)))

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        with self.builder.if_then(condition):
            yield

    def within(self, index: ir.Value, count: int) -> ir.Value:
        """Whether 0 ≤ index < count."""
        return self.builder.icmp_unsigned("<", index, INDEX(count))

    def least(self, index: ir.Value, other: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.icmp_signed("<", index, other), index, other)

    def plus(self, index: ir.Value, number: int) -> ir.Value:
        return self.builder.add(index, INDEX(number))

    def call(self, function: ir.Function, *pointers: ir.Value) -> None:
        self.builder.call(function, pointers)

    # --- variables ---------------------------------------------------------------------------------------------------

    def variable(self, kind: ir.Type | None = None) -> ir.Value:
        """Room for a vector, or another kind of value; LLVM finds a register for it."""
        return self._variables.alloca(kind or self.vector)

    def array(self, vectors: int) -> ir.Value:
        """Room for some vectors that have an address."""
        room = self._variables.alloca(FLOAT, vectors * self.lanes)
        room.align = 4 * self.lanes
        return room

    def get(self, variable: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        return self.builder.load(variable, typ=kind or self.vector)

    def set(self, variable: ir.Value, value: ir.Value) -> None:
        self.builder.store(value, variable)

    # --- memory ------------------------------------------------------------------------------------------------------

    def at(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        """The pointer, some words further on."""
        total, fixed = None, 0
        for offset in offsets:
            if isinstance(offset, int):
                fixed += offset
                continue
            term = self.builder.mul(offset[0], INDEX(offset[1])) if isinstance(offset, tuple) else offset
            total = term if total is None else self.builder.add(total, term)
        if total is not None:
            pointer = self.builder.gep(pointer, [total], source_etype=FLOAT)
        return self.builder.gep(pointer, [INDEX(fixed)], source_etype=FLOAT) if fixed else pointer

    def load(self, pointer: ir.Value, *offsets: Offset, aligned: bool = True) -> ir.Value:
        """A vector; it lies on a multiple of its size, if `aligned`."""
        align = 4 * self.lanes if aligned else 4
        return self.builder.load(self.at(pointer, *offsets), typ=self.vector, align=align)

    def store(self, value: ir.Value, pointer: ir.Value, *offsets: Offset, aligned: bool = True) -> None:
        self.builder.store(value, self.at(pointer, *offsets), align=4 * self.lanes if aligned else 4)

    def store_bfloat16(self, value: ir.Value, pointer: ir.Value, *offsets: Offset) -> None:
        """The vector as bfloat16, rounded to nearest."""
        narrow = self.builder.fptrunc(value, ir.VectorType(BFloat16(), self.lanes))
        self.builder.store(narrow, self.at(pointer, *offsets), align=2 * self.lanes)

    def load_bfloat16(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        """A vector of bfloat16 as float32."""
        halves = ir.VectorType(SHORT, self.lanes)
        bits = self.builder.zext(self.builder.load(self.at(pointer, *offsets), typ=halves, align=4), self.integers)
        return self.builder.bitcast(self.builder.shl(bits, ir.Constant(self.integers, [16] * self.lanes)), self.vector)

    def load_float16(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        """A vector of float16, twice as many as lanes."""
        return self.builder.load(self.at(pointer, *offsets), typ=self.float16, align=4 * self.lanes)

    def store_float16(self, value: ir.Value, pointer: ir.Value, *offsets: Offset) -> None:
        """A vector as float16."""
        narrow = self.builder.fptrunc(value, ir.VectorType(ir.HalfType(), self.lanes))
        self.builder.store(narrow, self.at(pointer, *offsets), align=2 * self.lanes)

    def from_float16(self, value: ir.Value) -> list[ir.Value]:
        """Both of its halves as float32."""
        wide = self.builder.fpext(value, ir.VectorType(FLOAT, 2 * self.lanes))
        halves = (list(range(first, first + self.lanes)) for first in (0, self.lanes))
        return [self.builder.shuffle_vector(wide, wide, ir.Constant(self.integers, places)) for places in halves]

    def store_levels(self, value: ir.Value, pointer: ir.Value, *offsets: Offset) -> None:
        """The vector as bytes: rounded towards zero, clamped to 0..255."""
        whole = self.builder.fptosi(self.relu(value), self.integers)
        most = ir.Constant(self.integers, [255] * self.lanes)
        within = self.builder.select(self.builder.icmp_unsigned("<", whole, most), whole, most)
        levels = self.builder.trunc(within, ir.VectorType(BYTE, self.lanes))
        self.builder.store(levels, self.at(pointer, *offsets), align=4)

    def store_levels_together(self, values: Sequence[ir.Value], pointer: ir.Value, *offsets: Offset) -> None:
        """Four vectors as `store_levels` has one; of their bytes, four of each are neighbours, and next to the next
        vector's four."""
        wide = "avx512" if self.lanes == 16 else "avx2"
        suffix = ".512" if self.lanes == 16 else ""
        shorts = ir.VectorType(SHORT, 2 * self.lanes)
        halve = self._intrinsic(f"llvm.x86.{wide}.packssdw{suffix}", [self.integers] * 2, shorts)
        quarter = self._intrinsic(
            f"llvm.x86.{wide}.packuswb{suffix}", [shorts] * 2, ir.VectorType(BYTE, 4 * self.lanes)
        )
        a, b, c, d = (self.builder.fptosi(value, self.integers) for value in values)
        levels = self.builder.call(quarter, [self.builder.call(halve, [a, b]), self.builder.call(halve, [c, d])])
        self.builder.store(levels, self.at(pointer, *offsets), align=4 * self.lanes)

    def interleaved(self, a: ir.Value, b: ir.Value, c: ir.Value) -> list[ir.Value]:
        """Words (a, b, c, 0) of three vectors of bytes, for each of their bytes: four vectors.

        The bytes of 16 neighbours, which processors shuffle at once, go to all four of them, four to each.
        """

        def woven(x: ir.Value, y: ir.Value, kind: ir.Type) -> list[ir.Value]:
            """Of the first and of the second half of each 16 bytes, one of x, one of y, and so on."""
            whole = ir.VectorType(kind, 4 * self.lanes * 8 // kind.width)
            count, of_16 = whole.count, 128 // kind.width
            x, y = (self.builder.bitcast(value, whole) for value in (x, y))
            halves = []
            for first in (0, of_16 // 2):
                places = [k + i for k in range(0, count, of_16) for i in range(first, first + of_16 // 2)]
                mask = ir.Constant(ir.VectorType(INTEGER, count), [n for i in places for n in (i, count + i)])
                halves.append(self.builder.shuffle_vector(x, y, mask))
            return halves

        pairs = zip(woven(a, b, BYTE), woven(c, self.zeros(), BYTE), strict=True)
        return [self.builder.bitcast(words, self.vector) for ab, c0 in pairs for words in woven(ab, c0, SHORT)]

    def load_long(self, pointer: ir.Value, number: int) -> ir.Value:
        """The int64 of this number."""
        return self.builder.load(self.at(pointer, 2 * number), typ=INDEX, align=8)

    def load_index(self, table: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.sext(self.builder.load(self.at(table, index), typ=INTEGER, align=4), INDEX)

    def load_word(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        return self.builder.load(self.at(pointer, *offsets), typ=FLOAT, align=4)

    def load_short(self, pointer: ir.Value, index: ir.Value) -> ir.Value:
        """One bfloat16, counted from the pointer in halves of words, as float32."""
        place = self.builder.gep(pointer, [index], source_etype=SHORT)
        bits = self.builder.zext(self.builder.load(place, typ=SHORT, align=2), INTEGER)
        return self.builder.bitcast(self.builder.shl(bits, INTEGER(16)), FLOAT)

    def store_lane(self, value: ir.Value, lane: int, pointer: ir.Value, *offsets: Offset) -> None:
        self.builder.store(self.builder.extract_element(value, INTEGER(lane)), self.at(pointer, *offsets), align=4)

    # --- bytes and integers ------------------------------------------------------------------------------------------

    def at_byte(self, pointer: ir.Value, offset: ir.Value) -> ir.Value:
        """The pointer, some bytes further on."""
        return self.builder.gep(pointer, [offset], source_etype=BYTE)

    def raw_bytes(self, pointer: ir.Value, offset: ir.Value) -> ir.Value:
        """As many bytes as lanes."""
        place = self.at_byte(pointer, offset)
        return self.builder.load(place, typ=ir.VectorType(BYTE, self.lanes), align=1)

    def load_bytes(self, pointer: ir.Value, offset: ir.Value) -> ir.Value:
        """Bytes as float32."""
        return self.to_float(self.builder.zext(self.raw_bytes(pointer, offset), self.integers))

    def to_bytes(self, value: ir.Value) -> ir.Value:
        """Of whole numbers in 0..255."""
        return self.builder.trunc(self.builder.fptosi(value, self.integers), ir.VectorType(BYTE, self.lanes))

    def store_bytes(self, value: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
        self.builder.store(value, self.at_byte(pointer, offset), align=1)

    def load_pairs(self, pointer: ir.Value, offset: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Bytes as float32, twice as many as lanes: the even ones, and the odd ones."""
        both = self.builder.load(self.at_byte(pointer, offset), typ=ir.VectorType(SHORT, self.lanes), align=1)
        wide = self.builder.zext(both, self.integers)
        low, eight = (ir.Constant(self.integers, [number] * self.lanes) for number in (255, 8))
        even, odd = self.builder.and_(wide, low), self.builder.lshr(wide, eight)
        return self.to_float(even), self.to_float(odd)

    def store_pairs(self, even: ir.Value, odd: ir.Value, pointer: ir.Value, offset: ir.Value) -> None:
        """Bytes of two vectors, alternating."""
        places = [place for i in range(self.lanes) for place in (i, self.lanes + i)]
        mask = ir.Constant(ir.VectorType(INTEGER, 2 * self.lanes), places)
        self.store_bytes(self.builder.shuffle_vector(even, odd, mask), pointer, offset)

    def chosen(self, mask: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Bytes of a where those of the mask are not 0, else b."""
        none = ir.Constant(ir.VectorType(BYTE, self.lanes), [0] * self.lanes)
        return self.builder.select(self.builder.icmp_unsigned("!=", mask, none), a, b)

    def load_integers(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        """A vector of int32."""
        return self.builder.load(self.at(pointer, *offsets), typ=self.integers, align=4)

    def gather(self, pointer: ir.Value, places: ir.Value) -> ir.Value:
        """The words at these places."""
        if self.lanes == 16:
            mask = ir.Constant(ir.VectorType(ir.IntType(1), 16), [1] * 16)
            kinds = [self.vector, POINTER, self.integers, mask.type, INTEGER]
            name = "llvm.x86.avx512.mask.gather.dps.512"
            return self.builder.call(self._intrinsic(name, kinds), [self.zeros(), pointer, places, mask, INTEGER(4)])
        all_ones = self.builder.bitcast(ir.Constant(self.integers, [-1] * 8), self.vector)
        kinds = [self.vector, POINTER, self.integers, self.vector, BYTE]
        return self.builder.call(
            self._intrinsic("llvm.x86.avx2.gather.d.ps.256", kinds),
            [self.zeros(), pointer, places, all_ones, BYTE(4)],
        )

    # --- tiles (AMX) -------------------------------------------------------------------------------------------------

    def configure_tiles(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Tile registers 0, 1, … get these numbers of rows and of words in a row, 16 at most; they are zeroed."""
        given = np.zeros(64, np.uint8)
        given[0] = 1  # the only palette
        given[16:32].view(np.uint16)[: len(sizes)] = [4 * words for _, words in sizes]
        given[48 : 48 + len(sizes)] = [rows for rows, _ in sizes]
        name = f"{self.function.name}_tiles"
        self._tiles("ldtilecfg", table(self.module, name, INTEGER, given.view(np.int32)))

    def release_tiles(self) -> None:
        """At the function's end: a processor with tiles in use saves them with each change of threads."""
        self._tiles("tilerelease")

    def zero_tile(self, tile: int) -> None:
        self._tiles("tilezero", BYTE(tile))

    def load_tile(self, tile: int, stride: int, pointer: ir.Value, *offsets: Offset) -> None:
        """Rows, one each `stride` words."""
        self._tiles("tileloadd64", BYTE(tile), self.at(pointer, *offsets), INDEX(4 * stride))

    def store_tile(self, tile: int, stride: int, pointer: ir.Value, *offsets: Offset) -> None:
        self._tiles("tilestored64", BYTE(tile), self.at(pointer, *offsets), INDEX(4 * stride))

    def multiply_add_tiles(self, in_bytes: bool, total: int, a: int, b: int) -> None:
        """total += a·b, matrices of words: as `multiply_add_bytes` or `multiply_add_bfloat16` has a word."""
        self._tiles("tdpbusd" if in_bytes else "tdpbf16ps", BYTE(total), BYTE(a), BYTE(b))

    def _tiles(self, name: str, *given: ir.Value) -> None:
        kinds = [value.type for value in given]
        self.builder.call(self._intrinsic(f"llvm.x86.{name}", kinds, ir.VoidType()), given)

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def constant(self, number: float) -> ir.Constant:
        """The nearest float32 in all lanes."""
        return ir.Constant(self.vector, [float(np.float32(number))] * self.lanes)

    def zeros(self) -> ir.Constant:
        return self.constant(0.0)

    def no_levels(self) -> ir.Constant:
        """Zeros, as int32."""
        return ir.Constant(self.integers, [0] * self.lanes)

    def rounded(self, value: ir.Value) -> ir.Value:
        """To whole numbers, halves to even ones."""
        return self.builder.call(self._intrinsic(f"llvm.rint.v{self.lanes}f32", [self.vector]), [value])

    def truncated(self, value: ir.Value) -> ir.Value:
        """Rounded towards zero."""
        return self.builder.call(self._intrinsic(f"llvm.trunc.v{self.lanes}f32", [self.vector]), [value])

    def splat(self, word: ir.Value) -> ir.Value:
        """The same word in all lanes."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, word, INTEGER(0))
        return self.builder.shuffle_vector(first, undefined, self.no_levels())

    def multiply_add(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """a·b + total, rounded once."""
        return self.builder.call(self._intrinsic(f"llvm.fma.v{self.lanes}f32", [self.vector] * 3), [a, b, total])

    def multiply_add_float16(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """The same of vectors of float16."""
        intrinsic = self._intrinsic(f"llvm.fma.v{2 * self.lanes}f16", [self.float16] * 3, self.float16)
        return self.builder.call(intrinsic, [a, b, total])

    def multiply_add_bfloat16(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """a·b + total, where the words of a and b are pairs of bfloat16: both products are added to a lane."""
        pairs = ir.VectorType(BFloat16(), 2 * self.lanes)
        intrinsic = self._intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", [self.vector, pairs, pairs])
        return self.builder.call(intrinsic, [total, self.builder.bitcast(a, pairs), self.builder.bitcast(b, pairs)])

    def multiply_add_bytes(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """a·b + total, where the words of a are four bytes each, of b four signed ones, of `total` an int32: all four
        products are added to a lane."""
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        intrinsic = self._intrinsic(name, [self.integers] * 3, self.integers)
        words = (self.builder.bitcast(value, self.integers) for value in (a, b))
        return self.builder.call(intrinsic, [total, *words])

    def to_float(self, value: ir.Value) -> ir.Value:
        """Of int32."""
        return self.builder.sitofp(value, self.vector)

    def relu(self, value: ir.Value) -> ir.Value:
        return self.at_least(value, 0.0)

    def at_least(self, value: ir.Value, bound: float) -> ir.Value:
        """NaN stays, so that it shows."""
        return self._bound(">", value, bound)

    def at_most(self, value: ir.Value, bound: float) -> ir.Value:
        """NaN stays."""
        return self._bound("<", value, bound)

    def _bound(self, order: str, value: ir.Value, bound: float) -> ir.Value:
        limit = ir.Constant(value.type, [float(np.float32(bound))] * value.type.count)
        beyond = self.builder.fcmp_ordered(order, limit, value)  # so written, it is one instruction
        return self.builder.select(beyond, limit, value)

    def sigmoid(self, value: ir.Value) -> ir.Value:
        """1 / (1 + e^-x). e^-x is 2^n · e^r with |r| ≤ ln 2 / 2, and e^r its Taylor series."""
        build = self.builder
        limited = self.clamped(build.fneg(value), -LARGEST_POWER, LARGEST_POWER)
        scaled = build.fmul(limited, self.constant(1 / np.log(2)))
        whole = self.rounded(scaled)
        high = 0.693359375  # of ln 2, with few digits, so that its product with n is exact
        rest = self.multiply_add(whole, self.constant(-high), limited)
        rest = self.multiply_add(whole, self.constant(high - np.log(2)), rest)
        power = self.constant(1 / 5040)
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            power = self.multiply_add(power, rest, self.constant(1 / factorial))
        exponent = build.shl(build.fptosi(whole, self.integers), ir.Constant(self.integers, [23] * self.lanes))
        power = build.bitcast(build.add(build.bitcast(power, self.integers), exponent), self.vector)
        return build.fdiv(self.constant(1), build.fadd(power, self.constant(1)))

    def clamped(self, value: ir.Value, least: float, most: float) -> ir.Value:
        return self.at_most(self.at_least(value, least), most)

    def _intrinsic(self, name: str, kinds: Sequence[ir.Type], given: ir.Type | None = None) -> ir.Function:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(given or self.vector, kinds), name)


def table(module: ir.Module, name: str, kind: ir.Type, values: np.ndarray) -> ir.Value:
    """A constant array of words."""
    array = ir.ArrayType(kind, len(values))
    constant = ir.GlobalVariable(module, array, name)
    constant.global_constant, constant.linkage, constant.align = True, "internal", 64
    constant.initializer = ir.Constant(array, [kind(value.item()) for value in values])
    return constant


def rounded_up(count: int, lanes: int) -> int:
    """The next multiple of `lanes`."""
    return -(-count // lanes) * lanes
