"""Parameters and buffers of the modules: names, shapes, state_dict, parametrizations, meta and fake tensors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune

import visattn_fast as vf
from cases import entries, feature_map, run
from visattn_fast import catalogue, reference


def batch_norm(name, channels):
    """Returns the keys and shapes of a batch norm."""
    return {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.num_batches_tracked": ()
    }


# The documented keys of each class, built for 32 channels by the arguments of the catalogue.
KEYS = {
    "S2MLPv2": {
        "mlp1.weight": (96, 32),
        "mlp1.bias": (96,),
        "mlp2.weight": (32, 32),
        "mlp2.bias": (32,),
        "split_attention.mlp1.weight": (32, 32),
        "split_attention.mlp2.weight": (96, 32),
    },
    "SK": {
        **{f"convs.{i}.0.weight": (32, 32, 3, 3) for i in range(2)},
        **batch_norm("convs.0.1", 32),
        **batch_norm("convs.1.1", 32),
        "fc.0.weight": (32, 32, 1, 1),
        **batch_norm("fc.1", 32),
        **{f"fcs.{i}.weight": (32, 32, 1, 1) for i in range(2)},
        **{f"fcs.{i}.bias": (32,) for i in range(2)},
    },
    "GAM": {
        "linear1.weight": (8, 32),
        "linear1.bias": (8,),
        "linear2.weight": (32, 8),
        "linear2.bias": (32,),
        "conv1.weight": (8, 32, 7, 7),
        "conv1.bias": (8,),
        **batch_norm("norm1", 8),
        "conv2.weight": (32, 8, 7, 7),
        "conv2.bias": (32,),
        **batch_norm("norm2", 32),
    },
    "SelfAttention2d": {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    },
    "GRN": {"weight": (32,), "bias": (32,)},
    "MapAttention2d": {
        "qkv.conv.weight": (64, 32, 1, 1),
        **batch_norm("qkv.bn", 64),
        "proj.conv.weight": (32, 32, 1, 1),
        **batch_norm("proj.bn", 32),
        "pe.conv.weight": (32, 1, 3, 3),
        **batch_norm("pe.bn", 32),
    },
    "CrissCross": {
        "query_conv.weight": (4, 32, 1, 1),
        "query_conv.bias": (4,),
        "key_conv.weight": (4, 32, 1, 1),
        "key_conv.bias": (4,),
        "value_conv.weight": (32, 32, 1, 1),
        "value_conv.bias": (32,),
        "gamma": (1,),
    },
    "SOCA": {
        "conv_du.0.weight": (4, 32, 1, 1),
        "conv_du.0.bias": (4,),
        "conv_du.2.weight": (32, 4, 1, 1),
        "conv_du.2.bias": (32,),
    },
    "WindowAttention2d": {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
        "relative_position_bias_table": (169, 2),
    },
    "SE": {"fc.0.weight": (2, 32), "fc.2.weight": (32, 2)},
    "scSE": {
        "cSE.1.weight": (2, 32, 1, 1),
        "cSE.1.bias": (2,),
        "cSE.3.weight": (32, 2, 1, 1),
        "cSE.3.bias": (32,),
        "sSE.0.weight": (1, 32, 1, 1),
        "sSE.0.bias": (1,),
    },
    "LocalAttention": {
        "channel_attention.1.weight": (4, 32, 1, 1),
        "channel_attention.1.bias": (4,),
        "channel_attention.3.weight": (32, 4, 1, 1),
        "channel_attention.3.bias": (32,),
        "spatial_attention.0.weight": (4, 32, 1, 1),
        "spatial_attention.0.bias": (4,),
        "spatial_attention.2.weight": (1, 4, 1, 1),
        "spatial_attention.2.bias": (1,),
    },
    "ECA": {"conv.weight": (1, 1, 3)},
    "CBAM": {
        "channelattention.fc1.weight": (4, 32, 1, 1),
        "channelattention.fc2.weight": (32, 4, 1, 1),
        "spatialattention.conv1.weight": (1, 2, 7, 7),
    },
    "CoordAtt": {
        "conv1.weight": (8, 32, 1, 1),
        "conv1.bias": (8,),
        **batch_norm("bn1", 8),
        **{f"conv_{axis}.weight": (32, 8, 1, 1) for axis in "hw"},
        **{f"conv_{axis}.bias": (32,) for axis in "hw"},
    },
    "TripletAttention": {
        **{f"{gate}.conv.conv.weight": (1, 2, 7, 7) for gate in ("cw", "hc", "hw")},
        **{key: shape for gate in ("cw", "hc", "hw") for key, shape in batch_norm(f"{gate}.conv.bn", 1).items()},
    },
    "BAM": {
        "channel_att.gate_c.gate_c_fc_0.weight": (2, 32),
        "channel_att.gate_c.gate_c_fc_0.bias": (2,),
        **batch_norm("channel_att.gate_c.gate_c_bn_1", 2),
        "channel_att.gate_c.gate_c_fc_final.weight": (32, 2),
        "channel_att.gate_c.gate_c_fc_final.bias": (32,),
        "spatial_att.gate_s.gate_s_conv_reduce0.weight": (2, 32, 1, 1),
        "spatial_att.gate_s.gate_s_conv_reduce0.bias": (2,),
        **batch_norm("spatial_att.gate_s.gate_s_bn_reduce0", 2),
        **{f"spatial_att.gate_s.gate_s_conv_di_{i}.weight": (2, 2, 3, 3) for i in range(2)},
        **{f"spatial_att.gate_s.gate_s_conv_di_{i}.bias": (2,) for i in range(2)},
        **batch_norm("spatial_att.gate_s.gate_s_bn_di_0", 2),
        **batch_norm("spatial_att.gate_s.gate_s_bn_di_1", 2),
        "spatial_att.gate_s.gate_s_conv_final.weight": (1, 2, 1, 1),
        "spatial_att.gate_s.gate_s_conv_final.bias": (1,),
    },
    "ChannelAttention": {"fc1.weight": (4, 32, 1, 1), "fc2.weight": (32, 4, 1, 1)},
    "SpatialAttention": {"conv1.weight": (1, 2, 7, 7)},
    "NAM": batch_norm("bn2", 32),
    "SimAM": {},
    "ShuffleAttention": {
        **dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), (1, 2, 1, 1)),
        "gn.weight": (2,),
        "gn.bias": (2,),
    },
}


def test_documented_keys_cover_the_catalogue():
    assert KEYS.keys() == {entry.reference.__name__ for entry in catalogue.ENTRIES.values()}


@entries
def test_state_dict_is_documented_and_crosses_classes(entry):
    """Both classes have the documented keys and shapes, and each loads the other's from a file."""
    for source, target in (entry.pair(32), entry.pair(32, seed=1)[::-1]):
        assert {k: tuple(v.shape) for k, v in source.state_dict().items()} == KEYS[entry.reference.__name__]
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
        torch.testing.assert_close(source(x), target(x))


