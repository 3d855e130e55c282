"""A case made concrete: its tensors, its contenders, their errors and their memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

from ..catalogue import ENTRIES, feature_map
from ..measure.memory import peak_bytes, saved_bytes
from ..measure.step import TRAINING, Results, step
from ..measure.timing import ready
from .cases import CONTENDERS, Case
from .rivals import of_timm

_CANCELLED = 1e-10  # of the largest value of a run: below it a tensor is rounding
# Units in the last place of a tensor's largest value: the rounding that is granted beside eager's error, to Inductor,
# too, which sums one after the other what eager sums in pairs.
_BAND = 8


class Subject:
    """The modules of a case, with equal parameters, and its input; runs are made of them.

    Attributes:
        x: normally distributed; it requires a gradient in the modes that have one.
        names: of the tensors that every run returns.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        dtype = getattr(torch, case.dtype)
        fast, plain = ENTRIES[case.op].pair(case.shape[1], dtype)
        self.case, self.device, self.dtype = case, device, dtype
        self.training = case.mode in TRAINING
        training = fast.training and case.mode != "inference"
        self.fast, self.plain = fast.to(device).train(training), plain.to(device).train(training)
        self.x = feature_map(case.shape, case.layout, dtype, device).requires_grad_(self.training)
        with torch.no_grad():
            shape = self.plain(self.x).shape
        self.grad = feature_map(tuple(shape), case.layout, dtype, device, seed=1)
        self.names = ["y"] * (case.mode != "backward")
        self.names += ["dx", *(f"d{name}" for name, _ in plain.named_parameters())] * self.training
        self._forgotten = False

    def run(self, contender: str) -> Callable[[], Results]:
        """What is timed: one of `CONTENDERS`, or ``"copy"``, which copies x into another map."""
        if contender == "copy":
            x, out = self.x.detach(), torch.empty_like(self.x, requires_grad=False)
            return lambda: (out.copy_(x),)
        module, mode = self._module(contender), CONTENDERS[contender].compiled
        if mode and not self._forgotten:  # the compiler gives up on a module after a few versions of it
            torch.compiler.reset()
            self._forgotten = True
        function = torch.compile(module, mode=mode) if mode else module
        return step(self.case.mode, function, (self.x,), (self.x, *self._parameters(module)), self.grad)

    def has(self, contender: str) -> bool:
        """Whether it takes part: a library's module where there is one for the case, or where its import fails."""
        with contextlib.suppress(Exception):  # which then is that contender's failure
            return not CONTENDERS[contender].library or self._timm is not None
        return True

    @functools.cached_property
    def _timm(self) -> nn.Module | None:
        return of_timm(self.plain, self.case.shape)

    def _module(self, contender: str) -> nn.Module:
        rival = self._timm if CONTENDERS[contender].library else self.plain
        if rival is None:
            raise ValueError(f"no {CONTENDERS[contender].about} for {self.case}")
        return self.fast if CONTENDERS[contender].fused else rival

    def _parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """In the order of `names`."""
        own = dict(getattr(module, "owner", module).named_parameters())
        return [own[name] for name, _ in self.plain.named_parameters()]

    def oracle(self) -> Results:
        """The results of the reference in float64."""
        plain = ENTRIES[self.case.op].reference(**ENTRIES[self.case.op].arguments(self.case.shape[1]))
        plain.load_state_dict(self.plain.state_dict())
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        plain = plain.to(self.device).double().train(self.plain.training)
        return step(self.case.mode, plain, (x,), (x, *plain.parameters()), self.grad.double())()

    def errors(self, results: Results, oracle: Results) -> dict[str, float]:
        """The largest error of each tensor, in multiples of the largest value of the oracle's.

        Where all of a tensor cancels, as in the gradient of a bias before a batch norm, only rounding is left to
        compare: there it is multiples of the largest value of all.

        Raises:
            AssertionError: a tensor that is not finite.
        """
        found = {}
        sizes = [float(exact.detach().abs().max()) for exact in oracle]
        for name, result, exact, size in zip(self.names, results, oracle, sizes, strict=True):
            assert result.isfinite().all(), f"{name} is not finite"
            scale = size if size > _CANCELLED * max(sizes) else max(sizes)
            error = (result.detach().double() - exact.detach()).abs().max()
            found[name] = float(error) / max(scale, torch.finfo(self.dtype).tiny)
        return found

    def check(self, errors: dict[str, float], eager: dict[str, float]) -> None:
        """Raises AssertionError unless each error is at most twice eager's, plus a rounding band."""
        band = _BAND * torch.finfo(self.dtype).eps
        wrong = [f"{n} {errors[n]:.1e} (eager {eager[n]:.1e})" for n in errors if errors[n] > 2 * eager[n] + band]
        if wrong:
            raise AssertionError(f"error against float64 above twice eager's: {', '.join(wrong)}")

    def saved_bytes(self, contender: str, run: Callable[[], Results]) -> int | None:
        """Bytes that a training run keeps for its backward pass, each storage once, parameters aside."""
        if not self.training or contender == "copy":
            return None
        return saved_bytes(run, self._module(contender).parameters())

    def peak_bytes(self, run: Callable[[], Results]) -> int | None:
        """The most that the timed part of a run allocates at a time, beside what was there before; None if unknown."""
        return peak_bytes(ready(run), self.device)
