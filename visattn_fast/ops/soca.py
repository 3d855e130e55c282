"""Second-order channel attention: a channel gate from the square root of the channels' covariance.

The gate needs the square root only times a vector, and the Newton-Schulz steps are a polynomial in the matrix: 122
products of the matrix with vectors replace 12 products of matrices, and as many again give the gradient. All steps
commute, and each is its own transpose. Small matrices are multiplied instead: there the number of calls is the cost.
Means, covariance, pooled values, hidden layer and gate are saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.soca import STEPS, square_root, trace
from ..reference.soca import covariance as plain_covariance
from . import flops
from .autograd import without_autocast
from .channel_scale import channel_input_grad, channel_mean, channel_scale_bwd, channel_scale_fwd
from .declare import composed_op
from .layout import as_matrices, empty_small, memory_format
from .library import define
from .signature import MAP

# Elements of x centred at a time, on a CPU and elsewhere, where launches cost the most. Backward, which keeps more, has
# smaller blocks.
_FORWARD, _BACKWARD = (1 << 18, 1 << 23), (1 << 18, 1 << 21)


def _blocks(x: Tensor, limits: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yields slices of images and of pixels: several whole images, or parts of one. Compiled, all of x is one block."""
    if torch.compiler.is_compiling():
        yield slice(None), slice(None)
        return
    n, c, h, w = x.shape
    limit = limits[0 if x.is_cpu else 1]
    images, pixels = limit // (c * h * w), max(limit // c, 1)
    if images:
        yield from ((slice(first, first + images), slice(None)) for first in range(0, n, images))
    else:
        starts = range(0, h * w, pixels)
        yield from ((slice(i, i + 1), slice(first, first + pixels)) for i in range(n) for first in starts)


def _matrices(x: Tensor, nhwc: bool) -> Tensor:
    """Returns x as ``[N, P, C]`` in channels_last, else as ``[N, C, P]``; a view if x is dense."""
    return x.permute(0, 2, 3, 1).flatten(1, 2) if nhwc else x.flatten(2)


