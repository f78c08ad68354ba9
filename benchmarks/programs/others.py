"""Trees, an environment in Python, Adam with a schedule, and the decode loop of transformers."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.benchmarks.programs.base import Program

Tree = Any  # an int, a leaf's word, or two trees


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * width, 5 * width)

    def forward(self, lh: Tensor, lc: Tensor, rh: Tensor, rc: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o, u = self.gates(torch.cat([lh, rh], -1)).chunk(5, -1)
        c = i.sigmoid() * u.tanh() + f.sigmoid() * lc + g.sigmoid() * rc
        return o.sigmoid() * c.tanh(), c


class TreeLSTM(Program):
    """Inference on a new tree of twelve leaves every step: paths never repeat."""

    def build(self) -> None:
        self.words, self.head = nn.Embedding(100, 64), nn.Linear(64, 5)
        self.model = self.forward = Cell(64)
        self.kept += [self.words, self.head]
        self.draw, self.zero = random.Random(0), torch.zeros(1, 64)
        self.ids = [torch.tensor([word]) for word in range(100)]

    def _tree(self, leaves: int) -> Tree:
        if leaves == 1:
            return self.draw.randrange(100)
        left = self.draw.randrange(1, leaves)
        return self._tree(left), self._tree(leaves - left)

    def _state(self, tree: Tree) -> tuple[Tensor, Tensor]:
        if isinstance(tree, int):
            return self.words(self.ids[tree]), self.zero
        return self.forward(*self._state(tree[0]), *self._state(tree[1]))

    @torch.no_grad()
    def step(self) -> Any:
        self.turn += 1
        return self.head(self._state(self._tree(12))[0]).argmax().item()


class Reinforce(Program):
    """A pole to balance, simulated in Python: an action is drawn and read at every moment."""

    def build(self) -> None:
        self.model = self.forward = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.kept.append(self.optimizer)
        self.draw = random.Random(0)

    def step(self) -> Any:
        angle, speed = self.draw.uniform(-0.05, 0.05), 0.0
        chances, rewards = [], []
        for _ in range(12):
            logits = self.forward(torch.tensor([angle, speed], device=self.device)).log_softmax(-1)
            action = torch.multinomial(logits.detach().exp(), 1).item()
            chances.append(logits[int(action)])
            speed += 0.1 * angle + (0.02 if action else -0.02)
            angle += speed
            rewards.append(1.0)
            if abs(angle) > 0.2:
                break
        returns, total = [], 0.0
        for reward in reversed(rewards):
            total = reward + 0.95 * total
            returns.insert(0, total)
        gain = torch.tensor(returns, device=self.device)
        loss = -(torch.stack(chances) * (gain - gain.mean())).sum()
        self.learn(loss)
        self.turn += 1
        return len(rewards), loss.item()


class AdamSchedule(Program):
    """Scalars that change at every step: Adam's corrections, warm-up and decay, clipping."""

    def build(self) -> None:
        self.model = self.forward = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.GELU(),
            nn.Linear(64, 4),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.kept.append(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda turn: min((turn + 1) / 10, 1 / (1 + turn / 50))
        )

    def step(self) -> Any:
        inputs = torch.randn(16, 16, device=self.device)
        loss = F.mse_loss(self.forward(inputs), torch.randn(16, 4, device=self.device))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.turn += 1
        return loss.item(), float(norm)


class HFDecode(Program):
    """Sixteen greedy tokens of a small Llama by transformers' own loop."""

    def build(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=256, pad_token_id=0,
        )  # fmt: skip
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.forward = self.model.forward
        self.ids = torch.randint(3, 256, (4, 1, 6))

    def step(self) -> Any:
        self.model.forward = self.forward
        ids = self.ids[self.turn % 4]
        mask = torch.ones_like(ids)
        self.turn += 1
        return self.model.generate(
            ids, attention_mask=mask, max_new_tokens=16, do_sample=False
        ).tolist()
