import csv
import io
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from regraft.cli import app
from regraft.program import RegraftError
from tests.conftest import tiny

VERBS = ("demo", "compile", "export", "generate", "inspect", "passes", "bench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(folder)
    words = {"[UNK]": 0, "one": 3, "two": 4, "three": 5}
    words |= {f"w{i}": i for i in range(6, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("REGRAFT_INDUCTOR", "0")
        yield


def regraft(*arguments):
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_screen(verb):
    lines = regraft(*filter(None, [verb]), "--help").rstrip().split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert verb or all(name in "\n".join(lines) for name in VERBS)


def test_generate_prints_the_models_own_words(folder):
    text = regraft("generate", "-m", folder, "-p", "one two", "-n", 4)
    model = tiny("llama")
    made = model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)[0, 2:]
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    assert text.split() == words.decode(made, skip_special_tokens=True).split()


def test_an_exported_folder_generates_alike(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    text = regraft("export", folder, tmp_path / "out", "--opset", "21")
    assert "prefill" in text and "padded batch" in text
    made, want = (
        regraft("generate", "-m", model, "-p", "one two", "-n", 6)
        for model in (tmp_path / "out", folder)
    )
    assert made == want
    with pytest.raises(RegraftError, match="exists"):
        regraft("export", folder, tmp_path / "out")
    with pytest.raises(RegraftError, match="is an export"):
        regraft("inspect", "-m", tmp_path / "out")


def test_packed_weights_are_exported(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    for settings in ((), ("--contrib",)):
        out = tmp_path / f"out{len(settings)}"
        assert "8-bit activations" in regraft("export", folder, out, "--weight-bits", 4, *settings)
        assert regraft("generate", "-m", out, "-p", "one two", "-n", 6)


def test_inspect_shows_signature_passes_and_cache(folder):
    text = regraft("inspect", "-m", folder, "--kv-bits", "4")
    assert "past_key_values.0.key" in text and "RaiseAttention" in text
    assert "KVQuant" in text and "bytes a token" in text


def test_inspect_an_onnx_file(tmp_path):
    from onnx import TensorProto, helper, save

    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    opsets = [helper.make_opsetid("", 20)]
    save(helper.make_model(graph, opset_imports=opsets), tmp_path / "m.onnx")
    text = regraft("inspect", tmp_path / "m.onnx")
    assert text == regraft("inspect", "--model", tmp_path / "m.onnx")
    assert all(word in text for word in ("in x", "out y", "batch, 3", "Relu", "20", "MiB"))
    with pytest.raises(RegraftError, match="does not exist"):
        regraft("inspect", tmp_path / "none.onnx")


def test_inspect_graph_and_diff(folder):
    graph = regraft("inspect", "-m", folder, "--graph")
    assert "regraft.cached_attention" in graph and "model.layers.1.self_attn" in graph
    diff = regraft("inspect", "-m", folder, "--diff", "RaiseAttention")
    assert "\n+cached_attention" in diff and "\n-attention" in diff
    text = regraft("inspect", "-m", folder, "--diff", "RaiseAttention", "--markdown")
    assert text.startswith("## RaiseAttention") and "```diff" in text
    unchanged = regraft("inspect", "-m", folder, "--diff", "KVQuant")
    assert unchanged == "KVQuant leaves the graph as it is\n"


def test_passes_lists_each_with_its_settings():
    text = regraft("passes")
    assert all(name in text for name in ("CleanUp", "RaiseAttention", "KVQuant", "bits=4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", "nowhere", "-p", "x"], "no config.json"),
        (["generate", "-m", "nowhere", "-p", "x", "--kv-bits", "5"], "bits must be"),
        (["generate", "-m", "nowhere", "-p", "x", "--kv-bits", "four"], "2, 3, 4, 8 or none"),
        (["inspect", "--diff", "RaiseAttentoin"], "did you mean 'RaiseAttention'"),
        (["bench", "speed"], "unknown suite 'speed'"),
        (["bench", "capture", "-o", "xml"], "unknown output 'xml'"),
        (["bench", "capture", "--onnx", "x"], "belongs to the suite decode"),
    ],
)
def test_bad_arguments_give_one_clear_error(arguments, message):
    with pytest.raises(RegraftError, match=message):
        regraft(*arguments)


def test_bench_prints_and_writes_every_format(tmp_path, monkeypatch):
    from regraft.benchmarks import perplexity
    from regraft.benchmarks.harness import Check, Result

    rows = [{"model": "a", "t/s": 2.5}]
    made = Result("regraft bench x", {"threads": 2}, rows, [Check.at_least("speed", 2.5, 2)])
    monkeypatch.setattr(perplexity, "run", lambda quick: made)
    path = tmp_path / "deep" / "x.json"
    assert json.loads(regraft("bench", "perplexity", "-o", "json", "--json", path))["rows"] == rows
    assert json.loads(path.read_text()) == made.to_dict()
    assert "| speed | 2.5 | >= 2 | yes |" in path.with_suffix(".md").read_text()
    table = regraft("bench", "perplexity", "-o", "csv").strip()
    assert list(csv.DictReader(io.StringIO(table))) == [{"model": "a", "t/s": "2.5"}]
    assert "| a | 2.5 |" in regraft("bench", "perplexity")


def test_a_compiled_folder_generates_and_can_be_inspected(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [{KVQuant: {bits: 8}}]\n")
    target = tmp_path / "compiled"
    assert "KVQuant" in regraft("compile", folder, target, "--recipe", recipe)
    assert (target / "regraft.json").is_file() and (target / "tokenizer.json").is_file()
    words = regraft("generate", "-m", target, "-p", "one two", "-n", 4)
    assert words == regraft("generate", "-m", folder, "-p", "one two", "-n", 4)
    text = regraft("inspect", "-m", target)
    assert "KVQuant" in text and "past_key_values.0.key" in text
    with pytest.raises(RegraftError, match="compiled already, with its own cache"):
        regraft("inspect", "-m", target, "--kv-bits", "4")
    with pytest.raises(RegraftError, match="name the model it was compiled from"):
        regraft("inspect", "-m", target, "--diff", "CleanUp")


def test_a_gguf_file_compiles_to_a_folder(folder, tmp_path):
    pytest.importorskip("gguf")
    from tests.gguf_files import write

    file = write(tmp_path / "tiny.gguf")
    assert "KeepPacked" in regraft("compile", file, tmp_path / "out", "--kv-bits", 4)
    assert "KeepPacked" in regraft("inspect", "-m", file)
    assert (tmp_path / "out" / "regraft.json").is_file()
    with pytest.raises(RegraftError, match="no tokenizer that can be read"):
        regraft("generate", "-m", file, "-p", "one")
    with pytest.raises(RegraftError, match="is no file"):
        regraft("inspect", "-m", tmp_path / "missing.gguf")
    with pytest.raises(RegraftError, match="is a GGUF file"):
        regraft("inspect", "-m", file, "--diff", "CleanUp")


def test_weight_bits(folder, tmp_path):
    assert "WeightQuant" in regraft("compile", folder, tmp_path / "out", "--weight-bits", 8)
    assert regraft("generate", "-m", tmp_path / "out", "-p", "one two", "-n", 4)
    text = tmp_path / "text.txt"
    text.write_text("one two " * 200)
    scaled = ("--weight-bits", 4, "--weight-method", "awq")
    assert "WeightQuant" in regraft("compile", folder, tmp_path / "awq", *scaled, "--text", text)
    with pytest.raises(RegraftError, match="awq needs --weight-bits and --text FILE"):
        regraft("compile", folder, tmp_path / "out2", *scaled)
    with pytest.raises(RegraftError, match="--weight-bits 3: 8, 4 or none"):
        regraft("compile", folder, tmp_path / "out2", "--weight-bits", 3)
