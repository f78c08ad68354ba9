"""ONNX's own node cases."""

import random
from itertools import islice

import pytest

from regraft.benchmarks.onnx_import import cases, check, family_of

EACH, FLOOR = 8, 1860
INEXACT = ("bernoulli", "dropout", "fp16", "align_corners", "dft_inverse")
"""Parts of names of cases that depend on chance or on the last bits of half precision."""


def sample():
    """A few cases of each family."""
    families = {}
    known = list(cases())
    random.Random(0).shuffle(known)
    for case in known:
        if not any(part in case.name for part in INEXACT):
            families.setdefault(family_of(case)[0], []).append(case)
    return [case for held in families.values() for case in islice(held, EACH)]


def failures(known):
    found = {}
    for case in known:
        try:
            check(case)
        except Exception as error:
            found[case.name] = str(error)[:200]
    return found


def test_a_sample_of_every_family_gives_the_expected_outputs():
    known = sample()
    assert len(known) > 120
    assert failures(known) == {}


@pytest.mark.slow
def test_nearly_all_cases_give_the_expected_outputs():
    known = cases()
    wrong = failures(known)
    assert len(known) - len(wrong) >= min(FLOOR, 0.985 * len(known)), wrong
