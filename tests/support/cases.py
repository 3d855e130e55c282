"""Shared cases of the tests: devices, backends, shapes, dtypes, strides; how a case runs and how it is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import visattn_fast as vf
from visattn_fast import catalogue, reference
from visattn_fast.measure.accuracy import Oracle

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# The backends with kernels for all modules; TRITON_INTERPRET=1 brings triton to the CPU. The native CUDA kernels serve
# a few modules: tests/cuda/test_cuda_kernels.py.
_PARTIAL = ("cuda", "reference")
TARGETS = [(d, b.name) for d in DEVICES for b in vf.backends(d).values() if b.available and b.name not in _PARTIAL]
INTERPRETED = ("cpu", "triton") in TARGETS

entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)
with_epilogue = pytest.mark.parametrize(
    "entry", [e for e in catalogue.ENTRIES.values() if e.epilogue], ids=lambda e: e.name
)
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)


def targets(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test on every device by every backend with kernels there, under Triton's interpreter too."""
    return pytest.mark.interpreted(pytest.mark.parametrize(("device", "backend"), TARGETS)(test))


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPILOGUES = ((False, None), (True, None), (True, "relu"), (True, "silu"), (False, "relu"))

SHAPES = [(2, 16, 8, 8), (3, 5, 7, 5), (2, 3, 13, 17), (2, 16, 1, 1), (1, 1, 3, 3), (2, 33, 2, 9), (1, 64, 9, 11)]
SHAPES += [(0, 16, 4, 4)]
# The first two shapes take every dtype; the others take two that differ in how they are read and rounded.
SHAPE_DTYPES = [(s, d) for s in SHAPES[:2] for d in DTYPES]
SHAPE_DTYPES += [(s, d) for s in SHAPES[2:] for d in (torch.float32, torch.bfloat16)]
# Large maps use many blocks, partial sums and threads. The interpreter takes about 1 ms a program, too long for them.
LARGE_SHAPES = [] if INTERPRETED else [(3, 64, 56, 56), (1, 96, 61, 67), (2, 512, 7, 7), (1, 8, 160, 200)]


def _sliced(dim: int, x: Tensor, layout: str) -> Tensor:
    wide = torch.cat([x, x], dim).contiguous(memory_format=catalogue.LAYOUTS[layout])
    return wide.narrow(dim, 0, x.shape[dim]).copy_(x)


def _strided_width(x: Tensor, layout: str) -> Tensor:
    wide = x.repeat_interleave(2, 3).contiguous(memory_format=catalogue.LAYOUTS[layout])
    return wide[..., ::2]


# Each view has the values of x and other strides; the expanded batch repeats the first image.
VIEWS = {
    "sliced channels": lambda x, layout: _sliced(1, x, layout),
    "sliced width": lambda x, layout: _sliced(3, x, layout),
    "strided width": _strided_width,
    "expanded batch": lambda x, layout: x[:1].expand_as(x),
    "transposed": lambda x, layout: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN, and refuses nondeterministic operations."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of PyTorch's threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RecordedOps(TorchDispatchMode):
    """Records the calls of our ops, in order, as pairs of an op and its detached arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, list[Any]]] = []

    @property
    def names(self) -> list[str]:
        return [op._opname for op, _ in self.calls]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "visattn_fast":
            self.calls.append((func, [a.detach() if isinstance(a, Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


def needs_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skips the test if ``backend`` does not serve ``dtype``."""
    reasons = vf.backends(device)[backend].reasons_against(dtype)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def run(
    module: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    noise: float = 0.0,
    change: Callable[[nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    """Runs a copy of the module forward, and backward with a random output gradient.

    Returns y, the gradients of x, residual and every parameter, and the floating-point buffers after the run. The
    epilogue of a reference module is computed by `reference.epilogue`. The output gradient is the same for every dtype
    and device, up to ``noise``, a relative deviation. ``change`` is applied to the copy first.
    """
    module = copy.deepcopy(module)
    if change:
        change(module)
    x = x.detach().requires_grad_()
    inputs = {"x": x, **dict(module.named_parameters())}
    if residual is not None:
        residual = inputs["residual"] = residual.detach().requires_grad_()
    if residual is None and activation is None:
        y = module(x)
    elif type(module).__module__.startswith("visattn_fast.fused"):
        y = module(x, residual=residual, activation=activation)
    else:
        y = reference.epilogue(module(x), residual, activation)
    grad = catalogue.feature_map(tuple(y.shape), dtype=torch.float64, seed=1)
    grad *= 1 + noise * catalogue.feature_map(tuple(y.shape), dtype=torch.float64, seed=2)
    grad = grad.to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(inputs.values()), grad)
    buffers = {name: b for name, b in module.named_buffers() if b.dtype.is_floating_point}
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True)), **buffers}


def value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Any], *arguments: Any) -> list[Tensor]:
    """Returns ``function(*inputs, *arguments)`` and the gradients of the inputs that require one.

    The output gradient is that of `run`.
    """
    y = function(*inputs, *arguments)
    grad = catalogue.feature_map(tuple(y.shape), dtype=torch.float64, seed=1).to(y.device, y.dtype)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def check(
    entry: catalogue.Entry,
    x: Tensor,
    backend: str,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> dict[str, Tensor]:
    """Runs the fused module on ``backend`` and compares it with a float64 oracle; returns the run."""
    fast, plain = (m.to(x.device) for m in entry.pair(x.shape[1], x.dtype))
    with vf.use_backend(backend), poisoned():
        fused = run(fast, x, residual, activation)
    eager, also = run(plain, x, residual, activation), None
    if entry.name == "sk":  # a batch norm of few pooled values magnifies rounding: one run may be exact by luck
        with vf.use_backend("reference"):
            also = run(fast, x, residual, activation)
    within_budget(fused, eager, *oracle(plain, x, residual, activation), also)
    return fused


def oracle(
    plain: nn.Module, x: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns two runs of ``plain`` in float64: the exact one, and one with rounded parameters and output gradient."""
    dtype = next((p.dtype for p in plain.parameters()), x.dtype)
    eps, double = torch.finfo(dtype).eps, copy.deepcopy(plain).double()
    inputs = (x.double(), None if residual is None else residual.double(), activation)
    exact = run(double, *inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in double.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            p.mul_(1 + eps * noise)
    return exact, run(double, *inputs, noise=eps)


def within_budget(
    fused: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    rounded: dict[str, Tensor],
    also: dict[str, Tensor] | None = None,
) -> None:
    """Asserts that ``fused`` meets the error budget of `visattn_fast.measure.accuracy`, in the dtypes of ``eager``.

    ``also`` is a second run of plain PyTorch: of both, the larger error counts.
    """
    assert fused.keys() == exact.keys()
    for name, got in fused.items():
        assert got.dtype == eager[name].dtype, f"{name}: {got.dtype}, expected {eager[name].dtype}"
    coarsest = max((t.dtype for t in fused.values()), key=lambda dtype: torch.finfo(dtype).eps)
    budget = Oracle(exact, rounded)
    errors = budget.errors(eager)
    if also is not None:
        second = budget.errors(also)
        errors = {name: max(error, second[name]) for name, error in errors.items()}
    budget.check(budget.errors(fused), errors, coarsest)


def feature_map(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str = "cpu", **kw: Any) -> Tensor:
    """Returns `catalogue.feature_map`, shifted so that means are not near zero."""
    return catalogue.feature_map(shape, layout, dtype, device, **kw) + 0.25
