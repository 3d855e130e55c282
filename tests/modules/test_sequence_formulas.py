"""The reference attention over sequences computes its published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from sequences import SCORES, D, K, N, Q, build, inputs, padding
from visattn_fast import reference


def test_layer_is_scaled_dot_product_attention():
    plain, _ = build("layer")
    q, k, v = inputs("layer")
    out, weights = plain(q, k, v)
    scores = plain.W_q(q) @ plain.W_k(k).transpose(1, 2) / math.sqrt(5)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ plain.W_v(v))
    torch.testing.assert_close(plain(q)[0], plain(q, q, q)[0])
    assert {n: tuple(t.shape) for n, t in plain.state_dict().items()} == {
        "W_q.weight": (5, D),
        "W_k.weight": (5, D),
        "W_v.weight": (8, D),
    }


def test_layer_matches_pytorchs_multihead_attention():
    """`nn.MultiheadAttention` has one head and the same weights; the keys are padded."""
    plain = reference.AttentionLayer(D, D, D)
    twin = torch.nn.MultiheadAttention(D, 1, bias=False, batch_first=True)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([plain.W_q.weight, plain.W_k.weight, plain.W_v.weight]))
        twin.out_proj.weight.copy_(torch.eye(D))
    x, lengths = torch.randn(N, K, D), torch.tensor([7, 4, 1])
    expected = twin(x, x, x, key_padding_mask=~padding(lengths)[:, 0])
    found = plain(x, x, mask=padding(lengths))
    torch.testing.assert_close(found, expected)


def test_pooling_is_nadaraya_watson():
    plain, fast = build("pooling")
    q, k, v = inputs("pooling")
    kernel = torch.exp(-(((q[:, :, None] - k[:, None]) * plain.w) ** 2) / 2)
    expected = (kernel * v[:, None]).sum(-1) / kernel.sum(-1)
    for module in (plain, fast):
        torch.testing.assert_close(module(q, k, v)[0], expected)
        own = k[:, None].expand(N, Q, K), v[:, None].expand(N, Q, K)
        torch.testing.assert_close(module(q, *own)[0], expected)
        torch.testing.assert_close(module(q[0], k[0], own[1][0])[0], expected[0])
    assert plain.state_dict().keys() == {"w"}


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_formulas(score):
    plain, _ = build("sequence", score=score)
    q, k, v = inputs(score)
    scores = torch.empty(N, Q, K)
    for i in range(Q):
        for j in range(K):
            a, b = q[:, i], k[:, j]
            if score == "concat":
                scores[:, i, j] = plain.v(torch.tanh(plain.W_q(a) + plain.W_k(b)))[:, 0]
            else:
                scores[:, i, j] = ((plain.W(a) if score == "general" else a) * b).sum(-1)
    context, weights = plain(q, k, v)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(context, weights @ v)
    keys = {"dot": set(), "general": {"W.weight"}, "concat": {"W_q.weight", "W_k.weight", "v.weight"}}
    assert plain.state_dict().keys() == keys[score]


def test_window_is_local_attention():
    """local-m has the keys within +-D of the query's index or of a given position; local-p has a Gaussian around p."""
    plain, _ = build("sequence", score="dot", window=2)
    q, k, v = inputs("dot")
    inside = (torch.arange(K) - torch.arange(Q)[:, None]).abs() <= 2
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    torch.testing.assert_close(plain(q, k, v)[1], scores.softmax(-1))
    position = torch.tensor([[0.5], [3.0], [6.0]])
    inside = (torch.arange(K) - position[..., None]).abs() <= 2
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    torch.testing.assert_close(plain(q, k, v, position=position)[1], scores.softmax(-1))

    plain, _ = build("sequence", score="dot", window=2, predictive=True)
    lengths = torch.tensor([7, 4, 2])
    p = lengths[:, None] * torch.sigmoid(plain.v_p(torch.tanh(plain.W_p(q)))[..., 0])
    distance = torch.arange(K) - p[..., None]
    inside = (distance.abs() <= 2) & padding(lengths)
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    expected = scores.softmax(-1) * torch.exp(-(distance**2) / 2)
    torch.testing.assert_close(plain(q, k, v, key_lengths=lengths)[1], expected)
