"""Triplet attention: passes over x along each of its axes, and between them the gates of the pooled planes.

Faces ``[N, F]`` hold a value for each pair of indices, in the accumulation dtype: C and W, then H and C, then, if there
is a third gate, H and W. Channels come first in NCHW, ``[C, W]`` and ``[C, H]``, and last in channels_last, ``[W, C]``
and ``[H, C]``. Pooled faces ``[N, 2, F]`` hold the maximum, then the mean.

Forward reads x twice and writes y; backward reads grad and x, then grad, and writes dx. Pooled faces, argmax, gates and
what the batch norms read are saved for backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.triplet_attention import PlaneGate
from .autograd import without_autocast
from .declare import composed_op
from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .layout import accumulation_dtype, converted, empty_small, memory_format, to_map
from .library import define
from .map_conv import map_conv, map_conv_bwd
from .shapes import Arguments
from .signature import MAP

_AXES = (2, 3, 1)  # pooled for the face of C and W, of H and C, of H and W
FIELDS = 5  # tensors of a gate: convolution, weight, bias, mean and variance


def _channels_last(x: Tensor) -> bool:
    """True if faces lie as in channels_last. With one channel or one pixel they lie the same in both layouts."""
    _, c, h, w = x.shape
    return c > 1 and h * w > 1 and memory_format(x) == torch.channels_last


def _shapes(x: Tensor, spatial: bool) -> list[tuple[int, int]]:
    """Returns the shapes of the faces as they lie in memory."""
    _, c, h, w = x.shape
    shapes = [(w, c), (h, c)] if _channels_last(x) else [(c, w), (c, h)]
    return [*shapes, (h, w)] if spatial else shapes


def _length(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(a * b for a, b in shapes)


def _planes(faces: Tensor, x: Tensor) -> list[Tensor]:
    """Splits faces ``[..., F]`` into planes ``[..., A, B]``, as they lie in memory. Makes views."""
    shapes = _shapes(x, spatial=True)
    if faces.shape[-1] != _length(shapes):
        shapes = _shapes(x, spatial=False)
    parts = faces.split([a * b for a, b in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _broadcast(faces: Tensor, x: Tensor) -> list[Tensor]:
    """Splits faces into ``[N, C, 1, W]``, ``[N, C, H, 1]`` and, if there are three, ``[N, 1, H, W]``."""
    cw, hc, *hw = _planes(faces, x)
    if _channels_last(x):
        cw, hc = cw.mT, hc.mT
    return [cw[:, :, None], hc[:, :, :, None], *(plane[:, None] for plane in hw)]


def _to_faces(planes: list[Tensor], x: Tensor) -> Tensor:
    """Joins ``[N, C, W]``, ``[N, C, H]`` and, if there are three, ``[N, H, W]`` to faces."""
    cw, hc, *hw = planes
    first = [cw.mT, hc.mT] if _channels_last(x) else [cw, hc]
    return torch.cat([plane.flatten(1) for plane in (*first, *hw)], 1)


def _mean_gate(gates: Tensor, x: Tensor) -> Tensor:
    """Returns the mean of the gates of every element, ``[N, C, H, W]``."""
    found = _broadcast(gates, x)
    return functools.reduce(torch.add, found) / len(found)


def _triplet_pool_reference(x: Tensor, spatial: bool) -> tuple[Tensor, Tensor]:
    axes, dtype = _AXES if spatial else _AXES[:2], accumulation_dtype(x)
    maxima = [x.max(axis) for axis in axes]
    largest = _to_faces([m.values.to(dtype) for m in maxima], x)
    means = _to_faces([x.mean(axis, dtype=dtype) for axis in axes], x)
    return torch.stack([largest, means], 1), _to_faces([m.indices.to(torch.int32) for m in maxima], x)


def _triplet_scale_reference(x: Tensor, gates: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return finish(x, _mean_gate(gates, x), residual, activation)


def _triplet_scale_bwd_reference(
    grad: Tensor, x: Tensor, gates: Tensor, residual: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    grad = start_backward(grad, x, _mean_gate(gates, x), residual, activation)
    product, count = grad * x, len(_planes(gates, x))
    dgates = _to_faces([product.sum(axis) for axis in _AXES[:count]], x) / count
    return dgates, residual_gradient(grad, x, activation)


def _triplet_input_grad_reference(grad: Tensor, x: Tensor, gates: Tensor, dpooled: Tensor, argmax: Tensor) -> Tensor:
    dx = grad.to(gates.dtype) * _mean_gate(gates, x)
    dmax, dmean = dpooled.unbind(1)
    for axis, d_max, d_mean, first in zip(_AXES, *(_broadcast(t, x) for t in (dmax, dmean, argmax)), strict=False):
        index = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (3 - axis))
        dx = dx + d_mean / x.shape[axis] + torch.where(index == first, d_max, 0.0)
    return to_map(dx, x)


def _empty_faces(*sizes: int, dtype: torch.dtype | None = None) -> Callable[[Arguments], Tensor]:
    """Returns the declared shape of faces ``[N, *sizes, F]``."""

    def allocate(given: Arguments) -> Tensor:
        x = given["x"]
        return empty_small(x, x.shape[0], *sizes, _length(_shapes(x, given["spatial"])), dtype=dtype)

    return allocate


_GATED = {"x": MAP, "gates": "N F", "F": "C*W+C*H | C*W+C*H+H*W"}
triplet_pool = define(  # argmax: the index of each maximum along its axis, the first of equal ones
    "triplet_pool(Tensor x, bool spatial) -> (Tensor pooled, Tensor argmax)",
    "triplet_attention",
    _triplet_pool_reference,
    (_empty_faces(2), _empty_faces(dtype=torch.int32)),
    {"x": MAP},
)
triplet_scale = define(
    "triplet_scale(Tensor x, Tensor gates, Tensor? residual, int activation) -> Tensor y",
    "triplet_attention",
    _triplet_scale_reference,
    ("like x",),
    {**_GATED, "residual": "like x"},
)
triplet_scale_bwd = define(
    "triplet_scale_bwd(Tensor grad, Tensor x, Tensor gates, Tensor? residual, int activation)"
    " -> (Tensor dgates, Tensor dresidual)",
    "triplet_attention",
    _triplet_scale_bwd_reference,
    ("shape of gates", residual_gradient_shape),
    {**_GATED, "residual": "like x", "grad": "like x"},
)
triplet_input_grad = define(  # reads the layout of x, not its values
    "triplet_input_grad(Tensor grad, Tensor x, Tensor gates, Tensor dpooled, Tensor argmax) -> Tensor dx",
    "triplet_attention",
    _triplet_input_grad_reference,
    ("like x",),
    {**_GATED, "grad": "like x", "dpooled": "N 2 F", "argmax": "N F : int32"},
)


def _gates(tensors: Sequence[Any], x: Tensor) -> list[tuple[Any, ...]]:
    """Returns each gate's filters, True if they are turned, and the norm's tensors, all in the accumulation dtype.

    The authors' planes are ``[C, W]``, ``[H, C]`` and ``[H, W]``; a face that lies otherwise has turned filters.
    """
    wide = converted(tensors, [accumulation_dtype(x)] * len(tensors))
    found = []
    for i, turned in enumerate((True, False, False) if _channels_last(x) else (False, True, False)):
        filters, *norm = wide[FIELDS * i : FIELDS * (i + 1)]
        if filters is not None:
            found.append((filters.mT if turned else filters, turned, *norm))
    return found


def batch_statistics(small: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns z ``[N, 1, A, B]``, its mean and ``1 / sqrt(var + eps)`` of each gate, from the op's small results.

    Mean and variance are empty if the gate does not take the batch's.
    """
    return [(small[i], small[i + 1], small[i + 2]) for i in range(3, len(small) - 1, 3)]


