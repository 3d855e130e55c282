"""The YOLO models that Ultralytics ships: `accelerate` takes their attention, and nothing else about them changes."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from outside import library
from visattn_fast.catalogue import feature_map

pytestmark = pytest.mark.filterwarnings("ignore")
# The smallest model of each family -> how many attention modules it has, and their class.
MODELS = {
    "yolov10n": (1, "Attention"),
    "yolo11n": (1, "Attention"),
    "yolo12n": (8, "AAttn"),
    "yolo26n": (2, "Attention"),
}
models = pytest.mark.parametrize("name", MODELS)


def twins(name):
    """Returns the model in float64, with random weights, and an accelerated copy."""
    torch.manual_seed(0)
    plain = library("ultralytics.nn.tasks").DetectionModel(f"{name}.yaml", nc=4, verbose=False).double()
    fast = copy.deepcopy(plain)
    report = vf.accelerate(fast)
    count, kind = MODELS[name]
    assert [s.recipe.original.__name__ for s in report.swapped] == [kind] * count
    assert not report.skipped
    return plain, fast


def images(size=(2, 3, 64, 96)):
    return feature_map(size, "nchw", torch.float64)


def tensors(value):
    """Yields the floating-point tensors of nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@models
def test_predictions_agree_before_and_after_fuse(name):
    plain, fast = (model.eval() for model in twins(name))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(list(tensors(fast(images()))), list(tensors(plain(images()))))
            plain, fast = plain.fuse(verbose=False), fast.fuse(verbose=False)  # folds batch norms into convolutions
    assert vf.restore(fast) == MODELS[name][0]


@models
def test_one_step_of_training_agrees(name):
    plain, fast = (model.train() for model in twins(name))
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sum(t.square().mean() for t in tensors(model(images()))).backward()
        optimizer.step()
    torch.testing.assert_close(dict(fast.state_dict()), dict(plain.state_dict()), rtol=1e-6, atol=1e-8)


@models
def test_traces_hold_no_op_of_this_package(name):
    """Exporters of Ultralytics trace the model."""
    plain, fast = (model.eval() for model in twins(name))
    for head in (plain.model[-1], fast.model[-1]):
        head.export, head.format = True, "torchscript"  # as `YOLO.export` sets them
    traced = torch.jit.trace(fast, images(), strict=False, check_trace=False)
    assert "visattn_fast::" not in str(traced.inlined_graph)
    with torch.no_grad():
        torch.testing.assert_close(list(tensors(traced(images()))), list(tensors(plain(images()))))


def test_lower_precision_and_channels_last():
    plain, fast = (model.eval() for model in twins("yolo11n"))
    x = images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = list(tensors(plain(x)))
        torch.testing.assert_close(list(tensors(fast(x))), want)
        found, eager = (list(tensors(model.bfloat16()(x.bfloat16()))) for model in (fast, plain))
    for got, rounded, exact in zip(found, eager, want, strict=True):
        error, other = ((t.double() - exact).abs().max() for t in (got, rounded))
        assert error <= 2 * other
