"""The parts of the demo model, untrained: SDXL's classes, few narrow layers, as `weights` configures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import weights_directory
from .images import IMAGE_SIZE

LATENT_CHANNELS = 4
VAE_FACTOR = 4
LATENT_SIZE = IMAGE_SIZE // VAE_FACTOR

GUIDANCE_SCALE = 3.0  # the teacher's, which is baked into the student

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def build_vae() -> AutoencoderKL:
    """A KL autoencoder of factor 4: (batch, 3, 64, 64) in [-1, 1] to latents (batch, 4, 16, 16)."""
    return _configured(AutoencoderKL, "vae")


def build_unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL's UNet in small (6.3 M weights): no attention at the top resolution, text_time conditioning."""
    return _configured(UNet2DConditionModel, "unet", **changes)


def build_teacher_scheduler() -> DDIMScheduler:
    """SDXL's noise schedule with trailing spacing, so that few-step sampling of the teacher starts from pure noise."""
    return _configured(DDIMScheduler, "scheduler")


def _configured(kind: Any, folder: str, **changes: Any) -> Any:
    return kind.from_config(kind.load_config(weights_directory(), subfolder=folder), **changes)


def time_ids(batch: int) -> torch.Tensor:
    """SDXL's micro-conditioning for the demo's images, (batch, 6): original size, crop corner, target size."""
    return torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0.0, 0.0, IMAGE_SIZE, IMAGE_SIZE]]).expand(batch, -1)


class CaptionEncoder(torch.nn.Module):
    """SDXL's two text encoders as one trainable module."""

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.text_encoder_2 = tokenizer, text_encoder, text_encoder_2

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids (batch, 24) of captions."""
        padding: Any = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(captions), **padding).input_ids

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (batch, 24, 128) and pooled ones (batch, 64) of token ids, as the pipelines compute them."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def build_caption_encoder() -> CaptionEncoder:
    """Both text encoders, randomly initialised, and their tokenizer."""
    config = CLIPTextConfig.from_pretrained(weights_directory(), subfolder="text_encoder")
    return CaptionEncoder(load_tokenizer(), CLIPTextModel(config), CLIPTextModelWithProjection(config))


def load_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with one token for each word of the captions; other words become bytes."""
    return CLIPTokenizer.from_pretrained(weights_directory(), subfolder="tokenizer")