@without_autocast
def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Normalises each gate with its statistics or, if they are None, with the batch's."""
    tensors, (residual, activation, *eps) = args[: 3 * FIELDS], args[3 * FIELDS :]
    gates = _gates(tensors, x)
    pooled, argmax = triplet_pool(x, len(gates) == 3)
    logits, small = [], []
    for plane, (filters, _, weight, bias, mean, var), e in zip(_planes(pooled, x), gates, eps, strict=False):
        z = map_conv(plane.contiguous(), filters)
        normed, *batch = torch.native_batch_norm(z, weight, bias, mean, var, mean is None, 0.0, e)
        logits.append(normed.flatten(1))
        small += [z, *batch]
    opened = torch.cat(logits, 1).sigmoid_()
    # The last result only tells backward how the faces lie: hooks on saved tensors may bring x back in another layout.
    layout = empty_small(x, 0, 0) if _channels_last(x) else empty_small(x, 0)
    return triplet_scale(x, opened, residual, activation), pooled, argmax, opened, *small, layout


@without_autocast
def _gradients(
    grad: Tensor, tensors: Sequence[Any], small: Sequence[Tensor], options: Any, needs: Sequence[bool]
) -> tuple[Any, ...]:
    x, *weights, residual = tensors
    (pooled, argmax, opened, *_, layout), (activation, *eps) = small, options
    if _channels_last(x) != (layout.dim() == 2):
        x = x.contiguous(memory_format=torch.channels_last if layout.dim() == 2 else torch.contiguous_format)
    dgates, dresidual = triplet_scale_bwd(grad, x, opened, residual, activation)
    dlogits = torch.ops.aten.sigmoid_backward(dgates, opened)
    dpooled: list[Tensor] = []
    found: list[Tensor | None] = []
    for plane, dlogit, gate, (z, *batch), e in zip(
        _planes(pooled, x), _planes(dlogits, x), _gates(weights, x), batch_statistics(small), eps, strict=False
    ):
        filters, turned, weight, _, mean, var = gate
        if z.numel():
            dz, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dlogit[:, None].contiguous(), z, weight, mean, var, *batch, mean is None, e, [True, True, True]
            )
        else:  # PyTorch's kernel divides by the number of values
            dz, dweight, dbias = z, torch.zeros_like(weight), torch.zeros_like(weight)
        dplane, dfilters = map_conv_bwd(dz, plane.contiguous(), filters)
        dpooled.append(dplane.flatten(2))
        found += [dfilters.mT if turned else dfilters, dweight, dbias, None, None]
    upstream = dresidual if activation else grad
    dx = triplet_input_grad(upstream, x, opened, torch.cat(dpooled, 2), argmax) if needs[0] else None
    return dx, *found, *(None,) * (3 * FIELDS - len(found)), dresidual


def _mathematics(x: Tensor, *args: Any) -> Tensor:
    tensors, eps = args[: 3 * FIELDS], args[3 * FIELDS :]
    gates = [
        PlaneGate(conv, weight, bias, mean, var, mean is None, 0.0, e)
        for conv, weight, bias, mean, var, e in zip(*(tensors[i::FIELDS] for i in range(FIELDS)), eps, strict=True)
        if conv is not None
    ]
    return reference.triplet_attention(x, *gates)


TRIPLET_ATTENTION = composed_op(
    "triplet_attention", _forward, _gradients, _mathematics, epilogue=True, options=3, partial=True
)
