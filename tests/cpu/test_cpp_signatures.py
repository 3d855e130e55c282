"""Every C++ function that serves an op takes and returns what the op's schema says.

The dispatcher calls these functions by position: it does not notice two tensors that have changed places.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from visattn_fast import native
from visattn_fast.ops.library import OPS

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = {path.relative_to(CSRC).as_posix(): path.read_text() for path in sorted(CSRC.glob("c*/*.cpp"))}
CPP_TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "std::optional<Tensor>",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
}


class Signature(NamedTuple):
    """Type and name of each argument, and the number of results."""

    arguments: list[list[str]]
    results: int


def registrations() -> list[tuple[str, str, str]]:
    """(source, op, C++ function) of each ``implement<function>(m, "op")``."""
    pattern = re.compile(r'implement<[\w:]*?(\w+)>\(m, "(\w+)"\)')
    return [(source, op, function) for source, text in SOURCES.items() for function, op in pattern.findall(text)]


def cpp_signature(source: str, function: str) -> Signature:
    """The signature in the C++ definition of ``function``."""
    found = re.search(rf"^([\w:<>, ]+)\s{function}\(([^()]*)\) {{", SOURCES[source], re.M)
    assert found, f"no definition of {function} in {source}"
    result, arguments = found.groups()
    return Signature([argument.split() for argument in arguments.split(",")], result.count("Tensor"))


def schema_signature(op: str) -> Signature:
    """The signature that the schema of ``op`` asks for."""
    schema = getattr(torch.ops.visattn_fast, op).default._schema
    return Signature([[CPP_TYPES[str(a.type)], a.name] for a in schema.arguments], len(schema.returns))


@pytest.mark.parametrize(("source", "op", "function"), registrations())
def test_cpp_function_has_the_signature_of_the_schema(source, op, function):
    assert cpp_signature(source, function) == schema_signature(op)


def test_every_kernel_in_the_library_is_checked():
    if why_not := native.load():
        pytest.skip(why_not)
    served = {op for op in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"visattn_fast::{op}", "CPU")}
    assert served == {op for source, op, _ in registrations() if source.startswith("cpu/")}
