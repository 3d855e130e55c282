"""The order of recipes: the first one that serves a module wins."""

from __future__ import annotations

import pytest
from torch import nn

import visattn_fast as vf
from outside import library
from visattn_fast.integrations.recipe import Recipe, first_match, require_layers
from visattn_fast.integrations.se_like import GATES, se_layers


class First(nn.Sequential):
    pass


class Second(nn.Sequential):
    pass


class OwnSigmoid(nn.Module):
    """Another library's sigmoid."""


STRICT = Recipe(nn.Sequential, First, "se", require_layers({"0": (nn.ReLU,)}))
LENIENT = Recipe(nn.Sequential, Second, "gate_channels")


def test_first_match_wins():
    module = nn.Sequential(nn.ReLU())
    assert first_match([STRICT, LENIENT], module) == (STRICT, "")
    assert first_match([LENIENT, STRICT], module) == (LENIENT, "")


def test_later_recipe_serves_what_the_first_refuses():
    assert first_match([STRICT, LENIENT], nn.Sequential(nn.GELU())) == (LENIENT, "")


def test_last_reason_is_given_if_none_matches():
    other = Recipe(nn.Sequential, Second, "eca", require_layers({"0": (nn.SiLU,)}))
    assert first_match([STRICT, other], nn.Sequential(nn.GELU())) == (other, "0 is GELU, not SiLU")


@pytest.mark.parametrize(
    ("options", "op"), [({}, "se"), ({"act_layer": nn.GELU}, "gate_channels")], ids=["known layers", "other layers"]
)
def test_one_op_comes_before_own_layers(options, op):
    """timm's SEModule has a recipe that replaces its layers, then one that runs them as they are."""
    (swapped,) = vf.accelerate(library("timm.layers").SEModule(32, **options)).swapped
    assert swapped.op == op


def test_se_layers_know_other_sigmoids_by_argument_alone():
    """A library that adds its own sigmoid changes nothing for the others."""
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), OwnSigmoid())
    assert se_layers("0", "1", "2", "3", {**GATES, OwnSigmoid: "sigmoid"})(module) == ""
    assert se_layers("0", "1", "2", "3")(module) == "3 is OwnSigmoid, not Sigmoid or Hardsigmoid"
