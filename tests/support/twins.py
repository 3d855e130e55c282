"""Small networks around one gate or block each, plain and fused, to which a test applies the same outside tool."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import visattn_fast as vf
from blocks import C, block
from cases import feature_map
from outside import library
from visattn_fast import catalogue

_GATES_ALONE = ("channel_attention", "spatial_attention")  # they return no map; CBAM holds both


class _Tokens(nn.Module):
    """Applies a module of [N, H, W, C] to maps [N, C, H, W]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _swin_block() -> nn.Module:
    kind = library("timm.models.swin_transformer").SwinTransformerBlock
    return _Tokens(kind(C, (8, 6), num_heads=2, window_size=2, shift_size=1))


def _has_layers(name: str, entry: catalogue.Entry) -> bool:
    return not name.endswith("_eval") and name not in _GATES_ALONE and bool(list(entry.pair(C)[1].children()))


OWN = [name for name, entry in catalogue.ENTRIES.items() if _has_layers(name, entry)]
_LIBRARY: dict[str, Callable[[], nn.Module]] = {
    **{f"timm_{name}": lambda name=name: block(name) for name in ("se", "eca", "cbam", "coord")},
    "timm_swin": _swin_block,
    "torchvision_se": lambda: library("torchvision.ops.misc").SqueezeExcitation(C, 8),
    "monai_se": lambda: block(None, "SEBlock"),
    "smp_scse": lambda: library("segmentation_models_pytorch.base.modules").SCSEModule(C),
    "ultralytics_cbam": lambda: library("ultralytics.nn.modules.conv").CBAM(C),
}
TWINS = [*OWN, *_LIBRARY]


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Returns a plain network and its equal: with the fused class, or accelerated if the gate is another library's."""
    torch.manual_seed(0)
    fast, plain = catalogue.ENTRIES[name].pair(C) if name in OWN else (None, _LIBRARY[name]())
    layers = OrderedDict(stem=nn.Conv2d(3, C, 3, padding=1), body=plain, pool=nn.AdaptiveAvgPool2d(1))
    plain = nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), head=nn.Linear(C, 5))).to(dtype)
    twin = copy.deepcopy(plain)
    if fast is None:
        assert vf.accelerate(twin).swapped
    else:
        twin.body = fast.to(dtype)
    return plain, twin


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns a batch for the networks, ``[2, 3, 8, 6]``."""
    return feature_map((2, 3, 8, 6), "nchw", dtype)


def inner_layers(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, Any]:
    """Returns the layers of these exact kinds inside the gate or block, by qualified name."""
    return {n: m for n, m in model.named_modules() if n.startswith("body.") and type(m) in kinds}


def training_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Trains one step by SGD. Returns the output, the gradients, and the state after the step."""
    x = x.clone().requires_grad_()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), 0.1)
    y = model(x)
    y.square().sum().backward()
    found = {
        "y": y.detach(),
        "x": x.grad,
        **{f"grad {n}": p.grad.clone() for n, p in trained.items() if p.grad is not None},
    }
    optimizer.step()
    return found | {n: t.clone() for n, t in model.state_dict().items()}
