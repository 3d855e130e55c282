"""Recipes: how much of a module the fused class may replace, and what is left alone."""

from __future__ import annotations

import pytest
from torch import nn

import visattn_fast as vf
from outside import library
from visattn_fast.integrations.recipe import Recipe
from visattn_fast.integrations.se_like import GATES, se_layers
from visattn_fast.reference.as_built import LINEAR, RELU, Layers, why_not


class Fused(nn.Sequential):
    """Stands for the layers of a perceptron; its passes stand for the first of them."""

    PARTS = Layers({"0": LINEAR})
    LAYERS = Layers({"0": LINEAR, "1": RELU})


class OwnSigmoid(nn.Module):
    """Another library's sigmoid."""


RECIPE = Recipe(nn.Sequential, Fused, "se", "gate_channels")


@pytest.mark.parametrize(
    ("layers", "op", "reason"),
    [
        ([nn.Linear(2, 2), nn.ReLU()], "se", ""),
        ([nn.Linear(2, 2), nn.GELU()], "gate_channels", "1 is GELU, not ReLU"),
        ([nn.Conv2d(2, 2, 1), nn.ReLU()], "", "0 is Conv2d, not Linear"),
    ],
    ids=["known layers", "other layers", "other parts"],
)
def test_plan_fuses_as_much_as_is_as_built(layers, op, reason):
    assert RECIPE.plan(nn.Sequential(*layers)) == (op, reason)


def test_module_without_passes_is_left_alone():
    assert Recipe(nn.Sequential, Fused, "se").plan(nn.Sequential(nn.Linear(2, 2), nn.GELU())) == (
        "",
        "1 is GELU, not ReLU",
    )


def test_recipe_may_refuse_a_module():
    refusing = Recipe(nn.Sequential, Fused, "se", "gate_channels", lambda module: "unknown version")
    assert refusing.plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ("", "unknown version")


@pytest.mark.parametrize(
    ("options", "op"), [({}, "se"), ({"act_layer": nn.GELU}, "gate_channels")], ids=["known layers", "other layers"]
)
def test_one_op_comes_before_own_layers(options, op):
    """The layers of timm's SEModule are replaced if they are known, and called if not."""
    (swapped,) = vf.accelerate(library("timm.layers").SEModule(32, **options)).swapped
    assert swapped.op == op
    assert bool(swapped.note) is (op == "gate_channels")


def test_se_layers_know_other_sigmoids_by_argument_alone():
    """A library that adds its own sigmoid changes nothing for the others."""
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), OwnSigmoid())
    names = ("0", "1", "2", "3")
    known = Layers(se_layers(*names, {**GATES, OwnSigmoid: "sigmoid"}, linear=LINEAR))
    assert why_not(module, known) == ""
    assert why_not(module, Layers(se_layers(*names, linear=LINEAR))) == "3 is OwnSigmoid, not Hardsigmoid or Sigmoid"
