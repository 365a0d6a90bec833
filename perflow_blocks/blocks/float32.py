"""Computing in float32 for a while with a pipeline that was loaded in half precision."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def precision(like: Tensor) -> torch.dtype:
    """The type that a model computes in on the device of `like`: autocast's, or that of its input."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def is_float32(models: Sequence[nn.Module], like: Tensor) -> bool:
    """Whether models with an input like this compute in float32 already."""
    return precision(like) == torch.float32 and not any(tensor.dtype in HALF for tensor in _tensors(models))


def why_not_float32(models: Sequence[nn.Module]) -> str | None:
    """What keeps these models from computing in float32 for a while; None where nothing does."""
    if any(_is_group_offload_enabled(model) for model in models) or any(t.is_meta for t in _tensors(models)):
        return "weights that are offloaded layer by layer cannot be made float32"
    weights = [weight for model in models for weight in model.parameters()]
    quantized = {str(weight.dtype) for weight in weights} - {str(dtype) for dtype in (*HALF, torch.float32)}
    quantized |= {type(weight.data).__name__ for weight in weights} - {"Tensor"}
    if quantized:
        return f"weights of {', '.join(sorted(quantized))} cannot be made float32"
    return None


@contextmanager
def in_float32(models: Sequence[nn.Module], values: dict[str, Any]) -> Iterator[None]:
    """Inside, half-precision weights of the models and half-precision tensors among `values` are float32.

    Afterwards the weights are as they were, bit for bit (float32 holds every half-precision number). Values that did
    not change inside are the objects they were; a tensor that did is cast to the type it had. Autocast is off inside.

    Args:
        models: their weights are replaced, so that no second copy is held.
        values: names and values, tensors also in lists, tuples and dictionaries; changed in place.
    """
    weights = [(tensor, tensor.dtype) for tensor in _tensors(models) if tensor.dtype in HALF]
    given = dict(values)
    lifted = {name: _to_float32(value) for name, value in given.items()}
    device_types = {tensor.device.type for tensor in _tensors(models)}
    values.update(lifted)
    try:
        for tensor, _ in weights:
            tensor.data = tensor.data.float()
        with _without_autocast(device_types):
            yield
    finally:
        for tensor, dtype in weights:
            tensor.data = tensor.data.to(dtype)
        for name, value in given.items():
            if values[name] is lifted[name]:
                values[name] = value
            elif isinstance(value, Tensor) and isinstance(values[name], Tensor):
                values[name] = values[name].to(value.dtype)


def _tensors(models: Sequence[nn.Module]) -> list[Tensor]:
    """The floating-point weights and buffers, each once."""
    found = {id(t): t for model in models for t in itertools.chain(model.parameters(), model.buffers())}
    return [tensor for tensor in found.values() if tensor.is_floating_point()]


@contextmanager
def _without_autocast(device_types: set[str]) -> Iterator[None]:
    if not device_types:
        yield
        return
    kind, *others = sorted(device_types)
    with torch.autocast(kind, enabled=False), _without_autocast(set(others)):
        yield


def _to_float32(value: Any) -> Any:
    """The value with half-precision tensors cast; the same object where there are none."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, dict):
        cast = {name: _to_float32(entry) for name, entry in value.items()}
        return cast if any(cast[name] is not value[name] for name in value) else value
    if isinstance(value, (list, tuple)):
        entries = [_to_float32(entry) for entry in value]
        changed = any(new is not old for new, old in zip(entries, value, strict=True))
        return type(value)(entries) if changed else value
    return value
