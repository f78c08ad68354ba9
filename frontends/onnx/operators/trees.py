"""Ensembles of decision trees, all rows and trees at once, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.frontends.onnx.operators.ml import ML, labelled
from regraft.frontends.onnx.operators.ml import post_transform as transform
from regraft.frontends.onnx.registry import operator

_MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


class _Forest:
    """Inner nodes and leaves as arrays; a child below zero is leaf -1 - child."""

    def __init__(
        self, roots: Any, features: Any, modes: Any, splits: Tensor, yes: Any, no: Any,
        missing: Any, members: list[Sequence[float]] | None = None,
    ) -> None:  # fmt: skip
        self.roots = torch.tensor(list(roots), dtype=torch.int64)
        self.features, self.modes = torch.tensor(list(features)), torch.tensor(list(modes))
        self.splits, self.missing = splits, torch.tensor(list(missing), dtype=torch.bool)
        self.yes, self.no = torch.tensor(list(yes)), torch.tensor(list(no))
        self.members = members or []

    def leaves(self, x: Tensor) -> Tensor:
        """The leaf [rows, trees] in which each row ends."""
        place = self.roots.expand(len(x), -1)
        while (place >= 0).any():
            node = place.clamp(min=0)
            value = x.gather(1, self.features[node])
            chosen = self._holds(value, node) | (value.isnan() & self.missing[node])
            following = torch.where(chosen, self.yes[node], self.no[node])
            place = torch.where(place >= 0, following, place)
        return -1 - place

    def _holds(self, value: Tensor, node: Tensor) -> Tensor:
        split, mode = self.splits[node], self.modes[node]
        holds = torch.zeros_like(value, dtype=torch.bool)
        tests = (torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne)
        for number, test in enumerate(tests):
            holds = torch.where(mode == number, test(value, split), holds)
        for number, members in enumerate(self.members):
            inside = torch.isin(value, torch.tensor(list(members), dtype=value.dtype))
            holds = torch.where(mode == len(tests) + number, inside, holds)
        return holds


@operator("TreeEnsemble", domain=ML)
def tree_ensemble(
    x, *, aggregate_function=1, leaf_targetids, leaf_weights, membership_values=None, n_targets,
    nodes_falseleafs, nodes_falsenodeids, nodes_featureids, nodes_hitrates=None,
    nodes_missing_value_tracks_true=None, nodes_modes, nodes_splits, nodes_trueleafs,
    nodes_truenodeids, post_transform=0, tree_roots,
):  # fmt: skip
    modes = _numbers(nodes_modes)
    splits = _tensor(nodes_splits)
    members = []
    if membership_values is not None:
        sets = _split_at_nan(_numbers(membership_values))
        for index, mode in enumerate(modes):
            if mode == 6:
                modes[index] = 6 + len(members)
                members.append(sets[len(members)])

    def children(ids, leaf):
        return [-1 - n if is_leaf else n for n, is_leaf in zip(ids, leaf, strict=True)]

    forest = _Forest(
        tree_roots, nodes_featureids, modes, splits,
        children(nodes_truenodeids, nodes_trueleafs),
        children(nodes_falsenodeids, nodes_falseleafs),
        nodes_missing_value_tracks_true or [0] * len(modes), members,
    )  # fmt: skip
    leaves = forest.leaves(x)
    weights = _tensor(leaf_weights)[leaves]
    targets = torch.tensor(list(leaf_targetids))[leaves]
    kind = ("AVERAGE", "SUM", "MIN", "MAX")[aggregate_function]
    scores = _gathered(weights, targets, n_targets, kind, len(forest.roots))
    names = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
    return transform(scores, names[post_transform]).to(x.dtype)


def _gathered(weights: Tensor, targets: Tensor, count: int, kind: str, trees: int) -> Tensor:
    made = weights.new_zeros(len(weights), count)
    if kind in ("MIN", "MAX"):
        way = "amin" if kind == "MIN" else "amax"
        return made.scatter_reduce(1, targets, weights, way, include_self=False)
    made = made.scatter_add(1, targets, weights)
    return made / trees if kind == "AVERAGE" else made


def _tensor(value: Any) -> Tensor:
    return value if torch.is_tensor(value) else value.tensor()


def _numbers(value: Any) -> list:
    return value.flatten().tolist() if torch.is_tensor(value) else value.numbers()


def _split_at_nan(values: list[float]) -> list[list[float]]:
    sets: list[list[float]] = [[]]
    for value in values:
        if value != value:
            sets.append([])
        else:
            sets[-1].append(value)
    return sets


def _old_forest(attributes: dict[str, Any]) -> tuple[_Forest, dict[tuple[int, int], int]]:
    """The forest of the older attributes, which number nodes within each tree."""
    trees, ids = attributes["nodes_treeids"], attributes["nodes_nodeids"]
    modes = attributes["nodes_modes"]
    inner, leaf = {}, {}
    for key, mode in zip(zip(trees, ids, strict=True), modes, strict=True):
        kind = leaf if mode == "LEAF" else inner
        kind[key] = len(kind)

    def child(tree: int, node: int) -> int:
        key = (tree, node)
        return inner[key] if key in inner else -1 - leaf[key]

    rows = [i for i, mode in enumerate(modes) if mode != "LEAF"]
    values = attributes.get("nodes_values_as_tensor")
    values = torch.tensor(list(attributes["nodes_values"])) if values is None else _tensor(values)
    missing = attributes.get("nodes_missing_value_tracks_true") or [0] * len(modes)
    roots = [child(tree, ids[trees.index(tree)]) for tree in dict.fromkeys(trees)]
    if not rows:
        return _Forest(roots, [0], [0], torch.zeros(1), [-1], [-1], [0]), leaf
    forest = _Forest(
        roots,
        [attributes["nodes_featureids"][i] for i in rows],
        [_MODES.index(modes[i]) for i in rows],
        values[rows],
        [child(trees[i], attributes["nodes_truenodeids"][i]) for i in rows],
        [child(trees[i], attributes["nodes_falsenodeids"][i]) for i in rows],
        [missing[i] for i in rows],
    )
    return forest, leaf


def _scores(x: Tensor, attributes: dict[str, Any], kind: str, count: int, way: str) -> Tensor:
    forest, leaf = _old_forest(attributes)
    weights = attributes.get(f"{kind}_weights_as_tensor")
    given = attributes[f"{kind}_weights"] if weights is None else _numbers(weights)
    table = torch.zeros(len(leaf), count, dtype=torch.float64)
    some = torch.zeros(len(leaf), count, dtype=torch.bool)
    ids = zip(
        attributes[f"{kind}_treeids"], attributes[f"{kind}_nodeids"], attributes[f"{kind}_ids"],
        given, strict=True,
    )  # fmt: skip
    for tree, node, target, weight in ids:
        table[leaf[tree, node], target] += weight
        some[leaf[tree, node], target] = True
    wide = x if x.is_floating_point() else x.float()
    found = forest.leaves(wide)
    values, given_here = table[found], some[found]
    if way in ("MIN", "MAX"):
        far = torch.inf if way == "MIN" else -torch.inf
        values = torch.where(given_here, values, far)
        total = values.amin(1) if way == "MIN" else values.amax(1)
        total = torch.where(total.isinf(), 0, total)
    else:
        total = values.sum(1)
        if way == "AVERAGE":
            total = total / len(forest.roots)
    base = attributes.get("base_values_as_tensor")
    values_at_start = attributes.get("base_values") if base is None else _numbers(base)
    return total + torch.tensor(list(values_at_start)) if values_at_start else total


@operator("TreeEnsembleRegressor", domain=ML)
def tree_ensemble_regressor(
    x, *, n_targets=1, aggregate_function="SUM", post_transform="NONE", **attributes
):
    scores = _scores(x, attributes, "target", n_targets, aggregate_function)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return transform(scores.to(dtype), post_transform)


@operator("TreeEnsembleClassifier", domain=ML)
def tree_ensemble_classifier(
    x, *, classlabels_int64s=None, classlabels_strings=None, post_transform="NONE", **attributes
):
    count = len(classlabels_int64s or classlabels_strings)
    binary = count == 2 and len(set(attributes["class_ids"])) == 1
    scores = _scores(x, attributes, "class", count, "SUM").float()
    if binary:
        one = scores[:, max(attributes["class_ids"])][:, None]
        if post_transform in ("LOGISTIC", "NONE"):
            positive = transform(one, post_transform)
            other = (
                1 - positive if post_transform == "LOGISTIC" or _shares(attributes) else -positive
            )
            made = torch.cat([other, positive], -1)
            found = (one.squeeze(-1) > (0.5 if _shares(attributes) else 0.0)).to(torch.int64)
            return labelled(found, classlabels_int64s, classlabels_strings), made
        scores = torch.cat([-one, one], -1)
    found = scores.argmax(-1)
    return labelled(found, classlabels_int64s, classlabels_strings), transform(
        scores, post_transform
    )


def _shares(attributes: dict[str, Any]) -> bool:
    """Whether the weights of a binary classifier are probabilities."""
    weights = attributes.get("class_weights")
    return weights is not None and min(weights) >= 0
