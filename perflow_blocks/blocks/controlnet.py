"""ControlNets: their inputs before the loop, and in the loop one call of them a step, beside the UNet's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLControlNetInputStep,
    StableDiffusionXLControlNetUnionInputStep,
)
from diffusers.utils import logging
from torch import Tensor
from torch.utils._pytree import tree_map

from .declare import Assembled, declared
from .denoise import (
    PeRFlowDenoiseStep,
    PeRFlowInpaintDenoiseStep,
    PeRFlowLoopDenoiser,
    PeRFlowLoopKeepKnownStep,
    PeRFlowLoopSolverStep,
    PeRFlowTiledLoopDenoiser,
    joined_conditions,
    repeated,
)
from .finite_guard import FiniteGuardStep
from .images import image_size
from .inputs import shared_inputs
from .specs import controlnet_spec, vae_spec

logger = logging.get_logger(__name__)


class WarnsOfSqueezing:
    """Mixed in before diffusers' ControlNet input steps, which resize control images to the output's size."""

    def prepare_control_image(self, components: Any, image: Any, width: int, height: int, **settings: Any) -> Tensor:
        given_height, given_width = image_size(image)
        # A crop keeps its proportions, and images are rounded to multiples of 8.
        if settings.get("crops_coords") is None and abs(given_width * height / given_height - width) >= 8:
            logger.warning(
                f"control_image is {given_width}x{given_height}, the output {width}x{height}: the control image is "
                "squeezed. To keep its proportions, crop it, or pass another height and width."
            )
        return super().prepare_control_image(components, image, width, height, **settings)  # type: ignore[misc]


class PeRFlowControlNetInputStep(WarnsOfSqueezing, StableDiffusionXLControlNetInputStep):
    """diffusers' step, with a warning of control images that are squeezed."""

    expected_components = declared(*StableDiffusionXLControlNetInputStep().expected_components, vae_spec())


class PeRFlowControlNetUnionInputStep(WarnsOfSqueezing, StableDiffusionXLControlNetUnionInputStep):
    """diffusers' step, which puts its tensors into the list `control_image`, on a list of its own."""

    expected_components = declared(*StableDiffusionXLControlNetUnionInputStep().expected_components, vae_spec())
    intermediate_outputs = declared(
        *StableDiffusionXLControlNetUnionInputStep().intermediate_outputs,
        OutputParam("control_image", list[Tensor], "The control images, as the ControlNet takes them."),
        OutputParam("control_mode", list[int], "The kind of each control image."),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        if isinstance(state.get("control_image"), list):
            state.set("control_image", list(state.get("control_image")))
        return super().__call__(components, state)


class PeRFlowAutoControlNetInputStep(Assembled, AutoPipelineBlocks):
    """Prepares the control images: for a ControlNet-Union with `control_mode`, else for one or more ControlNets."""

    block_classes = [PeRFlowControlNetUnionInputStep, PeRFlowControlNetInputStep]
    block_names = ["controlnet_union", "controlnet"]
    block_trigger_inputs = ["control_mode", "control_image"]
    description = "Prepares `control_image`, for a ControlNet-Union where `control_mode` is given; else is skipped."


class PeRFlowControlNetLoopDenoiser(PeRFlowLoopDenoiser):
    """The denoiser with a ControlNet, several of them or a ControlNet-Union: one call of it a step.

    A ControlNet-Union is called once for each image, since its attention would mix the images of a batch. A ControlNet
    whose scale is 0 at a step is not called. In `guess_mode` it sees the conditional batches only.
    """

    description = "Loop step that runs ControlNet and UNet once each on all batches of the guider and combines them."
    expected_components = declared(*PeRFlowLoopDenoiser.expected_components, controlnet_spec())
    inputs = declared(
        *PeRFlowLoopDenoiser.inputs,
        *shared_inputs("controlnet_cond", "conditioning_scale", "controlnet_keep", "guess_mode", required=True),
        *shared_inputs("control_type", "control_type_idx"),
    )

    def _residuals(
        self,
        components: Any,
        block_state: Any,
        batches: list[Any],
        i: int,
        t: Tensor,
        sample: Tensor,
        conditions: dict[str, Any],
    ) -> dict[str, Any]:
        scale = np.multiply(block_state.conditioning_scale, block_state.controlnet_keep[i]).tolist()  # of one, or each
        kinds = [batch[BaseGuidance._identifier_key] for batch in batches]
        # Every diffusers guider calls its unconditional batch "pred_uncond".
        controlled = [not (block_state.guess_mode and kind == "pred_uncond") for kind in kinds]
        if not any(controlled) or not np.any(scale):
            return {}
        copies, latents = sum(controlled), block_state.latents
        if copies < len(batches):
            chosen = [one for one, on in zip(batches, controlled, strict=True) if on]
            conditions = joined_conditions(block_state, chosen)
        tensors = {
            "sample": sample[: copies * len(latents), : latents.shape[1]],  # a 9-channel UNet's further ones left out
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "controlnet_cond": repeated(block_state, "controlnet_cond", block_state.controlnet_cond, copies),
            "added_cond_kwargs": {name: conditions[name] for name in conditions.keys() & {"text_embeds", "time_ids"}},
        }
        settings = {"conditioning_scale": scale, "guess_mode": block_state.guess_mode}
        calls = 1
        if block_state.control_type is not None:
            tensors["control_type"] = repeated(block_state, "control_type", block_state.control_type, copies)
            settings["control_type_idx"] = block_state.control_type_idx
            calls = len(latents)
        outputs = []
        for k in range(calls):
            rows = tree_map(lambda tensor, k=k: tensor[k::calls], tensors)
            outputs.append(components.controlnet(rows.pop("sample"), t, **rows, **settings, return_dict=False))
        down = [_spread(_interleave(parts), controlled) for parts in zip(*(down for down, _ in outputs), strict=True)]
        mid = _spread(_interleave([mid for _, mid in outputs]), controlled)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose rows `k`, `k + len(parts)`, ... are `parts[k]`."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), dim=1).flatten(0, 1)


def _spread(rows: Tensor, controlled: Sequence[bool]) -> Tensor:
    """`rows` of the controlled batches at their places among all batches, with zeros at the others."""
    if all(controlled):
        return rows
    parts = rows.chunk(sum(controlled))
    empty = torch.zeros_like(parts[0])
    chosen = iter(parts)
    return torch.cat([next(chosen) if on else empty for on in controlled])


class PeRFlowTiledControlNetLoopDenoiser(PeRFlowTiledLoopDenoiser, PeRFlowControlNetLoopDenoiser):  # type: ignore[override]
    """The tiled denoiser with ControlNets or a ControlNet-Union, which are shown the tile's part of their images."""


class PeRFlowControlNetDenoiseStep(PeRFlowDenoiseStep):
    """The loop with a ControlNet."""

    block_classes = [FiniteGuardStep, PeRFlowControlNetLoopDenoiser, PeRFlowLoopSolverStep]


class PeRFlowInpaintControlNetDenoiseStep(PeRFlowInpaintDenoiseStep):
    """The loop with a ControlNet that keeps the known part of an image."""

    block_classes = [*PeRFlowControlNetDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]
