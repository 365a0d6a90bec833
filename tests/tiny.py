"""Tiny random diffusion components that load in well under a second: the right shapes, meaningless pictures.

Every function is deterministic (fixed seeds, the caller's random state is left alone) and builds new objects at each
call, so that a test may change what it gets. Pictures are `IMAGE_SIZE` pixels wide and high; latents are half of that.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGE_SIZE = 32
LATENT_SIZE = 16
MAX_TOKENS = 16
TEXT_WIDTH = 16
"""Hidden size of each text encoder, and the pooled size of the second."""
TIME_ID_WIDTH = 8

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_vocab() -> dict[str, int]:
    """Special tokens, then every lower-case letter, digit and punctuation mark, alone and as the end of a word."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    return {token: index for index, token in enumerate(tokens)}


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that splits text into characters; no file is read."""
    return CLIPTokenizer(vocab=tiny_vocab(), merges=[], model_max_length=MAX_TOKENS)


def tiny_text_config() -> CLIPTextConfig:
    vocab = tiny_vocab()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=MAX_TOKENS,
    )


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """Three channels to four latent channels at half the size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=IMAGE_SIZE,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()


def tiny_sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's conditioning (`text_time`, two text encoders) on two small levels."""
    return _tiny_unet(
        seed,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
        use_linear_projection=True,
    )


def tiny_sd_unet(seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's conditioning on two small levels."""
    return _tiny_unet(seed, cross_attention_dim=TEXT_WIDTH)


def tiny_sdxl_components(scheduler: Any = None) -> dict[str, Any]:
    """What `StableDiffusionXLPipeline(**components)` and its img2img form need; the default scheduler is Euler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(tiny_text_config()).eval()
        text_encoder_2 = CLIPTextModelWithProjection(tiny_text_config()).eval()
    return {
        "vae": tiny_vae(),
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "unet": tiny_sdxl_unet(),
        "scheduler": scheduler or EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    }


def tiny_sd_components(scheduler: Any = None) -> dict[str, Any]:
    """What `StableDiffusionPipeline(**components)` and its img2img form need; the default scheduler is DDIM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(tiny_text_config()).eval()
    return {
        "vae": tiny_vae(),
        "text_encoder": text_encoder,
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_sd_unet(),
        "scheduler": scheduler or DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _tiny_unet(seed: int, **conditioning: Any) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=1,
            norm_num_groups=8,
            **conditioning,
        ).eval()
