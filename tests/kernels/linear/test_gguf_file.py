import random
import struct

import numpy as np
import pytest

from regraft.program import RegraftError

pytest.importorskip("gguf")
from regraft.kernels.linear.gguf_file import GgufFile  # noqa: E402
from tests.gguf_files import write  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf")


def test_tensors_are_those_of_gguf(good):
    import gguf

    file = GgufFile(good)
    assert file.architecture == "llama"
    for tensor in gguf.GGUFReader(good).tensors:
        own = file.tensors[tensor.name]
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(own.dense().numpy(), wanted)


def test_lists_longer_than_the_file(good, tmp_path):
    data = bytearray(good.read_bytes())
    at = data.index(b"tokenizer.ggml.tokens") + 21 + 8
    for count in (2**63 - 1, 2**64 - 1, 10**9):
        data[at : at + 8] = struct.pack("<Q", count)
        refuse(bytes(data), tmp_path)
    data[at - 4 : at] = struct.pack("<I", 0)
    refuse(bytes(data), tmp_path)


@pytest.mark.parametrize("value", [0, 31, 2**20, 2**40, 2**63, 2**64 - 1])
def test_sizes_that_lie(good, tmp_path, value):
    data = bytearray(good.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + 19 + 4
    for place in (at, at + 8)[: 1 if value == 31 else 2]:  # 31 rows are as good as any
        lying = data.copy()
        lying[place : place + 8] = struct.pack("<Q", value)
        refuse(bytes(lying), tmp_path)


@pytest.mark.filterwarnings("ignore:overflow")
def test_unknown_types_and_offsets_beyond_the_end(good, tmp_path):
    data = bytearray(good.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + 19 + 4 + 16
    refuse(bytes(data[:at] + struct.pack("<I", 4711) + data[at + 4 :]), tmp_path)
    for offset in (len(data), 2**62, 2**64 - 32):
        refuse(bytes(data[: at + 4] + struct.pack("<Q", offset) + data[at + 12 :]), tmp_path)


def test_every_truncation(good, tmp_path):
    data = good.read_bytes()
    for cut in (*range(0, 200, 7), *range(200, len(data), len(data) // 40)):
        refuse(data[:cut], tmp_path)


def test_random_damage_is_an_error_or_harmless(good, tmp_path):
    """Never a crash, never something read beyond the end, never an endless loop."""
    data, chance = good.read_bytes(), random.Random(0)
    head = GgufFile(good).tensors["token_embd.weight"].offset
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(head)
            broken[place] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path = tmp_path / "broken.gguf"
        path.write_bytes(broken)
        try:
            for tensor in GgufFile(path).tensors.values():
                if tensor.format:
                    tensor.packed()
        except RegraftError:
            pass


def refuse(data, folder):
    path = folder / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(RegraftError, match="is no sound GGUF file"):
        GgufFile(path)
