"""Calls of the declared ops, made from their signatures: valid ones, and ones with a single fault."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from visattn_fast.ops.library import OPS
from visattn_fast.ops.signature import ACCUMULATION, BOOL, FLOATING, INT32, OF_ARGUMENT, SUMS, Signature, TensorArgument

Call = tuple[Any, ...]


def signature_of(name: str) -> Signature:
    return OPS[name].signature


def letters_of(signature: Signature, rng: random.Random, largest: int = 9) -> dict[str, int]:
    """Draws a size for each letter, and a value for each whole number, within their declared limits."""
    limits = {a.name: a for a in signature.arguments if not isinstance(a, TensorArgument)}
    sizes: dict[str, int] = {}
    for letter in [v for v in signature.variables if v != "C"] + ["C"] * ("C" in signature.variables):
        sizes[letter] = rng.randint(1, largest)
    for name, limit in limits.items():  # those that depend on others come last in a declaration
        if name not in sizes and name not in signature.variables:
            continue
        if limit.values:
            if name == "C":  # a multiple
                sizes["C"] = 2 * sizes["D"] * rng.randint(1, 3)
            else:
                sizes[name] = rng.choice(limit.values).value(sizes)
        else:
            low = 0 if limit.low is None else limit.low.value(sizes)
            high = low + 2 if limit.high is None else limit.high.value(sizes)
            sizes[name] = rng.randint(low, max(high, low))
    if "L" in sizes:
        sizes["L"] = max(sizes["L"], 2)
        sizes["height"] = rng.randint(1, sizes["L"] - 1)
    return sizes


def valid_call(
    name: str, rng: random.Random, dtype: torch.dtype = torch.float32, device: str = "cpu", largest: int = 9
) -> Call:
    """Returns arguments that fit the op's declaration. Optional tensors are given, half of them as None."""
    signature = signature_of(name)
    sizes = letters_of(signature, rng, largest)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    made: dict[str, Any] = {}
    for argument in signature.arguments:
        if argument.position < 0:
            continue
        if not isinstance(argument, TensorArgument):
            made[argument.name] = sizes.get(argument.name, 0.5) if argument.integer else rng.uniform(0.1, 1)
            if argument.name == "activation":
                made[argument.name] = rng.randint(0, 2)
            continue
        shape = [size.expression.value(sizes) for size in argument.sizes]
        if argument.ellipsis:
            shape = [rng.randint(1, 3) for _ in range(rng.randint(0, 3))] + shape
        kind = argument.dtype
        if kind == INT32:
            low, high = (e.value(sizes) if e else 0 for e in (argument.low, argument.high))
            t = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
        elif kind == BOOL:
            t = torch.rand(shape, generator=generator) < 0.7
        else:
            types = {FLOATING: dtype, SUMS: wide, ACCUMULATION: wide}
            of = made[argument.dtype_of].dtype if kind == OF_ARGUMENT else types[kind]
            t = torch.rand(shape, generator=generator, dtype=torch.float64).to(of)
        absent = argument.optional and rng.random() < 0.5
        if argument.partner:
            absent = made[argument.partner] is None
        made[argument.name] = None if absent else t.to(device)
    given = {}
    for argument, text in zip(signature.names, OPS[name].schema.partition("(")[2].split(", "), strict=False):
        given[argument] = made[argument] if argument in made else bool(rng.randint(0, 1)) if "bool" in text else None
    return tuple(given[argument] for argument in signature.names)


def with_faults(name: str, call: Call) -> Iterator[tuple[str, str, Call]]:
    """Yields calls with one fault each: the argument at fault, the fault, and the arguments."""
    signature = signature_of(name)

    def altered(position: int, value: Any) -> Call:
        return *call[:position], value, *call[position + 1 :]

    for argument in signature.arguments:
        at = argument.position
        if at < 0:
            continue
        value = call[at]
        if not isinstance(argument, TensorArgument):
            wrong: list[Any] = [] if argument.integer else [float("nan"), float("inf")]
            if argument.low is not None and not argument.low.names:
                wrong.append(argument.low.value({}) - 1)
            if argument.high is not None and not argument.high.names:
                wrong += [argument.high.value({}) + 1, 1 << 40]
            yield from ((argument.name, f"is {number}", altered(at, number)) for number in wrong)
            continue
        if value is None:
            continue
        if argument.partner and argument.optional:
            yield argument.name, "is missing", altered(at, None)
        yield argument.name, "has another dtype", altered(at, value.to(torch.int64))
        if argument.dtype in (ACCUMULATION, OF_ARGUMENT, SUMS):
            other = torch.float16 if value.dtype != torch.float16 else torch.float64
            yield argument.name, f"is {other}", altered(at, value.to(other))
        if not argument.ellipsis:
            yield argument.name, "has a dimension more", altered(at, value.expand(2, *value.shape))
            yield argument.name, "has a dimension less", altered(at, value.flatten()[0])
        for d, size in enumerate(argument.sizes, value.dim() - len(argument.sizes)):
            if size.least:
                yield argument.name, f"is empty in dimension {d}", altered(at, value.narrow(d, 0, 0))
            if not size.defines:
                longer = torch.cat([value, value.narrow(d, 0, 1)], d)
                yield argument.name, f"is longer in dimension {d}", altered(at, longer)
                if value.shape[d] > 1:
                    yield (
                        argument.name,
                        f"is shorter in dimension {d}",
                        altered(at, value.narrow(d, 1, value.shape[d] - 1)),
                    )
        if argument.high is not None and argument.low is not None and value.numel():
            for extreme in (-(1 << 31), (1 << 31) - 1):
                worse = value.clone()
                worse.view(-1)[-1] = extreme
                yield argument.name, f"has the index {extreme}", altered(at, worse)
        if at != signature.names.index(signature.leading):
            yield argument.name, "is on another device", altered(at, value.to("meta"))
