"""What can be found wrong before anything is loaded, with the UNet's architecture but not its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, UNet2DConditionModel
from torch import nn

from ..attention.config import AttentionConfig
from ..blocks.guiders import check_guider
from ..blocks.merge_delta import require_no_rival
from ..delta.apply import require_architecture
from ..delta.files import open_weights, read_recipe
from ..delta.merge import require_factor
from ..delta.recipe import DeltaRecipe, require_guidance
from .problems import Problems
from .settings import BuilderSettings

_OF_RECIPE = {
    "prediction_type": "prediction_type",
    "num_time_windows": "num_time_windows",
    "window_boundaries": "window_boundaries",
    "default_num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
"""Configuration values that a delta's recipe has too, and so has the checks of."""


def check_conflicts(settings: BuilderSettings, problems: Problems) -> None:
    """Steps that say two things of one matter: which of them holds would hang on their order."""
    pairs = {
        ("from_pretrained", "from_single_file"): (settings.repository, settings.single_file),
        ("with_guider", "with_guidance"): (settings.guider, settings.guidance),
        ('with_component("guider", ...)', "with_guidance"): (settings.components.get("guider"), settings.guidance),
        **{
            ("with_delta", f"with_config({name}=...)"): (settings.delta, settings.config.get(name))
            for name in ("delta", "delta_variant", "delta_scale")
        },
        ("with_attention", "with_config(attention_plan=...)"): (
            settings.attention,
            settings.config.get("attention_plan"),
        ),
        ("with_guidance or with_guider", "with_config(guidance_scale=...)"): (
            settings.guidance or settings.guider,
            settings.config.get("guidance_scale"),
        ),
    }
    for (one, other), (value, other_value) in pairs.items():
        if value is not None and other_value is not None:
            problems.add(f"{one} and {other} are both given; leave one of them out.")


def check_config(declared: Sequence[str], values: Mapping[str, Any], problems: Problems) -> None:
    """
    Args:
        declared: the names that the blocks know.
    """
    for name, value in values.items():
        if name not in declared:
            problems.add(f"with_config: {name}={value!r} is unknown; the blocks know {', '.join(declared)}.")
        elif name in _OF_RECIPE:
            with problems.noted(TypeError, about=f"with_config({name}=...): "):
                DeltaRecipe(**{_OF_RECIPE[name]: value})
    if not problems:
        windows = {name: values.get(name) for name in ("num_time_windows", "window_boundaries")}
        with problems.noted(about="with_config: "):
            DeltaRecipe(**windows)


def check_unet(config: Mapping[str, Any], model_name: str | None, problems: Problems) -> None:
    if model_name == "stable-diffusion-xl" and config.get("addition_embed_type") != "text_time":
        problems.add(
            "the UNet is none of SDXL, since it takes no text_time conditioning "
            f"(addition_embed_type={config.get('addition_embed_type')!r}), and the blocks are for SDXL; pass an SDXL "
            "model."
        )


def check_controlnet(width: Any, unet_width: Any, problems: Problems) -> None:
    """
    Args:
        width, unet_width: the models' `cross_attention_dim`.
    """
    if width != unet_width:
        problems.add(
            f"the controlnet is of another family than the UNet: its cross_attention_dim is {width}, the UNet's "
            f"{unet_width}; pass one for this UNet."
        )


def empty_unet(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A UNet without values, on the device "meta"; takes no memory."""
    with torch.device("meta"):
        # The module's own `to`: that of diffusers is about values, and warns.
        return nn.Module.to(UNet2DConditionModel.from_config(dict(config)), dtype)


def check_delta(config: Mapping[str, Any], unet: nn.Module | None, given_unet: Any, problems: Problems) -> None:
    """
    Args:
        config: the pipeline's, as it will be; a delta that is not on the disk is not looked at.
        unet: may be without values; None where its architecture is not known.
        given_unet: the one that the user gave, which may hold deltas already; else None.
    """
    path = config.get("delta")
    if path is None:
        return
    with problems.noted(about="with_delta: "):
        require_factor("delta_scale", config.get("delta_scale", 1.0))
    if not Path(path).is_absolute():
        return
    with problems.noted(TypeError):
        weights = open_weights(path, config.get("delta_variant"))
        read_recipe(weights)
        if unet is not None:
            weights = require_architecture(weights, unet)
        if given_unet is not None:
            require_no_rival(given_unet, weights)


def check_guidance(settings: BuilderSettings, problems: Problems) -> None:
    with problems.noted(TypeError, about="with_guidance: " if settings.guidance else "with_guider: "):
        guider = make_guider(settings)
        if guider is not None:
            check_guider(guider)


def make_guider(settings: BuilderSettings) -> Any:
    """The guider that the steps ask for; None where they leave the pipeline its own.

    Raises:
        ValueError: a scale, start or stop that is out of range.
    """
    if settings.guidance is None:
        return settings.guider
    require_guidance(settings.guidance["guidance_scale"])
    return ClassifierFreeGuidance(**settings.guidance)


def check_attention(
    attention: Any, unet: nn.Module | None, device: torch.device, problems: Problems, about: str = "with_attention"
) -> None:
    """Puts each part of the plan into effect on a UNet without values, to find out what the machine lacks."""
    if attention is None:
        return
    plan: Any = attention.config.plan if isinstance(attention, AttentionConfig) else attention
    entries: list[Any] = [plan]
    if isinstance(plan, Mapping):
        entries = [{key: name} for key, name in plan.items()]
    elif isinstance(plan, (list, tuple)):
        entries = [[entry] for entry in plan]
    for entry in entries:
        with problems.noted(TypeError, about=f"{about}: "):
            part = AttentionConfig(entry)
            if unet is not None:
                part.attach({"unet": unet}, device=device)
