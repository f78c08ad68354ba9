"""Convolutional networks: attributes that change, random depths, boxes in numpy, two optimisers."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.benchmarks.programs.base import Program

log = logging.getLogger(__name__)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


class Classifier(Program):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.images = torch.randn(6, 8, 3, 16, 16).to(device)
        self.labels = torch.randint(5, (6, 8)).to(device)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images[self.turn % 6], self.labels[self.turn % 6]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 8), conv(8, 16, 2), conv(16, 16, 2)])
        self.head, self.keep = nn.Linear(16, 5), 1.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.training and self.keep < 1:
                seeds = (torch.rand_like(x[:, :1]) < (1 - self.keep) / 9).float()
                mask = 1 - F.max_pool2d(seeds, 3, 1, 1)
                x = x * mask * (mask.numel() / mask.sum())
        return self.head(x.mean((2, 3)))


class DropBlock(Classifier):
    """The probability to keep a block is an attribute that decays."""

    def build(self) -> None:
        self.model = self.forward = Dropping()
        self.optimizer = self.sgd(self.model)

    def step(self) -> Any:
        self.model.keep = max(0.7, self.model.keep - 0.01)
        images, labels = self.batch()
        loss = F.cross_entropy(self.forward(images), labels)
        self.learn(loss)
        self.turn += 1
        return loss.item(), self.model.keep


class Downsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 8), conv(8, 16), conv(16, 16, 2)])
        self.head = nn.Linear(16, 5)
        self.point, self.ratio = 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.point and self.ratio < 1:
                x = F.interpolate(x, scale_factor=self.ratio, mode="bilinear")
        return self.head(x.mean((2, 3)))


class SDPoint(Classifier):
    """Where and by how much to downsample is drawn at every step and kept on the module."""

    def build(self) -> None:
        self.model = self.forward = Downsampling()
        self.optimizer, self.draw = self.sgd(self.model), random.Random(0)

    def step(self) -> Any:
        self.model.point = self.draw.randrange(3)
        self.model.ratio = self.draw.choice([0.5, 0.75, 1.0])
        images, labels = self.batch()
        loss = F.cross_entropy(self.forward(images), labels)
        self.learn(loss)
        self.turn += 1
        return loss.item(), self.model.point


def suppress(boxes: np.ndarray, scores: np.ndarray, limit: float = 0.5) -> list[int]:
    """Greedy non-maximum suppression in numpy; boxes (n, 4) as two corners."""
    kept: list[int] = []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in np.argsort(-scores, kind="stable"):
        if kept:
            others = boxes[kept]
            low = np.maximum(boxes[index, :2], others[:, :2])
            high = np.minimum(boxes[index, 2:], others[:, 2:])
            shared = np.clip(high - low, 0, None).prod(1)
            if (shared / (area[index] + area[kept] - shared)).max() > limit:
                continue
        kept.append(int(index))
    return kept[:6]


class Proposals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 8, 2), conv(8, 16, 2), conv(16, 16, 2))
        self.scores, self.boxes = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)
        self.classes = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x)
        return x, self.scores(x).flatten(1), self.boxes(x).flatten(2).transpose(1, 2).sigmoid()


class FasterRCNN(Program):
    """Proposals leave torch for a suppression in numpy; a loop over images pools what is kept."""

    def build(self) -> None:
        self.model = self.forward = Proposals()
        self.optimizer = self.sgd(self.model, 0.02)
        self.images, self.labels = torch.randn(4, 2, 1, 32, 32), torch.randint(3, (4, 2))

    def step(self) -> Any:
        which = self.turn % 4
        features, scores, boxes = self.forward(self.images[which])
        losses, counts = [], []
        for image in range(2):
            corners = boxes[image].detach().cpu().numpy()
            corners = np.concatenate([corners[:, :2], corners[:, :2] + 0.2 + corners[:, 2:]], 1)
            kept = suppress(corners, scores[image].detach().cpu().numpy())
            pooled = features[image].flatten(1)[:, kept].mean(1)
            losses.append(F.cross_entropy(self.model.classes(pooled), self.labels[which, image]))
            target = torch.zeros(scores.shape[1], device=self.device)
            target[kept] = 1.0
            losses.append(F.binary_cross_entropy_with_logits(scores[image], target))
            counts.append(len(kept))
        loss = torch.stack(losses).sum() + boxes.pow(2).mean()
        self.learn(loss)
        self.turn += 1
        return loss.item(), counts


class DCGAN(Program):
    """Which network learns depends on an earlier loss; a picture in numpy now and then."""

    def build(self) -> None:
        makes = nn.Sequential(
            nn.ConvTranspose2d(16, 16, 4, 1, 0), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.judge = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1),
            nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4, 1, 0),
        )  # fmt: skip
        self.model = self.forward = makes
        self.kept.append(self.judge)
        self.makes_step, self.judge_step = self.sgd(makes, 0.02), self.sgd(self.judge, 0.02)
        self.real, self.last = torch.randn(8, 8, 1, 16, 16), 1.0

    def _loss(self, images: Tensor, wanted: float) -> Tensor:
        verdicts = self.judge(images).flatten()
        return F.binary_cross_entropy_with_logits(
            verdicts, torch.full((8,), wanted, device=self.device)
        )

    def step(self) -> Any:
        made = self.forward(torch.randn(8, 16, 1, 1, device=self.device))
        if self.last > 0.9 or self.turn % 2 == 0:
            self.judge_step.zero_grad()
            loss = self._loss(self.real[self.turn % 8], 1.0) + self._loss(made.detach(), 0.0)
            loss.backward()
            self.judge_step.step()
            self.last = loss.item()
        self.makes_step.zero_grad()
        loss = self._loss(made, 1.0)
        loss.backward()
        self.makes_step.step()
        if self.turn % 10 == 0:
            picture = np.concatenate(list(made.detach().cpu().numpy()[:4, 0]), 1)
            log.info("grid %s %.3f", picture.shape, picture.mean())
        self.turn += 1
        return self.last, loss.item()


class YOLOv3(Program):
    """One scale; cells get their targets in a Python loop over boxes."""

    def build(self) -> None:
        self.model = self.forward = nn.Sequential(
            conv(1, 8, 2), conv(8, 16, 2), conv(16, 16, 2), nn.Conv2d(16, 8, 1)
        )
        self.optimizer, self.draw = self.sgd(self.model, 0.02), random.Random(0)
        self.images = torch.randn(4, 4, 1, 32, 32)

    def step(self) -> Any:
        found = self.forward(self.images[self.turn % 4])
        target = torch.zeros(4, 8, 4, 4, device=self.device)
        weight = torch.full((4, 8, 4, 4), 0.1, device=self.device)
        for image in range(4):
            for _ in range(self.draw.randint(1, 3)):
                x, y, kind = self.draw.random(), self.draw.random(), self.draw.randrange(3)
                row, column = int(y * 4), int(x * 4)
                target[image, :3, row, column] = torch.tensor(
                    [1.0, x * 4 - column, y * 4 - row], device=self.device
                )
                target[image, 5 + kind, row, column] = 1.0
                weight[image, :, row, column] = 1.0
        loss = (weight * (found - target).pow(2)).sum() / 4
        self.learn(loss)
        self.turn += 1
        return loss.item()


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs))
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.short(x))


class ResNet(Classifier):
    """Eight layers, a learning rate that changes every step and running means for the log."""

    def build(self) -> None:
        blocks = Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 2)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        self.model = self.forward = nn.Sequential(conv(3, 8), *blocks, *head)
        self.optimizer = self.sgd(self.model)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.meters = {"loss": 0.0, "right": 0.0}

    def step(self) -> Any:
        images, labels = self.batch()
        logits = self.forward(images)
        loss = F.cross_entropy(logits, labels)
        self.learn(loss)
        self.schedule.step()
        new = {"loss": loss.item(), "right": (logits.argmax(-1) == labels).float().mean().item()}
        for name, value in new.items():
            self.meters[name] += 0.1 * (value - self.meters[name])
        self.turn += 1
        return dict(self.meters)
