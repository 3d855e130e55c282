"""The error budget: how far a run may be from exact results. Tests, report and benchmarks share it.

Exact results come from the reference in float64, the oracle. Fused results may err by `EAGER` times the error of eager
PyTorch, plus a band of units in the last place of the tensor's largest value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EAGER = 2  # times eager's error
ROUNDED = 4  # times the effect of rounding parameters and output gradient: eager may be exact by luck
UNITS = 8  # fewer fail Inductor, which sums in sequence what eager sums in pairs
UNITS_FLOAT64 = 64  # the oracle rounds, too
CANCELLED = 1e-10  # a tensor below this share of the run's largest value has cancelled: only its rounding is left
CANCELLED_BAND = 4  # widens the band of a cancelled tensor, the rounding of many terms

# The largest difference between two implementations without an oracle, relative to the largest value.
DIFFERENCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Oracle:
    """Exact results of a run, by name, and the check that other results are as exact as they can be.

    Args:
        exact: the results in float64.
        rounded: those with rounded parameters and output gradient, which show how the run magnifies rounding.
    """

    def __init__(self, exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None = None) -> None:
        self._exact = {name: tensor.detach() for name, tensor in exact.items()}
        self._sizes = {name: largest(tensor) for name, tensor in self._exact.items()}
        self._largest = max(self._sizes.values(), default=0.0)
        self._rounded = {} if rounded is None else self.errors(rounded)

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the largest error of each tensor, relative to the largest value of the exact one.

        The error of a cancelled tensor, as the gradient of a bias before a batch norm, is relative to the largest value
        of the whole run.

        Raises:
            AssertionError: a result has another shape, or is not finite.
        """
        found = {}
        for name, exact in self._exact.items():
            result = results[name].detach()
            assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
            assert result.isfinite().all(), f"{name} is not finite"
            found[name] = largest(result.double() - exact) / self._scale(name)
        return found

    def check(self, errors: Mapping[str, float], eager: Mapping[str, float], dtype: torch.dtype) -> None:
        """Holds the errors of a run to the budget.

        Args:
            errors: those of the run, from `errors`.
            eager: those of eager PyTorch.
            dtype: the coarsest dtype of the run.

        Raises:
            AssertionError: an error is above the budget; the message lists each.
        """
        if wrong := self.above_budget(errors, eager, dtype):
            raise AssertionError(f"error against float64 above the budget: {', '.join(wrong)}")

    def above_budget(
        self, errors: Mapping[str, float], eager: Mapping[str, float], dtype: torch.dtype, rounded: float = ROUNDED
    ) -> list[str]:
        """Returns a text for each error above the budget, which allows ``rounded`` times the effect of rounding."""
        wrong = []
        for name, error in errors.items():
            allowed = EAGER * eager[name] + self._band(name, dtype) + rounded * self._rounded.get(name, 0.0)
            if not error <= allowed:
                wrong.append(f"{name} {error:.1e} (allowed {allowed:.1e}, eager {eager[name]:.1e})")
        return wrong

    def _cancels(self, name: str) -> bool:
        return self._sizes[name] <= CANCELLED * self._largest

    def _scale(self, name: str) -> float:
        return (self._largest if self._cancels(name) else self._sizes[name]) or 1.0

    def _band(self, name: str, dtype: torch.dtype) -> float:
        """Returns the rounding that every result may have, relative as `errors` are."""
        band = (UNITS_FLOAT64 if dtype == torch.float64 else UNITS) * torch.finfo(dtype).eps
        if self._cancels(name) or self._exact[name].numel() == 1:  # a single number: a sum of terms that may be larger
            band *= CANCELLED_BAND * self._largest / self._scale(name)
        return band


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; 0 if it is empty."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
