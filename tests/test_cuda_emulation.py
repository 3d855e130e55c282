"""The code of the native CUDA kernels, run on the CPU thread by thread: results, traffic, and every access checked."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from cases import INTERPRETED
from visattn_fast.ops._library import OPS

emulation = pytest.importorskip("tools.emulation", reason="not beside the repository's tools")
Device = emulation.Device

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="knows nothing of triton"),
    pytest.mark.skipif(bool(emulation.why_not()), reason=str(emulation.why_not())),
]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "channels_last"])
# Small devices, and what they make of SHAPE: the variant, and how many slabs a block holds.
DEVICES = {
    "teams": (Device(shared_bytes=6 << 10, count=16, threads=96), "cluster", 1),
    "alone": (Device(shared_bytes=150 << 10, count=1), "cluster", 2),
    "semaphore": (Device(sm=80, count=8, l2_bytes=100 << 10), "semaphore", 0),
}
SHAPE = (5, 32, 16, 12)  # of float32: 24 KB an image


def expected(call, grad=None, small=None):
    """The op's own implementation in PyTorch."""
    w, x = call.weights, call.x
    codes = (call.activation,) if call.window else (call.activation, call.hidden_activation, call.gate_activation)
    name = "eca" if call.window else "se"
    if grad is None:
        weights = (w["w1"],) if call.window else (w["w1"], w.get("b1"), w["w2"], w.get("b2"))
        y, *kept = OPS[f"{name}_fwd"].reference(x, *weights, call.residual, *codes)
        names = ("mean", "gate") if call.window else ("mean", "hidden", "gate")
        return {"y": y, **dict(zip(names, kept, strict=True))}
    weights = (w["w1"],) if call.window else (w["w1"], w["w2"])
    kept = [small[k] for k in (("mean", "gate") if call.window else ("mean", "hidden", "gate"))]
    dx, dresidual, *rest = OPS[f"{name}_bwd"].reference(grad, x, *weights, call.residual, *kept, *codes)
    found = {"dx": dx, "dresidual": dresidual}
    return found if call.window else found | {"db1": rest[1], "db2": rest[3]}


