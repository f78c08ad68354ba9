"""Vector code for TVM's IR builder: one class a kind of processor, all methods on expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

Expr = Any


def integer(x: int | Expr) -> Expr:
    """Indices and loop bounds are 64-bit: a cache may hold more than 2**31 bytes."""
    return T.int64(x) if isinstance(x, int) else x


def tensor(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """An argument, contiguous and aligned to nothing."""
    return T.match_buffer(T.arg(name, T.handle()), list(map(integer, shape)), dtype, align=1)


def strided(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """An argument whose last dimension alone is contiguous; bfloat16 comes as its bits."""
    dtype = {"bfloat16": "uint16"}.get(dtype, dtype)
    strides = [*(T.int64() for _ in shape[1:]), T.int64(1)]
    handle, dims = T.arg(name, T.handle()), list(map(integer, shape))
    return T.match_buffer(handle, dims, dtype, strides=strides, align=1)


def loop(stop: int | Expr, start: int | Expr = 0) -> Any:
    return T.serial(integer(start), integer(stop))


def parallel(stop: int | Expr) -> Any:
    return T.parallel(integer(0), integer(stop))


def local(shape: Sequence[int], dtype: str = "float32") -> Any:
    """A buffer on the stack; one vector alone becomes a register."""
    kept = {"disable_lower_builtin": True}
    return T.alloc_buffer(tuple(shape), dtype, scope="local", annotations=kept)


def load(buffer: Any, *index: Expr, lanes: int) -> Expr:
    dtype = f"{buffer.dtype}x{lanes}" if lanes > 1 else buffer.dtype
    return T.Bind(buffer.vload(list(map(integer, index)), dtype))


def prefetch(buffer: Any, *index: Expr) -> None:
    """Ask for the cache line of an element that will be read; it need not exist."""
    address = T.address_of(buffer[tuple(map(integer, index))])
    hints = (T.int32(0), T.int32(3), T.int32(1))
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, *hints))


def load_float(buffer: Any, *index: Expr, lanes: int) -> Expr:
    """A float32 vector of an argument of a model's dtype; uint16 is bfloat16."""
    x = load(buffer, *index, lanes=lanes)
    if buffer.dtype != "uint16":
        return T.Bind(T.Cast(f"float32x{lanes}", x))
    wide = T.shift_left(T.Cast(f"uint32x{lanes}", x), fill(16, "uint32", lanes))
    return T.Bind(T.reinterpret(f"float32x{lanes}", wide))


def store(buffer: Any, value: Expr, *index: Expr, lanes: int) -> None:
    *outer, last = map(integer, index)
    T.buffer_store(buffer, value, [*outer, T.ramp(last, integer(1), lanes)])


def gather(buffer: Any, index: Sequence[Expr], last: Expr, lanes: int) -> Expr:
    """Elements at a vector of last indices (int32)."""
    places, found = local((lanes,), "int32"), local((lanes,), buffer.dtype)
    store(places, last, 0, lanes=lanes)
    for lane in range(lanes):
        put(found, get(buffer, *index, T.Cast("int64", get(places, lane))), lane)
    return load(found, 0, lanes=lanes)


def put(buffer: Any, value: Expr, *index: Expr) -> None:
    T.buffer_store(buffer, value, list(map(integer, index)))


def get(buffer: Any, *index: Expr) -> Expr:
    return buffer[tuple(map(integer, index))]


def opaque(value: Expr, dtype: str = "int64") -> Expr:
    """A scalar that TVM's simplifier does not look into: it takes minutes over nested divisions."""
    kept = local((1,), dtype)
    put(kept, value, 0)
    return T.Bind(get(kept, 0))


def divided(a: Expr, b: Expr | int) -> tuple[Expr, Expr]:
    """Quotient and remainder of numbers >= 0."""
    b = integer(b)
    return opaque(T.truncdiv(a, b)), opaque(T.truncmod(a, b))


def fill(value: float | int | Expr, dtype: str, lanes: int) -> Expr:
    scalar = getattr(T, dtype)(value) if isinstance(value, float | int) else value
    return T.broadcast(scalar, lanes)


def shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    return T.Bind(T.Shuffle(list(vectors), [T.int32(i) for i in indices]))


def call(dtype: str, name: str, *args: Expr) -> Expr:
    return T.Bind(T.call_llvm_pure_intrin(dtype, name, *args))


def unfused(product: Expr, lanes: int = 1) -> Expr:
    """A float32 product that is rounded before it is added to anything."""
    dtype, name = (f"float32x{lanes}", f"v{lanes}f32") if lanes > 1 else ("float32", "f32")
    return call(dtype, f"llvm.arithmetic.fence.{name}", product)


def suffix(dtype: str) -> str:
    """float32x8 -> v8f32, LLVM's name of it."""
    kind, lanes = dtype.split("x")
    return f"v{lanes}{kind[0]}{kind.lstrip('flointu')}"


def repeat(vector: Expr, lanes: int, times: int) -> Expr:
    """A vector [lanes], several times in a row."""
    return vector if times == 1 else shuffle([vector] * times, [*range(lanes)] * times)


def turn(pair: Expr, side: int, token: Expr) -> Expr:
    """Where a block's rotations hold the cosine (side 0) or sine (1) of a pair and token."""
    return (pair * 2 + side) * 32 + token


