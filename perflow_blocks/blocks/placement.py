"""Where a model's weights are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from torch import nn

from ..delta.model_lock import model_lock

ALIGNMENT = 64
"""Bytes: torch allocates tensors of a CPU at multiples of it."""

ALIGNED_ATTRIBUTE = "_perflow_aligned"


def is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs.

    Offloading in groups hooks each weight's own layer or one that holds it.
    """
    return any(
        hasattr(module, "_hf_hook")
        or (hasattr(module, "_diffusers_hook") and module._diffusers_hook.get_hook(_GROUP_OFFLOADING) is not None)
        for module in _down_to_weights(model)
    )


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The type a model computes with: that of its first weight, unless a hook or fewer bits say that it is another."""
    dtype = next(model.parameters()).dtype
    hooked = any(hasattr(module, "_diffusers_hook") for module in _down_to_weights(model))
    plain = dtype.is_floating_point and dtype.itemsize > 1 and not hooked
    return dtype if plain else model.dtype  # which walks all modules


def _down_to_weights(model: nn.Module) -> Iterator[nn.Module]:
    """The modules from the model down to the first one that holds weights itself."""
    for module in model.modules():
        yield module
        if module._parameters:
            return


def align_weights(model: nn.Module) -> None:
    """Moves weights that run on a CPU to aligned addresses, once for a model.

    Weights of a mapped file lie anywhere, and matrix products on a CPU round by the alignment of what they multiply:
    without this a pipeline and what it saved would give images that differ by a level of 255.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or ALIGNED_ATTRIBUTE in vars(model) or is_offloaded(model):
        return
    with model_lock(model).changing():
        for weight in model.parameters():
            if type(weight.data) is torch.Tensor and weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()
        vars(model)[ALIGNED_ATTRIBUTE] = True
