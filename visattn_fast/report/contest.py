"""One case made concrete: modules with equal parameters and one input, from which every contender's run is made."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..catalogue import ENTRIES, feature_map
from ..measure.accuracy import Oracle
from ..measure.memory import peak_bytes, saved_bytes
from ..measure.step import TRAINING, Results, step
from ..measure.timing import ready
from .cases import CONTENDERS, Case
from .rivals import of_timm


class Contest:
    """The modules and the input of one case.

    Attributes:
        x: the input, normally distributed; it requires a gradient in the modes that have one.
        names: the names of the tensors that every run returns.
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
        """Returns the run to be timed: of one of `CONTENDERS`, or of ``"copy"``, which copies x into another map."""
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
        """True if the contender takes part.

        A library's module takes part if the library has one for the case, and if its import fails: the failure is
        then shown in its row.
        """
        with contextlib.suppress(Exception):
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
        """Returns the parameters of a module in the order of `names`."""
        own = dict(getattr(module, "owner", module).named_parameters())
        return [own[name] for name, _ in self.plain.named_parameters()]

    def oracle(self) -> Oracle:
        """Runs the reference in float64, exactly and with rounded parameters and output gradient."""
        plain = ENTRIES[self.case.op].reference(**ENTRIES[self.case.op].arguments(self.case.shape[1]))
        plain.load_state_dict(self.plain.state_dict())
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        plain = plain.to(self.device).double().train(self.plain.training)
        exact, rounded = (self._in_float64(plain, x, noise) for noise in (0.0, torch.finfo(self.dtype).eps))
        return Oracle(exact, rounded)

    def _in_float64(self, plain: nn.Module, x: Tensor, noise: float) -> dict[str, Tensor]:
        """Runs the reference with parameters and output gradient that deviate by ``noise``, relatively."""
        module, generator = copy.deepcopy(plain), torch.Generator(self.device).manual_seed(0)

        def deviating(t: Tensor) -> Tensor:
            return t * (1 + noise * torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device))

        with torch.no_grad():
            for p in module.parameters() if noise else ():
                p.copy_(deviating(p))
            grad = deviating(self.grad.double()) if noise else self.grad.double()
        results = step(self.case.mode, module, (x,), (x, *module.parameters()), grad)()
        return dict(zip(self.names, results, strict=True))

    def errors(self, results: Results, oracle: Oracle) -> dict[str, float]:
        """Returns the errors of a run's results, by name, as `Oracle.errors` does."""
        return oracle.errors(dict(zip(self.names, results, strict=True)))

    def saved_bytes(self, contender: str, run: Callable[[], Results]) -> int | None:
        """Returns the bytes that a training run keeps for its backward pass; None in the other modes."""
        if not self.training or contender == "copy":
            return None
        return saved_bytes(run, self._module(contender).parameters())

    def peak_bytes(self, run: Callable[[], Results]) -> int | None:
        """Returns the peak of what the timed part of a run allocates; None if the device cannot tell."""
        return peak_bytes(ready(run), self.device)
