"""The switch that gives SE and ECA to kernels that keep an image on the chip. Nothing else chooses these kernels.

On an H200 they were slower than the streaming kernels of ``ops``; docs/internals/cuda.md tells how they work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import resident_eca, resident_se

LAUNCHERS = {
    f.__name__: f for f in (resident_se.se_fwd, resident_se.se_bwd, resident_eca.eca_fwd, resident_eca.eca_bwd)
}


@contextmanager
def resident(dispatch_key: str = "CUDA") -> Iterator[None]:
    """Within the context, the ops of SE and ECA run `LAUNCHERS` on tensors of ``dispatch_key``, in all threads.

    Args:
        dispatch_key: ``"CUDA"``, or ``"CPU"`` under TRITON_INTERPRET=1.

    Raises:
        RuntimeError: no kernels are registered for the key yet; `visattn_fast.backends` registers them.
    """
    for name in LAUNCHERS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"visattn_fast::{name}", dispatch_key):
            raise RuntimeError(f"{name} has no kernel for {dispatch_key} yet: call visattn_fast.backends(device) first")
    library = torch.library.Library("visattn_fast", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a kernel is overridden, which is the purpose here
            for name, launcher in LAUNCHERS.items():
                library.impl(name, launcher, dispatch_key, allow_override=True)
        yield
    finally:
        library._destroy()  # the kernels before serve again
