"""The model families that one loop distils: what their pipelines are made of, and how they are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

LATENT_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """What differs between families beside the weights.

    Attributes:
        name: for messages.
        pipeline: diffusers' class of the teacher's pipeline.
        text_encoders: class of each text encoder by its folder; the tokenizer's folder is named alike.
        added_conditions: the UNet takes pooled embeddings and time ids.
        guidance_scale: that a student of it is usually sampled with, where guidance is not baked in.
    """

    name: str
    pipeline: type[Any]
    text_encoders: Mapping[str, type[Any]]
    added_conditions: bool
    guidance_scale: float

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


SDXL = ModelFamily(
    name="Stable Diffusion XL",
    pipeline=StableDiffusionXLPipeline,
    text_encoders={"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    added_conditions=True,
    guidance_scale=2.0,
)
SD = ModelFamily(
    name="Stable Diffusion",
    pipeline=StableDiffusionPipeline,
    text_encoders={"text_encoder": CLIPTextModel},
    added_conditions=False,
    guidance_scale=4.5,
)
SD2 = replace(SD, name="Stable Diffusion 2", guidance_scale=7.5)
_SD2_TEXT_WIDTH = 1024


def family_of(unet_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a UNet's configuration.

    Raises:
        ValueError: a UNet that is conditioned otherwise than SD 1.5, 2.1 or SDXL, or fed more than noisy latents.
    """
    kind, channels = unet_config.get("_class_name"), unet_config.get("in_channels", LATENT_CHANNELS)
    if kind != "UNet2DConditionModel":
        raise ValueError(f"the teacher's UNet is a {kind}; pass one of Stable Diffusion 1.5, 2.1 or XL.")
    if channels != LATENT_CHANNELS:
        raise ValueError(f"the teacher's UNet takes {channels} channels; pass a text-to-image one, which takes 4.")
    if unet_config.get("time_cond_proj_dim") is not None:
        raise ValueError("the teacher's UNet is itself distilled (time_cond_proj_dim); pass the model it came from.")
    match unet_config.get("addition_embed_type"):
        case None:
            return SD2 if unet_config.get("cross_attention_dim") == _SD2_TEXT_WIDTH else SD
        case "text_time":
            return SDXL
        case other:
            raise ValueError(
                f"the teacher's UNet has addition_embed_type={other!r}; pass one of Stable Diffusion 1.5, 2.1 or XL."
            )
