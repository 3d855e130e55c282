"""Changes that people make to the layers inside a module: adapters, hooks, replaced layers, quantization, offloading.

A change takes a module and changes every inner layer that it fits. It returns the number of layers that it changed.
Applied to a fused module and to a plain twin, it must have the same effect on both.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)  # the layers that adapters and quantizers replace
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish)

CHANGES: dict[str, Callable[[nn.Module], int]] = {}


def change(function: Callable[[nn.Module], int]) -> Callable[[nn.Module], int]:
    CHANGES[function.__name__] = function
    return function


def inner(module: nn.Module, *kinds: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Returns parent, name and layer of each inner layer of exactly these kinds."""
    return [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if type(layer) in kinds
    ]


def each(module: nn.Module, *kinds: type[nn.Module]) -> Iterator[nn.Module]:
    return (layer for _, _, layer in inner(module, *kinds))


class Adapter(nn.Module):
    """A layer with a trained scale and shift beside it, as LoRA and IA3 wrap layers."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        self.scale = nn.Parameter(weight.new_tensor(1.3))
        self.shift = nn.Parameter(weight.new_tensor(0.2))

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * self.scale + self.shift


@change
def adapter(module: nn.Module) -> int:
    found = inner(module, *MATRICES)
    for parent, name, layer in found:
        setattr(parent, name, Adapter(layer))
    return len(found)


def _scaled(kind: type[nn.Module]) -> type[nn.Module]:
    class Scaled(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.3

    return Scaled


@change
def subclass(module: nn.Module) -> int:
    """Gives each layer a subclass with a forward of its own."""
    found = inner(module, *MATRICES, *NORMS)
    for _, _, layer in found:
        layer.__class__ = _scaled(type(layer))
    return len(found)


@change
def instance_forward(module: nn.Module) -> int:
    """Sets a forward on the instance, as Hugging Face's accelerate does."""
    found = inner(module, *MATRICES, *NORMS, *ACTIVATIONS)
    for _, _, layer in found:
        layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 1.3, layer)
    return len(found)


@change
def forward_hook(module: nn.Module) -> int:
    found = inner(module, *MATRICES, *NORMS, *ACTIVATIONS)
    for _, _, layer in found:
        layer.register_forward_hook(lambda layer, args, y: y * 1.3)
    return len(found)


@change
def forward_pre_hook(module: nn.Module) -> int:
    found = inner(module, *MATRICES, *NORMS, *ACTIVATIONS)
    for _, _, layer in found:
        layer.register_forward_pre_hook(lambda layer, args: (args[0] * 1.3,))
    return len(found)


@change
def container_hook(module: nn.Module) -> int:
    """Hooks every module that is not a leaf, the outermost excepted."""
    found = [m for m in module.modules() if m is not module and list(m.children())]
    found = [m for m in found if type(m) not in (nn.ModuleList, nn.ModuleDict)]  # PyTorch never calls these
    for layer in found:
        layer.register_forward_hook(lambda layer, args, y: y * 1.3)
    return len(found)


@change
def backward_hook(module: nn.Module) -> int:
    """Changes gradients, as guided backpropagation does."""
    found = inner(module, *MATRICES, *ACTIVATIONS)
    for _, _, layer in found:
        layer.register_full_backward_hook(lambda layer, grads, out: tuple(g if g is None else g * 1.3 for g in grads))
    return len(found)


@change
def replaced_activation(module: nn.Module) -> int:
    others = {nn.Sigmoid: nn.Hardsigmoid, nn.Hardsigmoid: nn.Sigmoid}
    found = inner(module, *ACTIVATIONS)
    for parent, name, layer in found:
        setattr(parent, name, others.get(type(layer), nn.ELU)())
    return len(found)


@change
def replaced_norm(module: nn.Module) -> int:
    found = inner(module, nn.BatchNorm1d, nn.BatchNorm2d)
    for parent, name, layer in found:
        norm = nn.GroupNorm(1, layer.num_features).to(layer.weight)
        setattr(parent, name, norm)
    return len(found)


@change
def frozen_norm(module: nn.Module) -> int:
    """Puts batch norms in eval mode, and takes their affine form away."""
    found = inner(module, nn.BatchNorm1d, nn.BatchNorm2d)
    for _, _, layer in found:
        layer.eval()
    return len(found)


@change
def removed_activation(module: nn.Module) -> int:
    found = inner(module, nn.ReLU, nn.SiLU, nn.GELU)
    for parent, name, _ in found:
        setattr(parent, name, nn.Identity())
    return len(found)


@change
def bias(module: nn.Module) -> int:
    """Adds a bias to layers without one, and takes it from the others."""
    found = inner(module, *MATRICES)
    for _, _, layer in found:
        width = layer.weight.shape[0]
        value = torch.linspace(-1, 1, width).to(layer.weight) if width > 1 else layer.weight.new_tensor([0.3])
        layer.bias = nn.Parameter(value) if layer.bias is None else None
    return len(found)


