"""What diffusers' guiders need to serve a UNet in a few steps: found before a model runs, told in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from diffusers import LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedMixGuidance,
    BaseGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.utils import logging
from torch.nn import Module, ModuleList

logger = logging.get_logger(__name__)


def is_batchable(guider: BaseGuidance) -> bool:
    """Whether one UNet call may serve all of the guider's batches: it does nothing to the model between them."""
    own = type(guider)
    return own.prepare_models is BaseGuidance.prepare_models and own.cleanup_models is BaseGuidance.cleanup_models


def check_guider(guider: Any, unet: Module) -> None:
    """Refuses a guider that would fail late on this UNet, or not do what it is for.

    Layers to be skipped are hooked and unhooked once, as the denoising loop does it. Runs no model.

    Raises:
        ValueError: no guider; a setting that is no finite number; a guider that diffusers does not get right on a
            UNet; layers to skip that this UNet does not have.
    """
    if not isinstance(guider, BaseGuidance):
        given = f"the class {guider.__name__}" if isinstance(guider, type) else f"of type {type(guider).__name__}"
        raise ValueError(f"the guider is {given}; pass one such as ClassifierFreeGuidance(guidance_scale=2.0).")
    if _count_predictions(guider) == 1:  # no guidance: turned off, or at a scale without effect
        return
    for fault in _FAULTS:
        if fault.concerns(guider):
            raise ValueError(f"{_name(guider)} does not work on a UNet: {fault.reason}; {fault.remedy}.")
    _check_layers(guider, unet)


def warn_about_few_steps(guider: BaseGuidance, num_inference_steps: int) -> None:
    """Logs what the guider's settings, often defaults for 30 steps or more, come to in as few as these."""
    for warning in _few_step_warnings(guider, num_inference_steps):
        logger.warning(f"{_name(guider)} {warning}.")


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """A guider of diffusers that fails on a UNet, or does not do what it is for.

    Attributes:
        guiders: the classes.
        method: where the fault lies; a subclass with a method of its own may have put it right.
        when: which settings bring it out.
        reason: what goes wrong.
        remedy: what to do instead.
    """

    guiders: tuple[type, ...]
    method: str
    when: Callable[[Any], bool] = lambda guider: True
    reason: str
    remedy: str

    def concerns(self, guider: BaseGuidance) -> bool:
        return any(self._is_inherited(guider, owner) for owner in self.guiders) and self.when(guider)

    def _is_inherited(self, guider: BaseGuidance, owner: type) -> bool:
        return isinstance(guider, owner) and getattr(type(guider), self.method) is getattr(owner, self.method)


def _skips_outside_guidance(guider: Any) -> bool:
    """Are there steps that skip layers while classifier-free guidance is off?"""
    if math.isclose(guider.skip_layer_guidance_scale, 0.0):
        return False
    off = guider.num_conditions < 3
    return off or guider.skip_layer_guidance_start < guider._start or guider.skip_layer_guidance_stop > guider._stop


def _guides_some_levels(guider: Any) -> bool:
    """Are there steps that guide some frequency levels but not all?"""
    neutral = 0.0 if guider.use_original_formulation else 1.0
    guided = {not math.isclose(scale, neutral) for scale in guider.guidance_scales}
    return max(len(guided), len(set(guider.guidance_start)), len(set(guider.guidance_stop))) > 1


_FAULTS = (
    _Fault(
        guiders=(SmoothedEnergyGuidance,),
        method="prepare_models",
        when=lambda guider: not math.isclose(guider.seg_guidance_scale, 0.0),
        reason="it never smooths anything, so that its third prediction costs a call for nothing",
        remedy="use PerturbedAttentionGuidance",
    ),
    _Fault(
        guiders=(MagnitudeAwareGuidance,),
        method="forward",
        reason="its norm fails on predictions of four dimensions",
        remedy="use AdaptiveProjectedGuidance",
    ),
    _Fault(
        guiders=(LTX2Guidance,),
        method="active_predictions",
        when=lambda guider: guider.is_stg_enabled() or guider.is_modality_enabled(),
        reason="its further predictions need the LTX-2 transformer",
        remedy="set stg_scale=0 and modality_scale=1, or use ClassifierFreeGuidance",
    ),
    _Fault(
        guiders=(FrequencyDecoupledGuidance,),
        method="forward",
        when=_guides_some_levels,
        reason="where it guides only some of its levels, it mixes them up",
        remedy="give all levels a scale with effect, and the same start and stop",
    ),
    _Fault(
        guiders=(SkipLayerGuidance, PerturbedAttentionGuidance),
        method="is_conditional",
        when=_skips_outside_guidance,
        reason="where it skips layers without classifier-free guidance, it guides by the wrong prediction",
        remedy="set a guidance_scale with effect, and let start and stop enclose the start and stop of the layers",
    ),
)


