"""The parts of the demo model: a small pipeline of genuine SDXL architecture.

Every part is the diffusers or transformers class that SDXL uses, with fewer and narrower layers: two CLIP text
encoders whose penultimate states are concatenated, a pooled embedding and six time ids
(`addition_embed_type="text_time"`), a four-channel KL autoencoder, and SDXL's noise schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .pictures import PICTURE_SIZE, all_captions

MAX_TOKENS = 24
TEXT_HIDDEN = 64
LATENT_CHANNELS = 4
VAE_FACTOR = 4
LATENT_SIZE = PICTURE_SIZE // VAE_FACTOR
_TIME_EMBED_DIM = 16

GUIDANCE_SCALE = 3.0
"""The teacher's, which is baked into the student."""

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges come from the demo's captions: one token a word of theirs.

    Words that the captions never use still tokenize, into bytes.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    words = sorted({word for caption in all_captions() for word in caption.replace(",", " ,").split()})
    tokenizer.train_from_iterator(words, trainer)
    merges = _merges(tokenizer)
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = alphabet + [symbol + "</w>" for symbol in alphabet] + ["".join(pair) for pair in merges]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys([*entries, start, end]))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=MAX_TOKENS,
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, randomly initialised. Penultimate states: (batch, 24, 64) each; pooled: (batch, 64)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_HIDDEN,
        intermediate_size=4 * TEXT_HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_HIDDEN,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_vae() -> AutoencoderKL:
    """A KL autoencoder of factor 4: (batch, 3, 64, 64) in [-1, 1] to latents (batch, 4, 16, 16)."""
    return AutoencoderKL(
        sample_size=PICTURE_SIZE,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet(channels: tuple[int, int, int] = (32, 64, 128), layers: int = 2) -> UNet2DConditionModel:
    """SDXL's UNet in small (6.3 M weights): no attention at the top resolution, text_time conditioning."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_HIDDEN,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=TEXT_HIDDEN + 6 * _TIME_EMBED_DIM,
        norm_num_groups=8,
    )


def build_teacher_scheduler() -> DDIMScheduler:
    """SDXL's noise schedule with trailing spacing, so that few-step sampling of the teacher starts from pure noise."""
    return DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )


def time_ids(batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """SDXL's micro-conditioning for the demo's pictures, (batch, 6): original size, crop corner, target size."""
    row = torch.tensor([PICTURE_SIZE, PICTURE_SIZE, 0, 0, PICTURE_SIZE, PICTURE_SIZE], dtype=torch.float32)
    return row.to(device).expand(batch, -1)
