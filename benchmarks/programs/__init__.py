"""Small imperative PyTorch programs, each with Python inside that conversion to a graph breaks on.

Ten are counterparts of the programs of Terra's evaluation (arXiv 2201.09210), four are hard ones
added. A program is made with a seed; ``step()`` is one iteration and returns what it logs; ``kept``
lists what it leaves behind; ``model`` is called through ``forward``, which a compiler may replace.
"""

from __future__ import annotations

from regraft.benchmarks.programs.base import Program
from regraft.benchmarks.programs.language import GPT2, BertCls, BertQA, MusicTransformer
from regraft.benchmarks.programs.others import AdamSchedule, HFDecode, Reinforce, TreeLSTM
from regraft.benchmarks.programs.vision import (
    DCGAN,
    DropBlock,
    FasterRCNN,
    ResNet,
    SDPoint,
    YOLOv3,
)

PAPER: dict[str, type[Program]] = {
    "DropBlock": DropBlock, "MusicTransformer": MusicTransformer, "SDPoint": SDPoint,
    "BERT-CLS": BertCls, "FasterRCNN": FasterRCNN, "BERT-Q&A": BertQA, "GPT-2": GPT2,
    "DCGAN": DCGAN, "YOLOv3": YOLOv3, "ResNet": ResNet,
}  # fmt: skip
PROGRAMS: dict[str, type[Program]] = {
    **PAPER, "TreeLSTM": TreeLSTM, "REINFORCE": Reinforce, "Adam + schedule": AdamSchedule,
    "HF decode": HFDecode,
}  # fmt: skip
