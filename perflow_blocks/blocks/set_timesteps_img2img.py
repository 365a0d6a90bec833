"""The window set-up of image-to-image and inpainting: where on the path a given picture enters, and how noisy."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.utils import logging

from ..core.step_plan import StepPlan
from ..schedulers import PeRFlowScheduler
from .denoising_range import before, check_denoising_range, check_strength, end_time, start_time
from .inputs import denoising_start_input, noising_input
from .set_timesteps import PeRFlowSetTimestepsStep

logger = logging.get_logger(__name__)


class PeRFlowImg2ImgSetTimestepsStep(PeRFlowSetTimestepsStep):
    """Sets up the time windows of a run that starts from a picture (arXiv 2405.07510).

    The run starts at the time `strength`: the steps of the whole schedule below it, after a first step from `strength`
    itself where the schedule has none. At 4 steps strength 0.3 makes two steps (from 0.3 and 0.25), 0.5 two, 0.8 four
    and 0.1 one; there is always at least one. With `denoising_start` the run starts at the window boundary nearest to
    where the earlier run ended, and `strength` has no say.

    Raises:
        ValueError: `strength` outside (0, 1], `denoising_start` outside (0, 1), `denoising_end` outside (0, 1] or not
            above the start once both are at window boundaries, an unknown `noising`, or what the parent raises.
    """

    default_strength = 0.3

    @property
    def description(self) -> str:
        return (
            "The window set-up for a run that starts from a picture: enters the path at `strength`, or at the window "
            "boundary where an earlier run left off, and says how to noise a picture at each step."
        )

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *super().inputs,
            InputParam(
                "strength",
                type_hint=float,
                default=self.default_strength,
                description="Time in (0, 1] at which the picture enters: 1 redraws everything, small values little.",
            ),
            denoising_start_input(),
            noising_input(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            *super().intermediate_outputs,
            OutputParam(
                "noise_coefficients",
                torch.Tensor,
                "(P, Q) of `P x0 + Q noise` at the start of each step and at the end, (num_steps + 1, 2), float32.",
            ),
        ]

    def prepare(self, components: Any, block_state: Any) -> None:
        super().prepare(components, block_state)
        table = components.scheduler.noise_coefficients(block_state.step_plan, block_state.noising)
        block_state.noise_coefficients = table.float().to(components._execution_device)

    def section(self, scheduler: PeRFlowScheduler, whole: StepPlan, block_state: Any) -> StepPlan:
        """The part from `strength` or `denoising_start` to `denoising_end`."""
        check_denoising_range(block_state.denoising_start, block_state.denoising_end)
        if block_state.denoising_start is None:
            check_strength(block_state.strength)
            start = min(float(block_state.strength), whole.times[0])  # custom schedules may begin below 1
        else:
            start = start_time(scheduler.windows, block_state.denoising_start)
        end = end_time(scheduler.windows, block_state.denoising_end)
        if start <= end:
            raise ValueError(
                f"nothing is left to run from time {start:.4g} to time {end:.4g} (1 is noise, 0 the picture); lower "
                "denoising_start, or raise denoising_end or strength."
            )
        plan = before(scheduler.plan_from(start, whole), end)
        logger.info("%d of %d steps are run, from time %.4g to %.4g.", len(plan), len(whole), plan.times[0], end)
        return plan


class PeRFlowInpaintSetTimestepsStep(PeRFlowImg2ImgSetTimestepsStep):
    """The same for inpainting, where the hole is painted anew unless `strength` says otherwise."""

    default_strength = 1.0
