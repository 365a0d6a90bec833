"""The step of the loop that shows what the image is going to be, and the linear map that makes images of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, VaeImageProcessor
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from PIL import Image
from torch import Tensor

from ..core.step_plan import apply_step
from ..core.windows import require_positive_int
from .declare import declared
from .inputs import param, shared_inputs
from .loop_block import LoopBlock

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

    Raises:
        ValueError: factors or bias are not for three colours, or latents have another number of channels than factors.
    """

    config_name = "latent_to_rgb.json"
    dtype = torch.float32

    @register_to_config
    def __init__(
        self, factors: Rows = SDXL_FACTORS, bias: Sequence[float] = SDXL_BIAS, scaling_factor: float = 1.0
    ) -> None:
        if not factors or any(len(row) != 3 for row in factors) or len(bias) != 3:
            raise ValueError(f"each row of {factors=} and {bias=} must hold three numbers: red, green, blue.")

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (batch, channels, height, width) as colours (batch, 3, height, width), float32 in [-1, 1]."""
        factors = torch.tensor(self.config.factors, dtype=torch.float32, device=latents.device)
        bias = torch.tensor(self.config.bias, dtype=torch.float32, device=latents.device)
        if latents.shape[1] != factors.shape[0]:
            raise ValueError(
                f"the latents have {latents.shape[1]} channels, the preview's factors {factors.shape[0]}; set a "
                "preview_decoder for this VAE, such as LatentToRGB(factors, bias)."
            )
        sample = (torch.einsum("bchw,cr->brhw", latents.float(), factors) + bias[:, None, None]).clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class PreviewStep(LoopBlock):
    """Decodes the clean latents that a step predicts and hands the images to `preview_callback(i, images)`.

    Insert it between denoiser and solver: `insert_loop_block(blocks, "preview", PreviewStep, before="solver")`. It
    shows the first step and then every `preview_every`-th; without a callback it does nothing. Each preview waits for
    the device, since the images are copied to the host.

    The component `preview_decoder` makes the images: by default a linear map with SDXL's colours, one pixel for each
    latent position. A tiny VAE shows more, at full size:
    `pipe.update_components(preview_decoder=AutoModel.from_pretrained("madebyollin/taesdxl"))`.

    Raises:
        ValueError: `preview_callback` cannot be called, `preview_every` is not a positive integer, or the decoder is a
            VAE that overflows in float16.
    """

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

    def start(self, components: Any, block_state: Any) -> None:
        callback, decoder = block_state.preview_callback, components.preview_decoder
        require_positive_int("preview_every", block_state.preview_every)
        if callback is not None and not callable(callback):
            raise ValueError(f"preview_callback={callback!r} cannot be called; pass a function of (i, images).")
        if callback is not None and decoder.dtype == torch.float16 and decoder.config.get("force_upcast"):
            raise ValueError(
                "preview_decoder overflows in torch.float16; use a tiny VAE, such as madebyollin/taesdxl, or float32."
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
    shift, scale = (row.to(device=latents.device, dtype=torch.float32) for row in _decoder_scaling(decoder.config))
    sample = decoder.decode((scale * latents.float() + shift).to(decoder.dtype)).sample
    return VaeImageProcessor().postprocess(sample.float(), output_type="pil")


def _decoder_scaling(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(shift, scale), each (channels or 1, 1, 1): a decoder takes `scale latents + shift` of what the UNet sees."""
    rows = (config.get("latents_mean") or [0.0], config.get("latents_std") or [1.0])
    shift, scale = (torch.tensor(row, dtype=torch.float64)[:, None, None] for row in rows)
    return shift, scale / config["scaling_factor"]
