"""Building blocks of the kernels for CUDA: TIR with small device functions for what TIR lacks.

A warp works on tiles of the tensor cores' m16n8k16 product. Its lane is 4 * g + q: g is a row of
the first operand and a column of the second, q says which channels or tokens the lane holds.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.tirx.script.builder import ir as T

Expr = Any
WORD, FLOAT = "unsigned", "float"
TYPES = {WORD: "uint32", FLOAT: "float32", "int": "int32", "void": "void"}
BITS = {"float16": "f16", "bfloat16": "bf16"}

_MMA = """asm("mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));"""
_MMA_ARGUMENTS = (
    "float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1"
)


def _asked(kind: str, words: int) -> str:
    """The body of a load that is left out unless valid."""
    if not words:
        return (
            'asm("{.reg .pred p; .reg .u16 h; setp.ne.s32 p, %2, 0; mov.u16 h, 0; '
            f"@p ld.global.{kind}.u16 h, [%1]; "
            'cvt.u32.u16 %0, h;}" : "=r"(d[0]) : "l"(s), "r"(valid));'
        )
    places = [f"%{i}" for i in range(words)]
    vector = f".v{words}" if words > 1 else ""
    target = f"{{{', '.join(places)}}}" if words > 1 else places[0]
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(words))
    return (
        f'asm("{{.reg .pred p; setp.ne.s32 p, %{words + 1}, 0; '
        f'@p ld.global.{kind}{vector}.u32 {target}, [%{words}];}}" '
        f': {outputs} : "l"(s), "r"(valid));'
    )


def _given(words: int) -> str:
    """The body of a load of what an earlier kernel may have written."""
    target = ", ".join(f"%{i}" for i in range(words))
    outputs = ", ".join(f'"=r"(d[{i}])' for i in range(words))
    return f'asm volatile("ld.global.v{words}.u32 {{{target}}}, [%{words}];" : {outputs} : "l"(s));'


