"""Blocks that watch the loop: previews of the result, a function that may end the run, a log of the windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, VaeImageProcessor
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, OutputParam
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ..core.step_plan import apply_step
from .declare import declared
from .inputs import param, shared_inputs

logger = logging.get_logger(__name__)

# Measured for SDXL's VAE: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/latent_formats.py
SDXL_FACTORS = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
SDXL_BIAS = (0.1084, -0.0175, -0.0011)

Rows = Sequence[Sequence[float]]
PreviewCallback = Callable[[int, list[Image.Image]], Any]


class LatentToRGB(ConfigMixin):
    """One pixel for each latent position, `colour = latent @ factors + bias`, at next to no cost.

    Stands in for a decoder: `decode(latents).sample`. The defaults are the colours of SDXL's VAE.

    Args:
        factors: (channels, 3), what each latent channel adds to red, green and blue, which run from -1 to 1.
        bias: the colour of latents that are zero.
        scaling_factor: what latents are divided by before they are decoded. 1: the map takes them as the UNet does.
    """

    config_name = "latent_to_rgb.json"
    dtype = torch.float32

    @register_to_config
    def __init__(
        self, factors: Rows = SDXL_FACTORS, bias: Sequence[float] = SDXL_BIAS, scaling_factor: float = 1.0
    ) -> None:
        pass

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (batch, channels, height, width) as colours (batch, 3, height, width), float32 in [-1, 1]."""
        rows = (self.config.factors, self.config.bias)
        factors, bias = (torch.tensor(row, dtype=torch.float32, device=latents.device) for row in rows)
        sample = (torch.einsum("bchw,cr->brhw", latents.float(), factors) + bias[:, None, None]).clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class PreviewStep(ModularPipelineBlocks):
    """Decodes the clean latents that a step predicts and hands the images to `preview_callback(i, images)`.

    Insert it between denoiser and solver: `insert_loop_block(blocks, "preview", PreviewStep, before="solver")`. It
    shows the first step and then every `preview_every`-th. Each preview waits for the device. By default one pixel
    stands for each latent position; a tiny VAE shows more:
    `pipe.update_components(preview_decoder=AutoModel.from_pretrained("madebyollin/taesdxl"))`.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that hands images of the predicted result to a callback; goes before the solver."
    expected_components = declared(
        ComponentSpec(
            "preview_decoder",
            LatentToRGB,
            description="Makes images of latents: a LatentToRGB, a tiny VAE, or the VAE itself.",
            config=FrozenDict({}),
            default_creation_method="from_config",
        )
    )
    inputs = declared(
        *shared_inputs("latents", "noise_pred", "step_coefficients", required=True),
        param("preview_callback", PreviewCallback, "Called with the step's number, from 0, and a list of PIL images."),
        param("preview_every", int, "Steps from one preview to the next, at least 1.", default=1),
    )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.preview_callback is not None and i % block_state.preview_every == 0:
            _, _, c, d = block_state.step_coefficients[i].unbind()
            clean = apply_step(block_state.latents, block_state.noise_pred, c, d)
            block_state.preview_callback(i, decode_preview(components.preview_decoder, clean))
        return components, block_state


@torch.no_grad()
def decode_preview(decoder: Any, latents: Tensor) -> list[Image.Image]:
    """What a decoder, or a LatentToRGB, makes of clean latents (images, channels, height/f, width/f)."""
    sample = decoder.decode((latents / decoder.config["scaling_factor"]).to(decoder.dtype)).sample
    return VaeImageProcessor().postprocess(sample.float(), output_type="pil")


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInfo:
    """Where the run is. All fields but the latents are numbers on the host.

    Attributes:
        step: the step's number, from 0 to num_steps - 1.
        num_steps: how many steps there are.
        timestep: what the UNet was given, usually from 1 to 1000.
        window_index: the number of the step's time window, from 0 (noise) on.
        window_start, window_end: the window's two ends in time; 1 is noise, 0 is data.
        alpha_start, alpha_end: the noise schedule's abar at these ends.
        latents: (images, channels, height/f, width/f) on the device; after the solver those of the next step.
    """

    step: int
    num_steps: int
    timestep: int
    window_index: int
    window_start: float
    window_end: float
    alpha_start: float
    alpha_end: float
    latents: Tensor


StepCallback = Callable[[StepInfo], bool | None]


class StepCallbackStep(ModularPipelineBlocks):
    """Calls `step_callback(info)` at each step. If it returns True, the run ends with this step.

    A run that ends early has the clean latents that its last step predicts. Inserted after the solver
    (`insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")`) the callback sees each step's result.

    Raises:
        ValueError: `step_callback` returns something other than True, False and None.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that calls a function with step, window and latents; if it returns True, the run ends."
    inputs = declared(
        *shared_inputs("latents", "step_plan", required=True),
        param("step_callback", StepCallback, "Called with a StepInfo at each step; may return True to end the run."),
    )
    intermediate_outputs = declared(
        OutputParam("stop_requested", bool, "Whether a block in the loop ended the run before its last step.")
    )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.step_callback is not None:
            plan = block_state.step_plan
            of_plan = ("window_index", "window_start", "window_end", "alpha_start", "alpha_end")
            numbers = {"timestep": plan.timesteps[i], **{name: getattr(plan, name)[i] for name in of_plan}}
            info = StepInfo(step=i, num_steps=len(plan), latents=block_state.latents, **numbers)
            answer = block_state.step_callback(info)
            if answer not in (True, False, None):  # the dictionary of another kind of callback would end the run
                returned = f"step_callback returned a value of type {type(answer).__name__}"
                raise ValueError(f"{returned}; return True to end the run, False or None to go on.")
            block_state.stop_requested = block_state.stop_requested or bool(answer)
        return components, block_state


class WindowLogStep(ModularPipelineBlocks):
    """Logs number, times and abar of each time window at its first step. Nothing is read from the device.

    Args:
        level: of Python's logging. INFO shows after, for example, `logging.basicConfig(level=logging.INFO)`.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that logs the number, the times and the noise schedule's abar of each time window."
    inputs = declared(*shared_inputs("step_plan", required=True))

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__()
        self.level = level

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        plan = block_state.step_plan
        if plan.begins_window(i):
            window = f"window {plan.window_index[i]}: time {plan.window_start[i]:g} to {plan.window_end[i]:g}"
            alphas = f"abar {plan.alpha_start[i]:.4g} to {plan.alpha_end[i]:.4g}"
            logger.log(self.level, f"Step {i + 1} of {len(plan)} begins {window}, {alphas}.")
        return components, block_state
