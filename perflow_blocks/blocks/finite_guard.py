"""Checks of models and results: latents and images are finite, models lie where they should."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from torch import Tensor, nn

from ..delta.model_lock import model_lock
from .declare import declared
from .inputs import shared_inputs
from .loop_block import LoopBlock, Repeat

ALIGNMENT = 64
"""Bytes: torch allocates tensors of a CPU at multiples of it."""

ALIGNED_ATTRIBUTE = "_perflow_aligned"


class FiniteGuardStep(LoopBlock):
    """Checks once, after the last step, that all latents are finite.

    Raises:
        ValueError: latents are not finite.
    """

    description = "Checks once, after the loop, that the latents are finite; if not, raises an error."
    inputs = declared(*shared_inputs("latents", required=True))

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        return components, block_state

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        problem = not_finite("the latents", block_state.latents)
        if problem is not None:
            in_half = precision(block_state.latents) != torch.float32
            wider = "load the pipeline with dtype=torch.bfloat16 or torch.float32, or " if in_half else ""
            raise ValueError(
                f"{problem}; {wider}check the delta, the LoRAs and the latents that you passed (the VAE is not the "
                "cause)."
            )


def not_finite(what: str, values: Tensor) -> str | None:
    """Names the images whose `values`, in words `what`, are not finite; None if all are. Reads the device once."""
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    bad = ", ".join(f"images[{index}]" for index, is_finite in enumerate(finite) if not is_finite)
    return f"{what} are not finite in {precision(values)} for {bad} of {len(finite)}" if bad else None


def precision(values: Tensor) -> torch.dtype:
    """The type that a model with this input computes in: autocast's, or that of the input."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs."""
    for module in model.modules():
        hooks: Any = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or (hooks is not None and hooks.get_hook(_GROUP_OFFLOADING) is not None):
            return True
        if module._parameters:
            break
    return False


def align_weights(model: nn.Module) -> None:
    """Moves weights that run on a CPU to aligned addresses, once for a model.

    Matrix products on a CPU round by the alignment of what they multiply, and weights of a mapped file lie anywhere.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or ALIGNED_ATTRIBUTE in vars(model) or is_offloaded(model):
        return
    with model_lock(model).changing():
        for weight in model.parameters():
            if type(weight.data) is Tensor and weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()
        vars(model)[ALIGNED_ATTRIBUTE] = True
