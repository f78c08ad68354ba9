from types import SimpleNamespace

import pytest
import torch

import regraft
from regraft.frontends.huggingface import capture
from regraft.passes import (
    DEFAULT,
    FINAL,
    Context,
    FuseLinear,
    KVQuant,
    RaiseAttention,
    registry,
    run,
)
from regraft.passes.base import _error
from regraft.program import RegraftError
from regraft.recipe import read_recipe, write_recipe


@pytest.fixture
def program(llama):
    return capture(llama)


def count(program, target):
    return len(program.graph.find_nodes(op="call_function", target=target))


def test_default_passes_report_matches_and_no_error(program):
    report = run(program, DEFAULT, Context())
    assert [row.name for row in report.rows] == [type(step).__name__ for step in DEFAULT]
    matches = {row.name: row.matches for row in report.rows}
    assert (matches["RaiseAttention"], matches["FuseLinear"]) == (2, 4)
    assert (matches["RaiseSoftmax"], matches["RaiseLatent"]) == (0, 0)
    assert all(row.max_abs_error <= 1e-5 for row in report.rows)
    assert count(program, torch.ops.aten.linear.default) == 2 * 4 + 1
    assert count(program, torch.ops.regraft.attention.default) == 0
    assert "RaiseAttention" in str(report)


def test_a_wrong_rotation_is_caught(program, monkeypatch):
    from regraft.passes import rotation

    right = rotation.as_rotation

    def wrong(matrix):
        cos, sin, style, *rest = right(matrix)
        return cos, sin, "interleaved" if style == "half" else "half", *rest

    monkeypatch.setattr(rotation, "as_rotation", wrong)
    with pytest.raises(RegraftError, match="RaiseAttention changed the output"):
        run(program, DEFAULT, Context())


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("deinterleaved", [False, True])
def test_rotation_matrices_are_recognised(style, offset, deinterleaved):
    from regraft.kernels.rotary.reference import rotate
    from regraft.passes.rotation import as_rotation

    if deinterleaved and style == "interleaved":
        pytest.skip("channels go to halves for a rotation of halves only")

    angles = torch.rand(1, 3, 4) + 0.1
    eye = torch.eye(16)[:, None, None].expand(16, 1, 3, 16)
    turned = rotate(eye, angles.cos(), angles.sin(), style == "interleaved", offset)
    matrix = turned.permute(1, 2, 3, 0)
    if deinterleaved:
        order = torch.arange(16)
        order[offset : offset + 8] = offset + torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        matrix = matrix[..., order.argsort()]
    cos, sin, *found = as_rotation(matrix)
    assert found == [style, offset, deinterleaved]
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert as_rotation(matrix * 1.01 + 0.01) is None


def test_a_required_pass_without_match_is_an_error(program):
    step = KVQuant(bits=4)
    with pytest.raises(RegraftError, match="KVQuant matched nothing.*not raised"):
        run(program, [step], Context(), required=[step])


def test_bad_settings_name_the_mend(tmp_path):
    with pytest.raises(RegraftError, match="bits must be"):
        KVQuant(bits=5)
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\npasses: [{KVQant: {bits: 4}}]")
    with pytest.raises(RegraftError, match="did you mean 'KVQuant'"):
        read_recipe(path)
    path.write_text("version: 1\npasses: [{KVQuant: {bit: 4}}]")
    with pytest.raises(RegraftError, match="did you mean 'bits'"):
        read_recipe(path)


def test_recipe_round_trip(tmp_path):
    passes = [FuseLinear(), KVQuant(bits=3, group=32)]
    write_recipe(passes, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == passes


def test_every_pass_states_its_rewrite():
    assert {"CleanUp", "FuseLinear", "KVQuant", "RaiseAttention"} <= set(registry)
    for name, kind in registry.items():
        text = (kind.__doc__ or "").lower()
        assert "->" in text and ("exact" in text or "lossy" in text), name


def test_dump_dir_holds_a_graph_a_pass(llama, tmp_path):
    regraft.compile(llama, [RaiseAttention()][:0], dump_dir=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    steps = [type(step).__name__ for step in (*DEFAULT, *FINAL)]
    assert names == [f"{i:02d}_{step}.txt" for i, step in enumerate(steps, 1)]


def test_diff_shows_the_raised_node(llama):
    before, after = capture(llama), capture(llama)
    run(after, DEFAULT, Context())
    assert "+cached_attention" in before.diff(after)


@pytest.mark.parametrize(
    "dtype, small, large",
    [(torch.float32, 5e-6, 5e-5), (torch.float16, 5e-3, 5e-2), (torch.bfloat16, 0.04, 0.4)],
    ids=str,
)
def test_exact_passes_may_round_otherwise(dtype, small, large):
    class Changed:
        examples, outputs = (), [SimpleNamespace(role="logits", name="logits")]

        def __init__(self, change):
            self.change = change

        def __call__(self):
            return [torch.tensor([1.0 + self.change, -0.5]).to(dtype)]

    reference = [torch.tensor([1.0, -0.5]).to(dtype)]
    assert 0 < _error("Exact", 1e-5, reference, Changed(small)) <= 1.2 * small
    with pytest.raises(RegraftError, match="Exact changed the output logits"):
        _error("Exact", 1e-5, reference, Changed(large))
