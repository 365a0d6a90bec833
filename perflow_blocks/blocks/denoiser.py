"""The guided prediction of one step: all of the guider's batches in one UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from .control_residuals import control_residuals
from .guiders import is_batchable
from .inputs import (
    conditioning_inputs,
    inpaint_conditioning_input,
    latents_input,
    num_inference_steps_input,
)
from .network_inputs import NetworkInputs
from .specs import guider_spec, unet_spec

GUIDER_FIELDS = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "time_ids": ("add_time_ids", "negative_add_time_ids"),
    "image_embeds": ("ip_adapter_embeds", "negative_ip_adapter_embeds"),
}
"""What the UNet takes: the names of the tensors for the guider's conditional and unconditional batches."""

NETWORK_INPUTS = "_network_inputs"
"""Where the block state of a run keeps its `NetworkInputs`."""


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
        batches = self._batches(components, block_state, i, t)
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

    def _batches(self, components: Any, block_state: Any, i: int, t: Tensor) -> list[Any]:
        """What the guider asks for at this step, a batch with conditions for each prediction."""
        guider = components.guider
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
        _require_embeddings(batches)
        vars(block_state).setdefault(NETWORK_INPUTS, NetworkInputs())
        return batches

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        """The raw prediction (len(batches) * batch, channels, height/f, width/f), from one UNet call."""
        return predict_noise(self._networks(components), t, **self._gather(block_state, batches, i))

    def _networks(self, components: Any) -> tuple[Any, ...]:
        """The UNet, and the ControlNet where there is one."""
        return (components.unet,)

    def _gather(self, block_state: Any, batches: list[Any], i: int) -> dict[str, Any]:
        """The arguments of `predict_noise` for these batches, all tensors but for settings."""
        inputs: NetworkInputs = block_state[NETWORK_INPUTS]
        copies = len(batches)
        settings = {
            "timestep_cond": inputs.repeat("timestep_cond", block_state.timestep_cond, copies),
            "cross_attention_kwargs": block_state.cross_attention_kwargs,
        }
        return {
            "sample": inputs.samples(block_state.latents, copies, block_state.inpaint_conditioning),
            "conditions": join_conditions(inputs, batches),
            "settings": settings,
        }


def predict_noise(
    networks: Sequence[Any],
    t: Tensor,
    sample: Tensor,
    conditions: Mapping[str, Any],
    settings: Mapping[str, Any],
    control: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the UNet, after one of the ControlNet if that is in force: tensors in, a tensor out.

    Args:
        networks: the UNet, and the ControlNet where there is one.
        t: the timestep, of no dimensions.
        sample: (rows, channels, height/f, width/f).
        conditions: by the UNet's names, `rows` of each.
        settings: further arguments of the UNet.
        control: arguments of `control_residuals`; None runs the UNet alone.

    Returns:
        The raw prediction, of the latents' channels.
    """
    unet, *controlnets = networks
    added = {name: value for name, value in conditions.items() if name != "encoder_hidden_states"}
    residuals = {} if control is None else control_residuals(controlnets[0], t, **control)
    return unet(
        sample,
        t,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        added_cond_kwargs=added,
        return_dict=False,
        **settings,
        **residuals,
    )[0]


def _require_embeddings(batches: list[Any]) -> None:
    if any(batch.encoder_hidden_states is None for batch in batches):
        raise ValueError(
            "the guider asks for an unconditional batch, but negative_prompt_embeds is None; encode the prompt "
            "with the same guider, or set its guidance_scale to 1."
        )


def join_conditions(inputs: NetworkInputs, batches: list[Any]) -> dict[str, Any]:
    """The batches' tensors by the UNet's name, concatenated along the batch; without those that are not given."""
    joined = {}
    for name in GUIDER_FIELDS:
        values = [batch[name] for batch in batches]
        if all(value is None for value in values):
            continue
        if any(value is None for value in values):
            raise ValueError(f"the guider asks for both {' and '.join(GUIDER_FIELDS[name])}; pass both.")
        joined[name] = inputs.join(name, values)
    return joined
