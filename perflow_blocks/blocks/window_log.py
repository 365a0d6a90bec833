"""The step of the loop that logs when a time window begins."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.utils import logging
from torch import Tensor

from .inputs import step_plan_input

logger = logging.get_logger(__name__)


class WindowLogStep(ModularPipelineBlocks):
    """Logs number, times and abar of each time window at its first step; reads nothing from the device.

    Args:
        level: of Python's logging. The default, INFO, shows once logging is set to it, for example with
            `logging.basicConfig(level=logging.INFO)`.
    """

    model_name = "stable-diffusion-xl"

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__()
        self.level = level

    @property
    def description(self) -> str:
        return "Loop step that logs the number, the times and the noise schedule's abar of each time window."

    @property
    def inputs(self) -> list[InputParam]:
        return [step_plan_input()]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        plan = block_state.step_plan
        if plan.begins_window(i):
            logger.log(
                self.level,
                "Step %d of %d begins window %d: time %g to %g, abar %.4g to %.4g.",
                i + 1,
                len(plan),
                plan.window_index[i],
                plan.window_start[i],
                plan.window_end[i],
                plan.alpha_start[i],
                plan.alpha_end[i],
            )
        return components, block_state