def _covariance_reference(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Centres some images at a time, or blocks of one: sums do not cancel, and no centred copy of x is stored."""
    n, c, h, w = x.shape
    nhwc = memory_format(x) == torch.channels_last
    matrices, mean = _matrices(x, nhwc), mean[:, None] if nhwc else mean[:, :, None]
    cov, rest = empty_small(x, n, c, c), empty_small(x, n, c)
    for images, pixels in _blocks(x, _FORWARD):
        centred = (matrices[images, pixels] if nhwc else matrices[images, :, pixels]) - mean[images]  # in mean's dtype
        pair = (centred.mT, centred) if nhwc else (centred, centred.mT)
        cov[images].baddbmm_(*pair, beta=1 if pixels.start else 0, alpha=1 / (h * w))
        if pixels.start:
            rest[images] += centred.sum(1 if nhwc else 2)
        else:
            torch.sum(centred, 1 if nhwc else 2, out=rest[images])
    return cov, rest


# rest: the sums of x - mean over the pixels, zero but for the rounding of mean.
covariance = define(
    "channel_covariance(Tensor x, Tensor mean) -> (Tensor cov, Tensor rest)",
    None,
    _covariance_reference,
    ("N C C", "N C"),
    {"x": MAP, "mean": "N C"},
    flops_of=lambda x, mean: flops.count(plain_covariance, x),
)


# factor: what x - mean is multiplied by in dx. Counts that product too, which `_add_product` makes in place.
covariance_bwd = define(
    "channel_covariance_bwd(Tensor dcov, Tensor x) -> Tensor factor",
    None,
    lambda dcov, x: (dcov * (2 / (x.shape[2] * x.shape[3]))).to(x.dtype),
    ("N C C : x",),
    {"x": MAP, "dcov": "N C C"},
    flops_of=lambda dcov, x: flops.count_gradient(plain_covariance, (x,)),
)


class _Root(Protocol):
    """Applies p(a), the square root of symmetric matrices a ``[N, C, C]`` by Newton-Schulz steps, to row vectors."""

    def apply(self, v: Tensor) -> Tensor:
        """Returns ``v p(a)`` for v ``[N, 1, C]``."""

    def gradient(self, v: Tensor, g: Tensor) -> Tensor:
        """Returns the gradient of a, symmetric matrices, from g, the gradient of ``v p(a)``."""


class _Vectors:
    """The Newton-Schulz iterates of a symmetric matrix a ``[N, C, C]``, applied to row vectors ``[N, 1, C]``.

    ``Y_0 = a``, ``Z_0 = 1``; ``T_k = (3 - Z_{k-1} Y_{k-1}) / 2``, ``Y_k = Y_{k-1} T_k``, ``Z_k = T_k Z_{k-1}``; Y_k
    tends to the square root of a. Every vector that a multiplies is recorded, and the gradient visits them in reverse.
    Each T around a product brings a factor -1/2, counted as a power.
    """

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.inputs: list[Tensor] = []
        self.gradients: list[tuple[Tensor, int]] = []

    def y(self, k: int, v: Tensor) -> Tensor:
        if k == 0:
            self.inputs.append(v)
            return torch.bmm(v, self.a)
        return self.t(k, self.y(k - 1, v))

    def z(self, k: int, v: Tensor) -> Tensor:
        return v if k == 0 else self.t(k, self.z(k - 1, v))

    def t(self, k: int, v: Tensor) -> Tensor:
        return self._half(v, self.y(k - 1, self.z(k - 1, v)))

    def _half(self, v: Tensor, product: Tensor) -> Tensor:
        """Returns ``(3 v - product) / 2`` in one call. A `baddbmm` that includes the product would lose two bits."""
        return torch.lerp(v, product, -0.5)

    def y_backward(self, k: int, g: Tensor, power: int) -> Tensor:
        if k == 0:
            self.gradients.append((g, power))
            return torch.bmm(g, self.a)
        return self.y_backward(k - 1, self.t_backward(k, g, power), power)

    def z_backward(self, k: int, g: Tensor, power: int) -> Tensor:
        return g if k == 0 else self.z_backward(k - 1, self.t_backward(k, g, power), power)

    def t_backward(self, k: int, g: Tensor, power: int) -> Tensor:
        return self._half(g, self.z_backward(k - 1, self.y_backward(k - 1, g, power + 1), power + 1))

    def apply(self, v: Tensor) -> Tensor:
        return self.y(STEPS, v)

    def gradient(self, v: Tensor, g: Tensor) -> Tensor:
        self.y(STEPS, v)
        self.y_backward(STEPS, g, 0)
        found = torch.zeros_like(self.a)
        for power in range(STEPS + 1):
            pairs = [(v, g) for v, (g, p) in zip(self.inputs, self.gradients[::-1], strict=True) if p == power]
            inputs, gradients = (torch.cat(vectors, 1) for vectors in zip(*pairs, strict=True))
            found.baddbmm_(inputs.mT, gradients, alpha=(-0.5) ** power)
        return _symmetric(found)


class _Matrices:
    """The same iterates as symmetric matrices, except the last one. `bmm` costs less than ``@``."""

    def __init__(self, a: Tensor) -> None:
        eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).mul_(1.5)
        t = torch.sub(eye, a, alpha=0.5)
        self.y, self.z, self.t = [a, torch.bmm(a, t)], [t, t], [t]
        for k in range(1, STEPS):
            y, z = self.y[k], self.z[k]
            t = torch.baddbmm(eye, z, y, alpha=-0.5)
            self.t.append(t)
            if k < STEPS - 1:
                self.y.append(torch.bmm(y, t))
                self.z.append(torch.bmm(t, z))

    def apply(self, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(v, self.y[-1]), self.t[-1])

    def gradient(self, v: Tensor, g: Tensor) -> Tensor:
        # T_k+1 = (3 - Z_k Y_k) / 2; the last Z has no gradient.
        dt = torch.bmm(v, self.y[-1]).mT * g
        dy = torch.baddbmm(v.mT * torch.bmm(g, self.t[-1]), self.z[-1], dt, alpha=-0.5)
        dz = -0.5 * torch.bmm(dt, self.y[-1])
        for y, z, t in zip(self.y[-2:0:-1], self.z[-2:0:-1], self.t[-2:0:-1], strict=True):
            dt = torch.baddbmm(torch.bmm(y, dy), dz, z)  # Y_k+1 = Y_k T, Z_k+1 = T Z_k
            dy = torch.baddbmm(torch.bmm(dy, t), z, dt, alpha=-0.5)
            dz = torch.baddbmm(torch.bmm(t, dz), dt, y, alpha=-0.5)
        a, t = self.y[0], self.t[0]  # Y_1 = a T, Z_1 = T, T = (3 - a) / 2
        dt = torch.baddbmm(dz, a, dy)
        return _symmetric(torch.baddbmm(dt, dy, t, beta=-0.5))


def _symmetric(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def _root(a: Tensor) -> _Root:
    n, c, _ = a.shape
    # At the limit both take equally long on a CPU; elsewhere the iterates take a few megabytes.
    return _Matrices(a) if n * c**3 <= (1 << 22 if a.is_cpu else 1 << 27) else _Vectors(a)


def _ones(cov: Tensor) -> Tensor:
    return torch.full((cov.shape[0], 1, cov.shape[1]), 1 / cov.shape[1], dtype=cov.dtype, device=cov.device)


def _soca_gate_fwd_reference(
    cov: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, ...]:
    w1, b1, w2, b2 = as_matrices(cov.dtype, w1, b1, w2, b2)
    total = trace(cov)
    pooled = (_root(cov / total).apply(_ones(cov)) * total.sqrt())[:, 0]
    hidden = F.relu(F.linear(pooled, w1, b1))
    return pooled, hidden, torch.sigmoid(F.linear(hidden, w2, b2))


def _layer_gradients(
    dgate: Tensor, w1: Tensor, w2: Tensor, pooled: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, ...]:
    """Returns the gradients of the first layer's result, of w1, b1, w2 and b2."""
    dz2 = dgate * gate * (1 - gate)
    dz1 = torch.where(hidden <= 0, 0.0, dz2 @ w2.flatten(1).to(gate.dtype))
    return dz1, (dz1.t() @ pooled).view(w1.shape), dz1.sum(0), (dz2.t() @ hidden).view(w2.shape), dz2.sum(0)


def _soca_gate_bwd_reference(
    dgate: Tensor, cov: Tensor, w1: Tensor, w2: Tensor, pooled: Tensor, hidden: Tensor, gate: Tensor
) -> tuple[Tensor, ...]:
    dz1, *dlayers = _layer_gradients(dgate, w1, w2, pooled, hidden, gate)
    dpooled = (dz1 @ w1.flatten(1).to(cov.dtype))[:, None]
    total = trace(cov)
    da = _root(cov / total).gradient(_ones(cov), dpooled * total.sqrt())
    # pooled = sqrt(total) p(cov / total): the gradient of total goes to the diagonal, unless total is not the trace.
    dtotal = (pooled[:, None] * dpooled).sum(2, keepdim=True) / (2 * total)
    dtotal = dtotal - (da * cov).sum((1, 2), keepdim=True) / total**2
    dtotal = torch.where(total == cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None], dtotal, 0.0)
    dcov = da / total + dtotal * torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device)
    return dcov, *dlayers


