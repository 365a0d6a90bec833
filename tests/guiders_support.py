"""Guiders that work on the tiny UNet, and runs of four steps that note what the denoiser did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser
from diffusers.utils import is_kornia_available

from perflow_blocks.blocks import PeRFlowLoopDenoiser

from .blocks_support import generator, make_pipeline
from .host_reads import no_host_reads

MIDDLE = "mid_block.attentions.0.transformer_blocks"
BATCHED, UNGUIDED, IN_TURN, IN_THREE = [2], [1], [1, 1], [1, 1, 1]


def layers(**settings: Any) -> LayerSkipConfig:
    return LayerSkipConfig(**{"indices": [0], "fqn": MIDDLE, **settings})


def attention_scores(**settings: Any) -> LayerSkipConfig:
    return layers(skip_attention=False, skip_ff=False, skip_attention_scores=True, **settings)


def skip_layer(scale: float = 3.0, config: Any = None, **settings: Any) -> SkipLayerGuidance:
    """Over all steps but the first, which diffusers always leaves out."""
    settings = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, **settings}
    return SkipLayerGuidance(scale, skip_layer_config=config or layers(), **settings)


def perturbed(scale: float = 3.0, config: Any = None, **settings: Any) -> PerturbedAttentionGuidance:
    settings = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0, **settings}
    return PerturbedAttentionGuidance(scale, perturbed_guidance_config=config or attention_scores(), **settings)


def smoothed(scale: float = 3.0, **settings: Any) -> SmoothedEnergyGuidance:
    return SmoothedEnergyGuidance(scale, seg_guidance_config=SmoothedEnergyGuidanceConfig([0], fqn=MIDDLE), **settings)


EVERYWHERE, AFTER_THE_FIRST = [BATCHED] * 4, [IN_TURN, IN_THREE, IN_THREE, IN_THREE]
GUIDERS: dict[str, tuple[Callable[[float], BaseGuidance], list[list[int]]]] = {
    "cfg": (lambda scale: ClassifierFreeGuidance(scale), EVERYWHERE),
    "cfg_rescaled": (lambda scale: ClassifierFreeGuidance(scale, guidance_rescale=0.7), EVERYWHERE),
    "cfg_original": (lambda scale: ClassifierFreeGuidance(scale, use_original_formulation=True), EVERYWHERE),
    "apg": (
        lambda scale: AdaptiveProjectedGuidance(scale, adaptive_projected_guidance_momentum=-0.5, eta=0.3),
        EVERYWHERE,
    ),
    "apg_mix": (
        lambda scale: AdaptiveProjectedMixGuidance(
            scale, adaptive_projected_guidance_scale=scale, adaptive_projected_guidance_start_step=1
        ),
        EVERYWHERE,
    ),
    "zero_star": (lambda scale: ClassifierFreeZeroStarGuidance(scale, zero_init_steps=0), EVERYWHERE),
    "zero_star_zeroed": (lambda scale: ClassifierFreeZeroStarGuidance(scale), EVERYWHERE),
    "tangential": (lambda scale: TangentialClassifierFreeGuidance(scale), EVERYWHERE),
    "ltx2": (lambda scale: LTX2Guidance(scale), EVERYWHERE),
    "auto": (lambda scale: AutoGuidance(scale, auto_guidance_config=layers()), [IN_TURN] * 4),
    "skip_layer": (skip_layer, AFTER_THE_FIRST),
    "skip_attention": (lambda scale: skip_layer(scale, layers(skip_ff=False)), AFTER_THE_FIRST),
    "perturbed": (perturbed, AFTER_THE_FIRST),
    "perturbed_up": (lambda scale: perturbed(scale, attention_scores(fqn="up_blocks")), AFTER_THE_FIRST),
}
if is_kornia_available():
    GUIDERS["frequency"] = (lambda scale: FrequencyDecoupledGuidance([scale, 2.0]), EVERYWHERE)


class RecordingDenoiser(PeRFlowLoopDenoiser):
    """This project's denoiser or the stock one; keeps each step's prediction and the batch sizes of its UNet calls."""

    def __init__(self, pipe: Any, *, stock: bool = False, guard: bool = False) -> None:
        super().__init__()
        self.denoiser = StableDiffusionXLLoopDenoiser() if stock else PeRFlowLoopDenoiser()
        self.guard = guard
        self.calls: list[list[int]] = []
        self.predictions: list[torch.Tensor] = []
        pipe.unet.register_forward_pre_hook(lambda module, args: self.calls[-1].append(args[0].shape[0]))

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        self.calls.append([])
        block_state.scaled_latents = block_state.latents  # what the stock denoiser reads
        with no_host_reads() if self.guard else nullcontext():
            self.denoiser(components, block_state, i=i, t=t)
        self.predictions.append(block_state.noise_pred)
        return components, block_state


def put_in_place_of_denoisers(blocks: Any, denoiser: Any) -> None:
    for name, block in blocks.sub_blocks.items():
        if isinstance(block, PeRFlowLoopDenoiser):
            blocks.sub_blocks[name] = denoiser
        else:
            put_in_place_of_denoisers(block, denoiser)


def draw(guider: BaseGuidance, *, prompts: int = 2, checked: bool = True, **denoiser: bool) -> Any:
    """Four steps: the recording, which also holds the final `latents` (prompts, 4, 16, 16)."""
    pipe = make_pipeline(guider=guider)
    if not checked:
        pipe._blocks.sub_blocks.pop("check_inputs")
    recording = RecordingDenoiser(pipe, **denoiser)
    put_in_place_of_denoisers(pipe._blocks, recording)
    recording.latents = pipe(
        prompt=["a star", "a ring"][:prompts],
        negative_prompt="a square",
        generator=generator(3),
        num_inference_steps=4,
        output_type="latent",
        output="latents",
    )
    return recording


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def hooks_of(unet: Any) -> list[str]:
    registries = [module._diffusers_hook for module in unet.modules() if hasattr(module, "_diffusers_hook")]
    return [name for registry in registries for name in registry.hooks]
