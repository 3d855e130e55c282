"""The code of the native CUDA kernels on a CPU, thread by thread: results, traffic, and a check of every access."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from visattn_fast.ops.library import OPS
from visattn_fast.reference.activations import Activation, GateActivation

emulation = pytest.importorskip("tools.emulation", reason="not beside the repository's tools")
Device = emulation.Device

pytestmark = pytest.mark.skipif(bool(emulation.why_not()), reason=str(emulation.why_not()))
NCHW, NHWC = torch.contiguous_format, torch.channels_last
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "channels_last"])
# Small devices, with the variant that they take for SHAPE and the number of slabs that a block holds.
DEVICES = {
    "teams": (Device(shared_bytes=6 << 10, count=32, threads=96), "cluster", 2),
    "tight": (Device(shared_bytes=4 << 10, count=32, threads=96), "cluster", 1),
    "alone": (Device(shared_bytes=220 << 10, count=1), "cluster", 2),
    "semaphore": (Device(sm=80, count=8, l2_bytes=100 << 10), "semaphore", 0),
}
SHAPE = (5, 32, 16, 12)  # 24 KB an image in float32


def hold(call):
    """Checks that both directions run without a fault and match the op in PyTorch; returns both outcomes."""
    name = "cbam" if call.cbam else "eca" if call.window else "se"
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[call.x.dtype]
    codes = (call.activation, call.hidden_activation, call.gate_activation) if name == "se" else (call.activation,)
    x, weights = call.x.float(), tuple(call.weights.values())
    if name == "eca":  # the emulation takes its taps alone
        weights = (weights[0].view(1, 1, -1),)
    residual = None if call.residual is None else call.residual.float()

    def close(got, want):
        for key, expected in zip(got, want, strict=True):
            scale = tolerance * max(1.0, expected.abs().nan_to_num().max().item())
            torch.testing.assert_close(
                got[key].to(expected.dtype).view(expected.shape),
                expected,
                rtol=tolerance,
                atol=scale,
                equal_nan=True,
                msg=key,
            )

    out, forward = call.forward()
    assert forward.variant != "refused"
    assert not forward.faults, "\n".join(forward.faults)
    close(out, OPS[f"{name}_fwd"].reference(x, *weights, residual, *codes))
    grad = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(2)).to(call.x.dtype)
    grad, small = torch.empty_like(out["y"]).copy_(grad), emulation.kept(out)
    found, backward = call.backward(grad, small)
    assert not backward.faults, "\n".join(backward.faults)
    weights = weights[::2] if name == "se" else weights  # without biases
    want = OPS[f"{name}_bwd"].reference(grad.float(), x, *weights, residual, *small.values(), *codes)
    close(found, [t for t in want if t.numel()])
    return forward, backward


@layouts
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 3], ids=["se", "eca"])
def test_se_and_eca_read_and_write_each_map_once(layout, device, window):
    """A team works on several images, its threads in random order."""
    machine, variant, stages = DEVICES[device]
    if device == "tight" and layout is NCHW:  # nchw needs less
        machine = dataclasses.replace(machine, shared_bytes=3 << 10)
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
def test_se_of_odd_shapes(layout, device, shape):
    """Rows that are no multiple of 16 bytes, images that are not aligned, blocks without rows."""
    hold(emulation.example(shape, layout, torch.bfloat16, device=DEVICES[device][0], seed=3))


@layouts
@pytest.mark.parametrize("activation", [Activation.RELU, Activation.SILU], ids=["relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 24, 7, 7)], ids=str)
def test_se_with_residual_and_activation(layout, activation, shape):
    call = emulation.example(
        shape,
        layout,
        torch.bfloat16,
        activation=activation,
        hidden_activation=Activation.SILU,
        gate_activation=GateActivation.HARD_SIGMOID,
    )
    call.residual = torch.randn_like(call.x)
    _, backward = hold(call)
    if shape[2] == 8:  # x, grad, residual; dx, dresidual
        assert backward.read + backward.written == 5 * call.x.nbytes


def roomy(machine):
    """Returns a device with room for CBAM's maps and their partial statistics."""
    return dataclasses.replace(machine, shared_bytes=max(machine.shared_bytes, 20 << 10))


@layouts
@pytest.mark.parametrize("device", ["teams", "alone", "semaphore"])
def test_cbam_reads_x_and_grad_once_if_they_fit(layout, device):
    """If they do not fit, backward reads each once more."""
    machine, variant, _ = DEVICES[device]
    call = emulation.cbam_example(SHAPE, layout, torch.float32, device=roomy(machine))
    forward, backward = hold(call)
    assert (forward.variant, forward.access) == (backward.variant, backward.access) == (variant, "wide rows")
    assert (backward.team > 1) == (device != "alone")
    assert (backward.held, backward.stages) == (0, 0) if variant == "semaphore" else (2, 2)
    again = 0 if variant == "cluster" else 2 * call.x.nbytes
    places = (forward.read + forward.written - 2 * call.x.nbytes - again) / call.x.nbytes
    assert places == 0 if again == 0 else 0 <= places < 0.5  # packs that had a maximum are read again
    assert backward.read + backward.written == 3 * call.x.nbytes + again


@pytest.mark.parametrize(("layout", "shared"), [(NCHW, 9 << 10), (NHWC, 10 << 10)], ids=["nchw", "channels_last"])
def test_cbam_with_room_for_x_alone_reads_grad_again(layout, shared):
    """With an activation it reads dresidual again."""
    device = Device(shared_bytes=shared, count=16)
    call = emulation.cbam_example((2, 64, 16, 24), layout, torch.bfloat16, device=device)
    for call.activation, moved in ((Activation.NONE, 4), (Activation.RELU, 6)):
        call.residual = torch.randn_like(call.x) if call.activation else None
        _, backward = hold(call)
        assert (backward.variant, backward.held) == ("cluster", 1)
        assert backward.read + backward.written == moved * call.x.nbytes


