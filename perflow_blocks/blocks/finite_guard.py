"""The check after the loop: broken latents are an error, not a black picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam


class FiniteGuardStep(ModularPipelineBlocks):
    """Reads once from the device whether the latents are finite, after the loop, where a read costs nothing."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Checks once, after the loop, that the latents are finite, so that no black picture is decoded."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents",
                required=True,
                type_hint=torch.Tensor,
                description="Denoised latents (batch, channels, height/f, width/f).",
            )
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """
        Raises:
            ValueError: nan or infinity in the latents of any picture.
        """
        latents = self.get_block_state(state).latents
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(finite):
            bad = [index for index, fine in enumerate(finite) if not fine]
            raise ValueError(
                f"the latents of {len(bad)} of {len(finite)} pictures (number {', '.join(map(str, bad[:8]))}) are not "
                f"finite in {latents.dtype}; load the model with dtype=torch.bfloat16 or torch.float32, "
                "and check the delta, the LoRAs and the latents that were passed."
            )
        return components, state
