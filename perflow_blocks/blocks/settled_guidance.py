"""Classifier-free guidance as torch.compile can trace it: the formula of diffusers, with nothing to decide."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance


class SettledGuidance(ClassifierFreeGuidance):
    """The formula alone, for steps at which it is in force.

    Diffusers' guider asks at each step whether the step is within its range and whether its scale has an effect, which
    a compiled function would have to be compiled again for. Here both are settled, and the scale is a tensor, so that
    one compiled function serves all steps and all scales.
    """

    def _is_cfg_enabled(self) -> bool:
        return True


Settings = tuple[float, float, bool]


def settings_of(guider: BaseGuidance) -> Settings:
    """What a settled guider is made from.

    Raises:
        ValueError: another guider than `ClassifierFreeGuidance`, whose formula may depend on the step or on its past.
    """
    if type(guider) is not ClassifierFreeGuidance:
        raise ValueError(
            f"guider={type(guider).__name__} cannot be part of a compiled step; use ClassifierFreeGuidance, or leave "
            "the loop as it is and compile the UNet alone with pipe.unet.compile(fullgraph=True)."
        )
    return guider.guidance_scale, guider.guidance_rescale, guider.use_original_formulation


def settle(settings: Settings, device: torch.device) -> Any:
    """A guider with these settings whose scale, (1, 1, 1, 1) in float32, lies on the device; copies one number there.

    With fewer dimensions it would be rounded to the type of half-precision predictions first. So it computes in
    float32, and what it returns for them is float32.
    """
    scale, rescale, original = settings
    guider: Any = SettledGuidance(guidance_rescale=rescale, use_original_formulation=original)
    guider.guidance_scale = torch.full((1, 1, 1, 1), scale, dtype=torch.float32, device=device)
    return guider
