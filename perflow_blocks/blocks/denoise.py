"""The denoising loops: the guider's batches in one UNet call a step, then one linear combination.

Blocks inserted into a loop are called as `block(components, block_state, i=i, t=t)`: i is the number of the step, an
int, and t its timestep, a tensor of no dimensions on the device. On `block_state` they find

- `latents`: after the solver those of step i + 1;
- `noise_pred`: the guided prediction of the last denoiser call, None before the first;
- `window_index`: the number of the time window of step i, an int;
- `step_plan`, `step_coefficients`, `timesteps`, `num_inference_steps`: the whole schedule;
- `guider`: this call's guider;
- `stop_requested`: set it to True, and the loop ends after this step with the clean latents that it predicts;
- the conditioning tensors, such as `prompt_embeds`.

The loop reads nothing back from the device; an `.item()` in an inserted block would be the first to do so.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

from ..core.step_plan import apply_step
from ..delta.merge import MergeRecord, merge_records
from ..delta.model_lock import model_lock
from .declare import Assembled, declared
from .denoiser import PeRFlowControlNetLoopDenoiser, PeRFlowLoopDenoiser
from .finite_guard import ControlNetFiniteGuardStep, FiniteGuardStep
from .guiders import forget_step, guider_of_call, is_batchable, warn_about_few_steps
from .inputs import shared_inputs
from .loop_block import LOOP_PROVIDES, LoopBlock, Repeat
from .specs import guider_spec, unet_spec

_LATENTS = OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f) after this step.")


class PeRFlowLoopSolverStep(ModularPipelineBlocks):
    """One Euler step along the window's straight line: `latents = A[i] latents + B[i] noise_pred`."""

    model_name = "stable-diffusion-xl"
    description = "Loop step that moves the latents to the next time: one multiply-add with the step's coefficients."
    inputs = declared(*shared_inputs("latents", "noise_pred", "step_coefficients", required=True))
    intermediate_outputs = declared(_LATENTS)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        a, b, _, _ = block_state.step_coefficients[i].unbind()
        block_state.latents = apply_step(block_state.latents, block_state.noise_pred, a, b)
        return components, block_state


class PeRFlowLoopKeepKnownStep(LoopBlock):
    """Outside the mask the latents become the known image, noised to the end of the step; at t = 0 the image itself.

    A UNet that sees mask and image through its own 9 channels needs this at the last step only.
    """

    description = "Loop step for inpainting: outside the mask the latents become the known image, noised on the path."
    inputs = declared(
        *shared_inputs("latents", "image_latents", "mask", "noise", "noise_coefficients", required=True),
        *shared_inputs("inpaint_conditioning"),
    )
    intermediate_outputs = declared(_LATENTS)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        table = block_state.noise_coefficients
        if block_state.inpaint_conditioning is None or i + 2 == table.shape[0]:
            signal, sigma = table[i + 1].unbind()
            known = apply_step(block_state.image_latents, block_state.noise, signal, sigma)
            block_state.latents = torch.lerp(known, block_state.latents, block_state.mask)
        return components, block_state

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        """A run that was stopped ends with predicted clean latents, so its known part is the clean image."""
        if block_state.stop_requested:
            block_state.latents = torch.lerp(block_state.image_latents, block_state.latents, block_state.mask)


