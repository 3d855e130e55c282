"""Training on one photograph without labels: the model predicts the rotation of a crop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BATCH = 8  # crops; each comes in all four rotations


def train_rotation(model: nn.Module, image: Tensor, steps: int, crop: int = 64, seed: int = 0) -> list[float]:
    """Trains ``model`` to predict by how many quarter turns a random crop of ``image`` was rotated.

    AdamW with a one-cycle learning rate; crops are mirrored at random. The model stays in training mode.

    Args:
        model: ``[N, C, crop, crop]`` -> logits ``[N, 4]``.
        image: ``[C, H, W]``; H and W at least ``crop``.
        steps: optimiser steps, each on 8 crops in all four rotations.
        crop: height and width of a crop, in pixels.
        seed: seed for drawing the crops.

    Returns:
        The loss of each step.

    Source: Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=max(steps, 1))
    model.train()
    losses = []
    for _ in range(steps):
        x, turns = rotated_crops(image, _BATCH, crop, generator)
        loss = F.cross_entropy(model(x), turns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def rotation_accuracy(model: nn.Module, image: Tensor, crop: int = 64, seed: int = 1, batches: int = 16) -> float:
    """The share of new random crops of ``image`` whose rotation ``model`` predicts. Puts ``model`` in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right = []
    for _ in range(batches):
        x, turns = rotated_crops(image, _BATCH, crop, generator)
        right.append((model(x).argmax(1) == turns).float().mean())
    return torch.stack(right).mean().item()


def rotated_crops(image: Tensor, count: int, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws crops in all four rotations, ``[4 * count, C, crop, crop]``, and their quarter turns, ``[4 * count]``."""
    height, width = image.shape[1:]
    tops = torch.randint(height - crop + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - crop + 1, (count,), generator=generator).tolist()
    mirrored = torch.randint(2, (count,), generator=generator).tolist()
    crops = [image[:, t : t + crop, n : n + crop] for t, n in zip(tops, lefts, strict=True)]
    upright = torch.stack([c.flip(2) if m else c for c, m in zip(crops, mirrored, strict=True)])
    turned = torch.cat([upright.rot90(k, (2, 3)) for k in range(4)])
    return turned, torch.arange(4).repeat_interleave(count)
