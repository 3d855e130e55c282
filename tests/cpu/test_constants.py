"""The version and the codes of activations are the same in C++ and in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import visattn_fast as vf
from visattn_fast.reference import activations

COMMON = Path(__file__).parents[2] / "csrc" / "common"
HEADER = (COMMON / "activations.h").read_text()
ENUMERATIONS = dict(re.findall(r"enum (\w+) : int \{(.*?)\}", HEADER, re.S))


@pytest.mark.parametrize("name", ["Activation", "GateActivation"])
def test_cpp_enumeration_has_the_codes_of_python(name):
    in_cpp = re.findall(r"k(\w+) = (\d+)", ENUMERATIONS[name])
    in_python = [(member.name.title().replace("_", ""), str(member.value)) for member in getattr(activations, name)]
    assert in_cpp == in_python


def test_library_has_the_version_of_the_package():
    assert f'"visattn_fast library {vf.__version__}";' in (COMMON / "version.cpp").read_text()
