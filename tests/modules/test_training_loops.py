"""Whole training loops, as torchvision's scripts and Lightning run them, train a model as with the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from visattn_fast import catalogue

few = pytest.mark.parametrize("name", ["se", "cbam", "coord_att", "gam", "window_attention"])


def small_models(name):
    """Builds two classifiers of 3 x 8 x 8 images with equal parameters, one fused and one reference."""
    torch.manual_seed(0)
    models = []
    for gate in catalogue.ENTRIES[name].pair(16):
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), gate
        models.append(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)))
    models[1].load_state_dict(models[0].state_dict())
    return models


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def torchvision_loop(model, dtype):
    """Trains as torchvision's reference scripts do: autocast, scaled gradients, clipping, a schedule, an EMA."""
    norms, others = [], []
    for module in model.modules():
        of_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        for name, p in module.named_parameters(recurse=False):
            (norms if of_norm or name == "bias" else others).append(p)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    losses = []
    for images, labels in batches():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
    swa_utils.update_bn((images for images, _ in batches(2)), average)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert scaler.get_scale() == (1024.0 if dtype == torch.float16 else 1.0)  # no step was skipped
    model.eval()
    average.eval()
    with torch.inference_mode():
        return losses, *(m(images) for m in (model, average))


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torchvision_loop_matches_reference(name, dtype):
    """The losses, the trained model and its average equal those of the reference."""
    found = [torchvision_loop(model, dtype) for model in small_models(name)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*found, **tolerance)


class Trained(nn.Module):
    """A module with a training step and an optimiser, as a LightningModule has them."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, **self.options)


def lightning_loop(module):
    """Trains as Lightning's automatic optimisation does: closures, accumulated gradients, validation in between."""
    optimizer, losses = module.configure_optimizers(), []

    def closure(batch, first):
        loss = module.training_step(batch) / 2
        if first:
            optimizer.zero_grad()
        loss.backward()
        return loss

    for index, batch in enumerate(batches()):
        module.train()
        step = functools.partial(closure, batch, index % 2 == 0)
        losses.append((optimizer.step(step) if index % 2 else step()).item())
        module.eval()
        with torch.inference_mode():
            losses.append(module.training_step(batch).item())
    return losses


@few
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_lightning_loop_matches_reference(name, options):
    """The losses equal those of the reference, with deterministic algorithms alone."""
    torch.use_deterministic_algorithms(True)
    try:
        found = [lightning_loop(Trained(model, **options)) for model in small_models(name)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
