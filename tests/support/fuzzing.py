"""Random cases of modules, accelerated gates and raw ops, and what must hold of each.

A case is drawn by hypothesis, so that it shrinks to the smallest one that fails. `tests/fuzz` runs some hundreds of
cases, `make fuzz` (tools/fuzz.py) thousands.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import visattn_fast as vf
from cases import threads
from known_modules import MODULES
from raw_calls import valid_call
from visattn_fast import catalogue, reference
from visattn_fast.measure.accuracy import CANCELLED, Oracle
from visattn_fast.ops.library import OPS

MOST = 1 << 17  # elements of a map
PRIMES = (11, 13, 17, 23, 29, 31, 37, 41, 53, 61, 67)
VALUES = ("normal", "shifted", "rounded", "denormal", "huge", "nan", "inf", "constant")
STRIDES = ("nchw", "nhwc", "sliced", "gaps", "transposed", "expanded", "offset", "reversed")
GRADIENTS = ("nchw", "nhwc", "expanded", "transposed", "gaps")
# Modules with a softmax, which turns large values into one and zeros: then gradients are differences of equal numbers.
POSITIONS = ("ultralytics Attention", "ultralytics AAttn")  # plain ones store all weights; the second has two areas
SOFTMAX = ("criss_cross", "self_attention", "window_attention", "split_attention", "sk", "sk_eval")
# Their result is the gate, from which backward computes the slope of the sigmoid: in bfloat16 a gate near 1 has none.
GATES_ALONE = ("channel_attention", "spatial_attention")
HOOKS = ("none", "spread", "copied")


def _size(most: int) -> st.SearchStrategy[int]:
    common = st.integers(1, min(9, most))
    return st.one_of(common, st.integers(1, most), st.sampled_from([p for p in PRIMES if p <= most] or [1]))


@dataclass(frozen=True)
class Case:
    """One call of a module and its backward pass.

    Attributes:
        name: the module, in the catalogue or in `known_modules`.
        shape: of x.
        dtype: of x and the parameters; ``mixed`` gives the parameters float32.
        strides, values: how x lies in memory, and what is in it.
        wanted: a bit for each of x, residual and the parameters, in order: whether it wants a gradient.
        gradient: how the gradient of y lies in memory.
        hooks: what hooks on saved tensors do with them.
        threads: of PyTorch.
    """

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    strides: str = "nchw"
    values: str = "normal"
    wanted: int = -1
    gradient: str = "nchw"
    residual: bool = False
    activation: str | None = None
    hooks: str = "none"
    threads: int = 2
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, names: list[str], channels: st.SearchStrategy[int] | None = None) -> Case:
    name = draw(st.sampled_from(names))
    entry = catalogue.ENTRIES.get(name)
    # timm's modules reshape no empty batch, and their norms of pooled values need two images.
    n, h, w = draw(st.integers(0 if channels is None else 2, 3)), draw(_size(70)), draw(_size(70))
    c = draw(channels if channels is not None else _size(70))
    if channels is None and draw(st.booleans()):
        c = draw(st.sampled_from([8, 16, 32, 64]))
    if draw(st.integers(0, 19)) == 0:  # one very large side
        h, w = draw(st.sampled_from([(1, 4099), (2053, 1), (257, 129)]))
    assume(n * c * h * w <= MOST)
    if name in POSITIONS:
        assume(h * w <= 400 and h * w % 2 == 0)
    assume(channels is None or h * w > 3)  # a norm of two values magnifies rounding,
    values = [
        v for v in VALUES if v != "shifted" or not ("batch norm" in name or name == "bam")
    ]  # and one of two pooled means
    epilogue = entry is not None and entry.epilogue
    if entry is not None:
        assume(entry.supports((n, c, h, w)))
    return Case(
        name,
        (n, c, h, w),
        draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])),
        draw(st.booleans()) and entry is not None and not entry.has_torch_layers and name not in GATES_ALONE,
        draw(st.sampled_from(STRIDES)),
        draw(st.sampled_from(values)),
        draw(st.one_of(st.just(-1), st.integers(1, 255))),
        draw(st.sampled_from(GRADIENTS)),
        epilogue and draw(st.booleans()),
        draw(st.sampled_from([None, "relu", "silu"])) if epilogue else None,
        draw(st.sampled_from(HOOKS)),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.integers(0, 1 << 20)),
    )


def filled(case: Case) -> Tensor:
    """Returns the values of x in float64, dense."""
    x = catalogue.feature_map(case.shape, dtype=torch.float64, seed=case.seed) + 0.25
    generator = torch.Generator().manual_seed(case.seed)
    if case.values == "shifted":
        return x if case.name in SOFTMAX else x + 5
    if case.values == "rounded":  # many equal values
        return x.round()
    if case.values == "denormal":
        return x * 1e-39
    if case.values == "huge":
        return x * (5 if case.name in SOFTMAX else 1e10)
    if case.values == "constant":
        return torch.full_like(x, 0.1)
    if case.values in ("nan", "inf") and x.numel():
        at = torch.randint(0, x.numel(), (3,), generator=generator)
        found = {"nan": [float("nan")] * 3, "inf": [float("inf"), -float("inf"), 1.0]}[case.values]
        x.view(-1)[at] = torch.tensor(found, dtype=x.dtype)
    return x


def strided(x: Tensor, kind: str) -> Tensor:
    """Returns the values of x with other strides. ``expanded`` repeats the first image."""
    if kind == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        return torch.cat([x, x[:, :1]], 1)[:, : x.shape[1]]
    if kind == "gaps":
        return torch.stack([x, x], 4)[..., 0]
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "expanded":
        return x[:1].expand_as(x) if x.shape[0] else x
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == "reversed":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return x.contiguous()


def _gradient(y: Tensor, kind: str, seed: int) -> Tensor:
    shape = tuple(y.shape)
    grad = catalogue.feature_map(shape, dtype=torch.float64, seed=seed + 1) if len(shape) == 4 else torch.ones(shape)
    if kind == "expanded":
        return grad[:1, :, :1, :1].to(y.dtype).expand(shape) if grad.numel() and len(shape) == 4 else grad.to(y.dtype)
    grad = grad.to(y.dtype)
    return strided(grad, kind) if len(shape) == 4 else grad


def _spread(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


_UNPACK: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "spread": _spread, "copied": torch.clone}


def derivatives(case: Case, module: nn.Module, x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
    """Returns y and the wanted gradients of a copy of the module."""
    module = copy.deepcopy(module)
    x = x.detach()
    inputs = {
        "x": x,
        **({} if residual is None else {"residual": residual.detach()}),
        **dict(module.named_parameters()),
    }
    wanted = [name for i, name in enumerate(inputs) if case.wanted >> min(i, 7) & 1] or ["x"]
    for name, t in inputs.items():
        t.requires_grad_(name in wanted)
    residual = inputs.get("residual")
    own = type(module).__module__.startswith("visattn_fast.fused")
    unpack = _UNPACK[case.hooks if own else "none"]
    with saved_tensors_hooks(lambda t: t, unpack):
        if own and (residual is not None or case.activation is not None):
            y = module(x, residual=residual, activation=case.activation)
        else:
            y = module(x)
            if residual is not None or case.activation is not None:
                y = reference.epilogue(y, residual, case.activation)
    if not y.requires_grad:
        return {"y": y}
    found = torch.autograd.grad(
        y, [inputs[n] for n in wanted], _gradient(y, case.gradient, case.seed), allow_unused=True
    )
    grads = {name: d for name, d in zip(wanted, found, strict=True) if d is not None}
    return {"y": y.detach(), **{f"d{name}": d for name, d in grads.items()}}


def check_module(case: Case) -> None:
    """The fused module is as near to float64 as plain PyTorch is, by the error budget."""
    entry = catalogue.ENTRIES[case.name]
    fast, plain = entry.pair(case.shape[1], torch.float32 if case.mixed else case.dtype, seed=case.seed % 97)
    compare(case, fast, plain)


def check_accelerated(case: Case) -> None:
    """An accelerated gate of another library does what it did before."""
    torch.manual_seed(case.seed)
    plain = MODULES[case.name]()
    fast = copy.deepcopy(plain)
    vf.accelerate(fast)
    # In float64 PyTorch's gradient of a hard sigmoid has float32's accuracy: findings/hardsigmoid_float64_gradient.sh
    rounds = any(isinstance(m, nn.Hardsigmoid) or "hardsigmoid" in str(m).lower() for m in plain.modules())
    dtype = torch.float32 if case.dtype == torch.bfloat16 or rounds else case.dtype
    case = Case(**{**case.__dict__, "dtype": dtype, "mixed": False})
    compare(case, fast.to(dtype), plain.to(dtype))


def compare(case: Case, fast: nn.Module, plain: nn.Module) -> None:
    x = strided(filled(case).to(case.dtype), case.strides)
    residual = strided(filled(Case(**{**case.__dict__, "seed": case.seed + 7})).to(case.dtype), "nhwc")
    residual = residual if case.residual else None
    with threads(case.threads):
        fused = derivatives(case, fast, x, residual)
    eager = _plain_run(case, plain, x, residual)
    double = copy.deepcopy(plain).double()
    wide = None if residual is None else residual.double()
    exact = derivatives(case, double, x.double(), wide)
    assert fused.keys() == eager.keys(), (fused.keys(), eager.keys())
    for name, t in fused.items():
        assert t.dtype == eager[name].dtype, f"{name}: {t.dtype}, expected {eager[name].dtype}"
        assert t.shape == eager[name].shape, f"{name}: {tuple(t.shape)}, expected {tuple(eager[name].shape)}"
    finite = all(t.isfinite().all() for run in (exact, eager) for t in run.values())
    if not finite or case.values in ("huge", "denormal"):
        _check_pattern(case, fused, eager, exact)
        return
    with torch.no_grad():
        eps = torch.finfo(next((p.dtype for p in plain.parameters()), case.dtype)).eps
        generator = torch.Generator().manual_seed(0)
        for p in double.parameters():
            p.mul_(1 + eps * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        noise = 1 + torch.finfo(case.dtype).eps * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    rounded = derivatives(case, double, x.double() * noise, wide)
    budget = Oracle(exact, rounded)
    coarsest = max((t.dtype for t in fused.values()), key=lambda dtype: torch.finfo(dtype).eps)
    # Three times the budget of the tests of parity: on maps of a few values eager may be exact by luck.
    eager_errors = budget.errors(eager)
    budget.check({name: error / 3 for name, error in budget.errors(fused).items()}, eager_errors, coarsest)


def _plain_run(case: Case, plain: nn.Module, x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
    """Plain PyTorch takes no parameters of another dtype than x: then it runs in theirs, and results are rounded."""
    if not case.mixed or case.dtype == torch.float32 or not list(plain.parameters()):
        return derivatives(case, plain, x, residual)
    found = derivatives(case, plain, x.float(), None if residual is None else residual.float())
    return {name: t.to(case.dtype) if name in ("y", "dx", "dresidual") else t for name, t in found.items()}


def _check_pattern(case: Case, fused: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Where plain PyTorch and float64 are both finite, the fused result is finite, and near them.

    Where both are NaN, y and dx are not finite. Gradients of biases may be: before a batch norm, they are zero.
    """
    run = max((float(t[t.isfinite()].abs().max()) for t in exact.values() if t.isfinite().any()), default=0.0)
    if case.values in ("nan", "inf"):  # gradients of parameters sum over what is not finite
        fused = {name: t for name, t in fused.items() if name in ("y", "dx")}
    coarse = any(t.dtype == torch.bfloat16 for t in fused.values())
    for name, t in fused.items():
        sound = eager[name].isfinite() & exact[name].isfinite()
        assert t[sound].isfinite().all(), f"{name} is not finite where plain PyTorch is"
        broken = eager[name].isnan() & exact[name].isnan()
        assert name not in ("y", "dx") or not t[broken].isfinite().any(), f"{name} is finite where plain PyTorch is NaN"
        if sound.any():
            size, tiny = exact[name][sound].abs().max().item(), torch.finfo(t.dtype).tiny * 1e3
            scale = max(size if size > CANCELLED * run else run, tiny)
            error = (t[sound].double() - exact[name][sound]).abs().max().item() / scale
            own = (eager[name][sound].double() - exact[name][sound]).abs().max().item() / scale
            allowed = 4 * own + (0.05 if coarse else 1e-3)
            assert error <= allowed, f"{name}: {error:.1e} of the largest value, plain PyTorch {own:.1e}"


