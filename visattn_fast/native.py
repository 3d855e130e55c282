"""Loads the native kernels once, or records why it cannot."""

from __future__ import annotations

import ctypes
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
# What the arguments of each op must be, by its name: the texts and numbers of `visattn_fast.ops.signature`.
signatures: dict[str, tuple[str, list[int]]] = {}


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
    # Loading registers the kernels, and they cannot be taken back: this is found out before.
    if b"visattn_declare" not in library.read_bytes():
        return f"the native library is damaged or of another version of this package: {_HOW_TO_BUILD[library]}"
    try:
        torch.ops.load_library(library)
        _declare(ctypes.CDLL(str(library)))
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the native library does not load: {error}"
    return None


def _declare(library: ctypes.CDLL) -> None:
    """Tells the library what the arguments of each op must be. It refuses calls of ops that it has not been told of."""
    for name, (text, numbers) in signatures.items():
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        if library.visattn_declare(name.encode(), text.encode(), table):
            raise RuntimeError(f"it cannot read the declaration of {name}")
