"""How the kernels for CUDA are launched, and what lies where in their shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.kernels.compiled import KernelError
from regraft.kernels.kvquant.layout import BLOCK

BARRIERS = 15
"""Those that a block of threads has besides the one of all its threads."""
RESERVED = 1024
"""Bytes that the shared memory may be away from where an address of it is 0."""


@dataclass(frozen=True)
class Case:
    """What a kernel is generated for; dtype is that of queries, exact tokens and outputs,
    shared the bytes of shared memory that a block of threads may have."""

    dtype: str
    heads: int
    groups: int
    queries: int
    size: int
    value_size: int
    key_bits: int
    value_bits: int
    key_outliers: bool
    value_outliers: bool
    rotated: bool
    softcap: bool
    shared: int

    @property
    def rows(self) -> int:
        return self.groups * self.queries

    @property
    def tiles(self) -> int:
        return 1 if self.rows <= 8 or max(self.size, self.value_size) > 128 else 2

    @property
    def row_stride(self) -> int:
        """Rows that shared memory holds of a warp's tile, a multiple of 4."""
        return min(8 * self.tiles, -(-self.rows // 4) * 4)


class Layout:
    """Sizes of the launch and places in its shared memory, in bytes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        for limit in (16, 8, 4, 2, 1)[case.tiles > 1 or case.value_size > 128 :]:
            self.heads = max(h for h in range(1, limit + 1) if case.heads % h == 0)
            for blocks in range(min(limit // self.heads, BARRIERS), 0, -1):
                self.blocks, self.warps = blocks, self.heads * blocks
                self._place(case)
                if self.bytes <= case.shared:
                    return
        raise KernelError(f"no room in shared memory for heads of {case.size} channels")

    def _place(self, case: Case) -> None:
        rows = case.row_stride
        self.row = 2 * case.size
        self.row += (32 - self.row) % 128 if case.rotated else 0
        self.angles = BLOCK * self.row if case.rotated else 0
        self.table = 256 * 4 ** max(case.key_bits, case.value_bits)
        angles = RESERVED + self.blocks * self.angles
        self.own = -(-angles // self.table) * self.table + self.table
        self.two_rows = 4 * case.size + 64
        self.fragment = 4 * case.size
        self.query = self.fragment + rows // 2 * self.two_rows
        self.tile = self.query + (rows // 2 * self.two_rows if case.rotated else 0)
        either = case.key_outliers or case.value_outliers
        self.extra = self.tile + (4 * BLOCK * rows if either else 0)
        self.each = self.extra + (4 * case.value_size * rows if case.value_outliers else 0)
        self.bytes = self.own + self.warps * self.each

    @property
    def places(self) -> int:
        """Blocks of threads that share a range of a sequence's tokens."""
        return -(-self.case.rows // (8 * self.case.tiles)) * (self.case.heads // self.heads)

    def parts(self, splits: int, exact: int) -> int:
        """Partial results of a row: those of ``splits`` ranges and of the exact tokens."""
        return (splits + -(-exact // (self.blocks * BLOCK))) * self.blocks


PITCH, BYTE_PITCH = BLOCK + 1, BLOCK + 4
"""Places of a channel's 32 numbers or bytes, such that few lanes share a bank either way."""


@dataclass(frozen=True)
class Turns:
    """What the kernel that codes channels in turn is generated for: channels of a head, levels,
    and whether some numbers are exact."""

    size: int
    levels: int
    exact: bool

    @property
    def panel(self) -> int:
        """Channels that are coded before all later ones learn of it."""
        return next(n for n in (8, 4, 2) if self.size % n == 0)

    @property
    def floats(self) -> int:
        """Of shared memory: what channels aim at, what they are, and two panels of the matrix."""
        return 2 * self.size * (PITCH + self.panel)

    @property
    def bytes(self) -> int:
        """All that a block of threads has."""
        return 4 * self.floats + self.size * BYTE_PITCH


@dataclass(frozen=True)
class Coded:
    """What the kernels that code whole blocks are generated for: count outliers a token, of all
    heads; with feedback, channels are coded in turn by a kernel of its own."""

    kind: str
    heads: int
    size: int
    bits: int
    count: int
    feedback: bool

    @property
    def channels(self) -> int:
        return self.heads * self.size
