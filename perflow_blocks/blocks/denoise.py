"""The denoising loop: the guider's batches in one UNet call, then one linear combination.

Blocks inserted into the loop are called as `block(components, block_state, i=i, t=t)`: i is the number of the step, an
int, and t its timestep, a tensor of no dimensions on the device. On `block_state` they find

- `latents`: after the solver those of step i + 1;
- `noise_pred`: the guided prediction, once the denoiser ran;
- `window_index`: the number of the time window of step i, an int;
- `step_plan`, `step_coefficients`, `timesteps`, `num_inference_steps`: the whole schedule;
- the conditioning tensors, such as `prompt_embeds`.

Nothing in the loop is read back from the device; an `.item()` in an inserted block would be the first to do so.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from ..components.specs import conditioning_inputs, guider_spec, latents_input, schedule_inputs, unet_spec
from ..core.plan import apply_step

GUIDER_FIELDS = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "time_ids": ("add_time_ids", "negative_add_time_ids"),
    "image_embeds": ("ip_adapter_embeds", "negative_ip_adapter_embeds"),
}
"""What the UNet takes: the names of the tensors for the guider's conditional and unconditional batches."""


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
            InputParam("num_inference_steps", type_hint=int, required=True, description="Number of denoising steps."),
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
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("noise_pred", Tensor, "The guided prediction of the last step, shaped like the latents.")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        guider = components.guider
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
        _require_embeddings(batches)
        if type(guider).prepare_models is BaseGuidance.prepare_models:
            _predict_together(components.unet, block_state, batches, t)
        else:
            _predict_in_turn(components.unet, guider, block_state, batches, t)
        block_state.noise_pred = guider(batches).pred
        return components, block_state


class PeRFlowLoopSolverStep(ModularPipelineBlocks):
    """One Euler step along the window's straight line: `latents = A[i] latents + B[i] noise_pred`."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Loop step that moves the latents to the next time: one multiply-add with the step's coefficients."

    @property
    def inputs(self) -> list[InputParam]:
        coefficients = (param for param in schedule_inputs() if param.name == "step_coefficients")
        return [
            latents_input(),
            InputParam("noise_pred", type_hint=Tensor, required=True, description="Guided prediction of this step."),
            *coefficients,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", Tensor, "Denoised latents (batch, channels, height/f, width/f).")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        row = block_state.step_coefficients[i]
        block_state.latents = apply_step(block_state.latents, block_state.noise_pred, row[0], row[1])
        return components, block_state


class PeRFlowDenoiseStep(LoopSequentialPipelineBlocks):
    """The loop over the steps of a plan. Another loop is another two lists, or a block inserted into `sub_blocks`."""

    model_name = "stable-diffusion-xl"
    block_classes = [PeRFlowLoopDenoiser, PeRFlowLoopSolverStep]  # noqa: RUF012  (as diffusers declares them)
    block_names = ["denoiser", "solver"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Denoises the latents: for each step of the plan the blocks `denoiser` (guided prediction) and `solver` "
            "(next latents), and those you insert between them."
        )

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec()]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [latents_input(), *schedule_inputs()]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        _require_one_dtype(components.unet, block_state.latents)
        window_index = block_state.step_plan.window_index
        try:
            with self.progress_bar(total=len(window_index)) as progress_bar:
                for i, block_state.window_index in enumerate(window_index):
                    components, block_state = self.loop_step(components, block_state, i=i, t=block_state.timesteps[i])
                    progress_bar.update()
        finally:
            # A guider that remembers its last step may think itself outside its range when the next prompt is encoded.
            components.guider.set_state(step=None, num_inference_steps=None, timestep=None)
        self.set_block_state(state, block_state)
        return components, state


def _require_one_dtype(unet: Any, latents: Tensor) -> None:
    """Latents take the text encoders' type, and transformers loads what a file holds where diffusers loads float32."""
    if latents.dtype != unet.dtype and not torch.is_autocast_enabled(latents.device.type):
        raise ValueError(
            f"the latents are {latents.dtype}, the UNet is {unet.dtype}; load all components with one type, "
            f"pipe.load_components(dtype={unet.dtype}), and pass latents, if any, in that type."
        )


def _require_embeddings(batches: list[Any]) -> None:
    if any(batch.encoder_hidden_states is None for batch in batches):
        raise ValueError(
            "the guider asks for an unconditional batch, but negative_prompt_embeds is None; encode the prompt "
            "with the same guider, or set its guidance_scale to 1."
        )


def _predict_together(unet: Any, block_state: Any, batches: list[Any], t: Tensor) -> None:
    """One call on the concatenation of the batches; each gets its rows of the result as `noise_pred`."""
    fields = {name: [batch[name] for batch in batches] for name in GUIDER_FIELDS}
    joined = {name: _concatenate(name, values) for name, values in fields.items()}
    noise_pred = _call_unet(unet, block_state, joined, t, copies=len(batches))
    for batch, rows in zip(batches, noise_pred.chunk(len(batches)), strict=True):
        batch.noise_pred = rows


def _predict_in_turn(unet: Any, guider: Any, block_state: Any, batches: list[Any], t: Tensor) -> None:
    for batch in batches:
        guider.prepare_models(unet)
        try:
            batch.noise_pred = _call_unet(unet, block_state, {name: batch[name] for name in GUIDER_FIELDS}, t)
        finally:
            guider.cleanup_models(unet)


def _call_unet(unet: Any, block_state: Any, fields: dict[str, Any], t: Tensor, copies: int = 1) -> Tensor:
    """The raw prediction (copies * batch, channels, height, width)."""
    conditions = {name: value for name, value in fields.items() if value is not None}
    return unet(
        _repeat(block_state.latents, copies),
        t,
        encoder_hidden_states=conditions.pop("encoder_hidden_states"),
        timestep_cond=_repeat(block_state.timestep_cond, copies),
        cross_attention_kwargs=block_state.cross_attention_kwargs,
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]


def _concatenate(name: str, values: list[Any]) -> Any:
    """Tensors along the batch; lists (one tensor per IP-Adapter) adapter by adapter; None where nothing is given."""
    if len(values) == 1:
        return values[0]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise ValueError(f"the guider asks for both {' and '.join(GUIDER_FIELDS[name])}; pass both or neither.")
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [torch.cat(parts) for parts in zip(*values, strict=True)]


def _repeat(value: Tensor | None, copies: int) -> Tensor | None:
    return value if value is None or copies == 1 else torch.cat([value] * copies)
