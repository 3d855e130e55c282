"""What a run launches: the ops that it dispatches, or the calls in the code that Inductor generated for it."""

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

# Beside views: what makes a tensor and writes nothing to it.
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
        with self:  # under inference_mode composite ops come whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self.count += not (func.is_view or func.overloadpacket.__name__ in _IDLE)
        return func(*args, **kwargs)


def dispatched(run: Run) -> int:
    """How many ops the timed part of a run dispatches; views, and tensors without values, launch nothing."""
    timed = ready(run)
    with _Counter() as counter:
        timed()
    return counter.count


@dataclass(frozen=True)
class Compilation:
    """The first call of something compiled.

    Attributes:
        seconds: that it took.
        cold: whether all was compiled anew; else an on-disk cache had some of it.
        calls: of kernels and of ops, in the generated code; None where there is no such code.
    """

    seconds: float
    cold: bool
    calls: int | None


def compiled(run: Callable[[], Any], cold: bool, backward_alone: bool) -> tuple[Any, Compilation]:
    """The results of a run's first call, and what compiling it took.

    Args:
        cold: take on-disk caches away for it.
        backward_alone: count what the backward pass calls, not what the forward pass does.
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

    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def generated_calls(source: str) -> int:
    """How often code that Inductor generated for a graph calls a kernel of its own or an op of a library."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    graphs = [f for f in functions if f.name == "call" or f.name.startswith("partition_")]
    calls = [node for f in graphs for node in ast.walk(f) if isinstance(node, ast.Call)]
    return sum(_launches(ast.unparse(call.func)) for call in calls)


def _launches(name: str) -> bool:
    """Whether a name that generated code calls is a kernel, as ``cpp_fused_...``, or an op."""
    if name.startswith(("extern_kernels.", "torch.ops.", "aten.")):
        return True
    return name.startswith("cpp_") or name.endswith(".run")