class Floats:
    """Float32 vectors of one length."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.dtype, self.ints = f"float32x{lanes}", f"int32x{lanes}"

    def of(self, value: float | Expr) -> Expr:
        return fill(value, "float32", self.lanes)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        return call(self.dtype, f"llvm.fma.{suffix(self.dtype)}", a, b, c)

    def round(self, x: Expr) -> Expr:
        return call(self.dtype, f"llvm.nearbyint.{suffix(self.dtype)}", x)

    def max(self, a: Expr, b: Expr) -> Expr:
        return T.Bind(T.max(a, b))

    def abs(self, x: Expr) -> Expr:
        return call(self.dtype, f"llvm.fabs.{suffix(self.dtype)}", x)

    def sqrt(self, x: Expr) -> Expr:
        return call(self.dtype, f"llvm.sqrt.{suffix(self.dtype)}", x)

    def total(self, x: Expr) -> Expr:
        """The sum of all lanes, by halves."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            x = T.Bind(shuffle([x], range(lanes)) + shuffle([x], range(lanes, 2 * lanes)))
        return x

    def largest(self, x: Expr) -> Expr:
        return call("float32", f"llvm.vector.reduce.fmax.{suffix(self.dtype)}", x)

    def exp(self, x: Expr) -> Expr:
        """exp of x <= 0, relative error 2e-7; 0 below -87."""
        power = T.Bind(T.max(x, self.of(-88.0)) * self.of(1.4426950408889634))
        whole = self.round(power)
        part = T.Bind(power - whole)
        p = self.of(1.5353362e-4)
        for c in (1.3398874e-3, 9.6184373e-3, 5.5503324e-2, 2.4022648e-1, 6.9314720e-1, 1.0):
            p = self.fma(p, part, self.of(c))
        exponent = T.shift_left(T.Cast(self.ints, whole), fill(23, "int32", self.lanes))
        result = T.reinterpret(self.dtype, T.reinterpret(self.ints, p) + exponent)
        return T.Bind(T.Select(x < self.of(-87.0), self.of(0.0), result))


class Registers:
    """Vectors that are kept in registers through a loop."""

    def __init__(self, count: int, dtype: str, lanes: int) -> None:
        self.lanes, self.dtype = lanes, dtype
        self.buffers = [local((lanes,), dtype) for _ in range(count)]
        for i in range(count):
            self[i] = fill(0, dtype, lanes)

    def __getitem__(self, i: int) -> Expr:
        return self.buffers[i].vload([T.int64(0)], f"{self.dtype}x{self.lanes}")

    def __setitem__(self, i: int, value: Expr) -> None:
        store(self.buffers[i], value, 0, lanes=self.lanes)


class X86:
    """Integer instructions on vectors of 256 or 512 bits (with VNNI)."""

    def __init__(self, level: str) -> None:
        self.bits = {"avx2": 256, "avx512": 512}[level]
        self.wide = self.bits == 512
        self.lanes = self.bits // 32

    def _type(self, width: int) -> str:
        return f"int{width}x{self.bits // width}"

    def _call(self, name: str, width: int, *args: Expr) -> Expr:
        prefix = "llvm.x86.avx512." if self.wide else "llvm.x86.avx2."
        return call(self._type(width), prefix + name + (".512" if self.wide else ""), *args)

    def multiply_high(self, a: Expr, b: Expr) -> Expr:
        """(a * b + 2**14) >> 15 of int16."""
        return self._call("pmul.hr.sw", 16, a, b)

    def dot_pairs(self, total: Expr, a: Expr, b: Expr) -> Expr:
        """int32 total + a0 * b0 + a1 * b1 of int16 pairs; b comes as int32."""
        b = T.reinterpret(self._type(16), b)
        if self.wide:
            return self._call("vpdpwssd", 32, total, a, b)
        return T.Bind(total + self._call("pmadd.wd", 32, a, b))

    def look_up_bytes(self, table: Expr, index: Expr) -> Expr:
        """Bytes of a table [16], the same in every 128 bits, by bytes below 16."""
        a, b = (T.reinterpret(self._type(8), x) for x in (table, index))
        return self._call("pshuf.b", 8, a, b)

    def look_up_words(self, table: Expr, index: Expr) -> Expr:
        """Words of a table [32] by the low five bits of words; 512 bits only."""
        return self._call("permvar.hi", 16, table, index)

    def interleave(self, a: Expr, b: Expr, width: int) -> tuple[Expr, Expr]:
        """The low and the high halves of each 128 bits, elements of a and b in turn."""
        count, lane = self.bits // width, 128 // width
        halves = [
            [i + side for start in range(half * lane // 2, count, lane)
             for i in range(start, start + lane // 2) for side in (0, count)]
            for half in (0, 1)
        ]  # fmt: skip
        return shuffle([a, b], halves[0]), shuffle([a, b], halves[1])

    def in_order(self, low: Expr, high: Expr) -> tuple[Expr, Expr]:
        """Undo what interleave does to the order of 32-bit elements."""
        lanes = self.bits // 128
        order = [
            i + 4 * k + side for k in range(lanes) for side in (0, 4 * lanes) for i in range(4)
        ]
        return shuffle([low, high], order[: 4 * lanes]), shuffle([low, high], order[4 * lanes :])

    def shift_right(self, x: Expr, count: int, width: int) -> Expr:
        if count == 0:
            return x
        dtype = "u" + self._type(width)
        amount = fill(count, f"uint{width}", self.bits // width)
        return T.Bind(T.reinterpret(self._type(32), T.shift_right(T.reinterpret(dtype, x), amount)))

    def mask(self, x: Expr, value: int) -> Expr:
        return T.Bind(T.bitwise_and(x, fill(value, "int32", self.lanes)))