@layouts
@pytest.mark.parametrize("device", ["teams", "semaphore"])
@pytest.mark.parametrize("shape", [(2, 24, 7, 7), (2, 3, 5, 5), (1, 40, 1, 1), (2, 16, 3, 9)], ids=str)
def test_cbam_of_odd_shapes(layout, device, shape):
    call = emulation.cbam_example(
        shape, layout, torch.bfloat16, window=7, device=roomy(DEVICES[device][0]), seed=3, activation=Activation.RELU
    )
    call.residual = torch.randn_like(call.x)
    hold(call)


@layouts
@pytest.mark.parametrize("device", ["teams", "semaphore"])
def test_cbam_takes_the_first_maximum_and_the_first_nan(layout, device):
    """Blocks may end anywhere between them."""
    call = emulation.cbam_example((2, 32, 8, 8), layout, torch.float32, device=roomy(DEVICES[device][0]))
    call.x.relu_()
    call.x[:, :, 3:5] = 0
    call.x[0, :, 2] = 1
    hold(call)
    call.x[1, 7, 2, 5] = call.x[1, 7, 6, 1] = call.x[1, 20, 2, 5] = float("nan")
    hold(call)


@layouts
@pytest.mark.parametrize("threads", [32, 96])
def test_cbam_exchanges_maxima_of_bfloat16(layout, threads):
    """With few threads the exchange shares its memory with other floats."""
    device = Device(shared_bytes=12 << 10, count=8, threads=threads)
    call = emulation.cbam_example((3, 64, 16, 12), layout, torch.bfloat16, device=device, seed=6)
    call.x[:, 3:60:4] = call.x[:, :1].clone()
    call.x[1, 7, 2, 5] = call.x[1, 7, 6, 1] = float("nan")
    call.x[2, :, 4] = float("-inf")
    forward, _ = hold(call)
    assert (forward.variant, forward.access) == ("cluster", "wide rows")
    assert forward.teams < 3


builds = pytest.mark.parametrize("build", [emulation.example, emulation.cbam_example], ids=["se", "cbam"])


@builds
def test_images_may_lie_apart(build):
    """Each image is dense; other memory lies between them."""
    call = build((3, 16, 8, 8), NCHW, torch.float32, seed=4)
    call.x = torch.cat([call.x, call.x], 1)[:, :16]
    assert call.x.stride(0) == 2 * 16 * 64
    hold(call)


def test_nan_stays_in_its_image():
    call = emulation.example((2, 16, 8, 8), NCHW, torch.float32)
    call.x[0, 3, 2, 1] = float("nan")
    hold(call)


def both_ways(call):
    """Returns the results of both directions, and true if backward was one launch."""
    out, _ = call.forward()
    found, outcome = call.backward(torch.ones_like(call.x), emulation.kept(out))
    assert not outcome.faults, outcome
    return out | found, outcome.one_launch


@builds
def test_the_order_of_threads_changes_no_bit(build):
    call = build((2, 32, 8, 12), NHWC, torch.float32)
    first, _ = both_ways(call)
    for seed in (11, 12):
        again, _ = both_ways(dataclasses.replace(call, seed=seed))
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["se", "eca", "cbam"])
def test_one_launch_gives_the_bits_of_two(kind):
    """A device without room for the grid takes a second launch for the weights' gradients."""
    build = emulation.cbam_example if kind == "cbam" else emulation.example
    options = {"window": 3} if kind == "eca" else {}
    results = []
    for count in (32, 1):
        device = Device(shared_bytes=14 << 10, count=count)
        results.append(both_ways(build((3, 64, 8, 16), NCHW, torch.float32, device=device, **options)))
    (one, in_one), (two, in_two) = results
    assert (in_one, in_two) == (True, False)
    assert all(torch.equal(one[name], two[name]) for name in one)


# What a thread leaves out -> a device where it matters, and the fault that is found.
PLANTED = {
    "team barrier": ("teams", "races|before it is written"),
    "block barrier": ("teams", "races|before it is written"),
    "second exchange": ("teams", "races"),
    "copy wait": ("alone", "not waited for"),
    "fence": ("alone", "without a fence"),
    "arrival at a semaphore": ("semaphore", "deadlock|not reset"),
}
# The same for CBAM's backward.
PLANTED_BACKWARD = {name: PLANTED[name] for name in ("team barrier", "block barrier", "copy wait", "fence")} | {
    "grid barrier": ("teams", "races with a write|before it is written")
}


@pytest.mark.parametrize("left_out", PLANTED)
def test_planted_faults_of_eca_forward_are_found(left_out):
    device, said = PLANTED[left_out]
    call = emulation.example(SHAPE, NCHW, torch.float32, window=3, device=DEVICES[device][0], sabotage=left_out)
    _, outcome = call.forward()
    assert re.search(said, "\n".join(outcome.faults)), outcome


@pytest.mark.parametrize("left_out", PLANTED_BACKWARD)
def test_planted_faults_of_cbam_backward_are_found(left_out):
    device, said = PLANTED_BACKWARD[left_out]
    call = emulation.cbam_example(SHAPE, NCHW, torch.float32, device=roomy(DEVICES[device][0]))
    out, _ = call.forward()
    _, outcome = dataclasses.replace(call, sabotage=left_out).backward(out["y"], emulation.kept(out))
    assert re.search(said, "\n".join(outcome.faults)), outcome