@change
def dilation(module: nn.Module) -> int:
    """Doubles the dilation of convolutions that are more than 1x1, as segmentation networks do to their encoders."""
    found = [layer for layer in each(module, nn.Conv2d) if layer.kernel_size != (1, 1)]
    for layer in found:
        layer.dilation = tuple(2 * d for d in layer.dilation)
        layer.padding = tuple(2 * p for p in layer.padding)
        layer._reversed_padding_repeated_twice = [2 * p for p in layer._reversed_padding_repeated_twice]
    return len(found)


@change
def padding_mode(module: nn.Module) -> int:
    found = [layer for layer in each(module, nn.Conv1d, nn.Conv2d) if layer.kernel_size not in ((1,), (1, 1))]
    for layer in found:
        layer.padding_mode = "circular"
    return len(found)


@change
def spectral_norm(module: nn.Module) -> int:
    """PyTorch's older spectral norm, a hook before forward."""
    found = inner(module, *MATRICES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, _, layer in found:
            torch.manual_seed(0)
            torch.nn.utils.spectral_norm(layer)
    return len(found)


@change
def weight_norm(module: nn.Module) -> int:
    """PyTorch's older weight norm, a hook before forward."""
    found = inner(module, *MATRICES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, _, layer in found:
            torch.nn.utils.weight_norm(layer)
    return len(found)


@change
def parametrized_spectral_norm(module: nn.Module) -> int:
    found = inner(module, *MATRICES)
    for _, _, layer in found:
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(layer)
    return len(found)


@change
def pruning_mask(module: nn.Module) -> int:
    """Masks of torch.nn.utils.prune that stay in place."""
    found = inner(module, *MATRICES)
    for _, _, layer in found:
        prune.l1_unstructured(layer, "weight", amount=0.4)
    return len(found)


def _fake_quantized(kind: type[nn.Module]) -> type[nn.Module]:
    class FakeQuantized(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, original = torch.fake_quantize_per_tensor_affine(self.weight.float(), 0.1, 0, -8, 7), self.weight
            self._parameters["weight"] = weight.to(original.dtype)
            try:
                return super().forward(x)
            finally:
                self._parameters["weight"] = original

    return FakeQuantized


@change
def fake_quantized(module: nn.Module) -> int:
    """Layers with fake-quantized weights, as for quantization-aware training."""
    found = inner(module, *MATRICES)
    for _, _, layer in found:
        layer.__class__ = _fake_quantized(type(layer))
    return len(found)


@change
def quantize_dynamic(module: nn.Module) -> int:
    """Swaps float32 linear layers for int8 ones, whose ``weight`` is a method."""
    found = inner(module, nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(module.float(), {nn.Linear}, inplace=True)
    return len(found)


class Scaled(torch.Tensor):
    """A weight that PyTorch's functions scale when they read it, as tensors of quantizers compute their values."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.linear, torch.conv1d, torch.conv2d):
            with torch._C.DisableTorchFunctionSubclass():
                args = [a.as_subclass(torch.Tensor) * 1.3 if isinstance(a, cls) else a for a in args]
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


@change
def subclass_weight(module: nn.Module) -> int:
    found = inner(module, *MATRICES)
    for _, _, layer in found:
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Scaled))
    return len(found)


@change
def offloaded(module: nn.Module) -> int:
    """Keeps parameters on the meta device, and gathers them while a layer runs, as accelerate's offloading does."""
    found = [layer for layer in each(module, *MATRICES, *NORMS) if layer._parameters.get("weight") is not None]
    for layer in found:
        values = {name: p.detach() for name, p in layer._parameters.items() if p is not None}
        for name, value in values.items():
            layer._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

        def gathered(self, x, values=values):
            there = dict(self._parameters)
            self._parameters.update({name: nn.Parameter(value) for name, value in values.items()})
            try:
                return type(self).forward(self, x)
            finally:
                self._parameters.update(there)

        layer.forward = types.MethodType(gathered, layer)
    return len(found)


INFERENCE = ("quantize_dynamic", "offloaded")  # without gradients
MODES = ("train", "eval", "no_grad")


def changed_run(module, x, mode):
    """Two calls, with the gradients of the second, and the buffers after them."""
    module.train(mode == "train")
    x = x.clone().requires_grad_(mode != "no_grad")
    with torch.set_grad_enabled(mode != "no_grad"):
        module(x)
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
    found = {"y": y.detach(), **{name: b.clone() for name, b in module.named_buffers() if isinstance(b, torch.Tensor)}}
    if mode != "no_grad":
        y.square().sum().backward()
        found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None} | {"x": x.grad}
    return found


def assert_same(got, want, float32):
    """``float32``: the results are only as exact as float32's."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        exact = expected.dtype == torch.float64 and not float32
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(got[name], expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_in_every_mode(module, plain, x, change):
    """Runs both modules in training, in eval mode and without gradients. An error of the plain one must be the same."""
    # The gradient of PyTorch's hard sigmoid is rounded to float32, in float64 too.
    float32 = any(type(layer) is nn.Hardsigmoid for layer in plain.modules())
    for mode in MODES[2:] if change in INFERENCE else MODES:
        try:
            want = changed_run(plain, x, mode)
        except RuntimeError as error:  # such as NAM's, which reads a weight that is offloaded
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                changed_run(module, x, mode)
        else:
            assert_same(changed_run(module, x, mode), want, float32)
