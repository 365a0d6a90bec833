"""The denoising loops: the guider's batches in one UNet call a step, then one linear combination.

Blocks inserted into a loop are called as `block(components, block_state, i=i, t=t)`: i is the number of the step, an
int, and t its timestep, a tensor of no dimensions on the device. On `block_state` they find

- `latents`: after the solver those of step i + 1;
- `noise_pred`: the guided prediction, once the denoiser ran;
- `window_index`: the number of the time window of step i, an int;
- `step_plan`, `step_coefficients`, `timesteps`, `num_inference_steps`: the whole schedule;
- `stop_requested`: set it to True, and the loop ends after this step with the clean latents that it predicts;
- the conditioning tensors, such as `prompt_embeds`.

Nothing in the loop is read back from the device; an `.item()` in an inserted block would be the first to do so.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from ..core.step_plan import apply_step
from .controlnet_denoiser import PeRFlowControlNetLoopDenoiser
from .declare import Assembled
from .denoiser import PeRFlowLoopDenoiser
from .finite_guard import ControlNetFiniteGuardStep, FiniteGuardStep
from .guiders import warn_about_few_steps
from .inputs import latents_input, schedule_inputs
from .keep_known import PeRFlowLoopKeepKnownStep
from .loop_block import LoopBlock
from .solver import PeRFlowLoopSolverStep
from .specs import guider_spec, unet_spec


class PeRFlowDenoiseStep(Assembled, LoopSequentialPipelineBlocks):
    """The loop over the steps of a plan. Another loop is another two lists, or a block inserted into `sub_blocks`."""

    model_name = "stable-diffusion-xl"
    block_classes = [FiniteGuardStep, PeRFlowLoopDenoiser, PeRFlowLoopSolverStep]
    block_names = ["finite_guard", "denoiser", "solver"]

    @property
    def description(self) -> str:
        return (
            "Denoises the latents: for each step of the plan the blocks "
            f"{', '.join(f'`{name}`' for name in self.sub_blocks)}, and those you insert between them."
        )

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec()]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [latents_input(), *schedule_inputs()]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", Tensor, "Denoised latents (batch, channels, height/f, width/f)."),
            OutputParam("stop_requested", bool, "Whether a block in the loop ended the run before its last step."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        _require_one_dtype(components.unet, block_state.latents)
        warn_about_few_steps(components.guider, len(block_state.step_plan))
        block_state.stop_requested = False
        observers = [block for block in self.sub_blocks.values() if isinstance(block, LoopBlock)]
        try:
            for block in observers:
                block.start(components, block_state)
            stop = self._run(components, block_state, 0, len(block_state.step_plan))
            for block in observers:
                block.finish(components, block_state, lambda first: self._run(components, block_state, first, stop))
        finally:
            # A guider that remembers its last step may think itself outside its range when the next prompt is encoded.
            components.guider.set_state(step=None, num_inference_steps=None, timestep=None)
        self.set_block_state(state, block_state)
        return components, state

    def _run(self, components: Any, block_state: Any, first: int, stop: int) -> int:
        """The steps from `first` to `stop - 1`, or until a block asks to stop; the number of the step that is next."""
        window_index = block_state.step_plan.window_index
        block_state.stop_requested = False
        with self.progress_bar(total=stop - first) as progress_bar:
            for i in range(first, stop):
                block_state.window_index = window_index[i]
                self.loop_step(components, block_state, i=i, t=block_state.timesteps[i])
                progress_bar.update()
                if block_state.stop_requested:
                    break
        block_state.stop_requested = i + 1 < len(window_index)  # at the last step the run is complete all the same
        if block_state.stop_requested:
            block_state.latents = _predicted_clean(block_state, i)
        return i + 1


class PeRFlowControlNetDenoiseStep(PeRFlowDenoiseStep):
    """The loop with a ControlNet."""

    block_classes = [
        ControlNetFiniteGuardStep,
        PeRFlowControlNetLoopDenoiser,
        PeRFlowLoopSolverStep,
    ]


class PeRFlowInpaintDenoiseStep(PeRFlowDenoiseStep):
    """The loop that keeps the known part of a picture."""

    block_classes = [*PeRFlowDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]
    block_names = [*PeRFlowDenoiseStep.block_names, "keep_known"]


class PeRFlowInpaintControlNetDenoiseStep(PeRFlowInpaintDenoiseStep):
    """The loop with a ControlNet that keeps the known part of a picture."""

    block_classes = [*PeRFlowControlNetDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]


def _predicted_clean(block_state: Any, i: int) -> Tensor:
    """The clean latents that step i predicts, from the latents after it: its start is (latents - B noise_pred) / A."""
    a, b, c, d = block_state.step_coefficients[i].unbind()
    start = apply_step(block_state.latents, block_state.noise_pred, 1.0 / a, -b / a)
    return apply_step(start, block_state.noise_pred, c, d)


def _require_one_dtype(unet: Any, latents: Tensor) -> None:
    """Latents take the text encoders' type, and transformers loads what a file holds where diffusers loads float32."""
    if latents.dtype == next(unet.parameters()).dtype:  # spares `unet.dtype`, which looks at all the weights
        return
    if latents.dtype != unet.dtype and not torch.is_autocast_enabled(latents.device.type):
        raise ValueError(
            f"the latents are {latents.dtype}, the UNet is {unet.dtype}; load all components with one type, "
            f"pipe.load_components(dtype={unet.dtype}), and pass latents, if any, in that type."
        )
