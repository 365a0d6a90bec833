"""The guided prediction of one step: all of the guider's batches in one UNet call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from torch import Tensor

from .declare import declared
from .guiders import guider_of_call, is_batchable
from .inputs import conditioning_inputs, param, shared_inputs
from .specs import guider_spec, unet_spec

GUIDER_FIELDS = {  # what the UNet takes: the tensors' names for the guider's conditional and unconditional batches
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "time_ids": ("add_time_ids", "negative_add_time_ids"),
    "image_embeds": ("ip_adapter_embeds", "negative_ip_adapter_embeds"),
}

T = TypeVar("T")


class PeRFlowLoopDenoiser(ModularPipelineBlocks):
    """Predicts the noise with guidance: one UNet call for all the batches that the guider asks for.

    A guider that hooks the model differently for each batch (skip-layer, perturbed attention, auto guidance) gets one
    call for each. The two ways agree to rounding. The guidance formula is always the guider's own.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that asks the guider for its batches, runs the UNet on all at once and combines them."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(
        *shared_inputs("latents", "num_inference_steps", required=True),
        *conditioning_inputs(),
        param("timestep_cond", Tensor, "Guidance embedding (batch, width) for UNets that were distilled with one."),
        *shared_inputs("cross_attention_kwargs", "inpaint_conditioning", "guider"),
    )
    intermediate_outputs = declared(
        OutputParam("noise_pred", Tensor, "The guided prediction of the last step, shaped like the latents.")
    )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        guider, unet = guider_of_call(components, block_state), components.unet
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
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
        inputs, copies = network_inputs(block_state), len(batches)
        sample = inputs.samples(block_state.latents, copies, block_state.inpaint_conditioning)
        conditions = inputs.conditions(batches)
        residuals = self._residuals(components, block_state, batches, i, t, sample, conditions)
        return components.unet(
            sample,
            t,
            encoder_hidden_states=conditions.pop("encoder_hidden_states"),
            timestep_cond=inputs.repeat("timestep_cond", block_state.timestep_cond, copies),
            cross_attention_kwargs=block_state.cross_attention_kwargs,
            added_cond_kwargs=conditions,
            return_dict=False,
            **residuals,
        )[0]

    def _residuals(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Further arguments of the UNet, from a ControlNet that may use its `sample` and `conditions`; none here."""
        return {}


class NetworkInputs:
    """Joined conditions that stay from step to step, and one buffer that each step writes its samples into.

    So a step allocates nothing before the network runs, and the network's inputs stay at the same addresses, which a
    CUDA graph needs. A value is made again once what it was made from is another tensor or was written to in place.
    Serves one run of the loop, and keeps what it was given alive.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any, Any]] = {}
        self._buffer: Tensor | None = None

    def conditions(self, batches: list[Any]) -> dict[str, Any]:
        """The batches' tensors by the UNet's names, joined along the batch, in a new dictionary. Omits what is None.

        Raises:
            ValueError: one batch has a condition that another one lacks.
        """
        if any(batch.encoder_hidden_states is None for batch in batches):
            raise ValueError(
                "the guider asks for an unconditional batch, but negative_prompt_embeds is None; encode the prompt "
                "with the same guider, or set its guidance_scale to 1."
            )
        joined = {}
        for name, fields in GUIDER_FIELDS.items():
            values = [getattr(batch, name) for batch in batches]
            missing = sum(value is None for value in values)
            if 0 < missing < len(values):
                raise ValueError(f"the guider asks for both {' and '.join(fields)}; pass both.")
            if not missing:
                joined[name] = self.join(name, values)
        return joined

    def join(self, name: str, values: Sequence[Any]) -> Any:
        """Tensors one after the other along the batch; lists (one tensor per IP-Adapter) entry by entry."""
        if len(values) == 1:
            return values[0]
        return self._keep(f"{name} of {len(values)}", list(values), lambda: _concatenate(values))

    def repeat(self, name: str, value: Any, copies: int) -> Any:
        """A tensor, or each tensor of a list, `copies` times along the batch; None as it is."""
        return None if value is None else self.join(name, [value] * copies)

    def samples(self, latents: Tensor, copies: int, also: Tensor | None = None) -> Tensor:
        """The latents `copies` times along the batch, with the channels of `also` behind theirs.

        With latents (batch, channels, height, width) and `also` (batch, further, height, width) this is (copies *
        batch, channels + further, height, width): the buffer, valid until the next call, or the latents themselves.
        """
        if also is None and copies == 1:
            return latents
        batch, channels, *plane = latents.shape
        shape = (copies, batch, channels + (0 if also is None else also.shape[1]), *plane)
        buffer = self._buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != latents.dtype or buffer.device != latents.device:
            self._buffer = buffer = latents.new_empty(shape)
            self._kept.pop("also", None)
        if also is not None:
            self._keep("also", also, lambda: buffer[:, :, channels:].copy_(also))
        buffer[:, :, :channels].copy_(latents)
        return buffer.flatten(0, 1)

    def _keep(self, name: str, source: Any, make: Callable[[], T]) -> T:
        """What `make` made of the source last time, if the source is the same and unchanged."""
        state = _state(source)
        before = self._kept.get(name)
        if before is not None and before[0] == state:
            return before[2]
        made = make()
        if state is not None:
            self._kept[name] = (state, source, made)  # holds the source, so that no other object gets its id
        return made


def network_inputs(block_state: Any) -> NetworkInputs:
    """The `NetworkInputs` of this run, made at the first step."""
    if block_state["_network_inputs"] is None:
        block_state["_network_inputs"] = NetworkInputs()
    return block_state["_network_inputs"]


def _state(value: Any) -> Any:
    """A tensor's, or a list's, identity and version; None for inference tensors, which count no writes."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else (id(value), value._version)
    states = [_state(entry) for entry in value]
    return None if None in states else states


def _concatenate(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [torch.cat(parts) for parts in zip(*values, strict=True)]
