"""Counts what a run launches: the ops that it dispatches, or the calls in the code that Inductor generated for it."""

from __future__ import annotations

import ast
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ..measure.timing import Run, ready

# Ops that, like views, make a tensor and write nothing to it.
_IDLE = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # under inference_mode composite ops arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self.count += not (func.is_view or func.overloadpacket.__name__ in _IDLE)
        return func(*args, **kwargs)


def dispatched(run: Run) -> int:
    """Counts the ops that the timed part of a run dispatches. Views and empty tensors launch nothing."""
    timed = ready(run)
    with _Counter() as counter:
        timed()
    return counter.count


@dataclass(frozen=True)
class Compilation:
    """The first call of a compiled run.

    Attributes:
        seconds: time of the call.
        cold: True if everything was compiled anew; False if an on-disk cache held a part.
        calls: calls of kernels and ops in the generated code; None if no code was generated.
    """

    seconds: float
    cold: bool
    calls: int | None


def compiled(run: Callable[[], Any], cold: bool, backward_alone: bool) -> tuple[Any, Compilation]:
    """Makes the first call of a compiled run. Returns its results and how it was compiled.

    Args:
        cold: compile without on-disk caches.
        backward_alone: count the calls of the backward pass alone.
    """
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.utils import fresh_cache

    PyCodeCache.cache_clear()
    with fresh_cache() if cold else contextlib.nullcontext(), config.patch(autotune_num_choices_displayed=0):
        hits, start = _cache_hits(), time.perf_counter()
        results = run()
        seconds = time.perf_counter() - start
        sources = [Path(m.__file__).read_text(encoding="utf-8") for m in PyCodeCache.modules if m.__file__]
    graphs = [s for s in sources if not backward_alone or "_backward']" in s]
    calls = sum(generated_calls(source) for source in graphs)
    return results, Compilation(seconds, cold or _cache_hits() == hits, calls or None)


def _cache_hits() -> int:
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def generated_calls(source: str) -> int:
    """Counts the calls of Inductor's own kernels and of library ops in the code that it generated for a graph."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    graphs = [f for f in functions if f.name == "call" or f.name.startswith("partition_")]
    calls = [node for f in graphs for node in ast.walk(f) if isinstance(node, ast.Call)]
    return sum(_launches(ast.unparse(call.func)) for call in calls)


def _launches(name: str) -> bool:
    """True if a function of this name in generated code is a kernel, such as ``cpp_fused_...``, or an op."""
    if name.startswith(("extern_kernels.", "torch.ops.", "aten.")):
        return True
    return name.startswith("cpp_") or name.endswith(".run")
