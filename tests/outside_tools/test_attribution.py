"""captum attributes through gates, and to the layers inside, as in plain networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from outside import library
from twins import TWINS, images, twins

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("DeepLift", "GuidedBackprop", "Deconvolution")
CALLED_TWICE = ("cbam", "timm_cbam", "timm_coord")  # a layer is, which LRP refuses
OF_LAYERS = ("LayerActivation", "LayerGradCam", "LayerGradientXActivation", "LayerDeepLift")


def attributions(method, model, *layer):
    """Returns the attributions of class 1."""
    found = getattr(library("captum.attr"), method)(model, *layer)
    arguments = {} if method == "LayerActivation" else {"target": 1}
    return found.attribute(images(), **arguments)


def leaves(model):
    return [n for n, m in model.named_modules() if n.startswith("body.") and not list(m.children())]


def takes(method, name):
    """False if captum cannot attribute in the plain network: timm's CBAM calls one ReLU twice."""
    return not (name == "timm_cbam" and "DeepLift" in method)


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in TWINS for m in METHODS if takes(m, n)])
def test_attributions_to_the_input(name, method):
    plain, fast = (model.eval() for model in twins(name))
    torch.testing.assert_close(attributions(method, fast), attributions(method, plain))


@pytest.mark.parametrize("name", [name for name in TWINS if name not in CALLED_TWICE])
def test_layerwise_relevance(name):
    """captum has no rule for some layers, such as sigmoids: they get one here.

    It also changes gradients of the tensors between layers. BAM's map for its spatial branch is such a tensor, which
    the reference backend shows.
    """
    rule = library("captum.attr._utils.lrp_rules").EpsilonRule
    found = []
    for model in twins(name):
        for module in model.eval().modules():
            if not list(module.children()) and not isinstance(module, nn.ReLU):
                module.rule = rule()
        with vf.use_backend("reference" if name == "bam" else "auto"):
            found.append(attributions("LRP", model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in TWINS for m in OF_LAYERS if takes(m, n)])
def test_attributions_to_each_layer_inside(name, method):
    plain, fast = (model.eval() for model in twins(name))
    for layer in leaves(plain):
        want = attributions(method, plain, plain.get_submodule(layer))
        got = attributions(method, fast, fast.get_submodule(layer))
        torch.testing.assert_close(got, want, msg=lambda m, layer=layer: f"{layer}: {m}")
