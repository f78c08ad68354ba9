import pytest

import regraft
from regraft.benchmarks.weights import MODELS, weight_bits


def test_bits_of_a_weight_hold_scales(llama):
    assert weight_bits(regraft.compile(llama, target="reference")) == 32
    for bits, group, wanted in ((4, 32, 5), (8, 32, 8.5), (8, None, 8.25)):
        quantised = [regraft.WeightQuant(bits=bits, group=group)]
        compiled = regraft.compile(llama, quantised, target="reference")
        assert weight_bits(compiled) == pytest.approx(wanted, rel=0.05)


def test_models_are_settings_of_the_pass():
    assert [regraft.WeightQuant(**settings).bits for settings in MODELS.values()] == [8, 4, 4]
