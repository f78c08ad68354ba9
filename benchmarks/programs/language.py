"""Transformers: training with metrics in numpy, state kept on modules, sampling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from regraft.benchmarks.programs.base import Encoder, Program


class BertCls(Program):
    """A confusion matrix in numpy and a line of JSON every step."""

    def build(self) -> None:
        self.model = self.forward = Encoder(200, 5, 16)
        self.optimizer = self.sgd(self.model)
        self.batches = [(torch.randint(200, (8, 16)), torch.randint(5, (8,))) for _ in range(10)]
        self.confusion = np.zeros((5, 5), int)

    def step(self) -> Any:
        ids, labels = self.batches[self.turn % 10]
        logits = self.forward(ids).mean(1)
        loss = F.cross_entropy(logits, labels)
        self.learn(loss)
        found, wanted = logits.detach().argmax(-1).cpu().numpy(), labels.cpu().numpy()
        np.add.at(self.confusion, (wanted, found), 1)
        self.log.append(json.dumps({"step": self.turn, "loss": loss.item()}))
        self.turn += 1
        return self.log[-1], int(self.confusion.trace())


class BertQA(Program):
    """Spans of answers; their F1 in Python every few steps."""

    def build(self) -> None:
        self.model = self.forward = Encoder(200, 2, 24)
        self.optimizer = self.sgd(self.model)
        self.ids = torch.randint(200, (8, 8, 24))
        self.starts = torch.randint(12, (8, 8))
        self.ends = self.starts + torch.randint(12, (8, 8))

    def step(self) -> Any:
        which = self.turn % 8
        start, end = self.forward(self.ids[which]).unbind(-1)
        loss = F.cross_entropy(start, self.starts[which]) + F.cross_entropy(end, self.ends[which])
        self.learn(loss)
        if self.turn % 5 == 0:
            found = zip(start.argmax(-1).tolist(), end.argmax(-1).tolist(), strict=True)
            truth = zip(self.starts[which].tolist(), self.ends[which].tolist(), strict=True)
            self.log.append(sum(map(self._f1, found, truth)) / 8)
        self.turn += 1
        return loss.item(), self.log[-1]

    @staticmethod
    def _f1(found: tuple[int, int], truth: tuple[int, int]) -> float:
        left, right = (set(range(a, b + 1)) for a, b in (found, truth))
        shared = len(left & right)
        return 2 * shared / (len(left) + len(right)) if shared else 0.0


class MusicTransformer(Program):
    """Relative attention whose maps stay on the modules and are summarised as training goes."""

    def build(self) -> None:
        self.model = self.forward = Encoder(90, 90, 24, causal=True, relative=True)
        self.optimizer = self.sgd(self.model)
        self.notes = torch.randint(90, (6, 4, 25))

    def step(self) -> Any:
        notes = self.notes[self.turn % 6]
        logits = self.forward(notes[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), notes[:, 1:].flatten())
        self.learn(loss)
        maps = [block.attention for block in self.model.blocks]
        if self.turn % 4 == 0:
            self.log.append([round(float(m.max()), 6) for m in maps])
        self.turn += 1
        return loss.item(), self.log[-1]


class GPT2(Program):
    """A character model that trains and, at times, samples with a growing context."""

    def build(self) -> None:
        self.model = self.forward = Encoder(64, 64, 24, causal=True)
        self.optimizer = self.sgd(self.model)
        self.text = torch.randint(64, (6, 4, 25))

    def step(self) -> Any:
        ids = self.text[self.turn % 6]
        loss = F.cross_entropy(self.forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.learn(loss)
        if self.turn % 4 == 0:
            self.log.append(self._sample())
        self.turn += 1
        return loss.item(), self.log[-1]

    @torch.no_grad()
    def _sample(self) -> list[int]:
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while ids.shape[1] < 8:
            chances = self.forward(ids)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
            if ids[0, -1] % 13 == 5:
                break
        return ids[0].tolist()