FUNCTIONS: dict[str, tuple[str, str, str]] = {
    # name: (result, parameters, body)
    "load16": ("void", "void* d, const void* s", "*(uint4*)d = __ldcs((const uint4*)s);"),
    "load8": ("void", "void* d, const void* s", "*(uint2*)d = __ldcs((const uint2*)s);"),
    "load4": (WORD, "const void* s", "return __ldcs((const unsigned*)s);"),
    "load2": (WORD, "const void* s", "return __ldcs((const unsigned short*)s);"),
    "copy16": ("void", "void* d, const void* s", "*(uint4*)d = *(const uint4*)s;"),
    "copy8": ("void", "void* d, const void* s", "*(uint2*)d = *(const uint2*)s;"),
    "read4": (WORD, "const void* s", "return *(const unsigned*)s;"),
    "write4": ("void", "void* d, unsigned x", "*(unsigned*)d = x;"),
    "write8": (
        "void",
        "void* d, unsigned x, unsigned y",
        "*(uint2*)d = make_uint2(x, y);",
    ),
    "write16": (
        "void",
        "void* d, unsigned x, unsigned y, unsigned z, unsigned w",
        "*(uint4*)d = make_uint4(x, y, z, w);",
    ),
    **{
        f"{name}{size}": ("void", "unsigned* d, const void* s, int valid", _asked(kind, size // 4))
        for name, kind in (("stream", "nc.L1::no_allocate"), ("held", "nc"))
        for size in (16, 8, 4, 2)
    },
    **{
        f"given{size}": ("void", "unsigned* d, const void* s", _given(size // 4))
        for size in (16, 8)
    },
    "prefetch": (
        "void",
        "const void* s, int valid",
        'asm volatile("{.reg .pred p; setp.ne.s32 p, %1, 0; @p prefetch.global.L2 [%0];}" '
        ':: "l"(s), "r"(valid));',
    ),
    "begin_next": ("void", "", 'asm volatile("griddepcontrol.launch_dependents;");'),
    "end_previous": ("void", "", 'asm volatile("griddepcontrol.wait;" ::: "memory");'),
    "and_or": (
        WORD,
        "unsigned a, unsigned b, unsigned c",
        'unsigned d; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); '
        "return d;",
    ),
    "times16_bf16": (
        WORD,
        "unsigned a",
        'unsigned d; asm("fma.rn.bf16x2 %0, %1, %2, %3;" '
        ': "=r"(d) : "r"(a), "r"(0x41804180), "r"(0x80008000)); return d;',
    ),
    "permute": (
        WORD,
        "unsigned a, unsigned b, unsigned s",
        'unsigned d; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d;',
    ),
    "fma2": (
        WORD,
        "unsigned a, unsigned b, unsigned c",
        'unsigned d; asm("fma.rn.f16x2 %0, %1, %2, %3;" '
        ': "=r"(d) : "r"(a), "r"(b), "r"(c)); return d;',
    ),
    "mul2": (
        WORD,
        "unsigned a, unsigned b",
        'unsigned d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;',
    ),
    "sub2": (
        WORD,
        "unsigned a, unsigned b",
        'unsigned d; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;',
    ),
    "fnma2": (
        WORD,
        "unsigned a, unsigned b, unsigned c",
        'unsigned d; asm("{.reg .b32 t; neg.f16x2 t, %1; fma.rn.f16x2 %0, t, %2, %3;}" '
        ': "=r"(d) : "r"(a), "r"(b), "r"(c)); return d;',
    ),
    "mma_f16": ("void", _MMA_ARGUMENTS, _MMA.format("f16")),
    "mma_bf16": ("void", _MMA_ARGUMENTS, _MMA.format("bf16")),
    "add_product": (
        FLOAT,
        "float x, float y, float z",
        'float d; asm("{.reg .f32 t; mul.rn.f32 t, %2, %3; add.rn.f32 %0, %1, t;}" '
        ': "=f"(d) : "f"(x), "f"(y), "f"(z)); return d;',
    ),
    "divide": (
        FLOAT,
        "float x, float y",
        'float d; asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(x), "f"(y)); return d;',
    ),
    "transpose": (
        WORD,
        "unsigned a",
        'unsigned d; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" '
        ': "=r"(d) : "r"(a)); return d;',
    ),
    "pack_f16": (
        WORD,
        "float x, float y",
        'unsigned d; asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(d) : "f"(x), "f"(y)); return d;',
    ),
    "pack_bf16": (
        WORD,
        "float x, float y",
        'unsigned d; asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(d) : "f"(x), "f"(y)); return d;',
    ),
    "float_f16": (
        FLOAT,
        "unsigned a",
        'float d; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" '
        ': "=f"(d) : "r"(a)); return d;',
    ),
    "float_upper_f16": (
        FLOAT,
        "unsigned a",
        'float d; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" '
        ': "=f"(d) : "r"(a)); return d;',
    ),
    "float_bf16": (FLOAT, "unsigned a", "return __uint_as_float(a << 16);"),
    "exp2": (
        FLOAT,
        "float x",
        'float d; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x)); return d;',
    ),
    "log2": (FLOAT, "float x", "return __log2f(x);"),
    "tanh": (
        FLOAT,
        "float x",
        'float d; asm("tanh.approx.f32 %0, %1;" : "=f"(d) : "f"(x)); return d;',
    ),
    "as_float": (FLOAT, "unsigned x", "return __uint_as_float(x);"),
    "as_word": (WORD, "float x", "return __float_as_uint(x);"),
    "ordered": (
        WORD,
        "float x",
        "unsigned u = __float_as_uint(x); return u >> 31 ? ~u : u | 1u << 31;",
    ),
    "unordered": (
        FLOAT,
        "unsigned u",
        "return __uint_as_float(u >> 31 ? u & ~(1u << 31) : ~u);",
    ),
    "ones": ("int", "unsigned x", "return __popc(x);"),
    "warp_total": ("int", "int x", "return __reduce_add_sync(~0u, x);"),
    "any": ("int", "int x", "return __any_sync(~0u, x);"),
    "ballot": (WORD, "int x", "return __ballot_sync(~0u, x);"),
    "leading_zeros": (
        "int",
        "unsigned x",
        'int d; asm("bfind.shiftamt.u32 %0, %1;" : "=r"(d) : "r"(x)); return d;',
    ),
    "across": (FLOAT, "float x, int mask", "return __shfl_xor_sync(~0u, x, mask);"),
    "from_lane": (FLOAT, "float x, int lane", "return __shfl_sync(~0u, x, lane);"),
    "int_from_lane": ("int", "int x, int lane", "return __shfl_sync(~0u, x, lane);"),
    "shared_address": (WORD, "const void* s", "return (unsigned)__cvta_generic_to_shared(s);"),
    "look_up": (
        WORD,
        "unsigned s",
        'unsigned d; asm("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(s)); return d;',
    ),
    "look_up_second": (
        WORD,
        "unsigned s",
        'unsigned d; asm("ld.shared.u32 %0, [%1+128];" : "=r"(d) : "r"(s)); return d;',
    ),
    "warp_max_word": (WORD, "unsigned x", "return __reduce_max_sync(~0u, x);"),
    "sync_threads": (
        "void",
        "int name, int count",
        'asm volatile("bar.sync %0, %1;" :: "r"(name), "r"(count) : "memory");',
    ),
    "sync_warp": ("void", "", "__syncwarp();"),
}


def call(name: str, *arguments: Expr) -> Expr:
    """Emit a call of one of FUNCTIONS; its result is bound to a variable."""
    result, parameters, body = FUNCTIONS[name]
    source = f"__device__ __forceinline__ {result} rg_{name}({parameters}) {{ {body} }}\n"
    value = cuda_func_call(f"rg_{name}", *arguments, source_code=source, return_type=TYPES[result])
    if result == "void":
        return T.evaluate(value)
    return T.Bind(value)


def address(buffer: Any, index: Expr) -> Expr:
    return T.address_of(buffer[index])


def registers(count: int, dtype: str = "float32") -> Any:
    """An array of this thread, indexed by constants alone."""
    return T.alloc_buffer((max(count, 1),), dtype, scope="local")


def store(buffer: Any, index: Expr, value: Expr) -> None:
    T.buffer_store(buffer, value, [index])


def let(value: Expr) -> Expr:
    """Bind a number where it stands: TVM would inline it, and copies what it finds in loops."""
    kinds = {"int32": "int", "uint32": WORD, "float32": FLOAT, "int64": "long long"}
    kind = kinds.get(str(value.ty))
    if kind is None:
        return T.Bind(value)
    name = f"rg_same_{kind.replace(' ', '_')}"
    source = f"__device__ __forceinline__ {kind} {name}({kind} x) {{ return x; }}\n"
    return T.Bind(cuda_func_call(name, value, source_code=source, return_type=str(value.ty)))


def wide(value: Expr) -> Expr:
    return T.cast(value, "int64")


def wide_row(row: Expr) -> Expr:
    """The number of a row, not negative: one instruction multiplies it by another to 64 bits."""
    return wide(T.cast(row, "uint32"))


def vector(name: str, dtype: str) -> Any:
    """A parameter: a flat tensor of any length, aligned as its elements are."""
    return T.match_buffer(T.arg(name, T.handle()), (T.int64(),), dtype, align=1)


def load_words(words: Any, place: int, buffer: Any, index: Expr, size: int) -> None:
    """Load size bytes, a multiple of 2, from 16 at a time down; buffer is of bytes."""
    if size == 2:
        piece = call("load2", address(buffer, index))
        shifted = piece if place % 4 == 0 else words[place // 4] | piece << T.uint32(16)
        store(words, place // 4, shifted)
    elif size == 4:
        store(words, place // 4, call("load4", address(buffer, index)))
    else:
        call(f"load{size}", address(words, place // 4), address(buffer, index))


def warp_max(value: Expr, masks: tuple[int, ...]) -> Expr:
    for mask in masks:
        value = T.max(value, call("across", value, mask))
    return value


def warp_sum(value: Expr, masks: tuple[int, ...]) -> Expr:
    for mask in masks:
        value = value + call("across", value, mask)
    return value
