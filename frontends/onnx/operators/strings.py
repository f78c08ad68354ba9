"""Operators on strings; torch has none, so numpy's object arrays hold them."""

from __future__ import annotations

import re

import numpy as np
import torch

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import Host, from_numpy, strings


@operator("StringConcat")
def string_concat(a, b):
    return strings(np.asarray(a.values + b.values, dtype=object))


@operator("RegexFullMatch")
def regex_full_match(x, *, pattern):
    found = [re.fullmatch(pattern, text) is not None for text in x.numbers()]
    return torch.tensor(found, dtype=torch.bool).reshape(x.shape)


@operator("StringSplit")
def string_split(x, *, delimiter=None, maxsplit=None):
    limit = -1 if maxsplit is None else maxsplit
    parts = [text.split(delimiter or None, limit) if text else [] for text in x.numbers()]
    width = max(map(len, parts), default=0)
    rows = np.empty((len(parts), width), dtype=object)
    for row, words in zip(rows, parts, strict=True):
        row[:] = words + [""] * (width - len(words))
    counts = torch.tensor([len(words) for words in parts], dtype=torch.int64)
    return strings(rows.reshape(*x.shape, width)), counts.reshape(x.shape)


@operator("StringNormalizer")
def string_normalizer(
    x, *, case_change_action="NONE", is_case_sensitive=0, locale=None, stopwords=()
):
    change = {"LOWER": str.lower, "UPPER": str.upper, "NONE": str}[case_change_action]
    same = str if is_case_sensitive else str.lower
    stopped = {same(word) for word in stopwords or ()}
    kept = [change(text) for text in x.numbers() if same(text) not in stopped] or [""]
    return strings(np.array(kept, dtype=object).reshape(*x.shape[:-1], -1))


@operator("TfIdfVectorizer")
def tf_idf_vectorizer(
    x, *, max_gram_length, max_skip_count, min_gram_length, mode, ngram_counts, ngram_indexes,
    pool_int64s=None, pool_strings=None, weights=None,
):  # fmt: skip
    pool = list(pool_int64s or pool_strings)
    grams, index = {}, 0
    for length, start in enumerate(ngram_counts, 1):
        end = ngram_counts[length] if length < len(ngram_counts) else len(pool)
        for place in range(start, end, length):
            grams[tuple(pool[place : place + length])] = index
            index += 1
    rows = x.numbers() if isinstance(x, Host) else x.tolist()
    if len(x.shape) == 1:
        rows = [rows]
    elif isinstance(x, Host):
        rows = x.values.tolist()
    counts = np.zeros((len(rows), max(ngram_indexes) + 1), dtype=np.float32)
    factors = np.zeros(counts.shape[1], dtype=np.float32)
    for gram in grams.values():
        factors[ngram_indexes[gram]] = weights[gram] if weights else 1.0
    for row, total in zip(rows, counts, strict=True):
        for gram in _grams(row, min_gram_length, max_gram_length, max_skip_count):
            if gram in grams:
                total[ngram_indexes[grams[gram]]] += 1
    if mode == "IDF":
        counts = np.minimum(counts, 1)
    made = counts if mode == "TF" else counts * factors
    return from_numpy(made[0] if len(x.shape) == 1 else made)


def _grams(row: list, shortest: int, longest: int, skips: int) -> list[tuple]:
    made = []
    for length in range(shortest, longest + 1):
        for gap in range(1, (skips if length > 1 else 0) + 2):
            reach = (length - 1) * gap
            made += [tuple(row[i : i + reach + 1 : gap]) for i in range(len(row) - reach)]
    return made