def hold(call):
    """Both directions without a fault, and as PyTorch has them; returns both outcomes."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[call.x.dtype]

    def close(got, want):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)

    got, forward = call.forward()
    assert forward.variant != "refused"
    assert not forward.faults, "\n".join(forward.faults)
    for name, want in expected(call).items():
        close(got[name], want)
    small = {name: t for name, t in got.items() if name != "y"}
    grad = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(2)).to(call.x.dtype)
    grad = torch.empty_like(got["y"]).copy_(grad)
    found, backward = call.backward(grad, small)
    assert not backward.faults, "\n".join(backward.faults)
    want = expected(call, grad, small)
    close(found["dx"], want["dx"])
    if call.activation:
        close(found["dresidual"], want["dresidual"])
    if not call.window:
        close(found["dz"].sum(0), want["db2"])
        close(found["dhidden"].sum(0), want["db1"])
    return forward, backward


@layouts
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 3], ids=["se", "eca"])
def test_variants(layout, device, window):
    """Several images for each team, in random order of threads; x and grad are read once, the result written once."""
    machine, variant, stages = DEVICES[device]
    call = emulation.example(SHAPE, layout, torch.float32, window=window, device=machine, seed=window)
    forward, backward = hold(call)
    assert (forward.variant, forward.stages, forward.access) == (variant, stages, "wide rows")
    assert (forward.team > 1) == (device != "alone")
    assert forward.teams < SHAPE[0]
    again = 0 if variant == "cluster" else call.x.nbytes  # from the L2 cache
    assert forward.read + forward.written == 2 * call.x.nbytes + again
    assert backward.read + backward.written == 3 * call.x.nbytes + again


@layouts
@pytest.mark.parametrize("device", ["teams", "semaphore"])
@pytest.mark.parametrize("shape", [(2, 24, 7, 7), (2, 3, 5, 5), (1, 40, 1, 1)], ids=str)
def test_odd_shapes(layout, device, shape):
    """Rows of which 16 bytes are no part, images that are not aligned, blocks without rows."""
    hold(emulation.example(shape, layout, torch.bfloat16, device=DEVICES[device][0], seed=3))


@layouts
@pytest.mark.parametrize("activation", [1, 2], ids=["relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 24, 7, 7)], ids=str)
def test_epilogue(layout, activation, shape):
    call = emulation.example(
        shape, layout, torch.bfloat16, activation=activation, hidden_activation=2, gate_activation=1
    )
    call.residual = torch.randn_like(call.x)
    _, backward = hold(call)
    if shape[2] == 8:  # x, grad, residual; dx, dresidual
        assert backward.read + backward.written == 5 * call.x.nbytes


def roomy(machine):
    """The maps and what pools into them need some shared memory, too."""
    return dataclasses.replace(machine, shared_bytes=max(machine.shared_bytes, 16 << 10))


def hold_cbam(call):
    """Forward without a fault, and as PyTorch has it, with the same maxima; returns the outcome."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[call.x.dtype]
    got, outcome = call.cbam()
    assert outcome.variant != "refused"
    assert not outcome.faults, "\n".join(outcome.faults)
    x = call.x.float()
    residual = None if call.residual is None else call.residual.float()
    want = OPS["cbam_fwd"].reference(x, *call.weights.values(), None, residual, call.activation)
    for name, expected_one in zip(got, want, strict=True):
        found = got[name].float() if name == "y" else got[name]
        torch.testing.assert_close(found, expected_one, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    return outcome


@layouts
@pytest.mark.parametrize("device", DEVICES)
def test_cbam(layout, device):
    machine, variant, _ = DEVICES[device]
    call = emulation.cbam_example(SHAPE, layout, torch.float32, device=roomy(machine))
    outcome = hold_cbam(call)
    assert (outcome.variant, outcome.access) == (variant, "wide rows")
    assert (outcome.team > 1) == (device != "alone")
    again = 0 if variant == "cluster" else 2 * call.x.nbytes
    assert outcome.read + outcome.written == 2 * call.x.nbytes + again


@layouts
@pytest.mark.parametrize("device", ["teams", "semaphore"])
@pytest.mark.parametrize("shape", [(2, 24, 7, 7), (2, 3, 5, 5), (1, 40, 1, 1), (2, 16, 3, 9)], ids=str)
def test_cbam_odd_shapes(layout, device, shape):
    call = emulation.cbam_example(
        shape, layout, torch.bfloat16, window=7, device=roomy(DEVICES[device][0]), seed=3, activation=1
    )
    call.residual = torch.randn_like(call.x)
    hold_cbam(call)


@layouts
@pytest.mark.parametrize("device", ["teams", "semaphore"])
def test_cbam_ties_and_nan(layout, device):
    """The first of equal maxima, and the first NaN, wherever the blocks' borders are."""
    call = emulation.cbam_example((2, 32, 8, 8), layout, torch.float32, device=roomy(DEVICES[device][0]))
    call.x.relu_()
    call.x[:, :, 3:5] = 0
    call.x[0, :, 2] = 1
    hold_cbam(call)
    call.x[1, 7, 2, 5] = call.x[1, 7, 6, 1] = call.x[1, 20, 2, 5] = float("nan")
    hold_cbam(call)


def test_slices_of_a_batch():
    """Images that are dense, with something between them."""
    call = emulation.example((3, 16, 8, 8), NCHW, torch.float32, seed=4)
    call.x = torch.cat([call.x, call.x], 1)[:, :16]
    assert call.x.stride(0) == 2 * 16 * 64
    hold(call)


def test_nan_stays_in_its_image():
    call = emulation.example((2, 16, 8, 8), NCHW, torch.float32)
    call.x[0, 3, 2, 1] = float("nan")
    hold(call)


def test_order_of_threads_changes_no_bit():
    call = emulation.example((2, 32, 8, 12), NHWC, torch.float32)
    first, _ = call.forward()
    for seed in (11, 12):
        again, _ = dataclasses.replace(call, seed=seed).forward()
        assert all(torch.equal(first[name], again[name]) for name in first)


# What is left out -> on which device it matters, and what is said of it.
PLANTED = {
    "team barrier": ("teams", "races|before it is written"),
    "block barrier": ("teams", "races|before it is written"),
    "second exchange": ("teams", "races"),
    "copy wait": ("alone", "not waited for"),
    "fence": ("alone", "without a fence"),
    "arrival at a semaphore": ("semaphore", "deadlock|not reset"),
}


@pytest.mark.parametrize("left_out", PLANTED)
def test_planted_faults_are_found(left_out):
    device, said = PLANTED[left_out]
    call = emulation.example(SHAPE, NCHW, torch.float32, window=3, device=DEVICES[device][0], sabotage=left_out)
    _, outcome = call.forward()
    assert re.search(said, "\n".join(outcome.faults)), outcome
