"""The guided prediction of one step: all of the guider's batches in one UNet call, with or without ControlNets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from ..components.guiders import is_batchable
from ..components.inputs import (
    conditioning_inputs,
    controlnet_inputs,
    inpaint_conditioning_input,
    latents_input,
    num_inference_steps_input,
)
from ..components.specs import controlnet_spec, guider_spec, unet_spec

GUIDER_FIELDS = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "time_ids": ("add_time_ids", "negative_add_time_ids"),
    "image_embeds": ("ip_adapter_embeds", "negative_ip_adapter_embeds"),
}
"""What the UNet takes: the names of the tensors for the guider's conditional and unconditional batches."""

UNCONDITIONAL = "pred_uncond"
"""What every diffusers guider calls its unconditional batch."""


class PeRFlowLoopDenoiser(ModularPipelineBlocks):
    """Predicts the noise with guidance: one UNet call for all the batches that the guider asks for.

    A guider that hooks the model differently for each batch (skip-layer, perturbed attention, auto guidance) gets one
    call for each. The two ways agree to rounding. The guidance formula is always the guider's own.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Loop step that asks the guider for its batches, runs the UNet on all at once and combines them."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            latents_input(),
            num_inference_steps_input(),
            *conditioning_inputs(),
            InputParam(
                "timestep_cond",
                type_hint=Tensor,
                description="Guidance embedding (batch, width) for UNets that were distilled with one.",
            ),
            InputParam(
                "cross_attention_kwargs",
                type_hint=dict[str, Any],
                description="Arguments for attention processors, such as a LoRA scale.",
            ),
            inpaint_conditioning_input(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("noise_pred", Tensor, "The guided prediction of the last step, shaped like the latents.")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        guider, unet = components.guider, components.unet
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
        _require_embeddings(batches)
        if is_batchable(guider):
            noise_pred = self._predict(components, block_state, batches, i, t)
            for batch, rows in zip(batches, noise_pred.chunk(len(batches)), strict=True):
                batch.noise_pred = rows
        else:
            for batch in batches:
                try:
                    guider.prepare_models(unet)
                    batch.noise_pred = self._predict(components, block_state, [batch], i, t)
                finally:
                    guider.cleanup_models(unet)
        block_state.noise_pred = guider(batches).pred
        if block_state.noise_pred.shape != block_state.latents.shape:
            raise ValueError(
                f"{type(guider).__name__} returns a prediction of shape {tuple(block_state.noise_pred.shape)} for "
                f"latents of {tuple(block_state.latents.shape)}; use another size, such as powers of two."
            )
        return components, block_state

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        """The raw prediction (len(batches) * batch, channels, height/f, width/f), from one UNet call."""
        conditions = _join(batches)
        residuals = self._residuals(components, block_state, batches, conditions, i, t)
        sample = block_state.latents
        if block_state.inpaint_conditioning is not None:
            sample = torch.cat([sample, block_state.inpaint_conditioning], dim=1)
        return components.unet(
            _repeat(sample, len(batches)),
            t,
            encoder_hidden_states=conditions.pop("encoder_hidden_states"),
            timestep_cond=_repeat(block_state.timestep_cond, len(batches)),
            cross_attention_kwargs=block_state.cross_attention_kwargs,
            added_cond_kwargs=conditions,
            return_dict=False,
            **residuals,
        )[0]

    def _residuals(
        self, components: Any, block_state: Any, batches: list[Any], conditions: dict[str, Any], i: int, t: Tensor
    ) -> dict[str, Any]:
        """What else the UNet is given for these batches, whose joined conditions are `conditions`."""
        return {}


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

    def _residuals(
        self, components: Any, block_state: Any, batches: list[Any], conditions: dict[str, Any], i: int, t: Tensor
    ) -> dict[str, Any]:
        scale = _scale_at(block_state, i)
        controlled = [batch for batch in batches if not (block_state.guess_mode and _is_unconditional(batch))]
        if not controlled or not any(scale if isinstance(scale, list) else [scale]):
            return {}
        copies = len(controlled)
        if copies < len(batches):
            conditions = _join(controlled)
        inputs = {
            "sample": _repeat(block_state.latents, copies),
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "controlnet_cond": _repeat(block_state.controlnet_cond, copies),
            "added_cond_kwargs": {name: conditions[name] for name in ("text_embeds", "time_ids")},
        }
        if block_state.control_type is not None:
            inputs["control_type"] = _repeat(block_state.control_type, copies)
        # The attention of a ControlNet-Union runs over the batch, which would mix the pictures.
        pictures = 1 if block_state.control_type is None else block_state.latents.shape[0]
        settings = {"conditioning_scale": scale, "guess_mode": block_state.guess_mode, "return_dict": False}
        if block_state.control_type is not None:
            settings["control_type_idx"] = block_state.control_type_idx
        outputs = []
        for k in range(pictures):
            chosen = _every(inputs, k, pictures)
            outputs.append(components.controlnet(chosen.pop("sample"), t, **chosen, **settings))
        down = [_interleave(parts) for parts in zip(*(output[0] for output in outputs), strict=True)]
        mid = _interleave([output[1] for output in outputs])
        if copies < len(batches):
            down, mid = [_spread(rows, batches, controlled) for rows in down], _spread(mid, batches, controlled)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _require_embeddings(batches: list[Any]) -> None:
    if any(batch.encoder_hidden_states is None for batch in batches):
        raise ValueError(
            "the guider asks for an unconditional batch, but negative_prompt_embeds is None; encode the prompt "
            "with the same guider, or set its guidance_scale to 1."
        )


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


def _join(batches: list[Any]) -> dict[str, Any]:
    """The batches' tensors by the UNet's name, concatenated along the batch; without those that are not given."""
    joined = {name: _concatenate(name, [batch[name] for batch in batches]) for name in GUIDER_FIELDS}
    return {name: value for name, value in joined.items() if value is not None}


def _concatenate(name: str, values: list[Any]) -> Any:
    """Tensors along the batch; lists (one tensor per IP-Adapter) adapter by adapter; None where nothing is given."""
    if len(values) == 1:
        return values[0]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise ValueError(f"the guider asks for both {' and '.join(GUIDER_FIELDS[name])}; pass both.")
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [torch.cat(parts) for parts in zip(*values, strict=True)]


def _repeat(value: Any, copies: int) -> Any:
    """A tensor, or each tensor of a list, `copies` times along the batch; None as it is."""
    if value is None or copies == 1:
        return value
    return torch.cat([value] * copies) if isinstance(value, Tensor) else [_repeat(entry, copies) for entry in value]


def _every(value: Any, first: int, step: int) -> Any:
    """Rows `first`, `first + step`, ... of each tensor, also in lists and dictionaries."""
    if isinstance(value, dict):
        return {name: _every(entry, first, step) for name, entry in value.items()}
    return value[first::step] if isinstance(value, Tensor) else [_every(entry, first, step) for entry in value]


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose rows `k`, `k + len(parts)`, ... are `parts[k]`."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), dim=1).flatten(0, 1)


def _spread(rows: Tensor, batches: Sequence[Any], controlled: Sequence[Any]) -> Tensor:
    """`rows` of the controlled batches at their places among all batches, with zeros at the others."""
    parts = iter(rows.chunk(len(controlled)))
    chosen = {id(batch) for batch in controlled}
    empty = torch.zeros_like(rows[: rows.shape[0] // len(controlled)])
    return torch.cat([next(parts) if id(batch) in chosen else empty for batch in batches])
