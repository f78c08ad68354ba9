import pytest
import torch
from transformers import AutoModelForCausalLM

import regraft
from regraft.passes import KeepPacked, Prune
from regraft.program import RegraftError

pytest.importorskip("gguf")
from tests.gguf_files import write  # noqa: E402

FILES = {
    "Q4_1": dict(),
    "Q4_0": dict(kind="Q4_0", embedding="F16"),
    "Q8_0": dict(kind="Q8_0", embedding="Q4_0", tied=False),
    "Q4_K": dict(kind="Q4_K", embedding="Q6_K", special={"attn_v": "Q6_K", "ffn_down": "Q6_K"}),
    "mixed": dict(special={"blk.0.attn_q": "F32", "blk.1.ffn_up": "F16"}),
}
IDS = torch.tensor([[5, 17, 291, 44, 44, 3, 120]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("name", FILES)
def test_equals_the_dequantised_model(tmp_path, name):
    path = write(tmp_path / "tiny.gguf", **FILES[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    fast = regraft.compile(path)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    found = fast(input_ids=IDS).logits
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(fast.generate(IDS, **options), model.generate(IDS, **options))
    floats = [x for x in _tensors(fast) if x.dtype == torch.float32 and x.dim() > 1]
    assert sum(x.numel() for x in floats) <= (3 * 256 * 256 if name == "mixed" else 0)


def _tensors(fast):
    from regraft.program.serialize import program_tensors

    return program_tensors(fast.program).values()


def test_weights_take_what_they_take_in_the_file(file):
    held = {id(x): x.nbytes for x in _tensors(regraft.compile(file))}
    assert sum(held.values()) <= 1.06 * file.stat().st_size


def test_kernels_give_the_same_text(file, monkeypatch):
    pytest.importorskip("tvm")
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    before = regraft.compile(file).generate(IDS, **options)
    monkeypatch.setenv("REGRAFT_TVM", "1")
    assert torch.equal(regraft.compile(file).generate(IDS, **options), before)


def test_projections_are_fused_and_the_program_is_kept(file):
    first, second = regraft.compile(file), regraft.compile(file, [KeepPacked()])
    calls = first.program.graph.find_nodes(op="call_module")
    assert calls or first.program.graph
    rows = {row.name: row for row in first.report.rows}
    assert rows["FuseLinear"].matches == 4 and rows["KeepPacked"].matches == 7 * 2 + 2
    assert torch.equal(second(input_ids=IDS).logits, first(input_ids=IDS).logits)
    assert second.program.graph.find_nodes(op="placeholder")[0].meta.get("spec")


def test_other_weights_in_the_same_structure(file, tmp_path):
    other = write(tmp_path / "other.gguf", seed=1)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=other.name, dtype=torch.float32
    )
    regraft.compile(file)
    found = regraft.compile(other)(input_ids=IDS).logits
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_with_a_quantised_cache_saved_and_loaded(file, tmp_path):
    fast = regraft.compile(file, [regraft.KVQuant(bits=8, tail=32)])
    options = dict(max_new_tokens=60, do_sample=False, pad_token_id=0)
    out = fast.generate(IDS, **options)
    fast.save(tmp_path / "saved")
    assert torch.equal(regraft.load(tmp_path / "saved").generate(IDS, **options), out)
    dense = regraft.compile(file)
    found, wanted = (m(input_ids=out[:, :60]).logits for m in (fast, dense))
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


def test_passes_that_need_float_weights_refuse(file):
    for one in (Prune(macs=0.5), regraft.WeightQuant()):
        with pytest.raises(RegraftError, match="needs float weights"):
            regraft.compile(file, [one], calibration=[IDS])


def test_models_without_a_file(llama):
    with pytest.raises(RegraftError, match='KeepPacked matched nothing.*compile\\("model.gguf"\\)'):
        regraft.compile(llama, [KeepPacked()])


def test_files_that_are_none(tmp_path):
    for data in (b"", b"GGUF", b"GGUF" + bytes(100), bytes(1000), b"GGUF\x63\0\0\0" + bytes(100)):
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(RegraftError, match="bad.gguf"):
            regraft.compile(path)
    with pytest.raises(RegraftError, match="is no file"):
        regraft.compile(tmp_path / "missing.gguf")


@pytest.mark.slow
def test_smollm2_writes_the_text_of_the_dequantised_model(monkeypatch):
    from transformers import AutoTokenizer

    from regraft.assets import smollm2, smollm2_gguf

    monkeypatch.setenv("REGRAFT_TVM", "1")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    fast = regraft.compile(smollm2_gguf())
    for prompt in ("The capital of France is", "def fibonacci(n):", "Water boils at"):
        inputs = tokenizer(prompt, return_tensors="pt")
        made = [m.generate(**inputs, max_new_tokens=64, do_sample=False) for m in (model, fast)]
        assert torch.equal(*made)


def test_halves_that_are_no_numbers_are_named(tmp_path, monkeypatch):
    from tests import gguf_files

    right = gguf_files.random_blocks

    def wrong(kind, *args):
        blocks = right(kind, *args)
        if kind == "F16":
            blocks[5, 3] = float("inf")
        return blocks

    monkeypatch.setattr(gguf_files, "random_blocks", wrong)
    path = write(tmp_path / "tiny.gguf", special={"blk.1.ffn_up": "F16"})
    with pytest.raises(RegraftError, match="blk.1.ffn_up.weight holds weights that are no finite"):
        regraft.compile(path)
