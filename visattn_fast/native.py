"""Loads the native kernels once, and remembers why they are absent."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

LIBRARY = Path(__file__).with_name("_C.so")
_lock = threading.Lock()


def load() -> str | None:
    """Registers the native kernels. Returns None, or the reason why there are none."""
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    import torch

    if not LIBRARY.exists():
        return "the native library was not built: pip install --no-build-isolation with a C++ compiler builds it"
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        return f"the native library needs torch >= 2.11, found {torch.__version__}"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"the native library does not load: {error}"
    return None
