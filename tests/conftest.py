"""Exact and deterministic products on GPUs; Triton's interpreter, without what takes most of its time."""

from __future__ import annotations

import functools
import os

import torch

from cases import INTERPRETED

# Asked of by torch.use_deterministic_algorithms, before the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Convolutions round as products do: by TF32 one algorithm is a hundred times as far off as another.
torch.backends.cudnn.allow_tf32 = False

if INTERPRETED:
    from triton import language
    from triton.runtime import interpreter

    _patch_lang = interpreter._patch_lang
    _patched: set[str] = set()
    _running: list[str] = []

    @functools.cache
    def _languages(fn):
        """The language modules that the function's module knows, and that patching it would patch."""
        modules = fn.__globals__.values()
        return frozenset(m.__name__ for m in (language, language.core) if any(m is other for other in modules))

    def _patch_once(fn):
        """Patches Triton's language for a kernel, as Triton does, and again for every device function that it calls,

        but not if that is of no effect: what a kernel has patched is restored after it, what a call has patched stays.
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