def test_bias_option_adds_biases():
    assert vf.FastSE(32, bias=True).state_dict().keys() == {f"fc.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}


def test_kernel_size_of_eca_follows_the_channels():
    """The size is int(abs((log2 C + 1) / 2)), plus one if even; an explicit size replaces it."""
    sizes = [reference.ECA(c).conv.weight.shape[2] for c in (1, 8, 16, 64, 128, 256, 512, 1024, 2048)]
    assert sizes == [1, 3, 3, 3, 5, 5, 5, 5, 7]
    assert reference.ECA(64, kernel_size=9).conv.weight.shape[2] == 9


def test_kernel_size_of_cbam_is_an_argument():
    assert vf.FastCBAM(32, 4, 3).spatialattention.conv1.weight.shape == (1, 2, 3, 3)


def test_repr_names_the_arguments():
    assert repr(vf.FastSE(32)).startswith("FastSE(\n  channels=32, reduction=16")


@entries
def test_names_and_norms_are_those_of_the_reference(entry):
    """Groups of parameters by name, shape or kind of layer, as for weight decay, are the same in both classes."""
    fast, plain = entry.pair(8)
    names = [[(name, p.shape) for name, p in module.named_parameters()] for module in (fast, plain)]
    assert names[0] == names[1]
    norms = [[isinstance(m, nn.modules.batchnorm._NormBase) for m in module.modules()] for module in (fast, plain)]
    assert norms[0] == norms[1]


class Doubled(torch.nn.Module):
    def forward(self, w):
        return 2 * w


@entries
def test_parametrized_parameters_are_read(entry):
    fast = entry.pair(32)[0].eval()
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    expected = fast(x)
    for module in [*fast.modules()]:
        for name, value in [*module.named_parameters(recurse=False)]:
            value.data /= 2
            parametrize.register_parametrization(module, name, Doubled())
    torch.testing.assert_close(fast(x), expected)


@entries
def test_parameters_as_plain_attributes_are_read(entry):
    """Replicas of `nn.DataParallel` hold tensors where the module holds parameters."""
    fast = entry.pair(32)[0].eval()
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    expected = fast(x)
    for module in fast.modules():
        for name, value in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            setattr(module, name, value.detach())
    torch.testing.assert_close(fast(x), expected)


@entries
@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm"])
def test_weight_and_spectral_norm_train_as_in_the_reference(entry, parametrization):
    """A weight computed from other parameters is computed anew in each pass, and its gradient reaches them."""
    torch.manual_seed(0)
    fast, plain = entry.pair(8, torch.float64)
    for layer in list(fast.modules()):
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            getattr(parametrizations, parametrization)(layer)
    twin = copy.deepcopy(fast)
    twin.__class__ = plain.__class__
    found = []
    for module in (fast, twin):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float64).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        found.append({"y": y, "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_permanent_pruning_is_read():
    """A permanent mask is part of the weight. A hook of an inner layer that applies a mask never runs."""
    fast, plain = catalogue.ENTRIES["se"].pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    for module in (fast, plain):
        prune.l1_unstructured(module.fc[0], "weight", 0.5)
        prune.remove(module.fc[0], "weight")
    torch.testing.assert_close(fast(x), plain(x))


@entries
def test_channels_last_weights_change_nothing(entry):
    """``module.to(memory_format=channels_last)`` makes a 7x7 weight strided; results and gradients stay."""
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 6, 5), "channels_last", torch.float32)
    expected = run(fast, x)
    torch.testing.assert_close(run(fast.to(memory_format=torch.channels_last), x), expected)


