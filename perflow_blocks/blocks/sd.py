"""Stable Diffusion 1.5 and 2.1: one text encoder and no size conditioning; all other blocks are those of SDXL."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLPrepareLatentsStep
from transformers import CLIPTextModel, CLIPTokenizer

from ..delta.model_lock import model_lock
from .apply_attention import PeRFlowApplyAttentionStep
from .auto_blocks import PeRFlowSDXLAutoBlocks, PeRFlowSDXLAutoDenoiseStep, PeRFlowSDXLCoreDenoiseStep, Preset
from .before_denoise import (
    PeRFlowImg2ImgPrepareLatentsStep,
    PeRFlowInpaintPrepareLatentsStep,
    PeRFlowInputStep,
    PeRFlowSDXLAutoBeforeDenoiseStep,
)
from .check_inputs import PeRFlowCheckInputsStep
from .controlnet import PeRFlowControlNetInputStep
from .declare import Assembled, declared
from .encode import CachesPrompts, PeRFlowAutoIPAdapterStep
from .guiders import guider_of_call
from .inputs import as_outputs, guided_inputs, shared_inputs
from .merge_delta import PeRFlowMergeDeltaStep
from .pipeline import PeRFlowSDModularPipeline
from .set_timesteps import PeRFlowImg2ImgSetTimestepsStep, PeRFlowInpaintSetTimestepsStep, PeRFlowSetTimestepsStep
from .specs import guider_spec
from .vae import PeRFlowAutoDecodeStep, PeRFlowAutoVaeEncoderStep


class PeRFlowSDTextEncoderStep(ModularPipelineBlocks):
    """Encodes texts as `StableDiffusionPipeline.encode_prompt` does, or takes embeddings that were made before.

    Where the guider wants negative embeddings and none are given, they are those of an empty text. One thread at a
    time uses tokenizer and encoder, since a tokenizer keeps padding on itself and an encoder the scale of its LoRAs.

    Raises:
        ValueError: guidance needs negative embeddings, and neither they nor a text encoder is given.
    """

    model_name = "stable-diffusion-xl"
    description = "Encodes the prompt where one is given, else takes the text embeddings that are."
    expected_components = declared(
        guider_spec(),
        ComponentSpec("text_encoder", CLIPTextModel, description="Turns tokens into embeddings."),
        ComponentSpec("tokenizer", CLIPTokenizer, description="Turns texts into tokens."),
    )
    inputs = declared(
        *shared_inputs("prompt", "negative_prompt"),
        *guided_inputs("prompt_embeds", required=False),
        *shared_inputs("clip_skip", "cross_attention_kwargs", "guider"),
    )
    intermediate_outputs = declared(*as_outputs(guided_inputs("prompt_embeds")))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        encoder, prompt, negative = components.text_encoder, block_state.prompt, block_state.negative_prompt
        is_guided = guider_of_call(components, block_state).num_conditions > 1
        if is_guided and encoder is None and block_state.negative_prompt_embeds is None:
            raise ValueError("negative_prompt_embeds is missing; pass it beside prompt_embeds, or guidance_scale=1.")
        if isinstance(prompt, list) and isinstance(negative, str):
            negative = [negative] * len(prompt)
        view = copy.copy(components)
        view.text_encoder = encoder and _WithTextModel(encoder)
        with model_lock(components if encoder is None else encoder):
            block_state.prompt_embeds, block_state.negative_prompt_embeds = StableDiffusionPipeline.encode_prompt(
                view,
                prompt,
                components._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=is_guided,
                negative_prompt=negative,
                prompt_embeds=block_state.prompt_embeds,
                negative_prompt_embeds=block_state.negative_prompt_embeds,
                lora_scale=(block_state.cross_attention_kwargs or {}).get("scale"),
                clip_skip=block_state.clip_skip,
            )
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowSDPromptCacheStep(CachesPrompts, PeRFlowSDTextEncoderStep):
    """`PromptCacheStep` for Stable Diffusion 1.5 and 2.1."""

    description = f"{PeRFlowSDTextEncoderStep.description} The same prompts with the same encoder are encoded once."


class _WithTextModel:
    """A text encoder as diffusers' `clip_skip` reads it: in transformers 5 the encoder is its own `text_model`."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.text_model = getattr(encoder, "text_model", encoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoder(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


