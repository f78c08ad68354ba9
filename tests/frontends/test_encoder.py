import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

import regraft
from regraft.assets import minilm
from regraft.program import RegraftError

SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=64,
    pad_token_id=0,
)
DISTILBERT = dict(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=256, pad_token_id=0)
SPECIAL = dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
MODELS = {
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": DISTILBERT,
    "electra": SIZES,
    "albert": SIZES,
    "modernbert": SIZES | SPECIAL,
}
HEADS = {
    "bert": "SequenceClassification",
    "roberta": "TokenClassification",
    "distilbert": "QuestionAnswering",
    "electra": "MaskedLM",
    "albert": "",
    "modernbert": "SequenceClassification",
}


def encoder(name, head="", **config):
    torch.manual_seed(0)
    kind = getattr(transformers, f"AutoModel{'For' if head else ''}{head}")
    return kind.from_config(AutoConfig.for_model(name, **config)).eval()


@pytest.fixture(scope="module")
def compiled():
    return regraft.compile(encoder("bert", **SIZES))


def batch():
    """Three sequences of 17, 9 and 3 tokens."""
    ids = torch.randint(3, 256, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(17) < torch.tensor([[17], [9], [3]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def same(actual, expected):
    assert type(actual) is type(expected) and list(actual) == list(expected)
    for name in expected:
        scale = expected[name].abs().max()
        assert (actual[name] - expected[name]).abs().max() <= 1e-5 * scale


def attentions(compiled):
    target = torch.ops.regraft.attention.default
    return len(compiled.program.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("name", MODELS)
def test_encoder_equals_eager_over_unequal_lengths(name):
    model = encoder(name, HEADS[name], **MODELS[name])
    compiled = regraft.compile(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        same(compiled(**batch()), model(**batch()))
        same(compiled(batch()["input_ids"][:1]), model(batch()["input_ids"][:1]))
    assert attentions(compiled) == 2


def test_bare_model_token_types_and_tuples(compiled):
    model = encoder("bert", **SIZES)
    inputs = batch() | {"token_type_ids": (torch.arange(17) > 4).long().repeat(3, 1)}
    with torch.no_grad():
        same(compiled(**inputs), model(**inputs))
        assert torch.equal(compiled(**inputs, return_dict=False)[0], model(**inputs)[0])
    assert [spec.shape for spec in compiled.program.inputs] == [
        ("batch_size", "sequence_length")
    ] * 3


def test_a_compiled_encoder_stays_where_it_is(compiled):
    assert compiled.to("cpu") is compiled
    with pytest.raises(RegraftError, match="compiled for cpu"):
        compiled.to(torch.float16)


def test_attention_that_is_not_registered_is_captured_and_reported():
    model = encoder("deberta-v2", HEADS["bert"], **SIZES)
    compiled = regraft.compile(model)
    with torch.no_grad():
        same(compiled(**batch()), model(**batch()))
    assert attentions(compiled) == 0
    assert "spelled out" in str(compiled.report)


def test_images():
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    model = encoder("vit", **sizes, image_size=32, patch_size=8)
    compiled = regraft.compile(model)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        same(compiled(pixel_values=pixels), model(pixel_values=pixels))
    assert attentions(compiled) == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, "limit of 64"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.full((1, 4), 256)}, "vocabulary of 256"),
        ({"input_ids": torch.ones(1, 4)}, "input_ids is torch.float32, wanted torch.int64"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"input_ids is \[4\]"),
        ({"ids": torch.ones(1, 4)}, "unknown input ids"),
        ({}, "input_ids is missing"),
        (
            {
                "input_ids": torch.ones(2, 4, dtype=torch.long),
                "attention_mask": torch.ones(2, 5, dtype=torch.long),
            },
            "attention_mask has size 5 in dimension 1",
        ),
    ],
)
def test_bad_input_gives_one_clear_error(compiled, inputs, message):
    with pytest.raises(RegraftError, match=message):
        compiled(**inputs)


def test_a_pass_for_caches_says_that_there_is_none():
    with pytest.raises(RegraftError, match="KVQuant matched nothing"):
        regraft.compile(encoder("bert", **SIZES), [regraft.KVQuant(bits=4)])


def test_other_modalities_need_example_inputs():
    model = AutoModel.from_config(AutoConfig.for_model("t5", d_model=16, d_kv=8, num_layers=1))
    with pytest.raises(RegraftError, match="give example_inputs"):
        regraft.compile(model)


@pytest.mark.slow
def test_minilm_ranks_sentences_as_eager_does():
    folder = minilm()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compiled = regraft.compile(model)
    texts = [
        "How do I reset my password?",
        "I cannot log in any more and want a new password for my account.",
        "Water boils at one hundred degrees.",
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        same(compiled(**inputs), model(**inputs))
    assert attentions(compiled) == 6
    mask = inputs["attention_mask"][..., None]
    means = (compiled(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = torch.cosine_similarity(means[:1], means[1:])
    assert near > 0.5 > 0.2 > far
    rows = pipeline("feature-extraction", model=compiled, tokenizer=tokenizer)(texts)
    torch.testing.assert_close(torch.tensor(rows[0][0])[0], model(**tokenizer(
        texts[:1], return_tensors="pt")).last_hidden_state[0, 0], rtol=0, atol=1e-4)  # fmt: skip
