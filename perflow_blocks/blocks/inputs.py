"""The inputs that more than one block takes.

Functions, not constants: diffusers writes into the parameters that a block returns.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from ..core.noising import NOISINGS
from ..core.step_plan import StepPlan
from ..delta.recipe import DeltaRecipe

DENOISER_INPUT_FIELDS = "denoiser_input_fields"
"""The name under which diffusers collects the tensors that the guider splits."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

NONFINITE_POLICIES = ("raise", "fallback")

CONTROLNET_KWARGS = "controlnet_kwargs"
"""The name under which diffusers collects what only some ControlNets take."""


def param(
    name: str,
    type_hint: Any,
    description: str,
    *,
    required: bool = False,
    default: Any = None,
    kind: str | None = None,
) -> InputParam:
    return InputParam(
        name, type_hint=type_hint, description=description, required=required, default=default, kwargs_type=kind
    )


def latents_input() -> InputParam:
    return param("latents", torch.Tensor, "Latents (batch, channels, height/f, width/f) of this step.", required=True)


def delta_recipe_input() -> InputParam:
    return param(
        "delta_recipe", DeltaRecipe, "How the merged delta was distilled, from `merge_delta`; None without a delta."
    )


def num_inference_steps_input() -> InputParam:
    return param("num_inference_steps", int, "Number of denoising steps.", required=True)


def step_plan_input() -> InputParam:
    return param("step_plan", StepPlan, "The steps on the host: times, windows, coefficients.", required=True)


def step_coefficients_input() -> InputParam:
    return param(
        "step_coefficients", torch.Tensor, "The plan's table (num_steps, 4) on the device, float32.", required=True
    )


def schedule_inputs() -> list[InputParam]:
    """What the window set-up hands to the loop."""
    return [
        param("timesteps", torch.Tensor, "Timesteps (num_steps,), integers on the device.", required=True),
        num_inference_steps_input(),
        step_plan_input(),
        step_coefficients_input(),
    ]


def noise_pred_input() -> InputParam:
    return param("noise_pred", torch.Tensor, "Guided prediction of this step.", required=True)


def noise_coefficients_input() -> InputParam:
    return param(
        "noise_coefficients",
        torch.Tensor,
        "(P, Q) of `P x0 + Q noise` at the start of each step and at the end, (num_steps + 1, 2) on the device.",
        required=True,
    )


def image_latents_input() -> InputParam:
    return param(
        "image_latents",
        torch.Tensor,
        "The given picture's clean latents (pictures, channels, height/f, width/f), one for each or one for all.",
        required=True,
    )


def mask_input() -> InputParam:
    return param(
        "mask", torch.Tensor, "What to repaint (pictures, 1, height/f, width/f): 1 is painted, 0 kept.", required=True
    )


def noise_input() -> InputParam:
    return param("noise", torch.Tensor, "The noise of the known part, shaped like the latents.", required=True)


def inpaint_conditioning_input() -> InputParam:
    return param(
        "inpaint_conditioning",
        torch.Tensor,
        "Mask and masked-image latents (batch, 5, height/f, width/f) for a 9-channel UNet; None for others.",
    )


def num_images_per_prompt_input() -> InputParam:
    return param("num_images_per_prompt", int, "Pictures for each prompt, at least 1.", default=1)


def batch_inputs() -> list[InputParam]:
    """How many pictures there are, and of what type their latents."""
    return [
        param("batch_size", int, "Number of prompts.", required=True),
        num_images_per_prompt_input(),
        param("dtype", torch.dtype, "Type of the latents, from the `input` step.", required=True),
    ]


def generator_input() -> InputParam:
    return param("generator", torch.Generator | list[torch.Generator], "Source of the noise: one, or one per picture.")


def output_type_input() -> InputParam:
    return param("output_type", str, f"What pictures are returned as: {', '.join(OUTPUT_TYPES)}.", default="pil")


def noising_input() -> InputParam:
    return param(
        "noising",
        str,
        f"How a picture is noised inside a window: {' or '.join(NOISINGS)}. The student's path is the chord.",
        default=NOISINGS[0],
    )


def on_nonfinite_input() -> InputParam:
    return param(
        "on_nonfinite",
        str,
        f"What to do about latents that are not finite: {' or '.join(NONFINITE_POLICIES)} (run all steps again in "
        "float32).",
        default=NONFINITE_POLICIES[0],
    )


def denoising_start_input() -> InputParam:
    return param(
        "denoising_start",
        float,
        "Share of the denoising, in (0, 1), that an earlier run did: no noise is added, and the steps before it are "
        "left out. Snaps to a window boundary. With a mask pass the earlier run's `noise` too.",
    )


def denoising_end_input() -> InputParam:
    return param(
        "denoising_end",
        float,
        "Share of the denoising, in (0, 1], after which to stop and leave the rest to a refiner. Snaps to a window "
        "boundary.",
    )


def controlnet_inputs() -> list[InputParam]:
    """What the ControlNet input steps of diffusers hand to the loop."""
    return [
        param(
            "controlnet_cond",
            torch.Tensor | list[torch.Tensor],
            "Control pictures (batch, 3, height, width) in [0, 1]; a list for several ControlNets or a union.",
            required=True,
        ),
        param(
            "conditioning_scale",
            float | list[float],
            "Weight of the ControlNet, or of each of several.",
            required=True,
        ),
        param(
            "controlnet_keep", list[float] | list[list[float]], "1 or 0 for each step: in force or not.", required=True
        ),
        param("guess_mode", bool, "Whether the ControlNet sees the conditional batches only.", required=True),
        param(
            "control_type",
            torch.Tensor,
            "Which kinds of control are given (batch, kinds), for a ControlNet-Union.",
            kind=CONTROLNET_KWARGS,
        ),
        param(
            "control_type_idx",
            list[int],
            "The kind of each control picture, for a ControlNet-Union.",
            kind=CONTROLNET_KWARGS,
        ),
    ]


def embeddings_inputs() -> list[InputParam]:
    """What a prompt is once it is encoded; each `negative_` twin goes to the guider's unconditional batch."""
    kind, tensor = DENOISER_INPUT_FIELDS, torch.Tensor
    return [
        param("prompt_embeds", tensor, "Text embeddings (batch, tokens, width).", required=True, kind=kind),
        param("negative_prompt_embeds", tensor, "Text embeddings of the negative prompt.", kind=kind),
        param("pooled_prompt_embeds", tensor, "Pooled text embeddings (batch, width).", required=True, kind=kind),
        param("negative_pooled_prompt_embeds", tensor, "Pooled embeddings of the negative prompt.", kind=kind),
    ]


def conditioning_inputs() -> list[InputParam]:
    """What the UNet is conditioned on."""
    kind, tensor = DENOISER_INPUT_FIELDS, torch.Tensor
    return [
        *embeddings_inputs(),
        param("add_time_ids", tensor, "Sizes and crop (batch, 6) that SDXL is told.", required=True, kind=kind),
        param("negative_add_time_ids", tensor, "Sizes and crop of the negative prompt.", kind=kind),
        *ip_adapter_inputs(),
    ]


def ip_adapter_inputs() -> list[InputParam]:
    """What the pictures for IP-Adapters are once they are encoded."""
    kind, tensors = DENOISER_INPUT_FIELDS, list[torch.Tensor]
    return [
        param("ip_adapter_embeds", tensors, "Image embeddings, one tensor per loaded IP-Adapter.", kind=kind),
        param("negative_ip_adapter_embeds", tensors, "Embeddings of the empty image, likewise.", kind=kind),
    ]
