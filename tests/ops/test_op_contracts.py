"""The ops of every module fit their schemas, fakes and reference ops."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.utils._pytree import tree_leaves

import visattn_fast as vf
from cases import INTERPRETED, RecordedOps, entries, feature_map, layouts, poisoned
from visattn_fast.ops.library import OPS

# The other tests call a kernel several times; for them, every backend is the same.
OP_TESTS = (
    "test_schema"
    if INTERPRETED
    else ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
)


@pytest.mark.interpreted
@entries
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (0, 8, 5, 3), (2, 8, 1, 1)], ids=["plain", "empty", "1x1"])
def test_ops_of_modules_fit_schema_fake_and_reference(entry, layout, shape):
    """Ops of both directions fit schema, fake and dispatch; values and strides equal those of the reference op."""
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    fast, _ = entry.pair(8)
    x = feature_map(shape, layout, torch.float32).requires_grad_()
    with RecordedOps() as recorded:
        fast(x).sum().backward()
        if entry.epilogue:
            fast(x, residual=x.detach(), activation="silu").sum().backward()
        with torch.no_grad():
            fast(x)
    expected = entry.ops or (f"{entry.name}_fwd", f"{entry.name}_bwd")
    expected += (f"{entry.name}_infer",) * (f"{entry.name}_infer" in OPS)
    assert {str(func) for func, _ in recorded.calls} == {f"visattn_fast.{op}.default" for op in expected}
    for func, args in recorded.calls:
        torch.library.opcheck(func, tuple(args), test_utils=OP_TESTS)
        with poisoned():
            kernel = func(*args)
        plain = OPS[func._opname].reference(*args)
        for got, want in zip(*map(tree_leaves, (kernel, plain)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.stride() == want.stride()


@pytest.mark.interpreted
@entries
def test_modules_keep_their_inputs(entry):
    """Forward writes to no input, and its result shares no memory with one."""
    fast, _ = entry.pair(8)
    x = feature_map((2, 8, 4, 4), "nchw", torch.float32)
    before = x.clone()
    with torch.no_grad():
        results = [fast(x)] + ([fast(x, residual=x, activation="relu")] if entry.epilogue else [])
    assert torch.equal(x, before)
    assert all(y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for y in results)


class Overriding(torch.Tensor):
    """A tensor that records the functions called on it."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def test_inference_op_is_seen_by_torch_function_overrides():
    """A tensor subclass and a mode that override functions see an op for inference like any other function."""
    module, x = vf.FastSE(32, 4), feature_map((2, 32, 3, 3), "nchw", torch.float32)
    with torch.no_grad():
        want, y = module(x), module(x.as_subclass(Overriding))
        assert type(y) is Overriding
        assert torch.equal(y, want)
        assert "visattn_fast.se_infer.default" in Overriding.called
        with torch.device("cpu"):
            assert torch.equal(module(x), want)
