"""Steps of the loop that say where the run is: to a function that may end the run, and to the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import Tensor

from .declare import declared
from .inputs import param, shared_inputs
from .loop_block import LoopBlock

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInfo:
    """Where the run is. All fields but the latents are numbers on the host.

    Attributes:
        step: the step's number, from 0 to num_steps - 1.
        num_steps: how many steps there are.
        timestep: what the UNet was given, usually from 1 to 1000.
        window_index: the number of the step's time window, from 0 (noise) on.
        window_start, window_end: the window's two ends in time; 1 is noise, 0 is data.
        alpha_start, alpha_end: the noise schedule's abar at these ends.
        latents: (images, channels, height/f, width/f) on the device; after the solver those of the next step.
    """

    step: int
    num_steps: int
    timestep: int
    window_index: int
    window_start: float
    window_end: float
    alpha_start: float
    alpha_end: float
    latents: Tensor


StepCallback = Callable[[StepInfo], bool | None]


class StepCallbackStep(LoopBlock):
    """Calls `step_callback(info)` at each step. If it returns True, the run ends with this step.

    A run that ends early has the clean latents that its last step predicts. After the solver
    (`insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")`) the callback sees each step's result.
    Nothing is read from the device, unless the callback does so.

    Raises:
        ValueError: `step_callback` cannot be called, or returns something other than True, False and None.
    """

    description = "Loop step that calls a function with step, window and latents; if it returns True, the run ends."
    inputs = declared(
        *shared_inputs("latents", "step_plan", required=True),
        param("step_callback", StepCallback, "Called with a StepInfo at each step; may return True to end the run."),
    )
    intermediate_outputs = declared(
        OutputParam("stop_requested", bool, "Whether a block in the loop ended the run before its last step.")
    )

    def start(self, components: Any, block_state: Any) -> None:
        callback = block_state.step_callback
        if callback is not None and not callable(callback):
            raise ValueError(f"step_callback={callback!r} cannot be called; pass a function of one StepInfo.")

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.step_callback is not None:
            plan = block_state.step_plan
            of_plan = ("window_index", "window_start", "window_end", "alpha_start", "alpha_end")
            numbers = {"timestep": plan.timesteps[i], **{name: getattr(plan, name)[i] for name in of_plan}}
            info = StepInfo(step=i, num_steps=len(plan), latents=block_state.latents, **numbers)
            answer = block_state.step_callback(info)
            if answer is not None and not isinstance(answer, (bool, np.bool_)):
                returned = f"step_callback returned a value of type {type(answer).__name__}"
                raise ValueError(f"{returned}; return True to end the run, False or None to go on.")
            block_state.stop_requested = block_state.stop_requested or bool(answer)
        return components, block_state


class WindowLogStep(ModularPipelineBlocks):
    """Logs number, times and abar of each time window at its first step. Nothing is read from the device.

    Args:
        level: of Python's logging. INFO shows after, for example, `logging.basicConfig(level=logging.INFO)`.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that logs the number, the times and the noise schedule's abar of each time window."
    inputs = declared(*shared_inputs("step_plan", required=True))

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__()
        self.level = level

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        plan = block_state.step_plan
        if plan.begins_window(i):
            window = f"window {plan.window_index[i]}: time {plan.window_start[i]:g} to {plan.window_end[i]:g}"
            alphas = f"abar {plan.alpha_start[i]:.4g} to {plan.alpha_end[i]:.4g}"
            logger.log(self.level, f"Step {i + 1} of {len(plan)} begins {window}, {alphas}.")
        return components, block_state
