"""Passes over x for any channel gate: pool, scale, and their gradients. The gate itself is computed elsewhere."""

from __future__ import annotations

from torch import Tensor

from ..reference import epilogue
from ..reference.checks import ACTIVATIONS
from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .layout import accumulation_dtype, to_map
from .library import define
from .signature import MAP


def _channel_mean_reference(x: Tensor) -> Tensor:
    return x.mean((2, 3), dtype=accumulation_dtype(x))


def _channel_scale_fwd_reference(x: Tensor, gate: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return finish(x, gate[:, :, None, None], residual, activation)


def _channel_affine_reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: int
) -> Tensor:
    a = accumulation_dtype(x)
    moved = x * scale[:, :, None, None].to(a) + shift[:, :, None, None].to(a)
    return to_map(epilogue(moved, residual, ACTIVATIONS[activation]), x)


def _channel_scale_bwd_reference(
    grad: Tensor, x: Tensor, gate: Tensor, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    grad = start_backward(grad, x, gate[:, :, None, None], residual, activation)
    return (grad * x).sum((2, 3)), residual_gradient(grad, x, activation)


def _channel_input_grad_reference(grad: Tensor, x: Tensor, gate: Tensor, dmean: Tensor | None) -> Tensor:
    dx = grad * gate[:, :, None, None].to(accumulation_dtype(x))
    if dmean is not None:
        dx = dx + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx, x)


_SCALED = {"x": MAP, "gate": "N C", "residual": "like x"}
channel_mean = define(
    "channel_mean(Tensor x) -> Tensor mean",
    "channel_scale",
    _channel_mean_reference,
    ("N C",),
    {"x": MAP},
)
# y = act(x * gate + residual); gate [N, C] in the accumulation dtype.
channel_scale_fwd = define(
    "channel_scale_fwd(Tensor x, Tensor gate, Tensor? residual, int activation) -> Tensor y",
    "channel_scale",
    _channel_scale_fwd_reference,
    ("like x",),
    _SCALED,
)
# y = act(x * scale + shift + residual); scale and shift [N, C] in the accumulation dtype. For inference: it has no
# gradient.
channel_affine = define(
    "channel_affine(Tensor x, Tensor scale, Tensor shift, Tensor? residual, int activation) -> Tensor y",
    "channel_scale",
    _channel_affine_reference,
    ("like x",),
    {"x": MAP, "scale": "N C", "shift": "N C", "residual": "like x"},
)
# dgate = sum over the pixels of g' x with g' = grad * act'(x * gate + residual); dresidual = g', empty without an
# activation, when it equals grad.
channel_scale_bwd = define(
    "channel_scale_bwd(Tensor grad, Tensor x, Tensor gate, Tensor? residual, int activation)"
    " -> (Tensor dgate, Tensor dresidual)",
    "channel_scale",
    _channel_scale_bwd_reference,
    ("N C", residual_gradient_shape),
    {**_SCALED, "grad": "like x"},
)
# dx = grad * gate + dmean / HW, in x's memory format. Reads the layout of x, not its values.
channel_input_grad = define(
    "channel_input_grad(Tensor grad, Tensor x, Tensor gate, Tensor? dmean) -> Tensor dx",
    "channel_scale",
    _channel_input_grad_reference,
    ("like x",),
    {"x": MAP, "grad": "like x", "gate": "N C", "dmean": "N C"},
)
