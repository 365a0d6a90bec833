"""The assembled preset for every task. What diffusers already has right is diffusers' own block."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from diffusers import ComponentsManager, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam

from .apply_attention import PeRFlowApplyAttentionStep
from .before_denoise import PeRFlowInputStep, PeRFlowSDXLAutoBeforeDenoiseStep
from .check_inputs import PeRFlowCheckInputsStep
from .controlnet import (
    PeRFlowAutoControlNetInputStep,
    PeRFlowControlNetDenoiseStep,
    PeRFlowInpaintControlNetDenoiseStep,
)
from .declare import Assembled
from .denoise import PeRFlowDenoiseStep, PeRFlowInpaintDenoiseStep
from .encode import PeRFlowAutoIPAdapterStep, PeRFlowAutoTextEncoderStep
from .merge_delta import PeRFlowMergeDeltaStep
from .pipeline import PeRFlowModularPipeline
from .specs import DEFAULT_GUIDANCE_SCALE
from .vae import PeRFlowAutoDecodeStep, PeRFlowAutoVaeEncoderStep, images_output


class PeRFlowSDXLAutoControlNetDenoiseStep(Assembled, AutoPipelineBlocks):
    """The loop with a ControlNet, for inpainting where there is a mask."""

    block_classes = [PeRFlowInpaintControlNetDenoiseStep, PeRFlowControlNetDenoiseStep]
    block_names = ["inpaint_controlnet_denoise", "controlnet_denoise"]
    block_trigger_inputs = ["mask", "controlnet_cond"]
    description = "The denoising loop with a ControlNet, for inpainting where there is a mask."


class PeRFlowSDXLAutoDenoiseStep(Assembled, AutoPipelineBlocks):
    """The loop that the task calls for."""

    block_classes = [PeRFlowSDXLAutoControlNetDenoiseStep, PeRFlowInpaintDenoiseStep, PeRFlowDenoiseStep]
    block_names = ["controlnet_denoise", "inpaint_denoise", "denoise"]
    block_trigger_inputs = ["controlnet_cond", "mask", None]
    description = "The denoising loop: with a ControlNet for `controlnet_cond`, inpainting for `mask`, else plain."


class PeRFlowSDXLCoreDenoiseStep(Assembled, SequentialPipelineBlocks):
    """From embeddings and encoded images to denoised latents, for every task."""

    block_classes = [
        PeRFlowInputStep,
        PeRFlowSDXLAutoBeforeDenoiseStep,
        PeRFlowAutoControlNetInputStep,
        PeRFlowSDXLAutoDenoiseStep,
    ]
    block_names = ["input", "before_denoise", "controlnet_input", "denoise"]
    description = "Batches the embeddings, sets up windows and latents, prepares control, runs the few steps."

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Hands on what `pipe.set_progress_bar_config` says, which by itself reaches top-level blocks only."""
        blocks = list(self.sub_blocks.values())
        for block in blocks:
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**kwargs)
            else:
                blocks.extend(block.sub_blocks.values())


class Preset(Assembled, SequentialPipelineBlocks):
    """A whole pipeline: its one output is the images, its inputs are what its blocks use.

    The check of the request reads the inputs of every task. Those that no other block takes are not inputs.

    Attributes:
        pipeline_class: what `init_pipeline` returns.
        not_inputs: inputs of blocks that a model of this family does not take.
    """

    pipeline_class: type[PeRFlowModularPipeline] = PeRFlowModularPipeline
    not_inputs: frozenset[str] = frozenset()

    def _work_out(self, name: str) -> list[Any]:
        entries = super()._work_out(name)
        if name != "inputs":
            return entries
        parts = [block for block in self.sub_blocks.values() if not isinstance(block, PeRFlowCheckInputsStep)]
        used = {entry.name for part in parts for entry in part.inputs} - self.not_inputs
        return [entry for entry in entries if entry.name in used]

    @property
    def outputs(self) -> list[OutputParam]:
        made = {name for block in self.sub_blocks.values() for name in block.intermediate_output_names}
        return [images_output()] if "images" in made else super().outputs

    def get_workflow(self, workflow_name: str) -> Preset:
        """The blocks of one of `available_workflows`, such as "text2image"."""
        family: Any = next(kind for kind in type(self).__mro__ if not vars(kind).get("block_classes"))
        return family.from_blocks_dict(super().get_workflow(workflow_name).sub_blocks)

    def init_pipeline(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> PeRFlowModularPipeline:
        """A `PeRFlowModularPipeline`, or the family's own, of a copy of these blocks, with nothing loaded yet."""
        return self.pipeline_class(deepcopy(self), pretrained_model_name_or_path, components_manager, collection)


class PeRFlowSDXLAutoBlocks(Preset):
    """PeRFlow for Stable Diffusion XL: images in 4 to 8 steps (arXiv 2405.07510).

    Text-to-image, image-to-image and inpainting, each with ControlNets, ControlNet-Union and IP-Adapters: the
    workflows of `StableDiffusionXLAutoBlocks`, chosen by what a call is given. Top-level names are diffusers' own
    (`text_encoder`, `ip_adapter`, `vae_encoder`, `denoise`, `decode`), after `check_inputs`, `apply_attention` and
    `merge_delta`.

    Example:
        >>> pipe = PeRFlowSDXLAutoBlocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(dtype=torch.float16)
        >>> images = pipe(prompt="a red star", delta="perflow_delta.safetensors", output="images")
        >>> images = pipe(prompt="a red star", image=images[0], strength=0.5, output="images")
    """

    block_classes = [
        PeRFlowCheckInputsStep,
        PeRFlowApplyAttentionStep,
        PeRFlowMergeDeltaStep,
        PeRFlowAutoTextEncoderStep,
        PeRFlowAutoIPAdapterStep,
        PeRFlowAutoVaeEncoderStep,
        PeRFlowSDXLCoreDenoiseStep,
        PeRFlowAutoDecodeStep,
    ]
    block_names = ["check_inputs", "apply_attention", "merge_delta", "text_encoder"]
    block_names += ["ip_adapter", "vae_encoder", "denoise", "decode"]
    _workflow_map = StableDiffusionXLAutoBlocks._workflow_map
    description = (
        "PeRFlow few-step generation with Stable Diffusion XL: images in 4 to 8 steps.\n"
        "The UNet is one that PeRFlow distilled, or any SDXL fine-tune with a delta file merged in.\n"
        f"Guidance is the component `guider` (default scale {DEFAULT_GUIDANCE_SCALE:g}): "
        "pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.5))."
    )
