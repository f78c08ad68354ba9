"""Classical machine learning (ai.onnx.ml), trees apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.frontends.onnx.operators.casts import cast
from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import Host, is_strings, strings

ML = "ai.onnx.ml"


@operator("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(x, indices):
    if is_strings(x):
        return strings(x.values[..., indices.flatten().numpy()])
    made = x.index_select(-1, indices.flatten())
    return made[None] if made.dim() == 1 else made


@operator("Binarizer", domain=ML)
def binarizer(x, *, threshold=0.0):
    return (x > threshold).to(x.dtype)


@operator("Scaler", domain=ML)
def scaler(x, *, offset=(0.0,), scale=(1.0,)):
    return (x.float() - torch.tensor(list(offset))) * torch.tensor(list(scale))


@operator("Normalizer", domain=ML)
def normalizer(x, *, norm="MAX"):
    x = x.float()
    size = {
        "MAX": lambda: x.amax(-1, keepdim=True),
        "L1": lambda: x.abs().sum(-1, keepdim=True),
        "L2": lambda: x.square().sum(-1, keepdim=True).sqrt(),
    }[norm]()
    return torch.where(size == 0, x, x / size)


@operator("Imputer", domain=ML)
def imputer(
    x, *, imputed_value_floats=None, imputed_value_int64s=None, replaced_value_float=0.0,
    replaced_value_int64=0,
):  # fmt: skip
    whole = not x.is_floating_point()
    values = torch.tensor(imputed_value_int64s if whole else imputed_value_floats, dtype=x.dtype)
    old = replaced_value_int64 if whole else replaced_value_float
    return torch.where(x.isnan() if old != old else x == old, values, x)


@operator("FeatureVectorizer", domain=ML)
def feature_vectorizer(*inputs, inputdimensions):
    rows = [x.float() if x.dim() > 1 else x.float()[None] for x in inputs]
    return torch.cat([r[:, :n] for r, n in zip(rows, inputdimensions, strict=True)], -1)


@operator("OneHotEncoder", domain=ML)
def one_hot_encoder(x, *, cats_int64s=None, cats_strings=None, zeros=1):
    if is_strings(x):
        hot = x.values[..., None] == np.array(cats_strings, dtype=object)
        return torch.from_numpy(np.asarray(hot, dtype=np.float32))
    return (x[..., None].to(torch.int64) == torch.tensor(cats_int64s)).float()


@operator("CategoryMapper", domain=ML)
def category_mapper(x, *, cats_int64s, cats_strings, default_int64=-1, default_string="_Unused"):
    if is_strings(x):
        table = dict(zip(cats_strings, cats_int64s, strict=True))
        return torch.tensor([table.get(v, default_int64) for v in x.numbers()]).reshape(x.shape)
    names = dict(zip(cats_int64s, cats_strings, strict=True))
    found = [names.get(v, default_string) for v in x.flatten().tolist()]
    return strings(np.array(found, dtype=object).reshape(tuple(x.shape)))


@operator("LabelEncoder", domain=ML)
def label_encoder(
    x, *, default_float=-0.0, default_int64=-1, default_string="_Unused", default_tensor=None,
    keys_floats=None, keys_int64s=None, keys_strings=None, keys_tensor=None, values_floats=None,
    values_int64s=None, values_strings=None, values_tensor=None, classes_strings=None,
):  # fmt: skip
    if classes_strings:
        keys_strings, values_int64s = classes_strings, range(len(classes_strings))
        if not is_strings(x):
            keys_strings, keys_int64s = None, values_int64s
            values_int64s, values_strings = None, classes_strings
    keys = _listed(keys_tensor, keys_strings, keys_int64s, keys_floats)
    values = _listed(values_tensor, values_strings, values_int64s, values_floats)
    default: Any = default_float
    dtype: Any = torch.float32
    if values_tensor is not None:
        default = _listed(default_tensor)[0] if default_tensor is not None else None
        dtype = values_tensor.dtype
        if default is None:
            default = "_Unused" if dtype is str else (-0.0 if dtype.is_floating_point else -1)
    elif values_strings is not None:
        default, dtype = default_string, str
    elif values_int64s is not None:
        default, dtype = default_int64, torch.int64
    table = {_key(k): v for k, v in zip(keys, values, strict=True)}
    found = [table.get(_key(v), default) for v in _listed(x)]
    if dtype is str:
        return strings(np.array(found, dtype=object).reshape(tuple(x.shape)))
    return torch.tensor(found, dtype=dtype).reshape(tuple(x.shape))


def _key(value: Any) -> Any:
    return "nan" if value != value else value


def _listed(*options: Any) -> list:
    chosen = next(value for value in options if value is not None)
    if isinstance(chosen, Host):
        return chosen.numbers()
    return chosen.flatten().tolist() if torch.is_tensor(chosen) else list(chosen)


@operator("CastMap", domain=ML)
def cast_map(x, *, cast_to="TO_FLOAT", map_form="DENSE", max_map=1):
    keys = sorted(x)
    values = [x[key] for key in keys]
    if map_form == "SPARSE":
        values = [x.get(i, 0) for i in range(max_map)]
    to = {"TO_FLOAT": 1, "TO_INT64": 7, "TO_STRING": 8}[cast_to]
    held = strings(values) if values and isinstance(values[0], str) else torch.tensor(values)
    made = cast(held, to=to)
    return strings(made.values[None]) if isinstance(made, Host) else made[None]


@operator("DictVectorizer", domain=ML)
def dict_vectorizer(x, *, int64_vocabulary=None, string_vocabulary=None):
    return torch.tensor([[x.get(key, 0) for key in string_vocabulary or int64_vocabulary]])


@operator("ZipMap", domain=ML)
def zip_map(x, *, classlabels_int64s=None, classlabels_strings=None):
    labels = list(classlabels_strings or classlabels_int64s)
    return [dict(zip(labels, row, strict=True)) for row in x.tolist()]


def post_transform(scores: Tensor, kind: str) -> Tensor:
    if kind == "LOGISTIC":
        return torch.sigmoid(scores)
    if kind == "SOFTMAX":
        return torch.softmax(scores, -1)
    if kind == "SOFTMAX_ZERO":
        some = torch.where(scores == 0, -torch.inf, scores)
        return torch.where(scores == 0, 0, torch.softmax(some, -1)).nan_to_num()
    if kind == "PROBIT":
        return 2**0.5 * torch.erfinv(2 * scores - 1)
    return scores


_transform = post_transform


def labelled(found: Tensor, integers: Any, names: Any) -> Tensor | Host:
    """The class labels at these positions."""
    if names:
        return strings(np.array(names, dtype=object)[found.numpy()])
    return torch.tensor(list(integers))[found] if integers else found


@operator("LinearRegressor", domain=ML)
def linear_regressor(x, *, coefficients, intercepts=None, post_transform="NONE", targets=1):
    weight = torch.tensor(list(coefficients)).reshape(targets, -1)
    bias = torch.tensor(list(intercepts)) if intercepts else None
    return _transform(F.linear(x.float(), weight, bias), post_transform)


@operator("LinearClassifier", domain=ML)
def linear_classifier(
    x, *, classlabels_ints=None, classlabels_strings=None, coefficients, intercepts=None,
    multi_class=0, post_transform="NONE",
):  # fmt: skip
    x = x.float() if x.dim() > 1 else x.float()[None]
    weight = torch.tensor(list(coefficients)).reshape(-1, x.shape[-1])
    scores = F.linear(x, weight, torch.tensor(list(intercepts)) if intercepts else None)
    count = len(classlabels_ints or classlabels_strings or ())
    if scores.shape[-1] == 1 and count == 2:
        made = _transform(scores, post_transform)
        probability = post_transform == "LOGISTIC"
        other = 1 - made if probability else -made
        found = (made.squeeze(-1) > (0.5 if probability else 0)).to(torch.int64)
        made = torch.cat([other, made], -1)
    else:
        found = scores.argmax(-1)
        made = _transform(scores, post_transform)
    return labelled(found, classlabels_ints, classlabels_strings), made


def _kernel(x: Tensor, vectors: Tensor, kind: str, params: Any) -> Tensor:
    gamma, offset, degree = params or (0.0, 0.0, 0.0)
    product = x @ vectors.t()
    if kind == "RBF":
        return torch.exp(-gamma * torch.cdist(x.double(), vectors.double()).square()).float()
    if kind == "POLY":
        return (gamma * product + offset) ** degree
    return torch.tanh(gamma * product + offset) if kind == "SIGMOID" else product


@operator("SVMRegressor", domain=ML)
def svm_regressor(
    x, *, coefficients, kernel_params=None, kernel_type="LINEAR", n_supports=0, one_class=0,
    post_transform="NONE", rho, support_vectors=None,
):  # fmt: skip
    x, weight = x.float(), torch.tensor(list(coefficients))
    if n_supports:
        vectors = torch.tensor(list(support_vectors)).reshape(n_supports, -1)
        y = _kernel(x, vectors, kernel_type, kernel_params) @ weight[:, None] + rho[0]
    else:
        y = x @ weight[:, None] + rho[0]
    if one_class:
        y = torch.where(y > 0, 1.0, -1.0)
    return _transform(y, post_transform)


@operator("SVMClassifier", domain=ML)
def svm_classifier(
    x, *, classlabels_ints=None, classlabels_strings=None, coefficients, kernel_params=None,
    kernel_type="LINEAR", post_transform="NONE", prob_a=None, prob_b=None, rho,
    support_vectors=None, vectors_per_class=None,
):  # fmt: skip
    x = x.float()
    classes = len(classlabels_ints or classlabels_strings)
    if not vectors_per_class:
        weight = torch.tensor(list(coefficients)).reshape(classes, -1)
        scores = x @ weight.t() + rho[0]
        found = scores.argmax(-1)
        return labelled(found, classlabels_ints, classlabels_strings), _transform(
            scores, post_transform
        )
    total = sum(vectors_per_class)
    vectors = torch.tensor(list(support_vectors)).reshape(total, -1)
    weight = torch.tensor(list(coefficients)).reshape(classes - 1, total)
    similar = _kernel(x, vectors, kernel_type, kernel_params)
    starts = np.cumsum([0, *vectors_per_class])
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    columns, votes = [], torch.zeros(len(x), classes)
    for number, (i, j) in enumerate(pairs):
        first, second = slice(*starts[i : i + 2]), slice(*starts[j : j + 2])
        score = similar[:, first] @ weight[j - 1, first] + similar[:, second] @ weight[i, second]
        score = score + rho[number]
        columns.append(score)
        votes[:, i] += (score > 0).float()
        votes[:, j] += (score <= 0).float()
    scores = torch.stack(columns, -1)
    if prob_a:
        made = _probabilities(scores, pairs, classes, prob_a, prob_b)
        return labelled(made.argmax(-1), classlabels_ints, classlabels_strings), _transform(
            made, post_transform
        )
    found = votes.argmax(-1)
    if classes == 2:
        scores = torch.cat([scores, -scores], -1)
    return labelled(found, classlabels_ints, classlabels_strings), _transform(
        scores, post_transform
    )


def _probabilities(scores: Tensor, pairs: list, classes: int, a: Any, b: Any) -> Tensor:
    """Class probabilities that agree best with the pairs' (Wu, Lin and Weng, 2004)."""
    logits = scores * torch.tensor(list(a)) + torch.tensor(list(b))
    one = torch.sigmoid(-logits).clamp(1e-7, 1 - 1e-7).double()
    r = torch.zeros(len(scores), classes, classes, dtype=torch.float64)
    for number, (i, j) in enumerate(pairs):
        r[:, i, j], r[:, j, i] = one[:, number], 1 - one[:, number]
    if classes == 2:
        return torch.stack([r[:, 0, 1], r[:, 1, 0]], -1).float()
    q = -r * r.transpose(1, 2)
    q = q + torch.diag_embed(r.square().sum(1))
    system = torch.zeros(len(scores), classes + 1, classes + 1, dtype=torch.float64)
    system[:, :classes, :classes], system[:, classes, :classes] = q, 1
    system[:, :classes, classes] = 1
    right = torch.zeros(len(scores), classes + 1, dtype=torch.float64)
    right[:, classes] = 1
    return torch.linalg.solve(system, right)[:, :classes].float()
