"""What a teacher UNet is told of a prompt batch, for Stable Diffusion and SDXL alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.windows import require_positive_int


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One batch of prompts as the UNet takes it.

    Attributes:
        prompt_embeds: (batch, tokens, width).
        added: SDXL's added conditions by the UNet's names for them, (batch, ...) each; empty for Stable Diffusion.
    """

    prompt_embeds: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def join(self, other: Conditioning) -> Conditioning:
        """Both along the batch, self first."""
        return Conditioning(
            prompt_embeds=torch.cat([self.prompt_embeds, other.prompt_embeds]),
            added={name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
        )

    def unet_kwargs(self) -> dict[str, Any]:
        added = {"added_cond_kwargs": dict(self.added)} if self.added else {}
        return {"encoder_hidden_states": self.prompt_embeds, **added}

    def check_rows(self, batch: int, prefix: str = "") -> None:
        """Raises a ValueError that names (after `prefix`) the tensor whose rows are not `batch`."""
        for name, value in {"prompt_embeds": self.prompt_embeds, **self.added}.items():
            if len(value) != batch:
                raise ValueError(f"{prefix}{name} has {len(value)} rows for {batch} latents; pass one row per latent.")


def sdxl_conditioning(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, time_ids: Tensor) -> Conditioning:
    """SDXL's conditions: embeddings (batch, tokens, width), pooled (batch, width), time ids (batch, 6)."""
    return Conditioning(prompt_embeds=prompt_embeds, added={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids})


def sdxl_time_ids(resolution: int, add_time_ids: Tensor | None, prompt_embeds: Tensor) -> Tensor:
    """Time ids (batch, 6) of the type and on the device of `prompt_embeds` (batch, tokens, width).

    `add_time_ids`, (6,), (1, 6) or (batch, 6), counts where given; else square uncropped pictures of `resolution`
    pixels.
    """
    if add_time_ids is None:
        size = require_positive_int("resolution", resolution)
        add_time_ids = torch.tensor([size, size, 0, 0, size, size])
    rows = add_time_ids.to(prompt_embeds).reshape(-1, add_time_ids.shape[-1])
    return rows.expand(len(prompt_embeds), -1) if len(rows) == 1 else rows
