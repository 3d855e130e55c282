"""Bad input of attention over sequences raises an error that names it."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from sequences import LENGTHS, D, K, N, Q, build
from visattn_fast import reference

X, S = torch.randn(N, Q, D), torch.randn(N, K, D)
BAD = [
    ("layer", {}, lambda m: m(X[0]), ValueError, r"query must have shape \[N, L, 6\] with L >= 1, got \[5, 6\]"),
    ("layer", {}, lambda m: m(X, S[:2]), ValueError, r"key must have the batch of query, 3, got \[2, 7, 6\]"),
    ("layer", {}, lambda m: m(X, S, X), ValueError, r"value must have as many positions as key, 7, got \[3, 5, 6\]"),
    ("layer", {}, lambda m: m(X.long()), TypeError, r"query must have a floating-point dtype, got torch.int64"),
    ("layer", {}, lambda m: m(X, mask=torch.ones(Q, Q)), TypeError, r"mask must be a bool tensor.*got torch.float32"),
    (
        "layer",
        {},
        lambda m: m(X, mask=torch.ones(Q, K) > 0),
        ValueError,
        r"mask must be broadcastable to \[3, 5, 5\], got \[5, 7\]",
    ),
    ("layer", {}, lambda m: m(X, S.to("meta")), ValueError, r"key must be on the device of the queries, cpu, got meta"),
    (
        "pooling",
        {},
        lambda m: m(X, S, S),
        ValueError,
        r"keys must have shape \[3, 5, 6, K\] or .*got \[3, 7, 6\]",
    ),
    ("pooling", {}, lambda m: m(X[0, 0], S[0, 0], S[0, 0, :2]), ValueError, r"values must be as many as keys, 6"),
    ("pooling", {}, lambda m: m(torch.tensor(1.0), S, S), ValueError, r"queries must have shape \[..., Q\]"),
    (
        "sequence",
        {"score": "dot"},
        lambda m: m(X, S, key_lengths=torch.ones(3)),
        TypeError,
        r"key_lengths must be an int32 or int64 tensor, got torch.float32",
    ),
    (
        "sequence",
        {"score": "dot"},
        lambda m: m(X, S, key_lengths=LENGTHS[:2]),
        ValueError,
        r"key_lengths must have shape \[3\], got \[2\]",
    ),
    (
        "sequence",
        {"score": "dot"},
        lambda m: m(X, S, position=torch.ones(3, 5)),
        ValueError,
        r"position must be None without a window",
    ),
    (
        "sequence",
        {"score": "dot", "window": 2},
        lambda m: m(X, S, position=torch.ones(3, 4)),
        ValueError,
        r"position must be broadcastable to \[3, 5\], got \[3, 4\]",
    ),
]


@pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])
@pytest.mark.parametrize(("name", "options", "call", "error", "message"), BAD)
def test_bad_call_raises(name, options, call, error, message, which):
    with pytest.raises(error, match=message):
        call(build(name, **options)[which])


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: reference.AttentionLayer(8, 0, 8), r"d_k must be a positive int, got 0"),
        (lambda: reference.SequenceAttention("cosine", 8), r"score must be one of .*got 'cosine'"),
        (lambda: reference.SequenceAttention("dot", 8, 6), r"key_size must be query_size=8 for the dot score, got 6"),
        (lambda: vf.FastSequenceAttention("dot", 8, window=0), r"window must be a positive int, got 0"),
        (lambda: reference.SequenceAttention("dot", 8, predictive=True), r"a predicted position needs a window"),
    ],
)
def test_bad_constructor_argument_raises(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()
