"""Settings of all tests: exact and deterministic products on GPUs, and the tests that Triton's interpreter runs."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch

from cases import INTERPRETED

KERNELS = Path(__file__).parent / "kernels"

# torch.use_deterministic_algorithms reads it before the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Convolutions round as products do; with TF32 the error of one algorithm is a hundred times that of another.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _same_threads():
    """Gives the next test the number of threads that this one got."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in kernels/ as `interpreted`; under the interpreter, skips the tests without this mark.

    A test without it runs no Triton kernel, or takes too long in the interpreter.
    """
    for item in items:
        if item.path.is_relative_to(KERNELS):
            item.add_marker(pytest.mark.interpreted)
        elif INTERPRETED and not item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="not marked `interpreted`"))


if INTERPRETED:
    from triton import language
    from triton.runtime import interpreter

    # Triton's interpreter patches its language anew at every call of a device function, which takes most of its time.
    _patch_lang = interpreter._patch_lang
    _patched: set[str] = set()
    _running: list[str] = []

    @functools.cache
    def _languages(fn):
        """Returns the names of the language modules that ``fn`` sees, which patching it changes."""
        modules = fn.__globals__.values()
        return frozenset(m.__name__ for m in (language, language.core) if any(m is other for other in modules))

    def _patch_once(fn):
        """Patches Triton's language for a kernel as Triton does, but not again for each device function in it.

        Triton restores the patches of a kernel when it ends. It never restores those of a device function, so these
        need to be made once.
        """
        modules = _languages(fn)
        if _running:
            if modules <= _patched.union(_running):
                return None
            _patched.update(modules)
            return _patch_lang(fn)
        scope = _patch_lang(fn)
        _running.extend(modules)
        restore = scope.restore
        scope.restore = lambda: (_running.clear(), restore())
        return scope

    interpreter._patch_lang = _patch_once
