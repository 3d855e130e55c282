"""Checks of arguments for attention over sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_floating


def check_sequence(name: str, sequence: Tensor, size: int | None = None) -> None:
    """Raises unless ``sequence`` is floating-point, ``[N, L, size]`` with L >= 1; ``size`` None: any size."""
    check_floating(name, sequence)
    wanted = "d" if size is None else size
    if sequence.dim() != 3 or sequence.shape[1] == 0 or size not in (None, sequence.shape[2]):
        raise ValueError(f"{name} must have shape [N, L, {wanted}] with L >= 1, got {list(sequence.shape)}")


def check_key_value(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_size: int, value_size: int | None
) -> None:
    """Raises unless key and value are None or sequences of these sizes, equally long, with query's batch size.

    Without a key, the query takes its place.
    """
    for name, sequence, size in (("key", key, key_size), ("value", value, value_size)):
        if sequence is None:
            continue
        check_sequence(name, sequence, size)
        _check_device(name, sequence, query)
        if sequence.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch of query, {query.shape[0]}, got {list(sequence.shape)}")
    source = query if key is None else key
    if value is not None and value.shape[1] != source.shape[1]:
        raise ValueError(f"value must have as many positions as key, {source.shape[1]}, got {list(value.shape)}")


def check_mask(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Returns ``mask`` with at least two dimensions. Raises unless it is bool, on like's device, and fits ``shape``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where attention is let through, got {_kind(mask)}")
    _check_device("mask", mask, like)
    _check_broadcast("mask", mask, shape)
    at_least_2d: Tensor = torch.atleast_2d(mask)
    return at_least_2d


def check_lengths(lengths: Tensor | None, batch: int, like: Tensor) -> None:
    """Raises unless ``lengths`` is None, or ``[batch]`` integers on the device of ``like``."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be an int32 or int64 tensor, got {_kind(lengths)}")
    _check_device("key_lengths", lengths, like)
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"key_lengths must have shape [{batch}], got {list(lengths.shape)}")


def check_position(position: Tensor | None, shape: tuple[int, ...], like: Tensor, allowed: bool) -> None:
    """Raises unless ``position`` is None, or allowed, real, on like's device, and broadcastable to ``shape``."""
    if position is None:
        return
    if not allowed:
        raise ValueError("position must be None without a window, or if the module predicts it")
    if not isinstance(position, Tensor) or position.is_complex() or position.dtype == torch.bool:
        raise TypeError(f"position must be a tensor of real numbers, got {_kind(position)}")
    _check_device("position", position, like)
    _check_broadcast("position", position, shape)


def check_pooling(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values as ``[..., 1 or Q, K]``. Raises unless they and queries ``[..., Q]`` fit each other."""
    check_floating("queries", queries)
    if queries.dim() == 0:
        raise ValueError("queries must have shape [..., Q], got a scalar")
    found = []
    for name, t in (("keys", keys), ("values", values)):
        check_floating(name, t)
        _check_device(name, t, queries)
        own = t.dim() == queries.dim() + 1 and t.shape[:-1] == queries.shape
        shared = t.dim() == queries.dim() and t.shape[:-1] == queries.shape[:-1]
        if not (own or shared) or t.shape[-1] == 0:
            leading = ", ".join(str(size) for size in queries.shape)
            batch = ", ".join(str(size) for size in (*queries.shape[:-1], "K"))
            raise ValueError(f"{name} must have shape [{leading}, K] or [{batch}], K >= 1, got {list(t.shape)}")
        found.append(t if own else t.unsqueeze(-2))
    if found[0].shape[-1] != found[1].shape[-1]:
        raise ValueError(f"values must be as many as keys, {found[0].shape[-1]}, got {list(values.shape)}")
    return found[0], found[1]


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of the queries, {like.device}, got {tensor.device}")


def _check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    sizes = tuple(tensor.shape)
    if len(sizes) > len(shape) or any(s not in (1, t) for s, t in zip(sizes[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got {list(sizes)}")