def _plain_gate(cov: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    return F.linear(F.relu(F.linear(square_root(cov).mean(1), w1.flatten(1), b1)), w2.flatten(1), b2)


_LAYERS = {"cov": "N C C : sums", "w1": "R C : floating", "w2": "C R : floating"}
soca_gate_fwd = define(
    "soca_gate_fwd(Tensor cov, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2)"
    " -> (Tensor pooled, Tensor hidden, Tensor gate)",
    None,
    _soca_gate_fwd_reference,
    ("N C", "N R", "N C"),
    {**_LAYERS, "b1": "R : floating", "b2": "C : floating"},
    flops_of=lambda *args: flops.count(_plain_gate, *args),
)
soca_gate_bwd = define(
    "soca_gate_bwd(Tensor dgate, Tensor cov, Tensor w1, Tensor w2, Tensor pooled, Tensor hidden, Tensor gate)"
    " -> (Tensor dcov, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    None,
    _soca_gate_bwd_reference,
    ("shape of cov", "shape of w1", "R", "shape of w2", "C"),
    {**_LAYERS, "dgate": "N C", "pooled": "N C", "hidden": "N R", "gate": "N C"},
    flops_of=lambda dgate, cov, w1, w2, *_: flops.count_gradient(_plain_gate, (cov, w1, None, w2, None)),
)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    # On a GPU PyTorch's own mean of a channels_last map takes many megabytes of scratch for partial sums.
    mean = channel_mean(x)
    cov, rest = covariance(x, mean)
    pooled, hidden, gate = soca_gate_fwd(cov, w1, b1, w2, b2)
    return channel_scale_fwd(x, gate, residual, activation), mean, rest, cov, pooled, hidden, gate


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any, needs: Any) -> tuple[Tensor | None, ...]:
    (x, w1, _, w2, _, residual), (mean, rest, cov, pooled, hidden, gate) = tensors, small
    dgate, dresidual = channel_scale_bwd(grad, x, gate, residual, *options)
    if not needs[0]:
        return None, *_layer_gradients(dgate, w1, w2, pooled, hidden, gate)[1:], dresidual
    dcov, dw1, db1, dw2, db2 = soca_gate_bwd(dgate, cov, w1, w2, pooled, hidden, gate)
    factor = covariance_bwd(dcov, x)
    # A mean far from zero is rounded by a part of the deviations: factor times the rest of it is taken off again.
    shift = -(factor * rest[:, None]).sum(2)
    dx = channel_input_grad(dresidual if options[0] else grad, x, gate, shift)
    _add_product(dx, factor, x, mean)
    return dx, dw1, db1, dw2, db2, dresidual


def _add_product(dx: Tensor, factor: Tensor, x: Tensor, mean: Tensor) -> None:
    """Adds ``factor (x - mean)`` to dx in place, block by block as in `_covariance_reference`, centred in x's dtype."""
    nhwc = memory_format(dx) == torch.channels_last
    matrices, sums, mean = _matrices(x, nhwc), _matrices(dx, nhwc), mean[:, None] if nhwc else mean[:, :, None]
    centred: Any = None
    for images, pixels in _blocks(x, _BACKWARD):
        centred = None  # before the next block is allocated
        block = (images, pixels) if nhwc else (images, slice(None), pixels)
        centred = torch.sub(matrices[block], mean[images], out=torch.empty_like(matrices[block]))
        sums[block].baddbmm_(*((centred, factor[images]) if nhwc else (factor[images], centred)))


SOCA = composed_op(
    "soca",
    without_autocast(_forward),
    without_autocast(_gradients),
    reference.soca,
    epilogue=True,
    partial=True,
    tiny=196,
)
