"""Budgets of latency, on a clock that counts multiplications instead of seconds."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

import regraft
from regraft.passes import Prune
from regraft.passes.pruning import latency
from regraft.passes.pruning.latency import Latency
from regraft.program import RegraftError
from tests.conftest import SMALL, tiny
from tests.passes.masking import dense_blocks

IDS = [torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in linear layers: a fixed second a call, and one by their weights."""
    now = [0.0]

    def linear(x, weight, bias=None):
        now[0] += 1.0 + weight.numel() / 1e3 * x.numel() / x.shape[-1]
        return F.linear(x, weight, bias)

    monkeypatch.setattr(latency, "linear", linear)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {key: n for key, n in SMALL.items() if "key" not in key}
    config = AutoConfig.for_model("bert", **sizes, num_labels=3, initializer_range=0.2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def pruned(model, **settings):
    calibration = [{"input_ids": ids} for ids in IDS] if "bert" in str(type(model)) else IDS
    pruning = Prune(tune=False, round_to=4, **settings)
    return regraft.compile(model, [pruning], calibration=calibration, target="reference")


def seconds(program, clock, batch, tokens):
    run, start = latency.timed(program, batch, tokens), clock[0]
    run()
    return clock[0] - start


@pytest.mark.parametrize("share", [0.7, 0.45])
@pytest.mark.parametrize("query_heads", [False, True], ids=["groups", "query heads"])
def test_a_budget_of_latency_is_kept(bert, clock, share, query_heads):
    model = tiny("llama") if query_heads else bert
    if query_heads:
        share = 0.5 + share / 2  # keys and values stay, and what reads the tokens out
    made = pruned(model, latency=share, batch=2, sequence_length=16, query_heads=query_heads)
    dense = regraft.compile(model, calibration=IDS, target="reference").program
    took = [seconds(program, clock, 2, 16) for program in (made.program, dense)]
    assert 0.9 * share <= took[0] / took[1] <= share


def test_tables_hold_what_was_measured_and_lines_between(bert, clock):
    program = regraft.compile(bert, target="reference").program
    blocks, _ = dense_blocks(program)
    measured = Latency(program, blocks, 2, 16, lambda what: None)
    assert measured.dense == pytest.approx(seconds(program, clock, 2, 16))
    heads, filters = 4 * 16 * 64 / 1e3 * 32, 2 * 64 / 1e3 * 32  # a head's four, a filter's two
    calls = [0.0 if block.residual is None else 1.0 * (len(block.inputs) + 1) for block in blocks]
    for index, (block, unit) in enumerate(zip(blocks, (heads, filters) * 2, strict=True)):
        assert measured.of(index, 0) == 0.0
        for count in (block.units, block.units // 2, block.units // 4):
            assert measured.of(index, count) == pytest.approx(calls[index] + count * unit)
        between = measured.of(index, block.units * 5 // 8)
        assert between == pytest.approx(calls[index] + block.units * 5 // 8 * unit, rel=0.01)
    whole = measured.rest + sum(measured.of(i, block.units) for i, block in enumerate(blocks))
    assert whole == pytest.approx(measured.dense)
    cut = [block.first(block.units // 2) for block in blocks]
    expected = measured.rest + sum(measured.of(i, len(kept)) for i, kept in enumerate(cut))
    assert measured.share(cut) == pytest.approx(expected / measured.dense)


def test_a_budget_of_latency_below_the_least_says_it(bert, clock):
    for model in (bert, tiny("llama")):
        with pytest.raises(RegraftError, match=r"least that can be reached is 0\.\d") as error:
            pruned(model, latency=0.001, batch=2, sequence_length=16)
        least = float(str(error.value).split()[-1])
        made = pruned(model, latency=least, batch=2, sequence_length=16)
        if model is bert:
            assert all(len(one.kept) <= 4 for one in made.program.metadata["masks"].cuts)
