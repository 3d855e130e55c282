"""The choice of a backend in several threads."""

from __future__ import annotations

import _thread
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel.parallel_apply import parallel_apply

import visattn_fast as vf
from replicas import stand_in_accelerator
from visattn_fast.backends import decide, preference, reference_asked
from visattn_fast.ops.se import SE


class Seen(nn.Module):
    """Records the choice in force in the thread that calls it."""

    def forward(self, found: list[str]) -> str:
        found.append(preference())
        return preference()


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_overlapping_choices_of_two_threads_are_their_own(first_ends_first):
    """Both threads enter, then one after the other leaves; none sees the other's choice, and nothing stays."""
    turns = [threading.Event() for _ in range(4)]
    seen: dict[str, list[str]] = {"a": [], "b": []}

    def first() -> None:
        with vf.use_backend("reference"):
            turns[0].set()
            turns[1].wait(10)
            seen["a"].append(preference())
            if not first_ends_first:
                turns[2].wait(10)
        seen["a"].append(preference())
        turns[3].set()

    def second() -> None:
        turns[0].wait(10)
        seen["b"].append(preference())
        with vf.use_backend("cpp"):
            turns[1].set()
            if first_ends_first:
                turns[3].wait(10)
            seen["b"].append(preference())
        seen["b"].append(preference())
        turns[2].set()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert seen == {"a": ["reference", "auto"], "b": ["auto", "cpp", "auto"]}
    assert preference() == "auto"


def test_contexts_that_end_in_any_order_leave_no_choice():
    """As those of generators and coroutines do, in one thread or in another."""
    contexts = [vf.use_backend(name) for name in ("reference", "cpp", "reference", "triton")]
    for context in contexts:
        context.__enter__()
    assert preference() == "triton"
    contexts[0].__exit__(None, None, None)
    assert preference() == "triton"
    contexts[3].__exit__(None, None, None)
    assert preference() == "reference"
    in_thread(lambda: contexts[2].__exit__(None, None, None))
    assert preference() == "cpp"
    assert in_thread(preference) == "auto"
    contextvars.copy_context().run(contexts[1].__exit__, None, None, None)
    assert preference() == "auto"


def test_replicas_of_data_parallel_follow_their_caller(monkeypatch):
    """While another thread has a choice of its own."""
    stand_in_accelerator(monkeypatch)

    def call() -> list[str]:
        return parallel_apply([Seen(), Seen(), Seen()], [([],)] * 3, devices=[0, 1, 2])

    def chosen(name: str) -> list[str]:
        with vf.use_backend("triton"), vf.use_backend(name):
            barrier.wait(10)
            return [*call(), preference()]

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(chosen, ["reference", "cpp"]))
    assert found == [["reference"] * 4, ["cpp"] * 4]
    with vf.use_backend("cpp"):
        assert in_thread(call) == ["auto"] * 3
    assert call() == ["auto"] * 3


def test_backward_in_a_thread_of_autograd_follows_its_caller():
    """On GPUs autograd runs backward passes in threads of its own, to which PyTorch hands the caller's context."""
    with vf.use_backend("cpp"):
        context = contextvars.copy_context()
    done, found = threading.Event(), []

    def backward() -> None:
        try:
            found.append(preference())
            torch._C._stash_obj_in_tls("context", context)
            found.append((preference(), decide(torch.zeros(1, 1, 1, 1), SE).backend))
        finally:
            torch._C._remove_obj_from_tls("context")
            done.set()

    _thread.start_new_thread(backward, ())
    assert done.wait(10)
    assert found == ["auto", ("cpp", "cpp")]


def test_use_backend_inside_a_compiled_function():
    """It is traced, and compiled code heeds the choice of the thread that calls it."""
    torch._dynamo.reset()
    module, x = vf.FastSE(16), torch.randn(2, 16, 32, 32)
    decisions: list[str] = []

    def decided(x: torch.Tensor) -> torch.Tensor:
        decisions.append(preference())
        with vf.use_backend("reference"):
            assert reference_asked()
            y = module(x)
        assert not reference_asked()
        return y

    compiled = torch.compile(decided, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    with vf.use_backend("cpp"):
        compiled(x)
        assert in_thread(lambda: compiled(x)) is not None
    assert decisions == ["auto", "cpp", "auto"]
