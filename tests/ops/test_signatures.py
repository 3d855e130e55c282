"""Every op refuses every argument that does not fit its declaration, before any kernel reads it."""

from __future__ import annotations

import random

import pytest
import torch

from raw_calls import signature_of, valid_call, with_faults
from visattn_fast.backends import backends
from visattn_fast.ops.library import OPS
from visattn_fast.ops.signature import STRIDED, TensorArgument


@pytest.fixture(autouse=True, scope="module")
def loaded():
    backends("cpu")


def op(name: str):
    return getattr(torch.ops.visattn_fast, name).default


def message(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@pytest.mark.parametrize("name", OPS)
def test_a_fault_is_named(name):
    """The native kernel, plain PyTorch and the fake refuse it, each in the same words."""
    found = 0
    for seed in range(4):
        call = valid_call(name, random.Random(seed))
        for argument, fault, wrong in with_faults(name, call):
            with pytest.raises(RuntimeError, match=f"{name}: ") as refused:
                op(name)(*wrong)
            with pytest.raises(RuntimeError) as plain:
                OPS[name].reference(*wrong)
            assert message(refused.value) == message(plain.value), (argument, fault)
            assert argument in message(plain.value), (argument, fault, message(plain.value))
            found += 1
    assert found > 4


@pytest.mark.parametrize("name", OPS)
def test_a_fake_refuses_it_too(name):
    for _argument, fault, wrong in with_faults(name, valid_call(name, random.Random(0))):
        if "index" in fault or "another device" in fault:
            continue
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in wrong]
        with pytest.raises(RuntimeError, match=name):
            op(name)(*on_meta)


def with_gaps(t):
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def turned(t):
    """Equal values, with the last two dimensions in the opposite order in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else with_gaps(t)


def last_first(t):
    """Equal values in channels_last."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else with_gaps(t)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("strided", [with_gaps, turned, last_first])
def test_any_strides_are_read(name, strided):
    if strided is last_first and name.startswith("triplet"):
        pytest.skip("its faces lie as x does")
    for seed in range(6):
        call = valid_call(name, random.Random(seed), torch.float64)
        wanted = op(name)(*call)
        for i, value in enumerate(call):
            if isinstance(value, torch.Tensor) and value.dim():
                found = op(name)(*call[:i], strided(value), *call[i + 1 :])
                for a, b in zip(flat(found), flat(wanted), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPS)
def test_dense_arguments_of_other_strides_give_the_same_bits(name):
    for seed in range(6):
        call = valid_call(name, random.Random(seed))
        wanted = op(name)(*call)
        strided = list(call)
        for argument in signature_of(name).arguments:
            value = call[argument.position]
            if (
                isinstance(argument, TensorArgument)
                and argument.layout != STRIDED
                and value is not None
                and value.dim()
            ):
                spread = torch.empty([*value.shape, 2], dtype=value.dtype)[..., 1]
                strided[argument.position] = spread.copy_(value)
        found = op(name)(*strided)
        for a, b in zip(flat(found), flat(wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def flat(results):
    return results if isinstance(results, (tuple, list)) else [results]
