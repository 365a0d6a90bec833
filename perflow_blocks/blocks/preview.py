"""The step of the loop that shows what the picture is going to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import VaeImageProcessor
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam
from PIL import Image
from torch import Tensor

from ..core.step_plan import apply_step
from ..core.windows import require_positive_int
from .inputs import latents_input, noise_pred_input, param, step_coefficients_input
from .latent_preview import LatentToRGB, decoder_scaling
from .loop_block import LoopBlock

PreviewCallback = Callable[[int, list[Image.Image]], Any]


class PreviewStep(LoopBlock):
    """Decodes the clean latents that a step predicts and hands the pictures to `preview_callback(i, pictures)`.

    Belongs between the denoiser and the solver, where latents and prediction are of one step:
    `insert_loop_block(blocks, "preview", PreviewStep, before="solver")`. Without a callback it does nothing. The steps
    it shows are those whose number `preview_every` divides: the first one always. Each waits for the device, since a
    picture must come to the host.

    The decoder is the component `preview_decoder`: by default a linear map with SDXL's colours, which costs nothing.
    One small picture element stands for each latent position; a tiny VAE shows more, at full size:
    `pipe.update_components(preview_decoder=AutoModel.from_pretrained("madebyollin/taesdxl"))`.

    Raises:
        ValueError: `preview_callback` cannot be called, `preview_every` is below 1, or the decoder is a VAE that
            overflows in its type.
    """

    @property
    def description(self) -> str:
        return "Loop step that hands pictures of the predicted result to a callback; goes before the solver."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec(
                "preview_decoder",
                LatentToRGB,
                description="Makes pictures of latents: a LatentToRGB, a tiny VAE, or the VAE itself.",
                config=FrozenDict({}),
                default_creation_method="from_config",
            )
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            latents_input(),
            noise_pred_input(),
            step_coefficients_input(),
            param(
                "preview_callback",
                PreviewCallback,
                "Called as `preview_callback(i, pictures)` with the step's number, from 0, and a list of PIL images.",
            ),
            param("preview_every", int, "Steps from one preview to the next, at least 1.", default=1),
        ]

    def start(self, components: Any, block_state: Any) -> None:
        callback, decoder = block_state.preview_callback, components.preview_decoder
        require_positive_int("preview_every", block_state.preview_every)
        if callback is None:
            return
        if not callable(callback):
            raise ValueError(f"preview_callback={callback!r} cannot be called; pass a function of (i, pictures).")
        if decoder.dtype == torch.float16 and decoder.config.get("force_upcast"):
            raise ValueError(
                "the preview_decoder overflows in torch.float16 (its force_upcast is set); pass a tiny VAE, "
                "such as madebyollin/taesdxl, or one in torch.float32."
            )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.preview_callback is not None and i % block_state.preview_every == 0:
            _, _, c, d = block_state.step_coefficients[i].unbind()
            clean = apply_step(block_state.latents, block_state.noise_pred, c, d)
            block_state.preview_callback(i, pictures(components.preview_decoder, clean))
        return components, block_state


@torch.no_grad()
def pictures(decoder: Any, latents: Tensor) -> list[Image.Image]:
    """What a decoder, or a LatentToRGB, makes of clean latents (pictures, channels, height/f, width/f)."""
    shift, scale = (row.to(device=latents.device, dtype=torch.float32) for row in decoder_scaling(decoder.config))
    sample = decoder.decode((scale * latents.float() + shift).to(decoder.dtype)).sample
    return VaeImageProcessor().postprocess(sample.float(), output_type="pil")