def _count_predictions(guider: BaseGuidance) -> int:
    """How many predictions the guider asks for at a step within all its starts and stops, once its settings pass."""
    # Guiders keep their settings as plain attributes, which users set too, so the config alone would miss some.
    for name, setting in vars(guider).items():
        for value in setting if isinstance(setting, list | tuple) else [setting]:
            if isinstance(value, Real) and (math.isnan(value) or (math.isinf(value) and "scale" in name)):
                raise ValueError(f"the guider's {name}={value} is not finite; set a number, such as 2.0.")
    _forget_step(guider)
    try:
        return guider.num_conditions
    except TypeError as error:
        raise ValueError(f"a scale of {_name(guider)}: {error}; set numbers, such as guidance_scale=2.0.") from error


def _forget_step(guider: BaseGuidance) -> None:
    guider.set_state(step=None, num_inference_steps=None, timestep=None)


def _check_layers(guider: BaseGuidance, unet: Module) -> None:
    settings = [value for value in vars(guider).values() if isinstance(value, list)]
    configs = [entry for setting in settings for entry in setting if isinstance(entry, LayerSkipConfig)]
    if not configs:
        return
    stacks = {path: module for path, module in unet.named_modules() if isinstance(module, ModuleList)}
    paths = [path for path in stacks if path.endswith("transformer_blocks")]
    if not paths:
        raise ValueError(f"{_name(guider)} finds no transformer blocks in this UNet; use ClassifierFreeGuidance.")
    middle = next((path for path in paths if "mid_block" in path), paths[0])
    example = f'LayerSkipConfig(indices=[0], fqn="{middle}")'
    for config in configs:
        _check_path(_name(guider), config, stacks, example)
    _rehearse(guider, unet, example)


def _check_path(name: str, config: LayerSkipConfig, stacks: dict[str, ModuleList], example: str) -> None:
    if config.fqn == "auto":
        raise ValueError(f"{name} cannot find the layers of a UNet by itself; name them, such as {example}.")
    if config.fqn not in stacks:
        raise ValueError(f"{name}: fqn={config.fqn!r} is no list of layers in this UNet; pass one, such as {example}.")
    count = len(stacks[config.fqn])
    listed = isinstance(config.indices, list | tuple) and len(config.indices) > 0
    if not listed or not all(index in range(count) for index in config.indices):
        raise ValueError(
            f"{name}: indices={config.indices} for the {count} layers of {config.fqn!r}; "
            f"pass a list of numbers from 0 to {count - 1}."
        )


def _rehearse(guider: BaseGuidance, unet: Module, example: str) -> None:
    """Hooks and unhooks the UNet as the loop will: what diffusers cannot hook, it refuses only then."""
    before, most = _count_hooks(unet), 0
    for _ in range(guider.num_conditions):
        try:
            guider.prepare_models(unet)
            most = max(most, _count_hooks(unet) - before)
        except ValueError as error:
            raise ValueError(
                f"{_name(guider)} cannot hook these layers: {error} Name transformer blocks, such as {example}, "
                "whose attention processors are diffusers' AttnProcessor2_0."
            ) from error
        finally:
            guider.cleanup_models(unet)
    _forget_step(guider)
    if most == 0 and guider.num_conditions == len(guider._input_predictions):
        raise ValueError(f"{_name(guider)} would change nothing in these layers; choose others, such as {example}.")


def _count_hooks(unet: Module) -> int:
    registries = [vars(module).get("_diffusers_hook") for module in unet.modules()]
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def _few_step_warnings(guider: Any, num_inference_steps: int) -> list[str]:
    wanted, found = _count_predictions(guider), 0
    for step in range(num_inference_steps):
        guider.set_state(step=step, num_inference_steps=num_inference_steps, timestep=None)
        found = max(found, guider.num_conditions)
    _forget_step(guider)
    warnings = []
    if found < wanted:
        warnings.append(
            f"asks for {found} of its {wanted} predictions at best, since its starts and stops, which are fractions "
            f"of the {num_inference_steps} steps, leave none to the rest; widen them"
        )
    if isinstance(guider, ClassifierFreeZeroStarGuidance) and guider.zero_init_steps > 0 and guider._enabled:
        warnings.append(
            f"zeroes the prediction of {guider.zero_init_steps} of the {num_inference_steps} steps, which no picture "
            "survives when steps are few; set zero_init_steps=0"
        )
    if isinstance(guider, AdaptiveProjectedMixGuidance) and wanted > 1:
        last = guider.adaptive_projected_guidance_start_step
        if last >= num_inference_steps - 1:
            warnings.append(
                f"never projects within {num_inference_steps} steps, since "
                f"adaptive_projected_guidance_start_step={last}; set at most {max(0, num_inference_steps - 2)}"
            )
    return warnings


def _name(guider: BaseGuidance) -> str:
    return type(guider).__name__
