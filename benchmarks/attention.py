"""One layer's attention of one token over a long cache: packed keys and values against torch's.

Keys and values are random, with channels of different size and offset; their codes are those of
the cache. Everything is timed in turn, and each kernel compared with the float64 reference first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regraft.benchmarks.harness import Check, Result, environment, progress, threads
from regraft.kernels.attention import cuda
from regraft.kernels.kvquant import reference
from regraft.kernels.kvquant.codebook import fixed
from regraft.kernels.kvquant.dispatch import kernels_of
from regraft.kernels.kvquant.layout import BLOCK, pack_table
from regraft.kernels.kvquant.reference import Body
from regraft.runtime.quantized import Coding, Store

SHAPES = {"32/8x128": (32, 8, 128), "9/3x64": (9, 3, 64)}
CONTEXTS = (1024, 8192, 32768, 131072)
MODES = {
    "4-bit": (4, 0.0), "4-bit 1 %": (4, 0.01), "3-bit 1 %": (3, 0.01), "2-bit 1 %": (2, 0.01),
}  # fmt: skip
EXACT, SAMPLE, ROUNDS, CACHE_BYTES = 64, 2048, 15, 200e6
ROWS, GQA, DENSE = "torch rows", "torch enable_gqa", "regraft dense"
BACKENDS = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """Attention of one new token to ``context`` cached ones."""

    shape: str
    context: int
    batch: int
    threads: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def run(quick: bool) -> Result:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(_cases(device, quick))
    rows: list[dict[str, Any]] = []
    with progress("attention", len(cases)) as stage, torch.inference_mode():
        for case in cases:
            stage(f"{case.shape} at {case.context}, batch {case.batch}")
            with threads(case.threads):
                rows += _measure(case, 5 if quick else ROUNDS)
    return Result(
        f"regraft bench attention{' --quick' if quick else ''}",
        environment(),
        rows,
        _checks(rows, device),
        chart="vs best torch",
        extra={"rounds": ROUNDS, "exact tokens": EXACT},
    )


def _cases(device: str, quick: bool) -> Iterator[Case]:
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    for shape in SHAPES:
        for context in contexts:
            yield Case(shape, context, 1, 1, device)
            if device == "cuda" and not quick:
                yield Case(shape, context, 16, 1, device)
            if device == "cpu" and context == contexts[-2]:
                yield Case(shape, context, 1, 2, device)


def _measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}
    heads, shared, size = SHAPES[case.shape]
    q = torch.randn(case.batch, heads, 1, size, device=case.device, dtype=case.dtype)
    for name, (bits, share) in MODES.items():
        body, exact = _body(case, bits, share)
        sizes[name] = _bytes(body) + 2 * exact[0].nbytes
        errors[name] = _error(q, body, exact, size)
        copies = [_copy(body) for _ in range(_copies(case, sizes[name]) - 1)]
        calls[name] = [partial(_attend, q, one, exact) for one in (body, *copies)]
        del body, copies
    dense = _dense(case, q)
    sizes |= dict.fromkeys(dense, 2 * shared * size * case.context * case.batch * q.element_size())
    calls |= dense
    times = _times(case.device, calls, rounds)
    torchs = {name: statistics.median(times[name]) for name in times if name.startswith("torch")}
    best, ceiling = min(torchs.values()), _ceiling(case.device)
    rows = []
    for name, found in times.items():
        seconds = statistics.median(found)
        low, _, high = statistics.quantiles(found, n=4)
        rows.append({
            "model": name, "test": f"{case.shape} batch {case.batch} threads {case.threads}",
            "depth": case.context, "ms": seconds * 1e3, "± iqr": (high - low) / seconds,
            "MiB": sizes[name] / 2**20, "GB/s": sizes[name] / seconds / 1e9,
            "of ceiling": sizes[name] / seconds / ceiling,
            "vs best torch": best / seconds,
            "vs enable_gqa": torchs[GQA] / seconds if GQA in torchs else None,
            "error": errors.get(name),
        })  # fmt: skip
    return rows


def _body(case: Case, bits: int, share: float) -> tuple[Body, tuple[Tensor, Tensor]]:
    """A body of the case's context, a coded sample of tokens again and again; exact tokens."""
    _, shared, size = SHAPES[case.shape]
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    k = normal(1, shared, SAMPLE, size) * (1 + normal(1, shared, 1, size).abs())
    k += 2 * normal(1, shared, 1, size)
    low, high = k.quantile(torch.tensor([share / 2, 1 - share / 2], device=k.device), dim=2)
    scale, zero = (x.unsqueeze(2).half() for x in ((high - low) / 2, (high + low) / 2))
    book = fixed("lloyd_max", bits)
    keys, values = (
        Store("key", Coding(bits, book, share, scale, zero)),
        Store("value", Coding(bits, book, share)),
    )
    keys.append(k)
    values.append(normal(1, shared, SAMPLE, size))
    blocks = (case.context - EXACT) // BLOCK
    angle = torch.arange(blocks * BLOCK, device=k.device)[:, None] * 1e4 ** -(
        torch.arange(0, size, 2, device=k.device) / size
    )
    table = pack_table(angle.cos()[None], angle.sin()[None], keys.layout)
    packed = [_tiled(store.packed, blocks, case.batch) for store in (keys, values)]
    exact = normal(2, case.batch, shared, EXACT, size).to(case.dtype)
    return Body(packed[0], packed[1], blocks, 0, table), (exact[0], exact[1])