class PeRFlowSDBeforeDenoiseStep(Assembled, SequentialPipelineBlocks):
    """Windows and starting noise of a text-to-image run."""

    block_classes = [PeRFlowSetTimestepsStep, StableDiffusionXLPrepareLatentsStep]
    block_names = ["set_timesteps", "prepare_latents"]
    description = "Prepares the loop: the window set-up and the starting noise."


class PeRFlowSDImg2ImgBeforeDenoiseStep(PeRFlowSDBeforeDenoiseStep):
    """Windows from `strength` on and the noised image of an image-to-image run."""

    block_classes = [PeRFlowImg2ImgSetTimestepsStep, PeRFlowImg2ImgPrepareLatentsStep]
    description = "Prepares the loop from an image: the window set-up and the noised image."


class PeRFlowSDInpaintBeforeDenoiseStep(PeRFlowSDBeforeDenoiseStep):
    """Windows, the noised image and its mask of an inpainting run."""

    block_classes = [PeRFlowInpaintSetTimestepsStep, PeRFlowInpaintPrepareLatentsStep]
    description = "Prepares the loop for inpainting: windows, noised image and mask."


class PeRFlowSDAutoBeforeDenoiseStep(PeRFlowSDXLAutoBeforeDenoiseStep):
    """Inpainting where there is a mask, image-to-image where there is an image, else text-to-image."""

    block_classes = [PeRFlowSDInpaintBeforeDenoiseStep, PeRFlowSDImg2ImgBeforeDenoiseStep, PeRFlowSDBeforeDenoiseStep]


class PeRFlowSDAutoControlNetInputStep(Assembled, AutoPipelineBlocks):
    """Prepares the control images where there are some."""

    block_classes = [PeRFlowControlNetInputStep]
    block_names = ["controlnet"]
    block_trigger_inputs = ["control_image"]
    description = "Prepares `control_image` for one or more ControlNets; else is skipped."


class PeRFlowSDCoreDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings and encoded images to denoised latents, for every task."""

    block_classes = [
        PeRFlowInputStep,
        PeRFlowSDAutoBeforeDenoiseStep,
        PeRFlowSDAutoControlNetInputStep,
        PeRFlowSDXLAutoDenoiseStep,
    ]


class SDPreset(Preset):
    """A whole pipeline for Stable Diffusion 1.5 or 2.1, without the inputs that SDXL's conditioning takes."""

    pipeline_class = PeRFlowSDModularPipeline
    not_inputs = frozenset(
        f"{prefix}{name}"
        for prefix in ("", "negative_")
        for name in ("pooled_prompt_embeds", "add_time_ids", "timestep_cond")
    )


class PeRFlowSDAutoBlocks(SDPreset):
    """PeRFlow for Stable Diffusion 1.5 and 2.1: images in 4 to 8 steps (arXiv 2405.07510).

    Text-to-image, image-to-image and inpainting (UNets of 4 and 9 channels), each with ControlNets and IP-Adapters,
    chosen by what a call is given, under the same names of workflows and blocks as in `PeRFlowSDXLAutoBlocks`.
    What the UNet predicts follows from the repository's scheduler, unless configuration or delta say otherwise:
    `diff_eps` where the base predicts the noise (SD 1.5; 8 steps, guidance 4.5), `velocity` where its scheduler says
    `v_prediction` (SD 2.1; 8 steps, guidance 7.5).

    Example:
        >>> pipe = PeRFlowSDAutoBlocks().init_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe.load_components(dtype=torch.float16)
        >>> images = pipe("a red star", delta="perflow-sd15-delta-weights", output="images")
    """

    block_classes = [
        PeRFlowCheckInputsStep,
        PeRFlowApplyAttentionStep,
        PeRFlowMergeDeltaStep,
        PeRFlowSDTextEncoderStep,
        PeRFlowAutoIPAdapterStep,
        PeRFlowAutoVaeEncoderStep,
        PeRFlowSDCoreDenoiseStep,
        PeRFlowAutoDecodeStep,
    ]
    block_names = PeRFlowSDXLAutoBlocks.block_names
    _workflow_map = {
        name: inputs for name, inputs in PeRFlowSDXLAutoBlocks._workflow_map.items() if "control_mode" not in inputs
    }
    description = (
        "PeRFlow few-step generation with Stable Diffusion 1.5 and 2.1: images in 4 to 8 steps.\n"
        "The UNet is one that PeRFlow distilled, or any fine-tune with a delta file merged in.\n"
        "Guidance is the component `guider` (default scale 4.5 for SD 1.5, 7.5 for SD 2.1): "
        "pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))."
    )
