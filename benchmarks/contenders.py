"""The ways of denoising one image that are compared: same UNet, embeddings, starting noise, steps and guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from torch import Tensor

from perflow_blocks import PeRFlowDenoiseStep, PeRFlowScheduler, PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.inputs import DENOISER_INPUT_FIELDS
from perflow_blocks.demo.models import SCHEDULE

from .models import Size, make_pipeline, random_embeddings, random_latents

GUIDANCE = 2.0

BARE = "bare UNet calls"
LOOP = "`PeRFlowDenoiseStep`"
STAGE = "`denoise` of the preset"
STOCK_LOOP = "`StableDiffusionXLDenoiseStep`"
STOCK_STAGE = "`denoise` of `StableDiffusionXLAutoBlocks`"
STOCK_PIPELINE = "`StableDiffusionXLPipeline`"

RIVALS = {LOOP: (STOCK_LOOP, STOCK_PIPELINE), STAGE: (STOCK_STAGE, STOCK_PIPELINE)}
"""What does the same work: loops, and all from embeddings to latents. The classic pipeline has its loop inside."""

Denoise = Callable[[], Tensor]


def make_contenders(unet: Any, size: Size, steps: int, device: torch.device) -> dict[str, Denoise]:
    """Functions that return the denoised latents (1, 4, latents, latents); those of `BARE` stay as they are."""
    components = {"unet": unet, "scheduler": PeRFlowScheduler(**SCHEDULE)}
    request = make_request(size, steps, device)
    stage = modular_pipeline(PeRFlowSDXLAutoBlocks().sub_blocks["denoise"], components)
    state = stage(**request)
    prepared = {**state.values, "latents": request["latents"]}
    # The stock loop's block names no tensors: it takes all that were collected for the guider.
    collected = {DENOISER_INPUT_FIELDS: state.get_by_kwargs(DENOISER_INPUT_FIELDS)}
    loop = modular_pipeline(PeRFlowDenoiseStep(), components)
    stock_loop = modular_pipeline(StableDiffusionXLDenoiseStep(), components)
    stock_stage = modular_pipeline(StableDiffusionXLCoreDenoiseStep(), components)
    classic = classic_pipeline(components)
    return {
        BARE: bare_calls(unet, prepared),
        LOOP: lambda: loop(**_inputs(loop, prepared), output="latents"),
        STAGE: lambda: stage(**request, output="latents"),
        STOCK_LOOP: lambda: stock_loop(**_inputs(stock_loop, prepared), **collected, output="latents"),
        STOCK_STAGE: lambda: stock_stage(**request, output="latents"),
        STOCK_PIPELINE: lambda: classic(**request, guidance_scale=GUIDANCE, output_type="latent").images,
    }


def make_request(
    size: Size, steps: int, device: torch.device, dtype: torch.dtype = torch.float32, prompt: str | None = None
) -> dict[str, Any]:
    """A call's arguments for all pipelines: the prompt or else random embeddings, and random latents."""
    return {
        **(random_embeddings(size, device, dtype) if prompt is None else {"prompt": prompt}),
        "latents": random_latents(size, device, dtype),
        "height": size.pixels,
        "width": size.pixels,
        "num_inference_steps": steps,
    }


def modular_pipeline(blocks: ModularPipelineBlocks, components: Mapping[str, Any]) -> Any:
    """The blocks' pipeline; `PeRFlowScheduler` and a guider are added unless given."""
    guider = ClassifierFreeGuidance(guidance_scale=GUIDANCE)
    return make_pipeline(blocks, {"scheduler": PeRFlowScheduler(**SCHEDULE), "guider": guider, **components})


def classic_pipeline(components: Mapping[str, Any]) -> StableDiffusionXLPipeline:
    """`StableDiffusionXLPipeline` with `PeRFlowScheduler`; models that are not given are None."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    models: dict[str, Any] = {name: components.get(name) for name in names}
    pipe = StableDiffusionXLPipeline(**models, scheduler=PeRFlowScheduler(**SCHEDULE), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def verify(contenders: Mapping[str, Denoise], unet: Any, steps: int) -> dict[str, int]:
    """Makes sure that all do the same work, and counts their UNet calls.

    Raises:
        AssertionError: latents that differ by more than rounding, or another number of rows through the UNet.
    """
    rows: list[int] = []
    hook = unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    calls, results = {}, {}
    try:
        for name, run in contenders.items():
            rows.clear()
            results[name] = run()
            calls[name] = len(rows)
            assert sum(rows) == 2 * steps, f"{name} runs {sum(rows)} rows through the UNet, not {2 * steps}"
    finally:
        hook.remove()
    del results[BARE]
    assert_agreement(results, STOCK_LOOP)
    return calls


def assert_agreement(results: Mapping[str, Tensor], reference: str) -> None:
    """Makes sure that all results are the reference's up to rounding. An AssertionError names the one that differs."""
    expected = results[reference]
    # On a GPU convolutions may compute in TF32, of 10 bits.
    tolerance = (1e-4 if expected.device.type == "cpu" else 2e-2) * float(expected.abs().max())
    for name, result in results.items():
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance, msg=partial("{}: {}".format, name))


def _inputs(pipe: Any, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What of the prepared values the pipeline's blocks take."""
    return {param.name: prepared[param.name] for param in pipe._blocks.inputs if param.name in prepared}


def bare_calls(unet: Any, prepared: Mapping[str, Any]) -> Denoise:
    """The UNet calls of a denoising with guidance: a call of two rows for each of the prepared timesteps."""

    def both(name: str) -> Tensor:
        return torch.cat([prepared[name], prepared[f"negative_{name}"]])

    twice = torch.cat([prepared["latents"]] * 2)
    conditions = {
        "encoder_hidden_states": both("prompt_embeds"),
        "added_cond_kwargs": {"text_embeds": both("pooled_prompt_embeds"), "time_ids": both("add_time_ids")},
    }

    @torch.no_grad()
    def run() -> Tensor:
        for timestep in prepared["timesteps"]:
            unet(twice, timestep, **conditions, return_dict=False)
        return prepared["latents"]

    return run
