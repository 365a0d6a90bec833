"""Captions to SDXL conditioning, as the pipelines compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True, kw_only=True)
class TextConditioning:
    """`prompt_embeds` (batch, tokens, 128) and `pooled_prompt_embeds` (batch, 64)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor

    def drop(self, rows: torch.Tensor) -> TextConditioning:
        """Replaces `rows` (batch,) bool by the empty prompt, which in SDXL is all zeros."""
        keep = (~rows).to(self.prompt_embeds)
        return TextConditioning(
            prompt_embeds=self.prompt_embeds * keep[:, None, None],
            pooled_prompt_embeds=self.pooled_prompt_embeds * keep[:, None],
        )


class CaptionEncoder(torch.nn.Module):
    """SDXL's two text encoders as one trainable module."""

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids  # (batch, tokens)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return TextConditioning(
            prompt_embeds=torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1),
            pooled_prompt_embeds=second.text_embeds,
        )
