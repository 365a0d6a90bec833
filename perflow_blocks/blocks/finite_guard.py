"""The guard of the loop: latents that are not finite raise an error or are computed again in float32."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..delta.model_lock import model_lock
from .declare import declared
from .guiders import guider_of_call
from .inputs import NONFINITE_POLICIES, guider_input, latents_input, on_nonfinite_input
from .loop_block import LoopBlock, Repeat
from .specs import controlnet_spec, guider_spec, unet_spec

logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)

_REMEDY = "check the delta, the LoRAs and the latents that you passed (the VAE is not the cause)"


class FiniteGuardStep(LoopBlock):
    """Checks once, after the last step, that all latents are finite.

    With `on_nonfinite="raise"`, latents that are not finite are an error. With `"fallback"`, all steps are run again
    in float32, with a warning; that needs memory for the networks in float32.

    Raises:
        ValueError: the policy is unknown; latents are not finite, with `"fallback"` also after the run in float32.
    """

    models: tuple[str, ...] = ("unet",)  # the components that the fallback runs in float32
    description = "Checks after the loop that the latents are finite; if not, raises or runs all steps in float32."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(latents_input(), on_nonfinite_input(), guider_input())
    intermediate_outputs = declared(
        OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f), all of them finite.")
    )

    def start(self, components: Any, block_state: Any) -> None:
        policy, latents, guider = block_state.on_nonfinite, block_state.latents, None
        if policy not in NONFINITE_POLICIES:
            raise ValueError(f"on_nonfinite={policy!r} must be one of {', '.join(NONFINITE_POLICIES)}.")
        if policy == "fallback":  # copies, since blocks may write into the latents, and a guider into its momentum
            latents, guider = latents.clone(), copy.deepcopy(vars(guider_of_call(components, block_state)))
        block_state["_run_starts_with"] = (latents, guider)

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        return components, block_state

    @torch.no_grad()
    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        latents, (beginning, guider) = block_state.latents, vars(block_state).pop("_run_starts_with")
        problem = _problem(latents)
        if problem is None:
            return
        if _problem(beginning) is not None:
            raise ValueError(f"{problem}, as were those that the run starts with; check the given latents or image.")
        if _precision(latents) == torch.float32:
            raise ValueError(f"{problem}; {_REMEDY}.")
        advice = _advice(latents)
        if block_state.on_nonfinite == "raise":
            raise ValueError(
                f'{problem}; {advice}, or pass on_nonfinite="fallback"; if that does not help, {_REMEDY}.'
            )
        models = [getattr(components, name) for name in self.models]
        if not _can_be_float32(models):
            raise ValueError(f"{problem}, and offloaded or quantized weights cannot be made float32; {advice}.")
        block_state.latents = beginning
        vars(guider_of_call(components, block_state)).update(guider)
        with ExitStack() as locks:
            for model in models:
                locks.enter_context(model_lock(model).changing())
            locks.enter_context(_in_float32(models, vars(block_state)))
            repeat(0)
        if _problem(block_state.latents) is not None:
            raise ValueError(f"{problem}, nor are they in torch.float32; {_REMEDY}.")
        logger.warning(f"{problem}; all steps were run again in float32. To avoid the second run, {advice}.")


class ControlNetFiniteGuardStep(FiniteGuardStep):
    """The guard of a loop with a ControlNet, which the fallback runs in float32 as well."""

    models = ("unet", "controlnet")
    expected_components = declared(*FiniteGuardStep.expected_components, controlnet_spec())


def _problem(latents: Tensor) -> str | None:
    """Names the images whose latents are not finite; None where there are none. One read of the device."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
    bad = ", ".join(f"images[{index}]" for index, is_finite in enumerate(finite) if not is_finite)
    return f"the latents are not finite in {_precision(latents)} for {bad} of {len(finite)}" if bad else None


def _precision(latents: Tensor) -> torch.dtype:
    """The type that a model with this input computes in: autocast's, or that of the input."""
    kind = latents.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else latents.dtype


def _advice(latents: Tensor) -> str:
    """How to compute in a type of more range."""
    if _precision(latents) != latents.dtype:
        return "run the pipeline outside torch.autocast"
    types = [str(dtype) for dtype in (torch.bfloat16, torch.float32) if dtype != latents.dtype]
    return f"load the pipeline with dtype={' or '.join(types)}"


def _can_be_float32(models: Sequence[nn.Module]) -> bool:
    """Whether all weights are here and plain numbers: neither offloaded layer by layer nor quantized."""
    weights = [weight for model in models for weight in model.parameters()]
    plain = all(type(w.data) is Tensor and w.dtype in (*HALF, torch.float32) and not w.is_meta for w in weights)
    return plain and not any(_is_group_offload_enabled(model) for model in models)


@contextmanager
def _in_float32(models: Sequence[nn.Module], values: dict[str, Any]) -> Iterator[None]:
    """Inside, the models' half-precision weights and those tensors among `values` are float32, and autocast is off.

    Afterwards the weights are as they were, bit for bit, since float32 holds every half-precision number; no second
    copy is held. Values that were not replaced inside are the objects they were; a new tensor has the old one's type.
    """
    tensors = itertools.chain.from_iterable((*model.parameters(), *model.buffers()) for model in models)
    halves = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in HALF]
    given = dict(values)
    lifted = tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor, given)
    values.update(lifted)
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        with torch.autocast(values["latents"].device.type, enabled=False):
            yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
        for name, value in given.items():
            if values[name] is lifted[name]:
                values[name] = value
            elif isinstance(value, Tensor) and isinstance(values[name], Tensor):
                values[name] = values[name].to(value.dtype)