class PeRFlowDenoiseStep(Assembled, LoopSequentialPipelineBlocks):
    """The loop over the steps of a plan. For another loop, set two other lists or insert a block into `sub_blocks`."""

    model_name = "stable-diffusion-xl"
    block_classes = [FiniteGuardStep, PeRFlowLoopDenoiser, PeRFlowLoopSolverStep]
    block_names = ["finite_guard", "denoiser", "solver"]
    loop_expected_components = declared(guider_spec(), unet_spec())
    loop_inputs = declared(
        *shared_inputs("latents", "timesteps", "num_inference_steps", "step_plan", "step_coefficients", required=True),
        *shared_inputs("guider", "merged_deltas", "cross_attention_kwargs", "callback_on_step_end"),
    )
    loop_intermediate_outputs = declared(
        _LATENTS,
        OutputParam("stop_requested", bool, "Whether a block in the loop ended the run before its last step."),
    )

    @property
    def description(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.sub_blocks)
        return (
            f"Denoises the latents: for each step of the plan the blocks {names}, and those you insert between them."
        )

    @property
    def required_inputs(self) -> list[str]:
        return [name for name in super().required_inputs if name not in LOOP_PROVIDES]

    def _get_inputs(self) -> list[InputParam]:
        return [entry for entry in super()._get_inputs() if entry.name not in LOOP_PROVIDES]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        guider, lock = guider_of_call(components, block_state), model_lock(components.unet)
        warn_about_few_steps(guider, len(block_state.step_plan))
        alone = not is_batchable(guider) or "scale" in (block_state.cross_attention_kwargs or {})
        with lock.changing() if alone else lock.running():
            _require_same_deltas(components.unet, block_state.merged_deltas)
            self._run_all(components, block_state)
        forget_step(guider)  # a stage may go on from this state
        self.set_block_state(state, block_state)
        return components, state

    def _run_all(self, components: Any, block_state: Any) -> None:
        """Runs all steps, with what blocks of the loop do before the first and after the last."""
        block_state.noise_pred, block_state.stop_requested = None, False
        observers = [block for block in self.sub_blocks.values() if isinstance(block, LoopBlock)]
        for block in observers:
            block.start(components, block_state)
        stop = self._run(components, block_state, 0, len(block_state.step_plan))
        for block in observers:
            block.finish(components, block_state, lambda first: self._run(components, block_state, first, stop))

    def _run(self, components: Any, block_state: Any, first: int, stop: int) -> int:
        """Runs the steps from `first` to `stop - 1`, or until a block asks to stop. Returns the next step's number."""
        window_index, timesteps = block_state.step_plan.window_index, block_state.timesteps.unbind()
        block_state.stop_requested = False
        with self.progress_bar(total=stop - first) as progress_bar:
            for i in range(first, stop):
                block_state.window_index = window_index[i]
                self.loop_step(components, block_state, i=i, t=timesteps[i])
                if block_state.callback_on_step_end is not None:
                    given = {"latents": block_state.latents}
                    returned = block_state.callback_on_step_end(components, i, timesteps[i], given)
                    block_state.latents = (returned or given).get("latents", block_state.latents)
                progress_bar.update()
                if block_state.stop_requested:
                    break
        block_state.stop_requested = i + 1 < len(window_index)  # a request at the last step ends nothing early
        if block_state.stop_requested:
            block_state.latents = _predicted_clean(block_state, i)
        return i + 1


class PeRFlowControlNetDenoiseStep(PeRFlowDenoiseStep):
    """The loop with a ControlNet."""

    block_classes = [ControlNetFiniteGuardStep, PeRFlowControlNetLoopDenoiser, PeRFlowLoopSolverStep]


class PeRFlowInpaintDenoiseStep(PeRFlowDenoiseStep):
    """The loop that keeps the known part of an image."""

    block_classes = [*PeRFlowDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]
    block_names = [*PeRFlowDenoiseStep.block_names, "keep_known"]


class PeRFlowInpaintControlNetDenoiseStep(PeRFlowInpaintDenoiseStep):
    """The loop with a ControlNet that keeps the known part of an image."""

    block_classes = [*PeRFlowControlNetDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]


def _predicted_clean(block_state: Any, i: int) -> Tensor:
    """The clean latents that step i predicts, from the latents after it: its start is (latents - B noise_pred) / A."""
    a, b, c, d = block_state.step_coefficients[i].unbind()
    start = apply_step(block_state.latents, block_state.noise_pred, 1.0 / a, -b / a)
    return apply_step(start, block_state.noise_pred, c, d)


def _require_same_deltas(unet: Any, merged: tuple[MergeRecord, ...] | None) -> None:
    """Refuses weights that another thread changed since this call looked at them. The lock is held."""
    lock = model_lock(unet)
    if merged is not None and lock.changed_by not in (None, threading.get_ident()) and merge_records(unet) != merged:
        raise ValueError(
            "another thread changed the deltas of this UNet during the call; use one delta and delta_scale in all "
            "threads, or give each thread a pipeline with a UNet of its own."
        )
