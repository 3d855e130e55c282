"""An op is declared once: its schemas, results and launchers say the same."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import visattn_fast  # noqa: F401  # declares the ops
from visattn_fast.ops import shapes
from visattn_fast.ops.library import OPS
from visattn_fast.ops.se import SE


def schema(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.visattn_fast, name).default._schema


def names(arguments: object) -> list[str]:
    return [argument.name for argument in arguments]


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.launcher])
def test_launcher_takes_what_the_schema_says(name):
    pytest.importorskip("triton")
    launchers = importlib.import_module(f"visattn_fast.kernels.ops.{OPS[name].launcher}")
    parameters = inspect.signature(getattr(launchers, name)).parameters
    assert list(parameters) == names(schema(name).arguments)


@pytest.mark.parametrize("name", list(OPS))
def test_plain_implementation_takes_as_many_arguments(name):
    """`CompositeExplicitAutograd` is called by position: a missing argument would only show when it runs."""
    plain = inspect.signature(OPS[name].reference, follow_wrapped=False)
    arguments = [object()] * len(schema(name).arguments)
    plain.bind(*arguments)


def test_gate_declares_both_directions_and_the_forms_for_inference():
    forward, backward = schema("se_fwd"), schema("se_bwd")
    assert names(forward.arguments) == [
        *("x", "w1", "b1", "w2", "b2", "residual"),
        *("activation", "hidden_activation", "gate_activation"),
    ]
    assert names(forward.returns) == ["y", "mean", "hidden", "gate"]
    assert names(backward.returns) == ["dx", "dresidual", "dw1", "db1", "dw2", "db2"]
    assert names(schema("se_infer").arguments) == names(forward.arguments)
    norm = ["z", "norm_weight", "norm_bias", "norm_mean", "norm_var", "eps"]
    assert names(schema("se_normed").arguments) == norm + names(forward.arguments)[1:]
    assert SE.name == "se"
    assert SE.epilogue


@pytest.mark.parametrize(
    ("shape", "expected", "dtype"),
    [
        ("N 2 C", (2, 2, 6), torch.float32),
        ("N C : int32", (2, 6), torch.int32),
        ("N R 1 : x", (2, 3, 1), torch.bfloat16),
        ("shape of w", (3, 6, 1, 1), torch.float32),
        ("like x", (2, 6, 5, 4), torch.bfloat16),
    ],
)
def test_shapes_are_read_as_written(shape, expected, dtype):
    x = torch.empty(2, 6, 5, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    sizes = {**dict(zip("NCHW", x.shape, strict=True)), "R": 3}
    made = shapes.allocated(shape, {"x": x, "w": torch.empty(3, 6, 1, 1)}, sizes, x)
    assert (tuple(made.shape), made.dtype) == (expected, dtype)
    if shape == "like x":
        assert made.is_contiguous(memory_format=torch.channels_last)
