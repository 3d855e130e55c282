"""The operator library: declares ops, and assigns their dispatch keys to kernels.

An op is declared with its schema, its implementation in plain PyTorch (``CompositeExplicitAutograd``, so that it runs
everywhere) and its fake. Kernels are registered on top when a device is first used: the native library takes ``CPU`` as
it is loaded, and `register_triton` gives the other keys to the Triton launchers. `register_cuda` lets the native CUDA
library share ``CUDA`` with Triton.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import native
from . import flops
from .autograd import without_autocast
from .layout import accumulation_dtype
from .shapes import Shape, fake_of
from .signature import Signature

LIBRARY = torch.library.Library("visattn_fast", "DEF")


class Op(NamedTuple):
    """A declared op.

    Attributes:
        reference: the implementation in plain PyTorch, with the check of the arguments in front of it.
        launcher: the module of ``visattn_fast.kernels.ops`` with the Triton launcher of the op's name. None: no Triton
            kernel; a C++ kernel or PyTorch's operations serve.
        schema: ``name(arguments) -> results``.
        signature: what its arguments must be.
        gradients_of: positions of the arguments whose gradients are the last results, in these arguments' dtypes.
    """

    reference: Callable[..., Any]
    launcher: str | None
    schema: str
    signature: Signature
    gradients_of: Sequence[int] = ()


OPS: dict[str, Op] = {}
NATIVE_LIBRARY = torch.library.Library("visattn_fast_cuda", "DEF")  # the same schemas, of the native kernels

_NORM = ("norm_weight", "norm_bias", "norm_mean", "norm_var")

# The kernels for CUDA by the op's name, and whether the native ones are chosen.
_TRITON: dict[str, Callable[..., Any]] = {}
_NATIVE: dict[str, Callable[..., Any]] = {}
_native_chosen: Callable[[], bool] = bool
_declared: set[str] = set()
_shared: set[str] = set()


def define(
    schema: str,
    launcher: str | None,
    reference: Callable[..., Any],
    results: Sequence[Shape],
    arguments: Mapping[str, str],
    gradients_of: Sequence[str] = (),
    flops_of: Callable[..., int] | None = None,
) -> Any:
    """Declares an op and returns its overload.

    Args:
        schema: ``name(arguments) -> results``.
        launcher: the module of ``visattn_fast.kernels.ops`` whose function ``name`` is the Triton implementation.
            None: no Triton kernel; a C++ kernel or PyTorch's operations serve.
        reference: the implementation in plain PyTorch.
        results: the shape of each result, as in `shapes`.
        arguments: what each argument must be, as in `signature`. Every call of every implementation is held to it.
        gradients_of: the arguments whose gradients are the last results. Kernels round each of these sums once, to the
            dtype of its weight. ``reference`` need not: its results are converted here, and those of the fake.
        flops_of: counts the floating-point operations that plain PyTorch would make in the op's place, as in `flops`,
            from the op's arguments on the meta device. None: those of ``reference``.
    """
    signature = Signature(schema, arguments)
    name = signature.name
    positions = [signature.names.index(weight) for weight in gradients_of]
    fake = _rounded(fake_of(signature, results), positions)
    checked_reference = _checked(_rounded(reference, positions), signature)
    # Kernels read any strides. Without this tag Inductor would copy maps to the layout that eager mode gives them.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, without_autocast(checked_reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"visattn_fast::{name}", fake, lib=LIBRARY)
    OPS[name] = Op(checked_reference, launcher, schema, signature, positions)
    native.signatures[name] = signature.table()
    op = getattr(torch.ops.visattn_fast, name)
    flops.register(op, flops_of or functools.partial(flops.count, reference))
    return op.default


def _rounded(function: Callable[..., Any], gradients_of: Sequence[int]) -> Callable[..., Any]:
    """Wraps ``function``: converts its last results, gradients of arguments, to the dtypes of these arguments."""

    def rounded(*args: Any) -> Any:
        results = function(*args)
        first = len(results) - len(gradients_of)
        sums = zip(results[first:], gradients_of, strict=True)
        return *results[:first], *(d.to(args[i].dtype) for d, i in sums)

    return rounded if gradients_of else function


def _checked(function: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """Puts the check of the arguments in front of ``function``."""

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        return function(*signature.fit(args))

    return checked


def define_infer(name: str) -> Any:
    """Declares ``<name>_infer``, which returns only y of ``<name>_fwd``, and returns its overload.

    It serves calls without a backward pass: on small maps, each further result takes a good part of a call. The native
    library may implement it; otherwise it calls the forward op.
    """
    forward = getattr(torch.ops.visattn_fast, f"{name}_fwd").default
    op = OPS[f"{name}_fwd"]
    schema = f"{name}_infer{op.schema.removeprefix(f'{name}_fwd').partition(' ->')[0]} -> Tensor y"
    return define(schema, None, lambda *args: forward(*args)[0], ("like x",), op.signature.texts)


def define_normed(name: str) -> Any:
    """Declares ``<name>_normed``, ``<name>_fwd`` of a batch norm in eval mode, and returns its overload.

    It serves inference. A native implementation never stores the normalised map; without one, plain PyTorch normalises
    and the forward op follows.
    """
    forward = getattr(torch.ops.visattn_fast, f"{name}_fwd").default
    op = OPS[f"{name}_fwd"]
    rest = op.schema.partition("(Tensor x, ")[2].partition(") ->")[0]
    norm = f"{', '.join(f'Tensor {key}' for key in _NORM)}, float eps"

    def plain(z: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, *rest: Any) -> Any:
        a = accumulation_dtype(z)
        gain = torch.rsqrt(var.to(a) + eps) * weight.to(a)
        d = (z - mean.to(a)[:, None, None]) * gain[:, None, None]
        return forward((d + bias.to(a)[:, None, None]).to(z.dtype), *rest)[0]

    arguments = {"z": op.signature.texts["x"], **dict.fromkeys(_NORM, "C : floating"), "eps": "0.."}
    arguments |= {key: text.replace("like x", "like z") for key, text in op.signature.texts.items() if key != "x"}
    schema = f"{name}_normed(Tensor z, {norm}, {rest}) -> Tensor y"
    return define(schema, None, plain, ("like z",), arguments)


def register_triton(dispatch_key: str) -> None:
    """Gives ``dispatch_key`` of every op to its Triton launcher; ``CUDA`` by way of `cuda_kernel`.

    Raises:
        ImportError: triton is not installed.
    """
    launched = {name: op for name, op in OPS.items() if op.launcher}
    modules = {
        op.launcher: importlib.import_module(f"visattn_fast.kernels.ops.{op.launcher}") for op in launched.values()
    }
    for name, op in launched.items():  # after all imports: one that fails leaves nothing half done
        launcher = _checked(getattr(modules[op.launcher], name), op.signature)
        if dispatch_key == "CUDA":
            _TRITON[name] = launcher
        else:
            LIBRARY.impl(name, launcher, dispatch_key)
    if dispatch_key == "CUDA":
        _share_cuda()


def register_cuda(load: Callable[[], str | None], chosen: Callable[[], bool]) -> str | None:
    """Lets the native kernels serve their ops on ``CUDA`` while ``chosen()`` is True; otherwise Triton's serve.

    Args:
        load: loads the native library, which implements ops of the namespace ``visattn_fast_cuda``. Returns None, or
            the reason why it cannot.
        chosen: asked at every call.

    Returns:
        The result of ``load``.
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
            kernel = getattr(getattr(torch.ops, NATIVE_LIBRARY.ns), name).default
            _NATIVE[name] = _rounded(kernel, OPS[name].gradients_of)
    _share_cuda()
    return None


def cuda_kernel(name: str, native_chosen: bool) -> Callable[..., Any]:
    """The kernel that serves op ``name`` on CUDA devices.

    Raises:
        RuntimeError: the native kernels were asked for, and this op has none.
    """
    own, triton = _NATIVE.get(name), _TRITON.get(name)
    # A native forward may have Triton's backward, and the other way round: both save and read the same tensors.
    if native_chosen and own is None and name.replace("_bwd", "_fwd") not in _NATIVE:
        served = ", ".join(sorted(_NATIVE)) or "none"
        raise RuntimeError(f"backend 'cuda' has no kernel for {name}; it has {served}")
    return own if native_chosen and own else triton or own or OPS[name].reference


def _share_cuda() -> None:
    """Gives ``CUDA`` of every op with a Triton launcher to `cuda_kernel`, once."""
    for name in {name for name, op in OPS.items() if op.launcher} - _shared:
        LIBRARY.impl(name, _chooser(name), "CUDA")
        _shared.add(name)


def _chooser(name: str) -> Callable[..., Any]:
    return lambda *args: cuda_kernel(name, _native_chosen())(*args)
