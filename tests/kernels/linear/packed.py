"""Random packed weights."""

import torch

from regraft.kernels.linear.formats import SUPER, pack, parse

FORMATS = (
    "int8",
    "int8g32",
    "int8g128",
    "int4g32",
    "int4g32z",
    "int4g64z",
    "int4g32zn",
    "int6g16n",
)


def random_packed(name, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    format = parse(name)
    groups = format.groups(columns)

    def whole(low, high, count, dtype):
        return torch.randint(low, high, (rows, count), generator=generator).to(dtype)

    def halves(count):
        return torch.randn(rows, count, generator=generator).half()

    parts = {}
    for kind in format.kinds:
        if not format.nested:
            parts[kind] = halves(groups)
        elif format.zero:
            parts[kind] = whole(0, 64, groups, torch.uint8)
        else:
            parts[kind] = whole(-128, 128, groups, torch.int8)
        if format.nested:
            parts[f"super_{kind}"] = halves(columns // SUPER)
    return pack(format, whole(0, 2**format.bits, columns, torch.uint8), **parts)
