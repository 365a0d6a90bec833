"""Pictures from latents without a decoder: a linear map from latent channels to colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, VaeImageProcessor
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import Tensor

# Measured for SDXL's VAE: https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/latent_formats.py
SDXL_FACTORS = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
SDXL_BIAS = (0.1084, -0.0175, -0.0011)

Rows = Sequence[Sequence[float]]


class LatentToRGB(ConfigMixin):
    """One picture element for each latent position, `colour = latent @ factors + bias`: costs nothing beside a UNet.

    Stands where a decoder may, as `decode(latents).sample`. For a VAE other than SDXL's use `fit`.

    Args:
        factors: (channels, 3), what each latent channel adds to red, green and blue.
        bias: the colour of latents that are zero; colours run from -1 to 1.
        scaling_factor: what latents are divided by before they are decoded. 1: the map takes them as the UNet does.

    Raises:
        ValueError: factors or bias that are not for three colours.
    """

    config_name = "latent_to_rgb.json"
    dtype = torch.float32

    @register_to_config
    def __init__(
        self, factors: Rows = SDXL_FACTORS, bias: Sequence[float] = SDXL_BIAS, scaling_factor: float = 1.0
    ) -> None:
        if not factors or any(len(row) != 3 for row in factors) or len(bias) != 3:
            raise ValueError(
                f"factors hold rows of {sorted({len(row) for row in factors})} numbers, the bias {len(bias)}; pass "
                "three numbers (red, green, blue) for each latent channel, and three for the bias."
            )

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: AutoencoderKL, images: Sequence[Image.Image]) -> LatentToRGB:
        """The map that comes nearest to what a VAE makes of these pictures, by least squares.

        Args:
            vae: encodes the pictures; its scaling is part of the map.
            images: a few pictures of many colours; sizes may differ.

        Raises:
            ValueError: no pictures, or too few different colours to tell the latent channels apart.
        """
        processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
        shift, scale = decoder_scaling(vae.config)
        latents, colours = [], []
        for image in images:
            pixels = processor.preprocess(image).to(device=vae.device, dtype=vae.dtype)
            encoded = vae.encode(pixels).latent_dist.mode()
            average = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), encoded.shape[-2:])
            latents.append(((encoded.double().cpu() - shift) / scale)[0].flatten(1).T)  # (positions, channels)
            colours.append(average.double().cpu()[0].flatten(1).T)  # (positions, 3)
        if not latents:
            raise ValueError("images is empty; pass a few pictures of many colours.")
        known = torch.cat(latents)
        known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
        rank = int(torch.linalg.matrix_rank(known))
        if rank < known.shape[1]:
            raise ValueError(
                f"the pictures' latents vary in {rank - 1} directions, the VAE has {known.shape[1] - 1} channels; "
                "pass more pictures, of many colours."
            )
        solution = torch.linalg.lstsq(known, torch.cat(colours)).solution
        return cls(factors=solution[:-1].tolist(), bias=solution[-1].tolist())

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (batch, channels, height, width) as colours in [-1, 1], float32 of shape (batch, 3, height, width).

        Raises:
            ValueError: the latents have another number of channels than the map.
        """
        factors = torch.tensor(self.config.factors, dtype=torch.float32, device=latents.device)
        bias = torch.tensor(self.config.bias, dtype=torch.float32, device=latents.device)
        if latents.shape[1] != factors.shape[0]:
            raise ValueError(
                f"the latents have {latents.shape[1]} channels, this preview takes {factors.shape[0]}; "
                "make one for the VAE with LatentToRGB.fit(vae, images)."
            )
        colours = torch.einsum("bchw,cr->brhw", latents.float(), factors) + bias[:, None, None]
        sample = colours.clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def decoder_scaling(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(shift, scale), each (channels or 1, 1, 1): a decoder takes `scale latents + shift` of what the UNet sees."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        mean, deviation = [0.0], [1.0]
    shift, scale = (torch.tensor(row, dtype=torch.float64)[:, None, None] for row in (mean, deviation))
    return shift, scale / config["scaling_factor"]
