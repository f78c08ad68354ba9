"""Damaged copies of real files: each runs or is one RegraftError, within limits."""

import random
import resource
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from regraft.assets import onnx_file
from regraft.benchmarks.onnx_files import calls_of
from regraft.frontends.onnx.check import all_nodes
from regraft.frontends.onnx.module import OnnxModule
from regraft.program import RegraftError

FILES = ("akiki-vad", "silero-vad-16k", "hibari-oov-gb", "ppocr-cls")
CASES, SECONDS, MEMORY = 800, 20, 6 << 30


class TooLong(BaseException):
    """No Exception, which the importer would explain."""


def late(*_):
    raise TooLong


def bytes_changed(proto, rng):
    """Flips, truncations, and pieces that are cut out, doubled or moved."""
    data = bytearray(proto.SerializeToString())
    kind = rng.choice("flip flip cut double move end".split())
    for _ in range(rng.choice((1, 1, 3, 30))):
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice((1, 8, 200)))
        piece = data[start:stop]
        if kind == "flip":
            data[start] ^= 1 << rng.randrange(8)
        elif kind in ("cut", "move"):
            del data[start:stop]
        if kind in ("double", "move"):
            place = rng.randrange(len(data))
            data[place:place] = piece
    return bytes(data[: rng.randrange(1, len(data))] if kind == "end" else data)


def fields_changed(proto, rng):
    """A valid protobuf whose sizes, attributes, operators or names are others."""
    numbers = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**40, 2**63 - 1)
    nodes = all_nodes(proto.graph.node)
    for _ in range(rng.randint(1, 3)):
        node, other = rng.choice(nodes), rng.choice(nodes)
        kind = rng.randrange(8)
        held = rng.choice(proto.graph.initializer) if proto.graph.initializer else None
        if kind == 0 and held is not None and held.dims:
            held.dims[rng.randrange(len(held.dims))] = rng.choice(numbers)
        elif kind == 1 and held is not None:
            held.data_type = rng.randrange(30)
        elif kind == 2 and held is not None and held.raw_data and len(held.raw_data) <= 64:
            held.raw_data = rng.randbytes(len(held.raw_data))
        elif kind == 3 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = rng.choice(numbers)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(numbers)
            if attribute.HasField("t"):
                values = onnx.numpy_helper.to_array(attribute.t)
                if 0 < values.size <= 16 and values.dtype.kind == "i":
                    changed = np.full_like(values, rng.choice(numbers[1:12]) % 2**31)
                    attribute.t.CopyFrom(onnx.numpy_helper.from_array(changed))
        elif kind == 4 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(["", *other.output])
        elif kind == 5:
            node.op_type = other.op_type
        elif kind == 6 and node.input:
            del node.input[rng.randrange(len(node.input))]
        else:
            for attribute in [a.SerializeToString() for a in other.attribute]:
                node.attribute.add().ParseFromString(attribute)
    return proto.SerializeToString()


def fuzz(name, count):
    """Print what went wrong, the case first; the last line says how many ran."""
    source = onnx.load(onnx_file(name))
    given = {key: torch.from_numpy(value) for key, value in calls_of(name)[0].items()}
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, late)
    fine = 0
    for case in range(count):
        rng = random.Random(f"{name} {case}")
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        data = rng.choice((bytes_changed, fields_changed))(proto, rng)
        signal.alarm(SECONDS)
        try:
            with torch.no_grad():
                OnnxModule(data)(**given)
            fine += 1
        except RegraftError as error:
            if "\n" in str(error):
                print("case", case, "has several lines", flush=True)
        except BaseException as error:
            print("case", case, type(error).__name__, str(error)[:300], flush=True)
        finally:
            signal.alarm(0)
    print("ran", fine, flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damaged_real_files_run_or_are_one_error(name):
    onnx_file(name)
    command = [sys.executable, "-W", "ignore", __file__, name, str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}"
    *wrong, last = done.stdout.strip().splitlines()
    assert not wrong
    assert 0 < int(last.removeprefix("ran ")) < CASES


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]))
