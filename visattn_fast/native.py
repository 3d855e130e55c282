"""Loads the native kernels once, or records why it cannot.

For developers: VISATTN_LIBRARY, read on first use, is the path of another build of the CPU library, as `make sanitize`
and `make portable` use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
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


def build_of(library: Path) -> Path:
    """Returns ``library``, or the build that VISATTN_LIBRARY chooses instead of the CPU library."""
    chosen = os.environ.get("VISATTN_LIBRARY")
    return Path(chosen) if chosen and library is LIBRARY else library


def load(library: Path = LIBRARY) -> str | None:
    """Registers the kernels of ``library``. Returns None, or the reason why it has none."""
    with _lock:
        return _load(library)


@functools.cache
def _load(library: Path) -> str | None:
    import torch

    from . import __version__

    path = build_of(library)
    how = _HOW_TO_BUILD[library] if path is library else f"VISATTN_LIBRARY is {path}"
    if not path.exists():
        return f"the native library was not built: {how}"
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        return f"the native library needs torch >= 2.11, found {torch.__version__}"
    try:
        # Loading registers the kernels, and they cannot be taken back: this is found out before.
        if not _whole(path.read_bytes(), __version__):
            return f"the native library is damaged or not of version {__version__}: {how}"
        torch.ops.load_library(path)
        _declare(ctypes.CDLL(str(path)))
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the native library does not load: {error.__cause__ or error}"
    return None


def _whole(data: bytes, version: str) -> bool:
    """True if ``data`` is a library of this version that is not cut short.

    The dynamic linker ends the process at a file cut short, and a kernel may do so that takes other arguments.
    """
    if data.startswith(b"\x7fELF\2\1"):  # 64 bits, little-endian; the table of sections ends the file
        (table,) = struct.unpack_from("<Q", data.ljust(64), 0x28)
        entry, count = struct.unpack_from("<HH", data.ljust(64), 0x3A)
        if table + entry * count > len(data):
            return False
    return f"visattn_fast library {version}\0".encode() in data


def _declare(library: ctypes.CDLL) -> None:
    """Tells the library what the arguments of each op must be. It refuses calls of ops that it has not been told of."""
    for name, (text, numbers) in signatures.items():
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        if library.visattn_declare(name.encode(), text.encode(), table):
            raise RuntimeError(f"it cannot read the declaration of {name}")
