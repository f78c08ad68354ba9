"""MiniLM classifiers of headlines and of Wikipedia leads, fine-tuned once and kept in the cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.assets import minilm, sarcasm, topics
from regraft.program.folders import cache_dir, folder_written_whole

SEED, BATCH, RATE = 0, 32, 1e-4
VERSION = 1
"""Part of the name of kept classifiers: to be raised when the recipe below changes."""


@dataclass(frozen=True)
class Task:
    """A labelled set, its split fixed by SEED: the first ``held_out`` shuffled rows are for tests.

    length: the most tokens of a text.
    """

    name: str
    held_out: int
    length: int
    epochs: int

    def rows(self) -> list[tuple[str, int]]:
        """(text, label), shuffled."""
        found: list[tuple[str, Any]] = list(sarcasm() if self.name == "sarcasm" else topics())
        known = sorted({label for _, label in found})
        rows = [(text, known.index(label)) for text, label in found]
        random.Random(SEED).shuffle(rows)
        return rows

    def split(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Rows to train and calibrate on, and rows to test on."""
        rows = self.rows()
        return rows[self.held_out :], rows[: self.held_out]


SARCASM = Task("sarcasm", 5000, 64, 2)
TOPICS = Task("topics", 3000, 128, 2)


def batches(
    tokenizer: Any, rows: Sequence[tuple[str, int]], length: int, size: int = BATCH
) -> list[dict[str, Tensor]]:
    """Rows of about equal length together, padded to the longest: ids, mask, types, labels."""
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    found = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        labels = torch.tensor([rows[i][1] for i in chosen])
        types = torch.zeros_like(batch["input_ids"])
        found.append({**batch, "token_type_ids": types, "labels": labels})
    return found


def classifier(task: Task) -> tuple[Any, Any]:
    """The fine-tuned model and its tokenizer; trained on the first call, minutes on two cores."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = cache_dir() / f"minilm-{task.name}-{VERSION}"
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
        model = _trained(task, tokenizer)
        with folder_written_whole(folder) as made:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _trained(task: Task, tokenizer: Any) -> Any:
    """AdamW, linear warm-up over a tenth and decay, gradients clipped at 1."""
    from transformers import AutoModelForSequenceClassification

    from regraft.benchmarks.harness import progress

    rows, _ = task.split()
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=1 + max(label for _, label in rows), local_files_only=True
    )
    steps = task.epochs * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * step / steps, (steps - step) / (0.9 * steps))
    )
    model.train()
    with progress(f"fine-tuning MiniLM on {task.name}", steps) as stage:
        for batch in _epochs(tokenizer, rows, task):
            labels = batch.pop("labels")
            loss = F.cross_entropy(model(**batch).logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            stage(f"loss {loss.item():.2f}")
    return model.eval()


def _epochs(
    tokenizer: Any, rows: Sequence[tuple[str, int]], task: Task
) -> Iterator[dict[str, Tensor]]:
    """Each epoch's batches in an order of its own; within 50 batches' rows, of equal length."""
    draw = random.Random(SEED)
    for _ in range(task.epochs):
        rows = draw.sample(rows, len(rows))
        for start in range(0, len(rows), 50 * BATCH):
            found = batches(tokenizer, rows[start : start + 50 * BATCH], task.length)
            yield from draw.sample(found, len(found))


@torch.no_grad()
def accuracy(run: Any, tests: Sequence[dict[str, Tensor]]) -> Tensor:
    """Whether the class of the largest of run(ids, mask, types) is right, bool [rows]."""
    right = []
    for batch in tests:
        logits = run(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        right.append(logits.argmax(-1) == batch["labels"])
    return torch.cat(right)
