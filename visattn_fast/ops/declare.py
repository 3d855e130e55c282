"""Declares a gate once. Schemas, fakes, the autograd node and the forms for inference follow from the declaration.

A gate is ``y = act(f(x, weights) + residual)``. Its declaration names the weights, the options and the small results
that forward saves for backward, each with its shape, and brings forward, backward and mathematics in plain PyTorch::

    ECA = gate_op(
        "eca",
        weights={"weight": "1 1 K"},
        saves={"mean": "N C", "gate": "N C"},
        forward=_forward,  # (x, weight, residual, activation) -> (y, mean, gate)
        backward=_backward,  # (grad, x, weight, residual, mean, gate, activation) -> (dx, dresidual, dweight)
        mathematics=reference.eca,  # (x, weight) -> y, differentiable, without the epilogue
    )

In general this declares

- ``<name>_fwd(x, *weights, residual, activation, *options) -> (y, *saves)``,
- ``<name>_bwd(grad, x, *weights, residual, *saves, activation, *options) -> (dx, *dmaps, dresidual, *dweights)``,
  where dmaps are the gradients of weights that are maps, and dresidual is empty if it equals grad,
- on request ``<name>_infer``, which returns y alone, and ``<name>_normed``, which applies a batch norm to x first,
- the fakes of these ops, and the `FusedOp` with its autograd node and double backward.

A gate that is itself the result, such as CBAM's two halves, has neither residual nor activation. Its forward returns
``(gate, *saves)``, and its backward takes ``(grad, x, *weights, gate, *saves, *options)``.

Kernels are optional; they have the arguments of the schemas. Functions named ``<name>_fwd`` and ``<name>_bwd`` in
``kernels/ops/<name>.py`` are the Triton launchers. C++ registers the same names under the key ``CPU``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import flops
from .autograd import FusedOp, Gradients, fused_function, in_dtype_of_x
from .epilogue import residual_gradient_shape, with_epilogue
from .library import OPS, define, define_infer, define_normed
from .shapes import Arguments, Shape, allocated
from .signature import MAP


def gate_op(
    name: str,
    *,
    weights: Mapping[str, str],
    saves: Mapping[str, str],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    mathematics: Callable[..., Tensor],
    options: str = "",
    ranges: Mapping[str, str] | None = None,
    kernels: str = "",
    unread: Sequence[str] = (),
    statistics: Sequence[str] = (),
    empty_if_absent: Sequence[str] = (),
    backward_options: str | None = None,
    derived: Mapping[str, Callable[[Arguments], Any]] | None = None,
    result: str = "like x",
    epilogue: bool = True,
    infer: bool = False,
    normed: bool = False,
    tiny: int = 0,
    over_positions: bool = False,
) -> FusedOp:
    """Declares the ops of a gate. Returns its `FusedOp`, which the public function hands to `serve`.

    Shapes are written as in `shapes`.

    Args:
        name: the stem of the family, as in the file names of all layers.
        weights: name -> shape, in the order of the arguments. ``"R or None"``: the weight is optional. ``"like x"``: it
            is a map.
        saves: name -> text of the small results that forward returns after y and backward takes.
        forward, backward: the ops in plain PyTorch, with the arguments of the schemas, by position.
        mathematics: ``(x, *weights, *options) -> y`` in differentiable PyTorch, without the epilogue.
        options: numbers after the activation, as in a schema: ``"float eps"``.
        ranges: option or letter -> its range or values, as in `signature`.
        kernels: the module of ``visattn_fast.kernels.ops`` with the launchers, if not named after the family.
        unread: weights that backward does not take, such as biases; it returns their gradients all the same.
        statistics: weights that have no gradient, such as running means; backward does not take them either.
        empty_if_absent: optional weights whose gradient is empty if they are None. The gradients of other optional
            weights are always computed.
        backward_options: the options of backward, if they differ from forward's.
        derived: option of backward -> function of forward's arguments by name, for options that forward does not have.
        result: the shape of y.
        epilogue: False for a gate that is itself the result.
        infer: True declares ``<name>_infer``.
        normed: True declares ``<name>_normed``.
        tiny, over_positions: as in `FusedOp`.
    """
    shapes = {key: shape.removesuffix(" or None") for key, shape in weights.items()}
    schema = {key: f"Tensor{'?' * shape.endswith(' or None')} {key}" for key, shape in weights.items()}
    read = [key for key in weights if key not in {*unread, *statistics}]
    graded = [key for key in weights if key not in statistics]
    maps = [key for key in graded if shapes[key] == "like x"]
    small = [key for key in graded if key not in maps]
    residual, code = (["Tensor? residual"], ["int activation"]) if epilogue else ([], [])
    gate = [] if epilogue else ["Tensor gate"]
    saved = [*gate, *(f"Tensor {key}" for key in saves)]
    late = options if backward_options is None else backward_options

    fits = {key: shape if shape == "like x" else f"{shape} : floating" for key, shape in shapes.items()}
    fits |= {key: f"{fits[key]} with {statistics[0]}" for key in statistics[1:]}
    added = {"residual": "like x"} if epilogue else {}
    bounds = ranges or {}
    dropped = {*_names(options)} - {*_names(late)}  # options that backward does not take

    arguments = ["Tensor x", *schema.values(), *residual, *code, *_listed(options)]
    results = ["Tensor y"] * epilogue + saved
    forward_op = define(
        f"{name}_fwd({', '.join(arguments)}) -> ({', '.join(results)})",
        kernels or name,
        forward,
        (result, *(text.partition(" in ")[0] for text in saves.values())),
        {"x": MAP, **fits, **added, **bounds},
    )

    def gradient(key: str) -> Shape:
        """The declared gradient of a weight: shaped like the weight, or as declared if backward does not get it."""
        absent = "0" if key in empty_if_absent else shapes[key]
        return lambda given: absent if given.get(key) is None else f"shape of {key}"

    def backward_flops(*args: Any) -> int:
        """Counts the backward pass of ``mathematics``. Weights and options that backward does not get count nothing."""
        signature = OPS[f"{name}_bwd"].signature
        given = dict(zip(signature.names, args, strict=True))
        x, sizes = given["x"], signature.check(args)[1]
        tensors = [given[key] if key in given else allocated(shapes[key], given, sizes, x) for key in weights]
        values = [given.get(option, 1) for option in _names(options)]
        constants = [1 + i for i, key in enumerate(weights) if key in statistics]
        return flops.count_gradient(mathematics, (x, *tensors, *values), constants)

    inputs = ["Tensor grad", "Tensor x", *(schema[key] for key in read)]
    bwd_arguments = [*inputs, *residual, *saved, *code, *_listed(late)]
    bwd_results = [f"Tensor d{key}" for key in ("x", *maps, *(["residual"] if epilogue else []), *small)]
    backward_op = define(
        f"{name}_bwd({', '.join(bwd_arguments)}) -> ({', '.join(bwd_results)})",
        kernels or name,
        backward,
        (
            *("like x" for _ in ("x", *maps)),
            *([residual_gradient_shape] if epilogue else []),
            *(gradient(key) for key in small),
        ),
        {
            "x": MAP,
            **{key: fits[key] for key in read},
            **added,
            "grad": "like x" if epilogue else result,
            **({} if epilogue else {"gate": result}),
            **saves,
            **{key: text for key, text in bounds.items() if key not in dropped},
        },
        gradients_of=[_owner(key, weights) for key in small],
        flops_of=backward_flops,
    )
    names = ["x", *weights, *(["residual"] if epilogue else [])]
    activation = ["activation"] * epilogue
    numbers, late_numbers = [*activation, *_names(options)], [*activation, *_names(late)]
    order = [result.removeprefix("Tensor d") for result in bwd_results]
    picked = [names.index(key) for key in ("x", *read, *(["residual"] if epilogue else []))]
    places = [order.index(key) if key in order else -1 for key in names]  # the last gradient is None

    def gradients(grad: Tensor, tensors: Any, kept: Any, values: Any) -> list[Tensor | None]:
        if late_numbers != numbers:
            given = dict(zip((*names, *numbers), (*tensors, *values), strict=True))
            values = [derived[key](given) if derived and key in derived else given[key] for key in late_numbers]
        # Lists, not generators: on small maps each microsecond shows.
        found = (*backward_op(grad, *[tensors[i] for i in picked], *kept, *values), None)
        return [found[place] for place in places]

    return composed_op(
        name,
        forward_op,
        gradients,
        mathematics,
        epilogue=epilogue,
        options=len(_listed(options)),
        saves_result=not epilogue,
        infer=define_infer(name) if infer else None,
        normed=define_normed(name) if normed else None,
        tiny=tiny,
        over_positions=over_positions,
    )


def composed_op(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    gradients: Gradients,
    mathematics: Callable[..., Tensor],
    *,
    epilogue: bool = False,
    options: int = 0,
    saves_result: bool = False,
    partial: bool = False,
    widens: bool = True,
    **facts: Any,
) -> FusedOp:
    """Makes a `FusedOp` from functions that call one or several declared ops.

    Args:
        name: the stem of the family.
        forward, gradients: as in `fused_function`.
        mathematics: ``(*tensors, *options) -> y`` in differentiable PyTorch, without the epilogue.
        epilogue: True if the arguments end in residual, activation and ``options``.
        options: the number of options, without the activation.
        saves_result, partial: as in `fused_function`.
        widens: False if ``mathematics`` takes tensors of several dtypes as they are.
        facts: the other attributes of `FusedOp`.
    """
    plain = in_dtype_of_x(mathematics) if widens else mathematics
    differentiable = with_epilogue(mathematics, options) if epilogue else plain
    function = fused_function(name, forward, gradients, differentiable, saves_result, epilogue, partial)
    return FusedOp(name, function, plain, epilogue=epilogue, **facts)


def _listed(options: str) -> list[str]:
    return options.split(", ") if options else []


def _names(options: str) -> list[str]:
    return [option.split()[-1] for option in _listed(options)]


def _owner(key: str, weights: Mapping[str, str]) -> str:
    """The weight that gives the gradient of ``key`` its dtype: itself, or the one before it if ``key`` may be None."""
    names = list(weights)
    while weights[key].endswith(" or None"):
        key = names[names.index(key) - 1]
    return key
