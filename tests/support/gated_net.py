"""A network with several kinds of gates, and a comparison of its state before and after it is observed."""

from __future__ import annotations

import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map
from visattn_fast import reference

# The names of the gates that run, in order.
KEYS = ["se", "twice[0]", "twice[1]", "cbam.channel", "cbam.spatial"]


class Net(nn.Module):
    """A network with gates, batch norm and dropout; the gate ``twice`` runs twice, and ``idle`` never runs."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.5))
        self.se, self.twice, self.cbam, self.idle = (
            (vf.FastSE(16), vf.FastECA(16), vf.FastCBAM(16), vf.FastSE(16))
            if fused
            else (reference.SE(16), reference.ECA(16), reference.CBAM(16), reference.SE(16))
        )

    def forward(self, x, scale=None):
        x = self.twice(self.twice(self.se(x=self.conv(x))))
        x = self.cbam(x, residual=x, activation="relu") if isinstance(self.cbam, vf.FastCBAM) else self.cbam(x)
        return x if scale is None else x * scale


def net(fused: bool = True) -> Net:
    """Builds the network, with the same parameters each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(fused)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns a batch of the network's input, ``[2, 3, 6, 5]``."""
    return feature_map((2, 3, 6, 5), "nchw", dtype)


def snapshot(model: nn.Module) -> tuple:
    """Returns the state that observation must not change: values, storages, versions, modes, hooks, gradients, RNG."""
    state = {key: (value.data_ptr(), value._version, value.clone()) for key, value in model.state_dict().items()}
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    return state, [m.training for m in model.modules()], hooks, grads, torch.get_rng_state()


def assert_unchanged(before: tuple, model: nn.Module) -> None:
    state, modes, hooks, grads, rng = snapshot(model)
    for key, (pointer, version, value) in before[0].items():
        assert state[key][:2] == (pointer, version), key
        assert torch.equal(state[key][2], value), key
    assert (modes, hooks, grads) == before[1:4]
    assert torch.equal(rng, before[4])
