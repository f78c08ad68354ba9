"""Programs that read what masks keep, with nothing cut out of them."""

import torch

from regraft.passes import Context, RaiseLinear
from regraft.passes.fuse_linear import split_fused
from regraft.passes.pruning.blocks import find
from regraft.passes.pruning.slicing import columns
from regraft.passes.recorder import Runner


def dense_blocks(program, query_heads=False):
    """The blocks that Prune finds in a program captured here, and what it skips."""
    RaiseLinear().apply(program, Context())
    split_fused(program)
    return find(program, query_heads)


def masked(program, blocks, masks):
    """A runner whose output layers read what is kept, as it is scaled or refitted, and zeros."""
    edits = {}
    for block, one in zip(blocks, masks.cuts, strict=True):
        weight, bias = one.reading(program, block)
        full = torch.zeros(weight.shape[0], block.units * block.width)
        full[:, columns(block, one.kept)] = weight
        edits[block.output] = lambda x, *_, full=full, bias=bias: (x, full, bias)
    return Runner(program, edits)
