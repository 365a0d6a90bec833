"""What runs before the loop in each task: the window set-up, the starting latents, SDXL's size conditioning."""

from __future__ import annotations

from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
)

from .assembly import AskedOnce
from .prepare_latents import PeRFlowImg2ImgPrepareLatentsStep, PeRFlowInpaintPrepareLatentsStep
from .set_timesteps import PeRFlowSetTimestepsStep
from .set_timesteps_img2img import PeRFlowImg2ImgSetTimestepsStep, PeRFlowInpaintSetTimestepsStep

NAMES = ["set_timesteps", "prepare_latents", "prepare_add_cond"]


class PeRFlowSDXLBeforeDenoiseStep(SequentialPipelineBlocks):
    """Windows, starting noise and SDXL's size conditioning of a text-to-image run."""

    block_classes = [  # noqa: RUF012  (as diffusers declares them)
        PeRFlowSetTimestepsStep,
        StableDiffusionXLPrepareLatentsStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
    ]
    block_names = NAMES

    @property
    def description(self) -> str:
        return "Prepares the loop: the window set-up, the starting noise and SDXL's size conditioning."


class PeRFlowSDXLImg2ImgBeforeDenoiseStep(SequentialPipelineBlocks):
    """Windows from `strength` on, the noised picture and SDXL's size conditioning of an image-to-image run."""

    block_classes = [  # noqa: RUF012
        PeRFlowImg2ImgSetTimestepsStep,
        PeRFlowImg2ImgPrepareLatentsStep,
        StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    ]
    block_names = NAMES

    @property
    def description(self) -> str:
        return "Prepares the loop from a picture: the window set-up, the noised picture and SDXL's size conditioning."


class PeRFlowSDXLInpaintBeforeDenoiseStep(SequentialPipelineBlocks):
    """Windows, the noised picture, its mask and SDXL's size conditioning of an inpainting run."""

    block_classes = [  # noqa: RUF012
        PeRFlowInpaintSetTimestepsStep,
        PeRFlowInpaintPrepareLatentsStep,
        StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    ]
    block_names = NAMES

    @property
    def description(self) -> str:
        return "Prepares the loop for inpainting: windows, noised picture, mask and SDXL's size conditioning."


class PeRFlowSDXLAutoBeforeDenoiseStep(AskedOnce, AutoPipelineBlocks):
    """Inpainting where there is a mask, image-to-image where there is a picture, else text-to-image."""

    block_classes = [  # noqa: RUF012
        PeRFlowSDXLInpaintBeforeDenoiseStep,
        PeRFlowSDXLImg2ImgBeforeDenoiseStep,
        PeRFlowSDXLBeforeDenoiseStep,
    ]
    block_names = ["inpaint", "img2img", "text2img"]  # noqa: RUF012
    block_trigger_inputs = ["mask", "image_latents", None]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Prepares the loop for inpainting with `mask`, image-to-image with `image_latents`, else text-to-image."
