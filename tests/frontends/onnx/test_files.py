"""Real ONNX files, as the packages that bring them hold them."""

import pytest

import regraft
from regraft.assets import ONNX_FILES, onnx_file
from regraft.benchmarks.onnx_files import (
    TOLERANCE,
    calls_of,
    cut_difference,
    difference,
    operators,
    run_ours,
    session_of,
)
from regraft.program import RegraftError

SMALL = "akiki-vad"
ON_DATA = {"silero-vad": "If", "silero-vad-ifless": "If", "silero-vad-sequence": "sequence_length"}
"""Files that run operator by operator, and a word of the reason."""


def fetched(name):
    try:
        return onnx_file(name)
    except RegraftError as error:
        if "downloading" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])


def check(name):
    path = fetched(name)
    compiled = regraft.compile(path)
    assert ON_DATA.get(name, "") in compiled.program.metadata.get("python", "")
    assert (name in ON_DATA) == ("python" in compiled.program.metadata)
    session = session_of(path.read_bytes())
    quantised = "DynamicQuantizeLinear" in operators(path)
    for given in calls_of(name):
        theirs = session.run(None, given)
        error = difference(run_ours(compiled, given), theirs)
        if quantised:
            assert cut_difference(path, given) <= TOLERANCE
            assert error < 0.5  # codes flip: the cut file is what must be equal
        else:
            assert error <= TOLERANCE


def test_a_real_file_equals_onnxruntime():
    check(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ONNX_FILES if name != SMALL])
def test_real_files_equal_onnxruntime_at_every_size(name):
    check(name)


def test_unknown_files_are_named():
    with pytest.raises(RegraftError, match="unknown ONNX file 'no'.*akiki-vad"):
        onnx_file("no")


def test_a_file_that_cannot_be_fetched_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RegraftError, match="downloading akiki==0.0.6 with pip failed"):
        onnx_file(SMALL)
    assert not list(tmp_path.rglob("*.onnx"))