def _tiled(packed: Any, blocks: int, batch: int) -> Any:
    """The blocks of one sequence, repeated to ``blocks`` of ``batch`` sequences."""

    def tiled(x: Tensor | None, dim: int) -> Tensor | None:
        if x is None:
            return None
        index = torch.arange(blocks, device=x.device) % (SAMPLE // BLOCK)
        return x.index_select(dim, index).repeat(batch, *[1] * (x.dim() - 1))

    parts: dict[str, Any] = {"codes": tiled(packed.codes, 2)}
    parts |= {name: tiled(getattr(packed, name), 1) for name in ("outliers", "offsets")}
    if packed.kind == "value":
        parts |= {name: tiled(getattr(packed, name), 1) for name in ("scale", "zero")}
    return replace(packed, **parts)


def _tensors(body: Body) -> list[Tensor]:
    found = [x for part in (body.key, body.value) for x in vars(part).values()]
    return [x for x in (*found, body.table) if torch.is_tensor(x)]


def _bytes(body: Body) -> int:
    return sum(x.nbytes for x in _tensors(body))


def _copy(body: Body) -> Body:
    """Another body in other memory; the rotations are shared, as layers share them."""

    def copied(part: Any) -> Any:
        return replace(part, **{k: v.clone() for k, v in vars(part).items() if torch.is_tensor(v)})

    return replace(body, key=copied(body.key), value=copied(body.value))


def _copies(case: Case, size: int) -> int:
    """As many as one call after the other finds nothing in a GPU's cache."""
    return 1 if case.device == "cpu" else max(1, round(CACHE_BYTES / size))


def _attend(q: Tensor, body: Body, exact: tuple[Tensor, Tensor], attend: Any = None) -> Tensor:
    batch, heads = q.shape[:2]
    mask = torch.zeros(batch, 1, exact[0].shape[2], device=q.device)
    first = torch.zeros(batch, 1, dtype=torch.int32, device=q.device)
    sinks = torch.full((heads,), float("-inf"), device=q.device)
    scale = q.shape[3] ** -0.5
    return (attend or kernels_of(q.device.type).attend)(q, body, *exact, mask, first, sinks, scale)


def _error(q: Tensor, body: Body, exact: tuple[Tensor, Tensor], size: int) -> float:
    """Relative error of the kernel over the first 1024 tokens of one sequence."""
    short = replace(body, blocks=min(body.blocks, 32))
    q = q / q.float().std() * 0.3
    out = _attend(q, short, exact).double()[:1]
    part = [
        replace(x, **{
            name: getattr(x, name)[:1] for name in ("codes", "scale", "zero", "outliers", "offsets")
            if getattr(x, name) is not None
        })
        for x in (body.key, body.value)
    ]  # fmt: skip
    one = replace(short, key=part[0], value=part[1])
    exact = exact[0][:1], exact[1][:1]
    want = _attend(q[:1], one, exact, lambda *a: reference.attend(*a, dtype=torch.float64)).double()
    return float((out - want).norm() / want.norm())


def _dense(case: Case, q: Tensor) -> dict[str, list[Callable[[], Tensor]]]:
    heads, shared, size = SHAPES[case.shape]
    bytes_ = 2 * case.batch * shared * case.context * size * q.element_size()
    caches = [
        torch.randn(2, case.batch, shared, case.context, size, device=q.device, dtype=q.dtype)
        for _ in range(_copies(case, bytes_))
    ]
    grouped = q.view(case.batch, shared, heads // shared, size)

    def gqa(cache: Tensor, backend: SDPBackend | None = None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)

    def rows(cache: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(grouped, cache[0], cache[1])

    makers: dict[str, Callable[[Tensor], Tensor]] = {GQA: gqa, ROWS: rows}
    if case.device == "cuda":
        makers[DENSE] = lambda cache: cuda.attend(q, cache[0], cache[1], case.context)
        makers |= {name: partial(gqa, backend=backend) for name, backend in BACKENDS.items()}
    return {name: [partial(make, cache) for cache in caches] for name, make in makers.items()}


def _times(
    device: str, calls: dict[str, list[Callable[[], Tensor]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds a call, each contender's copies one after the other, the contenders in turn."""
    runs: dict[str, Callable[[], float]] = {}
    for name, some in calls.items():
        try:
            runs[name] = _on_cuda(some) if device == "cuda" else _on_cpu(some)
            runs[name]()
        except RuntimeError:
            runs.pop(name, None)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, one in runs.items():
            found[name].append(one())
    return found


def _on_cpu(calls: list[Callable[[], Tensor]]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return timed


def _on_cuda(calls: list[Callable[[], Tensor]]) -> Callable[[], float]:
    """All calls as one recorded graph, so that the host's time does not count."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(kept)

    return timed


def _ceiling(device: str) -> float:
    """Bytes a second that memory gives: a sum on the CPU, a copy on CUDA."""
    x = torch.ones(2**27, device=device)
    y = torch.empty_like(x) if device == "cuda" else None
    calls: Any = [x.sum] if y is None else [lambda: y.copy_(x)]
    times = _times(device, {"": calls}, 5)[""]
    return x.nbytes * (1 if y is None else 2) / min(times)


def _checks(rows: list[dict[str, Any]], device: str) -> list[Check]:
    found = {(row["model"], row["test"], row["depth"]): row for row in rows}

    def ratio(column: str, name: str, batch: int, context: int) -> float | None:
        row = found.get((name, f"32/8x128 batch {batch} threads 1", context))
        return row[column] if row else None

    if device == "cuda":
        return [
            Check.at_least(f"4-bit 1 % / best SDPA, {context // 1024}K batch {batch}",
                           ratio("vs best torch", "4-bit 1 %", batch, context), bar)
            for context, batch, bar in ((131072, 1, 2.5), (32768, 16, 2.5), (32768, 1, 2.0))
        ]  # fmt: skip
    bars = [("4-bit 1 %", "vs best torch", 2.8), ("4-bit 1 %", "vs enable_gqa", 9.0),
            ("4-bit", "vs best torch", 3.5), ("4-bit", "vs enable_gqa", 10.0)]  # fmt: skip
    checks = [
        Check.at_least(f"{name} {column}, 32K, 1 thread", ratio(column, name, 1, 32768), bar)
        for name, column, bar in bars
    ]
    one, two = (
        found.get(("4-bit 1 %", f"32/8x128 batch 1 threads {n}", 32768), {}).get("ms")
        for n in (1, 2)
    )
    gain = one / two if one and two else None
    return [*checks, Check.at_least("two threads / one, 4-bit 1 %, 32K", gain, 1.7)]
