import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, WhisperForConditionalGeneration

import regraft
from regraft.program import RegraftError

BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=128,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
    init_std=0.5,
)
MODELS = {
    "t5": dict(
        d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=128,
        decoder_start_token_id=0, initializer_factor=20.0,
    ),
    "bart": BART,
    "marian": BART,
    "whisper": BART | dict(num_mel_bins=8, max_source_positions=20, max_target_positions=40),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model, and the same one compiled."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    whisper = request.param == "whisper"
    make = WhisperForConditionalGeneration if whisper else AutoModelForSeq2SeqLM.from_config
    model = make(config).eval()
    return model, regraft.compile(model)


@pytest.fixture(scope="module")
def bart():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bart", **BART | {"max_position_embeddings": 96})
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    return model, regraft.compile(model, [regraft.KVQuant(bits=8, tail=16, group=32)])


def inputs(model):
    """Two inputs; texts of nine and six tokens."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 40, generator=generator)}
    ids = torch.randint(3, 128, (2, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def targets(length):
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(2))


def test_prefill_and_three_steps_equal_eager(pair):
    model, compiled = pair
    given, ids = inputs(model), targets(8)
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=ids).logits
    output = compiled(**given, decoder_input_ids=ids[:, :5])
    logits = [output.logits]
    rest = {k: v for k, v in given.items() if k == "attention_mask"}
    for i in range(5, 8):
        output = compiled(
            **rest,
            encoder_outputs=(output.encoder_last_hidden_state,),
            decoder_input_ids=ids[:, i : i + 1],
            past_key_values=output.past_key_values,
        )
        logits.append(output.logits)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_generate_equals_eager(pair, options):
    model, compiled = pair
    options = {"max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 2, **options}
    expected = model.generate(**inputs(model), **options)
    assert len(expected.unique()) > 3
    assert torch.equal(compiled.generate(**inputs(model), **options), expected)


def test_sampling_equals_eager(pair):
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs(model), max_new_tokens=8, do_sample=True, top_k=20))
    assert torch.equal(*outputs)


def test_decoder_padding_equals_eager(pair):
    model, compiled = pair
    given, ids = inputs(model), targets(5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    actual = compiled(**given, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    difference = (actual - expected)[mask.bool()].abs().max()
    assert difference <= 1e-5 * expected.abs().max()


def test_cross_states_are_computed_once_from_the_encoded_input(pair):
    model, compiled = pair
    layers = len(compiled.program.cache.layers)
    assert [spec.name for spec in compiled.cross.outputs[:2]] == ["cross.0.key", "cross.0.value"]
    assert len(compiled.cross.outputs) == 2 * layers
    attention = torch.ops.regraft.attention.default
    raised = torch.ops.regraft.cached_attention.default
    count = {
        (name, target): len(program.graph.find_nodes(op="call_function", target=target))
        for name, program in (("cross", compiled.cross), ("step", compiled.program))
        for target in (attention, raised)
    }
    assert count == {
        ("cross", attention): 0, ("cross", raised): 0,
        ("step", attention): layers, ("step", raised): layers,
    }  # fmt: skip
    cache = compiled.new_cache()
    compiled(**inputs(model), decoder_input_ids=targets(1), past_key_values=cache)
    before = cache.cross[0].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.cross[0], before[[1, 0]])
    cache.reset()
    assert cache.nbytes == 0


def test_quantised_cache_follows_dense(bart):
    model, compiled = bart
    given, ids = inputs(model), targets(80)
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=ids).logits
    output = compiled(**given, decoder_input_ids=ids[:, :60])
    output = compiled(
        attention_mask=given["attention_mask"],
        encoder_outputs=(output.encoder_last_hidden_state,),
        decoder_input_ids=ids[:, 60:],
        past_key_values=output.past_key_values,
    )
    error = (output.logits - expected[:, 60:]).abs().max() / expected.abs().max()
    assert 1e-6 < error < 0.05
    assert "KVQuant (decoder)" in str(compiled.report)


IDS, START = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS}, "decoder_input_ids must be an int64 tensor"),
        ({"decoder_input_ids": START}, "input_ids or encoder_outputs is missing"),
        ({"input_ids": IDS.float(), "decoder_input_ids": START}, "input_ids is torch.float32"),
        ({"input_ids": IDS[:, :0], "decoder_input_ids": START}, "input_ids is empty"),
        ({"input_ids": IDS, "decoder_input_ids": START[:, :0]}, "needs a start token"),
        ({"input_ids": IDS, "decoder_input_ids": START[:1]}, "1 rows, the encoded input 2"),
        ({"input_ids": IDS, "decoder_input_ids": START, "labels": IDS}, "unknown input labels"),
        (
            {"input_ids": IDS, "decoder_input_ids": START, "attention_mask": IDS[:, :3]},
            "attention_mask has size 3",
        ),
        (
            {"input_ids": IDS, "decoder_input_ids": START, "decoder_attention_mask": IDS},
            "decoder_attention_mask must be",
        ),
        ({"input_ids": IDS, "decoder_input_ids": IDS.repeat(1, 30)}, "limit of 96"),
        (
            {"input_ids": IDS, "decoder_input_ids": START, "past_key_values": ()},
            "past_key_values is a tuple",
        ),
    ],
)
def test_bad_input_gives_one_clear_error(bart, given, message):
    with pytest.raises(RegraftError, match=message):
        bart[1](**given)
