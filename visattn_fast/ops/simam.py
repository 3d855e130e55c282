"""SimAM: ``x * sigmoid(scale d^2 + 0.5)`` with ``d = x - mean`` and a scale per channel, from its variance.

Mean and scale are saved for backward. The Triton kernels move the bytes of x twice forward and 3 times backward if
planes fit in a tile, else 3 and 5 times.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .declare import gate_op
from .epilogue import finish, residual_gradient, start_backward
from .layout import to_map
from .self_gate import Coefficients, deviation_and_gate, input_gradient, logit_gradient, moments


def _forward(x: Tensor, residual: Tensor | None, activation: int, e_lambda: float) -> tuple[Tensor, ...]:
    mean, second = moments(x, (2, 3))
    scale = 1 / (4 * (second / max(x.shape[2] * x.shape[3] - 1, 1) + e_lambda))
    _, gate = deviation_and_gate(x, Coefficients(mean, q=scale, b=0.5))
    return finish(x, gate, residual, activation), mean, scale


def _backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, mean: Tensor, scale: Tensor, activation: int
) -> tuple[Tensor, ...]:
    k, pixels = Coefficients(mean, q=scale, b=0.5), x.shape[2] * x.shape[3]
    d, gate = deviation_and_gate(x, k)
    grad = start_backward(grad, x, gate, residual, activation)
    r = logit_gradient(grad, x, gate)
    u = -8 * scale.square() * (r * d * d).sum((2, 3)) / max(pixels - 1, 1)
    v = -2 * scale * (r * d).sum((2, 3)) / pixels
    return to_map(input_gradient(grad, gate, d, r, k, u, v), x), residual_gradient(grad, x, activation)


SIMAM = gate_op(
    "simam",
    weights={},
    options="float e_lambda",
    backward_options="",
    saves={"mean": "N C", "scale": "N C"},
    forward=_forward,
    backward=_backward,
    mathematics=reference.simam,
    tiny=196,
    over_positions=True,
)
