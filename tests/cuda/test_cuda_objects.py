"""The native CUDA kernels compiled without a GPU, where nvcc is. `python -m tools.cuda_objects` compiles them all."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
cuda_objects = pytest.importorskip("tools.cuda_objects", reason="not beside the repository's tools")

REPORT = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def test_spills_are_found():
    assert list(cuda_objects.ptxas_report(REPORT)) == [("_Z1fv", 64, 20)]
    kernel = cuda_objects.Compiled("_Z1fv", "sm_90", 64, 20, cuda_objects.Counter())
    assert kernel.faults == ["_Z1fv for sm_90: spills 20 bytes"]


SASS = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   STS [R0], R4 ;
        /*0030*/                   LDS.128 R8, [R6+0x80] ;
        /*0040*/                   I2F.RP R9, R8 ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P1 BRA 0x10 ;
"""


def test_divisions_in_loops_over_packs_are_found():
    """The loop over images is no loop over packs."""
    (loop,) = cuda_objects.loops(SASS)
    assert loop == (3, 1, 0, 1)
    symbol = "_Z12cbam_kernelILb1ELi0ELb0EN11CbamForwardIfE"
    kernel = cuda_objects.Compiled(symbol, "sm_90", 64, 0, cuda_objects.Counter(("LDG.128", "STG.128")), (loop,))
    assert [fault.split(": ")[1] for fault in kernel.faults] == ["divides in a loop over packs"]


@pytest.mark.skipif(bool(cuda_objects.why_not()), reason=str(cuda_objects.why_not()))
def test_kernels_do_not_spill_and_access_maps_widely():
    """For one element type, images whose rows are aligned, and each target."""
    chosen = [s for s in cuda_objects.SOURCES if s.stem.endswith("bfloat16")]
    kernels = cuda_objects.compile_all(chosen, cuda_objects.TARGETS, "-DVISATTN_FEW_KERNELS")
    assert sum(k.variant is not None for k in kernels) == 16 * len(cuda_objects.TARGETS) - 8  # no clusters on sm_80
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)
