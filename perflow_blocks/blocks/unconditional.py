"""The preset for unconditional models in pixel space: a `UNet2DModel`, without prompts, guidance or VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel, VaeImageProcessor
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, OutputParam
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .auto_blocks import Preset
from .check_inputs import check_settings
from .declare import declared
from .denoise import PeRFlowDenoiseStep, PeRFlowLoopSolverStep
from .finite_guard import FiniteGuardStep, align_weights
from .guiders import Unguided
from .images import require_shape
from .inputs import param, shared_inputs
from .merge_delta import PeRFlowMergeDeltaStep
from .set_timesteps import PeRFlowSetTimestepsStep
from .vae import images_output

UNUSED = frozenset({"guider", "guidance_scale", "cross_attention_kwargs", "denoising_end"})
"""What shared blocks declare and models without prompts have no use for."""


def _unet_spec() -> ComponentSpec:
    return ComponentSpec("unet", UNet2DModel, description="A PeRFlow student, or the base for a delta.")


class PeRFlowUnconditionalInputStep(ModularPipelineBlocks):
    """Checks the request before a model runs or a weight changes, and draws the starting noise.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """

    description = "Checks the request and draws the noise that the images start from."
    expected_components = declared(_unet_spec())
    inputs = declared(
        param("batch_size", int, "Number of images, at least 1. None: as many as `latents`, else 1."),
        *shared_inputs("num_inference_steps", "generator"),
        param("latents", Tensor, "Starting noise (images, channels, height, width). None: drawn, of the UNet's size."),
        *shared_inputs("output_type", "on_nonfinite"),
    )
    intermediate_outputs = declared(
        OutputParam("latents", Tensor, "Starting noise (images, channels, height, width)."),
        OutputParam("guider", Unguided, "Stands in for a guider."),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        request, unet = self.get_block_state(state), components.unet
        if unet is None:
            raise ValueError("unet not loaded; call pipe.load_components() and read its warnings, or set unet.")
        check_settings(request)
        count, channels, latents = request.batch_size, unet.config.in_channels, request.latents
        if latents is not None:
            require_shape("latents", latents, (count or "images", channels, "height", "width"))
            count = len(latents)
        count, generators = count or 1, request.generator
        if isinstance(generators, list) and len(generators) != count:
            raise ValueError(f"generator holds {len(generators)} generators for {count} images; pass {count}, or one.")
        align_weights(unet)
        device, side = components._execution_device, unet.config.sample_size
        if latents is None:
            height, width = (side, side) if isinstance(side, int) else side
            shape = (count, channels, height, width)
            latents = randn_tensor(shape, generator=generators, device=device, dtype=unet.dtype)
        state.set("latents", latents.to(device, unet.dtype))
        state.set("guider", Unguided())
        return components, state


class PeRFlowUnconditionalLoopDenoiser(ModularPipelineBlocks):
    """Predicts the noise of the images by one UNet call."""

    description = "Loop step that runs the UNet once."
    expected_components = declared(_unet_spec())
    inputs = declared(*shared_inputs("latents", required=True))
    intermediate_outputs = declared(OutputParam("noise_pred", Tensor, "The prediction, shaped like the latents."))

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        block_state.noise_pred = components.unet(block_state.latents, t, return_dict=False)[0]
        return components, block_state


class PeRFlowUnconditionalDenoiseStep(PeRFlowDenoiseStep):
    """The loop over the steps of a plan, for a model without prompts."""

    block_classes = [FiniteGuardStep, PeRFlowUnconditionalLoopDenoiser, PeRFlowLoopSolverStep]


class PeRFlowUnconditionalImagesStep(ModularPipelineBlocks):
    """Makes images of the denoised pixels, which are in [-1, 1]."""

    description = "Makes images of the denoised pixels."
    inputs = declared(*shared_inputs("latents", required=True), *shared_inputs("output_type"))
    intermediate_outputs = declared(images_output())

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        block_state.images = VaeImageProcessor().postprocess(block_state.latents, block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowUnconditionalBlocks(Preset):
    """PeRFlow for unconditional diffusion models in pixel space, a `UNet2DModel` (arXiv 2405.07510).

    For the models of `DDPMPipeline` and `DDIMPipeline`, distilled by `perflow distill`. Pixels are in [-1, 1]; there
    are no prompts, no guidance and no VAE. Images have the UNet's own size, or that of `latents`.

    Raises:
        ValueError: `batch_size`, `latents` or `generator` do not fit together, an unknown `output_type` or
            `on_nonfinite`, or what the window set-up, the delta's merge or the loop raise.

    Example:
        >>> pipe = PeRFlowUnconditionalBlocks().init_pipeline("a-ddpm-model")
        >>> pipe.load_components()
        >>> images = pipe(batch_size=4, num_inference_steps=4, delta="perflow_delta.safetensors", output="images")
    """

    block_classes = [
        PeRFlowUnconditionalInputStep,
        PeRFlowMergeDeltaStep,
        PeRFlowSetTimestepsStep,
        PeRFlowUnconditionalDenoiseStep,
        PeRFlowUnconditionalImagesStep,
    ]
    not_inputs = UNUSED
    block_names = ["input", "merge_delta", "set_timesteps", "denoise", "decode"]
    description = "PeRFlow few-step generation with an unconditional UNet2DModel in pixel space."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [spec for spec in super().expected_components if spec.name not in UNUSED]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [spec for spec in super().expected_configs if spec.name not in UNUSED]
