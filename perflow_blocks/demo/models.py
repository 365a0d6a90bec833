"""The parts of the demo model: the classes that SDXL uses, with fewer and narrower layers, and its noise schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .images import IMAGE_SIZE, all_captions

MAX_TOKENS = 24
TEXT_HIDDEN = 64
LATENT_CHANNELS = 4
VAE_FACTOR = 4
LATENT_SIZE = IMAGE_SIZE // VAE_FACTOR
_TIME_EMBED_DIM = 16

GUIDANCE_SCALE = 3.0  # the teacher's, which is baked into the student

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
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    words = sorted({word for caption in all_captions() for word in caption.replace(",", " ,").split()})
    tokenizer.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    entries = alphabet + [symbol + "</w>" for symbol in alphabet] + ["".join(pair) for pair in merges]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys([*entries, start, end]))}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, **special)


def build_vae() -> AutoencoderKL:
    """A KL autoencoder of factor 4: (batch, 3, 64, 64) in [-1, 1] to latents (batch, 4, 16, 16)."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
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
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    return DDIMScheduler(**SCHEDULE, **settings)


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

    def forward(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (batch, 24, 128) and pooled embeddings (batch, 64) of captions, as the pipelines compute them."""
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def build_caption_encoder() -> CaptionEncoder:
    """Both text encoders, randomly initialised, and their tokenizer."""
    tokenizer = build_tokenizer()
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
    return CaptionEncoder(tokenizer, CLIPTextModel(config), CLIPTextModelWithProjection(config))
