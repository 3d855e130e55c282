"""Library functions that a fused class repeats: where they differ from the known version, the library's own serve."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from blocks import GATED, inputs
from outside import library
from visattn_fast.integrations.accelerate import known
from visattn_fast.integrations.recipe import Repeated, source_hash

NAMES = [name for name in GATED if not name.startswith("AttentionBlock")]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def built(name: str) -> tuple[nn.Module, tuple[Repeated, ...]]:
    """Returns the module in eval mode, and what the fused classes of it and of the gates inside it repeat."""
    torch.manual_seed(0)
    module = GATED[name]().double().eval()
    recipes = known()
    found = [recipes[type(m)].repeats for m in module.modules() if type(m) in recipes]
    return module, tuple({(r.owner, r.name): r for repeats in found for r in repeats}.values())


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a replacement. Its source is another, although it names the wrapped function as decorators do."""

    @functools.wraps(function)
    def other(*args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        return 1.5 * y if isinstance(y, torch.Tensor) and y.is_floating_point() else y

    return other


@pytest.mark.parametrize("name", NAMES)
def test_known_versions_are_swapped(name):
    """The installed libraries have the functions that are known."""
    module, repeats = built(name)
    assert repeats
    assert [r.why_not() for r in repeats] == [""] * len(repeats)
    assert vf.accelerate(module).swapped


@pytest.mark.parametrize("name", NAMES)
def test_function_patched_before_is_not_repeated(name, monkeypatch):
    """The module is left alone; the report says why."""
    module, repeats = built(name)
    for repeated in repeats:
        with monkeypatch.context() as patch:
            patch.setattr(repeated.owner, repeated.name, scaled(repeated.function))
            fast = copy.deepcopy(module)
            found = vf.accelerate(fast)
            owner = repeated.owner.__name__.rpartition(".")[2]
            assert f"unknown version of {owner}.{repeated.name}" in {s.reason for s in found.skipped}
            torch.testing.assert_close(fast(inputs(name)), module(inputs(name)), rtol=1e-9, atol=1e-9)
        assert not vf.accelerate(copy.deepcopy(module)).skipped


COMPILED = ("timm SEModule", "timm CbamModule", "timm Swin", "monai SEBlock")


@pytest.mark.parametrize(("name", "compiled"), [*((n, False) for n in NAMES), *((n, True) for n in COMPILED)])
def test_function_patched_after_is_called(name, compiled, monkeypatch):
    """The accelerated module equals the patched original, and says so; as before when the patch is taken off."""
    module, repeats = built(name)
    fast, x = copy.deepcopy(module), inputs(name)
    found = vf.accelerate(fast)
    want, seen = module(x), 0

    def call() -> torch.Tensor:
        torch._dynamo.reset()
        return torch.compile(fast, backend="eager")(x) if compiled else fast(x)

    torch.testing.assert_close(call(), want, rtol=1e-9, atol=1e-9)
    for repeated in repeats:
        with monkeypatch.context() as patch:
            patch.setattr(repeated.owner, repeated.name, scaled(repeated.function))
            patched = module(x)
            seen += not torch.equal(patched, want)
            torch.testing.assert_close(call(), patched, rtol=1e-9, atol=1e-9)
            assert any("unknown version of" in s.note and s.op == "its own forward" for s in found.swapped)
        torch.testing.assert_close(call(), want, rtol=1e-9, atol=1e-9)
    assert seen


def test_other_version_of_the_same_mathematics_is_known():
    """Comments, docstrings and annotations make no other version; a function without source is unknown."""

    def one(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Scales."""
        return self.act(x) * x  # gate

    first = source_hash(one)

    def one(self, x):
        return self.act(x) * x

    assert source_hash(one) == first != ""

    def one(self, x):
        return self.act(x) + x

    assert source_hash(one) not in (first, "")
    made: dict[str, Any] = {}
    exec("def one(self, x):\n    return self.act(x) * x", made)
    assert source_hash(made["one"]) == source_hash(torch.relu) == source_hash(None) == ""


def test_patch_of_a_gate_inside_a_block_keeps_the_norm_apart(monkeypatch):
    """In inference a block folds its norm into its gate; a patched gate is called."""
    module, _ = built("timm Bottleneck, se")
    gate = library("timm.layers").SEModule
    fast, x = copy.deepcopy(module), inputs("")
    vf.accelerate(fast)
    monkeypatch.setattr(gate, "forward", scaled(gate.forward))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), module(x), rtol=1e-9, atol=1e-9)
        assert "SEModule.forward was replaced" in vf.explain(fast, x).called_layers.values()
