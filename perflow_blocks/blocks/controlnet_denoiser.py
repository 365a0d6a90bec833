"""The guided prediction of one step with ControlNets: one call of them a step, beside the UNet's."""

from __future__ import annotations

from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam

from .denoiser import NETWORK_INPUTS, PeRFlowLoopDenoiser, join_conditions
from .inputs import controlnet_inputs
from .network_inputs import NetworkInputs
from .specs import controlnet_spec

UNCONDITIONAL = "pred_uncond"
"""What every diffusers guider calls its unconditional batch."""


class PeRFlowControlNetLoopDenoiser(PeRFlowLoopDenoiser):
    """The same with a ControlNet, several of them or a ControlNet-Union: one call of it a step, beside the UNet's.

    A ControlNet-Union is called once for each picture, since it lets the pictures of a batch see one another.

    A ControlNet whose scale is 0 at a step (`control_guidance_start`, `control_guidance_end`) is not called. In
    `guess_mode` it sees the conditional batches only.
    """

    @property
    def description(self) -> str:
        return "Loop step that runs ControlNet and UNet once each on all batches of the guider and combines them."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, controlnet_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, *controlnet_inputs()]

    def _networks(self, components: Any) -> tuple[Any, ...]:
        return (components.unet, components.controlnet)

    def _gather(self, block_state: Any, batches: list[Any], i: int) -> dict[str, Any]:
        call = super()._gather(block_state, batches, i)
        scale = _scale_at(block_state, i)
        layout = [not (block_state.guess_mode and _is_unconditional(batch)) for batch in batches]
        if not any(layout) or not any(scale if isinstance(scale, list) else [scale]):
            return call
        inputs: NetworkInputs = block_state[NETWORK_INPUTS]
        copies, conditions = sum(layout), call["conditions"]
        if copies < len(batches):
            controlled = [batch for batch, chosen in zip(batches, layout, strict=True) if chosen]
            conditions = join_conditions(inputs, controlled)
        latents = block_state.latents
        tensors = {
            "sample": call["sample"][: copies * len(latents), : latents.shape[1]],
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "controlnet_cond": inputs.repeat("controlnet_cond", block_state.controlnet_cond, copies),
            "added_cond_kwargs": {name: conditions[name] for name in ("text_embeds", "time_ids")},
        }
        settings = {"conditioning_scale": scale, "guess_mode": block_state.guess_mode}
        pictures = 1
        if block_state.control_type is not None:
            tensors["control_type"] = inputs.repeat("control_type", block_state.control_type, copies)
            settings["control_type_idx"] = block_state.control_type_idx
            pictures = len(latents)  # the attention of a ControlNet-Union runs over the batch, and would mix them
        control = {"tensors": tensors, "settings": settings, "pictures": pictures, "layout": layout}
        return {**call, "control": control}


def _is_unconditional(batch: Any) -> bool:
    return batch[BaseGuidance._identifier_key] == UNCONDITIONAL


def _scale_at(block_state: Any, i: int) -> float | list[float]:
    """The ControlNets' scale at step i: a number for one ControlNet, a list for several, or for a union's controls."""
    keep, scale = block_state.controlnet_keep[i], block_state.conditioning_scale
    if isinstance(keep, list):
        scales = scale if isinstance(scale, list) else [scale] * len(keep)
        return [float(s * k) for s, k in zip(scales, keep, strict=True)]
    if isinstance(scale, list):
        return [float(s * keep) for s in scale] if block_state.control_type is not None else float(scale[0] * keep)
    return float(scale * keep)
