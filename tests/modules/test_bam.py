"""BAM: the authors' composition of layers, product and sum of the branches, branches of the caller, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import (
    EPILOGUES,
    VIEWS,
    RecordedOps,
    check,
    feature_map,
    layouts,
    needs_dtype,
    poisoned,
    run,
    targets,
    value_and_gradients,
)
from visattn_fast import catalogue, reference

combinations = pytest.mark.parametrize("combine", ["product", "sum"])


class Published(nn.Module):
    """The module as the paper has it; layers in the order of the authors' names."""

    def __init__(self, channels: int, reduction: int, dilation: int, combine: str) -> None:
        super().__init__()
        hidden = channels // reduction
        layers = [nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)]
        self.channel = nn.Sequential(*layers)
        layers = [nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()]
        for _ in range(2):
            conv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
        self.spatial = nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))
        self.combine = combine

    def forward(self, x):
        channel = self.channel(x.flatten(2).mean(2))[:, :, None, None].expand_as(x)
        spatial = self.spatial(x).expand_as(x)
        return x + x * torch.sigmoid(channel * spatial if self.combine == "product" else channel + spatial)


@targets
@layouts
@combinations
@pytest.mark.parametrize("training", [True, False])
def test_modules_match_the_published_composition(training, combine, layout, device, backend):
    """Values, gradients and running statistics. The parameters have the published order, and are copied in it."""
    published = Published(12, 3, 2, combine).double().to(device).train(training)
    x = feature_map((5, 12, 7, 6), layout, torch.float64, device)
    published(x)  # statistics other than zeros and ones
    expected = run(published, x)
    for cls in (reference.BAM, vf.FastBAM):
        module = cls(12, 3, 2, combine)
        module.load_state_dict(dict(zip(module.state_dict(), published.state_dict().values(), strict=True)))
        with vf.use_backend(backend):
            got = run(module.double().to(device).train(training), x)
        for value, wanted in zip(got.values(), expected.values(), strict=True):
            torch.testing.assert_close(value, wanted)


@targets
@layouts
@combinations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_both_combinations_match_reference(dtype, combine, layout, device, backend):
    """Epilogues and strides, in eval mode."""
    needs_dtype(backend, device, dtype)
    arguments = {"reduction": 4, "combine": combine}
    entry = dataclasses.replace(catalogue.ENTRIES["bam"], arguments=lambda c: {"channels": c, **arguments})
    x = feature_map((3, 36, 6, 11), layout, dtype, device)
    residual = feature_map((3, 36, 6, 11), layout, dtype, device, seed=2)
    for with_residual, activation in EPILOGUES:
        check(entry, x, backend, residual if with_residual else None, activation)
    for view in VIEWS.values() if dtype == torch.float32 else ():
        check(entry, view(x, layout), backend)


@targets
@layouts
def test_training_step_matches_reference(layout, device, backend):
    """Residual, activation and both orders of gradients with batch norms in training mode."""
    x = feature_map((5, 8, 7, 6), layout, torch.float64, device)
    residual = feature_map((5, 8, 7, 6), layout, torch.float64, device, seed=2)
    fast, plain = catalogue.ENTRIES["bam"].pair(8, torch.float64)
    runs, penalties = [], []
    for module in (fast, plain):
        module = module.to(device).train()
        with vf.use_backend(backend):
            runs.append(run(module, x, residual, "silu"))
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
            inputs = [leaf, *module.parameters()]
            penalties.append(torch.autograd.grad(gradient.square().sum(), inputs))
    torch.testing.assert_close(*runs)
    torch.testing.assert_close(*penalties)


def test_compiled_training_step_is_one_graph():
    torch._dynamo.reset()
    module = vf.FastBAM(8, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = feature_map((4, 8, 6, 5), "nchw", torch.float32).requires_grad_()
    results = [torch.autograd.grad(f(x).square().sum(), [x, *module.parameters()]) for f in (compiled, module)]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@targets
@layouts
def test_branches_may_ignore_their_input(layout, device, backend):
    """Then nothing comes back from them, or from one of them, for dx."""
    x = feature_map((2, 6, 5, 4), layout, torch.float64, device).requires_grad_()
    w = torch.ones(6, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
    functions = {
        "channel": (lambda mean: mean * w, lambda mean: torch.ones_like(mean) * w),
        "spatial": (lambda x: x.mean(1, keepdim=True), lambda x: torch.ones_like(x[:, :1])),
    }
    for channel in functions["channel"]:
        for spatial in functions["spatial"]:
            with vf.use_backend(backend), poisoned():
                fused = value_and_gradients(lambda x, w: vf.functional.bam(x, channel, spatial), [x, w])  # noqa: B023
            plain = value_and_gradients(lambda x, w: reference.bam(x, channel, spatial), [x, w])  # noqa: B023
            torch.testing.assert_close(fused, plain)


@pytest.mark.interpreted
@layouts
def test_dx_is_written_once(layout):
    """The pass that writes dx takes in the gradient that the spatial branch sends back: autograd adds no maps."""
    module = vf.FastBAM(8, 2)
    x = feature_map((4, 8, 6, 5), layout, torch.float32).requires_grad_()
    with RecordedOps() as recorded:
        module(x).sum().backward()
    assert recorded.names == ["channel_mean", "bam_scale", "bam_scale_bwd", "bam_input_grad"]
    assert recorded.calls[-1][1][5].shape == x.shape


@pytest.mark.interpreted
def test_hooks_on_layers_run():
    module, seen = vf.FastBAM(8, 2), []
    for layer in (module.channel_att.gate_c.gate_c_fc_0, module.spatial_att.gate_s.gate_s_conv_final):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    module(feature_map((4, 8, 6, 5), "nchw", torch.float32))
    assert len(seen) == 2


@pytest.mark.interpreted
def test_bad_input_is_refused():
    for cls in (reference.BAM, vf.FastBAM):
        for arguments, message in (
            ({"channels": 4}, "channels must be at least reduction=16"),
            ({"channels": 16, "dilation": 0}, "dilation must be a positive int"),
            ({"channels": 16, "combine": "mean"}, r"combine must be one of \('product', 'sum'\), got 'mean'"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(**arguments)
        module = cls(16)
        with pytest.raises(ValueError, match="at least 2 images in training, got 1"):
            module(torch.ones(1, 16, 3, 3))
        assert int(module.spatial_att.gate_s.gate_s_bn_reduce0.num_batches_tracked) == 0
    x = torch.ones(2, 4, 3, 3)
    for function in (reference.bam, vf.functional.bam):
        with pytest.raises(ValueError, match=r"channel must return shape \[2, 4, 1, 1\], got \[2, 4\]"):
            function(x, lambda mean: mean.flatten(1), lambda x: x[:, :1])
        with pytest.raises(ValueError, match=r"spatial must return shape \[2, 1, 3, 3\], got \[2, 4, 3, 3\]"):
            function(x, lambda mean: mean, lambda x: x)
        with pytest.raises(ValueError, match="combine must be one of"):
            function(x, lambda mean: mean, lambda x: x[:, :1], "mean")
