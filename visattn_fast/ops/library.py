"""The operator library: how an op is declared, and who owns which dispatch key.

Every op is declared with its schema, its implementation in plain PyTorch (``CompositeExplicitAutograd``, so that it
runs everywhere) and its fake. The kernels register themselves over it when a device is first used: the native library
under ``CPU`` as it is loaded, the Triton launchers through `register_triton`. Where the native CUDA library is there,
too, `register_cuda` gives ``CUDA`` to a choice between the two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .autograd import without_autocast
from .layout import accumulation_dtype, empty_map
from .shapes import Shape, fake_of

LIBRARY = torch.library.Library("visattn_fast", "DEF")


class Op(NamedTuple):
    """A declared op: its implementation in plain PyTorch, and the kernels' module with the launcher of its name.

    ``gradients_of`` are the positions of the arguments whose gradients are the last results, and have their dtypes.
    """

    reference: Callable[..., Any]
    launcher: str | None
    schema: str
    gradients_of: Sequence[int] = ()


OPS: dict[str, Op] = {}
NATIVE_LIBRARY = torch.library.Library("visattn_fast_cuda", "DEF")  # the same schemas, of the native kernels

# What has kernels for CUDA, by the op's name, and which of them are reached.
_TRITON: dict[str, Callable[..., Any]] = {}
_NATIVE: dict[str, Callable[..., Any]] = {}
_native_chosen: Callable[[], bool] = bool
_declared: set[str] = set()
_shared: set[str] = set()


def define(
    schema: str,
    launcher: str | None,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | Sequence[Shape],
    gradients_of: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
) -> Any:
    """Declares an op and returns its overload.

    Args:
        schema: ``name(arguments) -> results``.
        launcher: the module of ``visattn_fast.kernels.ops`` whose function ``name`` is the Triton implementation.
            None: PyTorch's own operations serve every device.
        reference: the implementation in plain PyTorch.
        fake: shapes, dtypes and strides of the results: a function, or each result's shape as in `shapes`.
        gradients_of: the arguments whose gradients are the last results. Kernels round each sum once, to its weight's
            dtype; reference and fake may return sums as they are, and they are rounded for them.
        weights: the declared shapes of arguments, which bind the letters of ``fake``.
    """
    name = schema[: schema.index("(")]
    arguments = [a.split()[-1] for a in schema[len(name) + 1 : schema.index(")")].split(",")]
    positions = [arguments.index(weight) for weight in gradients_of]
    if not callable(fake):
        fake = fake_of(arguments, fake, weights or {})
    reference, fake = _rounded(reference, positions), _rounded(fake, positions)
    # Kernels read any strides. Without the tag Inductor would copy maps back to the layout of eager mode.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"visattn_fast::{name}", fake, lib=LIBRARY)
    OPS[name] = Op(reference, launcher, schema, positions)
    return getattr(torch.ops.visattn_fast, name).default


def _rounded(function: Callable[..., Any], gradients_of: Sequence[int]) -> Callable[..., Any]:
    """``function`` with its last results in the dtypes of the arguments whose gradients they are."""

    def rounded(*args: Any) -> Any:
        results = function(*args)
        first = len(results) - len(gradients_of)
        sums = zip(results[first:], gradients_of, strict=True)
        return *results[:first], *(d.to(args[i].dtype) for d, i in sums)

    return rounded if gradients_of else function


def define_infer(name: str) -> Any:
    """Declares ``<name>_infer``, the first result of ``<name>_fwd`` alone, and returns its overload.

    For calls that keep nothing for a backward pass: on small maps every result is a good part of a call. A native
    library may implement it; else it calls the forward op.
    """
    forward = getattr(torch.ops.visattn_fast, f"{name}_fwd").default
    arguments = OPS[f"{name}_fwd"].schema.removeprefix(f"{name}_fwd").partition(" ->")[0]
    schema = f"{name}_infer{arguments} -> Tensor y"
    return define(schema, None, lambda *args: forward(*args)[0], lambda x, *rest: empty_map(x))


def define_normed(name: str) -> Any:
    """Declares ``<name>_normed``, y of ``<name>_fwd`` behind a batch norm that goes by its statistics.

    For inference: what the norm makes of z is never stored. Returns its overload.
    """
    forward = getattr(torch.ops.visattn_fast, f"{name}_fwd").default
    arguments = OPS[f"{name}_fwd"].schema.partition("(Tensor x, ")[2].partition(") ->")[0]
    norm = "Tensor norm_weight, Tensor norm_bias, Tensor norm_mean, Tensor norm_var, float eps"

    def plain(z: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, *rest: Any) -> Any:
        a = accumulation_dtype(z)
        gain = torch.rsqrt(var.to(a) + eps) * weight.to(a)
        d = (z - mean.to(a)[:, None, None]) * gain[:, None, None]
        return forward((d + bias.to(a)[:, None, None]).to(z.dtype), *rest)[0]

    return define(
        f"{name}_normed(Tensor z, {norm}, {arguments}) -> Tensor y", None, plain, lambda z, *rest: empty_map(z)
    )


def register_triton(dispatch_key: str) -> None:
    """Gives ``dispatch_key`` of every op to its Triton launcher. Raises ImportError without triton."""
    for name, op in OPS.items():
        if op.launcher is None:
            continue
        launchers = importlib.import_module(f"visattn_fast.kernels.ops.{op.launcher}")
        if dispatch_key == "CUDA":
            _TRITON[name] = getattr(launchers, name)
        else:
            LIBRARY.impl(name, getattr(launchers, name), dispatch_key)
    if dispatch_key == "CUDA":
        _share_cuda()


def register_cuda(load: Callable[[], str | None], chosen: Callable[[], bool]) -> str | None:
    """Lets the native kernels serve their ops on ``CUDA`` whenever ``chosen()``, and Triton's the rest of the time.

    Args:
        load: loads the native library, which implements ops of the namespace ``visattn_fast_cuda``; returns None or
            the reason why it cannot.

    Returns:
        That reason, or None.
    """
    global _native_chosen
    for name in OPS.keys() - _declared:
        NATIVE_LIBRARY.define(OPS[name].schema)
        _declared.add(name)
    if absent := load():
        return absent
    _native_chosen = chosen
    for name in OPS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE_LIBRARY.ns}::{name}", "CUDA"):
            native = getattr(getattr(torch.ops, NATIVE_LIBRARY.ns), name).default
            _NATIVE[name] = _rounded(native, OPS[name].gradients_of)
    _share_cuda()
    return None


def cuda_kernel(name: str, native_chosen: bool) -> Callable[..., Any]:
    """The kernel that serves op ``name`` on CUDA devices.

    Raises:
        RuntimeError: the native kernels were asked for, and there is none for this op.
    """
    native, triton = _NATIVE.get(name), _TRITON.get(name)
    # The backward of a native forward may be Triton's, and the other way round: both read what either keeps.
    if native_chosen and native is None and name.replace("_bwd", "_fwd") not in _NATIVE:
        there = ", ".join(sorted(_NATIVE)) or "none"
        raise RuntimeError(f"backend 'cuda' has no kernel for {name}; it has {there}")
    return native if native_chosen and native else triton or native or OPS[name].reference


def _share_cuda() -> None:
    """Gives ``CUDA`` of every op with kernels to `cuda_kernel`."""
    for name in {name for name, op in OPS.items() if op.launcher} - _shared:
        LIBRARY.impl(name, _chooser(name), "CUDA")
        _shared.add(name)


def _chooser(name: str) -> Callable[..., Any]:
    return lambda *args: cuda_kernel(name, _native_chosen())(*args)
