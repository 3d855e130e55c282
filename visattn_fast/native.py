"""Loads the native kernels once, or records why it cannot."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

LIBRARY = Path(__file__).with_name("_C.so")
CUDA_LIBRARY = Path(__file__).with_name("_CUDA.so")
_HOW_TO_BUILD = {
    LIBRARY: "pip install --no-build-isolation with a C++ compiler builds it",
    CUDA_LIBRARY: "make ext-cuda, or VISATTN_BUILD_CUDA=1 pip install -v --no-build-isolation with nvcc builds it",
}
_lock = threading.Lock()


def load(library: Path = LIBRARY) -> str | None:
    """Registers the kernels of ``library``. Returns None, or the reason why it has none."""
    with _lock:
        return _load(library)


@functools.cache
def _load(library: Path) -> str | None:
    import torch

    if not library.exists():
        return f"the native library was not built: {_HOW_TO_BUILD[library]}"
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        return f"the native library needs torch >= 2.11, found {torch.__version__}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the native library does not load: {error}"
    return None
