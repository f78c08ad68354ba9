"""Options of the ``regraft`` command that stand for passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

WEIGHTS = typer.Option("none", "--weight-bits", help="Bits of weights: 8, 4 or none.")
BITS = typer.Option("none", "--kv-bits", help="Bits of the KV cache: 2, 3, 4, 8 or none.")
METHOD = typer.Option("rtn", "--weight-method", help="How to round weights: rtn, or awq by --text.")


def passes(
    kv_bits: str, weight_bits: str = "none", method: str = "rtn", text: Path | None = None
) -> list[Any]:
    """The passes that the options ask for; text: what there is to calibrate with."""
    from regraft import KVQuant, RegraftError, WeightQuant

    found: list[Any] = []
    if weight_bits != "none":
        if weight_bits not in ("8", "4"):
            raise RegraftError(f"--weight-bits {weight_bits}: 8, 4 or none")
        found.append(WeightQuant(bits=int(weight_bits), method=method))
    if method == "awq" and (weight_bits == "none" or text is None):
        raise RegraftError("--weight-method awq needs --weight-bits and --text FILE")
    if kv_bits != "none":
        if not kv_bits.isdigit():
            raise RegraftError(f"--kv-bits {kv_bits}: 2, 3, 4, 8 or none")
        found.append(KVQuant(bits=int(kv_bits)))
    return found


def pruned(macs: float | None, text: Path | None) -> list[Any]:
    from regraft import Prune, RegraftError

    if macs is not None and text is None:
        raise RegraftError("--macs needs --text FILE: what the model is calibrated with")
    return [] if macs is None else [Prune(macs=macs, method="reconstruct")]


def batches(text: Path, tokenizer: Any) -> list[Any]:
    """The file's tokens, of which at most 64 pieces of 512 are used."""
    from regraft import RegraftError

    try:
        ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise RegraftError(f"{text} cannot be read: {error}") from error
    return list(ids[:, : 64 * 512].split(512, 1))