def check_raw(name: str, seed: int) -> None:
    """A raw op on a valid call agrees with its plain PyTorch, whatever the strides and however few the values."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    largest = rng.choice([3, 9, 9, 20]) if name not in _STEEP else 4
    call = valid_call(name, rng, dtype, largest=largest)
    wanted, found = OPS[name].reference(*call), getattr(torch.ops.visattn_fast, name)(*call)
    for i, (a, b) in enumerate(zip(_flat(found), _flat(wanted), strict=True)):
        assert a.dtype == b.dtype, (i, a.dtype, b.dtype)
        assert a.shape == b.shape, (i, a.shape, b.shape)
        if not a.is_floating_point():
            continue  # indices of equal values may differ where they are rounded
        tolerance = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 0.04}[
            max(
                (t.dtype for t in call if isinstance(t, Tensor) and t.is_floating_point()),
                key=lambda d: torch.finfo(d).eps,
            )
        ]
        finite = b.isfinite()
        torch.testing.assert_close(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True)
        if finite.any():
            a, b = a[finite].double(), b[finite].double()
            assert (a - b).abs().max().item() <= tolerance * max(b.abs().max().item(), 1.0), (i, call)


_STEEP = ("window_attention_fwd", "window_attention_bwd", "attention_fwd", "attention_bwd", "attention_mean")


def _flat(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]
