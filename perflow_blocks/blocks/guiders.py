"""The guider of one call, and what diffusers' guiders need to work on a UNet in a few steps."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any

from diffusers.guiders import BaseGuidance, ClassifierFreeZeroStarGuidance
from diffusers.utils import logging

from ..delta.recipe import require_guidance

logger = logging.get_logger(__name__)


def guider_for_call(guider: Any, guidance_scale: float | None = None) -> Any:
    """A copy of a guider for one call, since guiders keep the step on themselves and threads share the component.

    `guidance_scale` is this call's, at least 0; None for the guider's own. Another one is a ValueError.
    """
    check_guider(guider)
    own = copy.copy(guider)
    forget_step(own)
    if "guidance_scale" in vars(own):
        scale = own.guidance_scale if guidance_scale is None else guidance_scale
        require_guidance(scale)
        set_guidance(own, scale)
    elif guidance_scale is not None:
        raise ValueError(f"guidance_scale is given, but {type(own).__name__} has no such scale; set another guider.")
    return own


def set_guidance(guider: Any, scale: float) -> None:
    """Sets a guider's scale. From 0 to 1 it is none, as in diffusers' classic pipelines: else 0 drops the prompt."""
    is_none = isinstance(scale, Real) and 0 <= scale <= 1 and not vars(guider).get("use_original_formulation", True)
    guider.guidance_scale = 1.0 if is_none else scale


def guider_of_call(components: Any, block_state: Any) -> Any:
    """The guider that an earlier block made for this call; where there was none, a copy of the component."""
    if block_state.guider is not None:
        return block_state.guider
    if block_state["_guider"] is None:
        block_state["_guider"] = guider_for_call(components.guider)
    return block_state["_guider"]


def is_batchable(guider: BaseGuidance) -> bool:
    """Whether one UNet call may serve all of the guider's batches: it does nothing to the model between them."""
    own = type(guider)
    return own.prepare_models is BaseGuidance.prepare_models and own.cleanup_models is BaseGuidance.cleanup_models


class Unguided:
    """In a guider's place for a model without prompts: one prediction, as it is."""

    num_conditions = 1
    prepare_models, cleanup_models = BaseGuidance.prepare_models, BaseGuidance.cleanup_models

    def set_state(self, **step: Any) -> None:
        """Nothing to keep."""


def check_guider(guider: Any) -> None:
    """Raises a ValueError for what is not a guider, such as a number or a guider's class."""
    if not isinstance(guider, BaseGuidance):
        given = f"the class {guider.__name__}" if isinstance(guider, type) else f"of type {type(guider).__name__}"
        raise ValueError(f"guider is {given}; use, for example, ClassifierFreeGuidance(guidance_scale=2.0).")


def warn_about_few_steps(guider: BaseGuidance, num_inference_steps: int) -> None:
    """Logs a warning for each setting of the guider that suits 30 steps or more but not this few."""
    steps, wanted, found = num_inference_steps, guider.num_conditions, 0
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=None)
        found = max(found, guider.num_conditions)
    forget_step(guider)
    name = type(guider).__name__
    if found < wanted:
        logger.warning(
            f"{name} makes at most {found} of its {wanted} predictions in {steps} steps; widen its start and stop."
        )
    if isinstance(guider, ClassifierFreeZeroStarGuidance) and guider.zero_init_steps > 0 and guider._enabled:
        logger.warning(
            f"{name} zeroes the prediction of {guider.zero_init_steps} of the {steps} steps, which ruins the image; "
            "set zero_init_steps=0."
        )


def forget_step(guider: BaseGuidance) -> None:
    """As at the start of a run: guiders keep the step on themselves."""
    guider.set_state(step=None, num_inference_steps=None, timestep=None)
