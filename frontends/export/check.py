"""Whether onnxruntime computes with an export what the compiled program computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from regraft.kernels.linear.packed import unrounded
from regraft.program import RegraftError

LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
ROUNDED = 0.5
"""The limit for packed weights as onnxruntime runs them, activations rounded to 8 bits."""


def check(path: Path, compiled: Any, together: bool = True) -> dict[str, float]:
    """The largest difference over the largest logit, by what was run: a prompt, tokens one by one
    and several at once behind it, and a left-padded batch, unless not together with tokens one by
    one alone; a prompt in pieces where the program takes no longer ones. RegraftError where it is
    too large. Packed weights meet unrounded activations in these, and rounded ones, as they do by
    default, in one more."""
    vocab = compiled.config.get_text_config(decoder=True).vocab_size
    program = compiled.program
    longest = program.prefill.tokens[1] if program.prefill is not None else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(vocab - 1, 4), (2, 16 + (longest or 0)), generator=generator)
    n = min([15, *compiled._served()])
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[1, :5] = 0
    cases = [
        ("prefill", ones[:1], (n,)),
        ("decode", ones[:1], (n - 2, 1, 1)),
        ("verify", ones[:1], (n - 9, 9) if program.cache.states else (n - 6, 3, 3)),
        ("padded batch", padded, (n - 4, 1, 3 if together else 1)),
    ]
    if longest is not None:
        cases.append(("pieces", padded, (longest + 7, 9)))
    limit = LIMITS.get(compiled.dtype, 1e-3)
    with _exact(path) as (exact, packed), unrounded():
        errors = _checked(exact, compiled, ids, cases, limit)
    if packed:
        given = [("8-bit activations", padded, (n - 4, 1))]
        errors |= _checked(path, compiled, ids, given, ROUNDED, exact=False)
    return errors


@contextmanager
def _exact(path: Path) -> Iterator[tuple[Path, bool]]:
    """The model beside it, without rounded activations, and whether it has packed weights."""
    model = ir.load(path)
    own = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    bodies = [node for function in model.functions.values() for node in function]
    packed = any(n.op_type == "DequantizeLinear" for n in (*model.graph.all_nodes(), *bodies))
    if not own:
        yield path, packed
        return
    for node in own:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    exact = path.with_name("exact.onnx")
    ir.save(model, exact)
    try:
        yield exact, True
    finally:
        exact.unlink()


def _checked(
    path: Path, compiled: Any, ids: Tensor, cases: list[Any], limit: float, exact: bool = True
) -> dict[str, float]:
    from regraft.runtime.onnx_lm import OnnxCausalLM

    settings = compiled.config, compiled.generation_config
    exported = OnnxCausalLM.open(path, *settings, exact=exact)
    errors = {}
    with torch.inference_mode():
        for name, mask, sizes in cases:
            errors[name] = max(_errors(exported, compiled, ids[: len(mask)], mask, sizes))
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= limit:
        raise RegraftError(
            f"the export differs from the compiled program: {worst} by {errors[worst]:.1e} of the "
            f"largest logit, {limit:.0e} allowed; nothing was written"
        )
    return errors


def _errors(one: Any, other: Any, ids: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> list[float]:
    start, found = 0, []
    caches = one.new_cache(), other.new_cache()
    for size in sizes:
        part = slice(start, start + size)
        start += size
        got, want = (
            model(ids[:, part], mask[:, :start], past_key_values=cache).logits.float()
            for model, cache in zip((one, other), caches, strict=True)
        )
        seen = mask[:, part].bool()
        error = (got - want)[seen].abs().max() / want[seen].abs().max()
        found.append(float(error) if error == error else float("inf"))
    return found
