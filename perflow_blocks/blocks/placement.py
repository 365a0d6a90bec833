"""Where a model's weights are."""

from __future__ import annotations

import torch
from torch import nn

from ..delta.model_lock import model_lock

ALIGNMENT = 64
"""Bytes: torch allocates tensors of a CPU at multiples of it."""

ALIGNED_ATTRIBUTE = "_perflow_aligned"


def is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs.

    Offloading in groups hooks each weight's own layer or one that holds it.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            return True
        if module._parameters:
            return False
    return False


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
