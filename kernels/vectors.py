"""What kernels for processors are written with: functions of vectors and loops, compiled by LLVM.

All memory is counted in words of 4 bytes: one float32, or two bfloat16.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from llvmlite import ir

FLOAT, INDEX, SHORT, BYTE4, POINTER = ir.FloatType(), ir.IntType(64), ir.IntType(16), ir.IntType(32), ir.PointerType()
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
        self.vector = ir.VectorType(FLOAT, lanes)
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
    def when(self, condition: ir.Value) -> Iterator[None]:
        with self.builder.if_then(condition):
            yield

    def within(self, index: ir.Value, count: int) -> ir.Value:
        """Whether 0 ≤ index < count."""
        return self.builder.icmp_unsigned("<", index, INDEX(count))

    def plus(self, index: ir.Value, number: int) -> ir.Value:
        return self.builder.add(index, INDEX(number))

    def call(self, function: ir.Function, *pointers: ir.Value) -> None:
        self.builder.call(function, pointers)

    # --- variables ---------------------------------------------------------------------------------------------------

    def variable(self, kind: ir.Type | None = None) -> ir.Value:
        """Room for a vector, or another kind of value; LLVM finds a register for it."""
        return self._variables.alloca(kind or self.vector)

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

    def load(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        """A vector; it lies on a multiple of its size."""
        return self.builder.load(self.at(pointer, *offsets), typ=self.vector, align=4 * self.lanes)

    def store(self, value: ir.Value, pointer: ir.Value, *offsets: Offset) -> None:
        self.builder.store(value, self.at(pointer, *offsets), align=4 * self.lanes)

    def store_half(self, value: ir.Value, pointer: ir.Value, *offsets: Offset) -> None:
        """The vector as bfloat16, rounded to nearest."""
        narrow = self.builder.fptrunc(value, ir.VectorType(BFloat16(), self.lanes))
        self.builder.store(narrow, self.at(pointer, *offsets), align=2 * self.lanes)

    def load_index(self, table: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.sext(self.builder.load(self.at(table, index), typ=BYTE4, align=4), INDEX)

    def load_word(self, pointer: ir.Value, *offsets: Offset) -> ir.Value:
        return self.builder.load(self.at(pointer, *offsets), typ=FLOAT, align=4)

    def load_short(self, pointer: ir.Value, index: ir.Value) -> ir.Value:
        """One bfloat16, counted from the pointer in halves of words, as float32."""
        place = self.builder.gep(pointer, [index], source_etype=SHORT)
        bits = self.builder.zext(self.builder.load(place, typ=SHORT, align=2), BYTE4)
        return self.builder.bitcast(self.builder.shl(bits, BYTE4(16)), FLOAT)

    def store_lane(self, value: ir.Value, lane: int, pointer: ir.Value, *offsets: Offset) -> None:
        self.builder.store(self.builder.extract_element(value, BYTE4(lane)), self.at(pointer, *offsets), align=4)

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def zeros(self) -> ir.Constant:
        return ir.Constant(self.vector, [0.0] * self.lanes)

    def splat(self, word: ir.Value) -> ir.Value:
        """The same word in all lanes."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, word, BYTE4(0))
        nowhere = ir.Constant(ir.VectorType(BYTE4, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, nowhere)

    def multiply_add(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """a·b + total, rounded once."""
        return self.builder.call(self._intrinsic(f"llvm.fma.v{self.lanes}f32", [self.vector] * 3), [a, b, total])

    def multiply_add_halves(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """a·b + total, where the words of a and b are pairs of bfloat16: both products are added to a lane."""
        pairs = ir.VectorType(BFloat16(), 2 * self.lanes)
        intrinsic = self._intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", [self.vector, pairs, pairs])
        return self.builder.call(intrinsic, [total, self.builder.bitcast(a, pairs), self.builder.bitcast(b, pairs)])

    def relu(self, value: ir.Value) -> ir.Value:
        positive = self.builder.fcmp_ordered(">", value, self.zeros())
        return self.builder.select(positive, value, self.zeros())

    def sigmoid(self, value: ir.Value) -> ir.Value:
        """1 / (1 + e^-x). e^-x is 2^n · e^r with |r| ≤ ln 2 / 2, and e^r its Taylor series."""
        build, count = self.builder, self.lanes
        constant = lambda number: ir.Constant(self.vector, [float(np.float32(number))] * count)  # noqa: E731
        limited = self._clamped(build.fneg(value), -LARGEST_POWER, LARGEST_POWER)
        scaled = build.fmul(limited, constant(1 / np.log(2)))
        whole = build.call(self._intrinsic(f"llvm.rint.v{count}f32", [self.vector]), [scaled])
        high = 0.693359375  # of ln 2, with few digits, so that its product with n is exact
        rest = self.multiply_add(whole, constant(-high), limited)
        rest = self.multiply_add(whole, constant(high - np.log(2)), rest)
        power = constant(1 / 5040)
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            power = self.multiply_add(power, rest, constant(1 / factorial))
        words = ir.VectorType(BYTE4, count)
        exponent = build.shl(build.fptosi(whole, words), ir.Constant(words, [23] * count))
        power = build.bitcast(build.add(build.bitcast(power, words), exponent), self.vector)
        return build.fdiv(constant(1), build.fadd(power, constant(1)))

    def _clamped(self, value: ir.Value, least: float, most: float) -> ir.Value:
        for order, limit in ((">", least), ("<", most)):
            bound = ir.Constant(self.vector, [limit] * self.lanes)
            value = self.builder.select(self.builder.fcmp_ordered(order, value, bound), value, bound)
        return value

    def _intrinsic(self, name: str, kinds: Sequence[ir.Type]) -> ir.Function:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(self.vector, kinds), name)


def table(module: ir.Module, name: str, kind: ir.Type, values: np.ndarray) -> ir.Value:
    """A constant array of words."""
    array = ir.ArrayType(kind, len(values))
    constant = ir.GlobalVariable(module, array, name)
    constant.global_constant, constant.linkage, constant.align = True, "internal", 64
    constant.initializer = ir.Constant(array, [kind(value.item()) for value in values])
    return constant