@pytest.mark.interpreted
@entries
def test_gradients_have_the_strides_of_channels_last_weights(entry):
    """A 1x1 weight in channels_last has other strides than a contiguous one, and so has its gradient."""
    fast, _ = entry.pair(32)
    fast.to(memory_format=torch.channels_last)
    fast(feature_map((2, 32, 6, 5), "channels_last", torch.float32).requires_grad_()).sum().backward()
    assert [p.grad.stride() for p in fast.parameters()] == [p.stride() for p in fast.parameters()]


@entries
def test_fake_and_meta_modules_run_and_load(entry):
    """Fake and meta modules run both ways with the right shapes; meta modules load by assignment or copy."""
    fast, _ = entry.pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    with FakeTensorMode():
        fake = entry.fast(**entry.arguments(16))
        image = torch.empty(x.shape, requires_grad=True)
        y = fake(image)
        y.sum().backward()
    with torch.device("meta"):
        meta = entry.fast(**entry.arguments(16))
    given = x.to("meta").requires_grad_()
    z = meta(given)
    z.sum().backward()
    assert y.shape == z.shape == fast(x).shape
    for module, leaf in ((fake, image), (meta, given)):
        assert leaf.grad.shape == x.shape
        assert all(p.grad.shape == p.shape for p in module.parameters())
    assigned, copied = copy.deepcopy(meta), meta.to_empty(device="cpu")
    assigned.load_state_dict(copy.deepcopy(fast.state_dict()), assign=True)
    copied.load_state_dict(fast.state_dict())
    expected = copy.deepcopy(fast)(x)
    for module in (assigned, copied):
        assert torch.equal(module.train(fast.training)(x), expected)
