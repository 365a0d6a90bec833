"""The guard of the loop: latents that are not finite raise an error or are computed again in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import Tensor

from .declare import declared
from .guiders import guider_of_call
from .inputs import NONFINITE_POLICIES, shared_inputs
from .loop_block import LoopBlock, Repeat
from .precision import in_float32, not_finite, precision, require_float32_may_help
from .specs import controlnet_spec, guider_spec, unet_spec

logger = logging.get_logger(__name__)

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
    inputs = declared(*shared_inputs("latents", required=True), *shared_inputs("on_nonfinite", "guider"))
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
        problem = not_finite("the latents", latents)
        if problem is None:
            return
        advice, models = _advice(latents), [getattr(components, name) for name in self.models]
        require_float32_may_help(problem, beginning, models, _REMEDY, advice)
        if block_state.on_nonfinite == "raise":
            raise ValueError(
                f'{problem}; {advice}, or pass on_nonfinite="fallback"; if that does not help, {_REMEDY}.'
            )
        block_state.latents = beginning
        vars(guider_of_call(components, block_state)).update(guider)
        with in_float32(models, vars(block_state), beginning.device):
            repeat(0)
        if not_finite("the latents", block_state.latents) is not None:
            raise ValueError(f"{problem}, nor are they in torch.float32; {_REMEDY}.")
        logger.warning(f"{problem}; all steps were run again in float32. To avoid the second run, {advice}.")


class ControlNetFiniteGuardStep(FiniteGuardStep):
    """The guard of a loop with a ControlNet, which the fallback runs in float32 as well."""

    models = ("unet", "controlnet")
    expected_components = declared(*FiniteGuardStep.expected_components, controlnet_spec())


def _advice(latents: Tensor) -> str:
    """How to compute in a type of more range."""
    if precision(latents) != latents.dtype:
        return "run the pipeline outside torch.autocast"
    types = [str(dtype) for dtype in (torch.bfloat16, torch.float32) if dtype != latents.dtype]
    return f"load the pipeline with dtype={' or '.join(types)}"
