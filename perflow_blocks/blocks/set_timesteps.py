"""The window set-up: whatever scheduler the repository brought becomes PeRFlow's, and the steps become a table."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.utils import logging

from ..core.step_plan import StepPlan
from ..core.windows import tile_windows
from ..delta.recipe import DeltaRecipe
from ..schedulers.scheduling_perflow import PeRFlowScheduler, is_perflow_scheduler
from .denoising_range import before, end_time
from .inputs import delta_recipe_input, denoising_end_input
from .specs import (
    DEFAULT_NUM_INFERENCE_STEPS,
    guider_spec,
    schedule_config_specs,
    scheduler_spec,
    unet_spec,
)

logger = logging.get_logger(__name__)

OWN_ATTRIBUTE = "_perflow_made_in_set_up"
"""On a scheduler that this block made, to tell it from one that a user set: the configuration it was made from."""


class PeRFlowSetTimestepsStep(ModularPipelineBlocks):
    """Sets up the time windows of a text-to-image run (arXiv 2405.07510).

    What the configuration says about the windows wins over the merged delta's recipe, which wins over the defaults
    (`ddim_eps`, 4 windows, 6 steps); an argument of the call wins over all. The noise schedule is the delta's, or that
    of the scheduler that is replaced. A PeRFlowScheduler that you set stays as
    it is; one that this block made follows configuration and delta from call to call.

    Raises:
        ValueError: a number of steps below 1, timesteps that make no schedule, `denoising_end` outside (0, 1], or a
            scheduler without betas.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return (
            "Turns the scheduler into a PeRFlowScheduler with the windows the weights were distilled for, lays the "
            "steps over the windows and puts each step's coefficients on the device."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        # The guider is unused here: the first block that names it decides its default.
        return [guider_spec(), scheduler_spec(), unet_spec()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return schedule_config_specs()

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "num_inference_steps",
                type_hint=int,
                description="Denoising steps, at least 1; fewer than the windows are raised to one per window.",
            ),
            InputParam(
                "timesteps",
                type_hint=list[int],
                description="Descending timesteps that hold every window start; they win over `num_inference_steps`.",
            ),
            denoising_end_input(),
            delta_recipe_input(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("timesteps", torch.Tensor, "Timesteps (num_steps,), integers on the device."),
            OutputParam("num_inference_steps", int, "Number of denoising steps that are run."),
            OutputParam("step_plan", StepPlan, "The steps on the host: times, windows, coefficients."),
            OutputParam("step_coefficients", torch.Tensor, "The plan's table (num_steps, 4) on the device, float32."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        self.prepare(components, block_state)
        self.set_block_state(state, block_state)
        return components, state

    def prepare(self, components: Any, block_state: Any) -> None:
        """Puts the scheduler in place and what the loop needs of its plan on `block_state`."""
        recipe = block_state.delta_recipe or DeltaRecipe()
        _place_scheduler(components, window_settings(components.config, recipe), recipe.noise_schedule())
        scheduler, device = components.scheduler, components._execution_device
        if block_state.timesteps is not None:
            scheduler.set_timesteps(timesteps=block_state.timesteps, device=device)
        else:
            defaults = (components.config.default_num_inference_steps, recipe.num_inference_steps)
            steps = _first(block_state.num_inference_steps, *defaults, DEFAULT_NUM_INFERENCE_STEPS)
            scheduler.set_timesteps(steps, device=device)
        plan = self.section(scheduler, scheduler.plan, block_state)
        block_state.timesteps = torch.tensor(plan.timesteps).to(device)
        block_state.num_inference_steps = len(plan)
        block_state.step_plan = plan
        block_state.step_coefficients = plan.coefficients(device)

    def section(self, scheduler: PeRFlowScheduler, whole: StepPlan, block_state: Any) -> StepPlan:
        """What is run of the scheduler's whole plan: here all of it, or the part before `denoising_end`."""
        return before(whole, end_time(scheduler.windows, block_state.denoising_end))


def window_settings(config: Any, recipe: DeltaRecipe) -> dict[str, Any]:
    """The settings of a PeRFlowScheduler that configuration or recipe name; the configuration wins.

    Number and boundaries of the windows belong together, so both come from one of the two.
    """
    source = recipe if config.num_time_windows is None and config.window_boundaries is None else config
    settings: dict[str, Any] = {
        "prediction_type": _first(config.prediction_type, recipe.prediction_type),
        "num_time_windows": source.num_time_windows,
        "window_boundaries": source.window_boundaries,
    }
    _warn_of_a_clash("prediction_type", config.prediction_type, recipe.prediction_type)
    if source is config:
        _warn_of_a_clash("windows", _boundaries(config), _boundaries(recipe))
    return {name: value for name, value in settings.items() if value is not None}


def _boundaries(source: Any) -> tuple[float, ...] | None:
    """The windows that a configuration or a recipe describes; None where it is silent."""
    if source.num_time_windows is None and source.window_boundaries is None:
        return None
    return tile_windows(num_windows=source.num_time_windows, boundaries=source.window_boundaries).boundaries


def _warn_of_a_clash(name: str, configured: Any, distilled: Any) -> None:
    if None not in (configured, distilled) and configured != distilled:
        logger.warning(
            "The configuration's %s=%s is used, but the merged delta was distilled with %s.",
            name,
            configured,
            distilled,
        )


def _place_scheduler(components: Any, settings: dict[str, Any], noise_schedule: dict[str, Any]) -> None:
    """Puts a PeRFlowScheduler with the settings in place, unless the user set one.

    Its noise schedule is that which the delta was distilled on, and where the delta does not say that of the scheduler
    it replaces.
    """
    current = components.scheduler
    own = vars(current).get(OWN_ATTRIBUTE) if current is not None else None
    if is_perflow_scheduler(current) and own is None:
        _warn_of_other_windows(current, {**settings, **noise_schedule})
        return
    source = own["source"] if own is not None else current and dict(current.config)
    wanted = PeRFlowScheduler.from_scheduler(source, **settings, **noise_schedule)
    if own is None or dict(wanted.config) != dict(current.config):
        for name, value in noise_schedule.items():
            if source and source.get(name, value) != value:
                logger.warning(
                    "The merged delta was distilled with %s=%s, which is used instead of the scheduler's %s.",
                    name,
                    value,
                    source[name],
                )
        setattr(wanted, OWN_ATTRIBUTE, {"source": source})
        remember_source(wanted, components)
        components.update_components(scheduler=wanted)


def _first(*values: Any) -> Any:
    """The first that is not None (0 counts as given, so that it is refused rather than replaced)."""
    return next((value for value in values if value is not None), None)


def _warn_of_other_windows(scheduler: PeRFlowScheduler, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        kept = scheduler.config[name]
        if kept != (list(value) if isinstance(value, (list, tuple)) else value):
            logger.warning(
                "The scheduler in place has %s=%s, where configuration and delta say %s; the scheduler is kept. "
                "Call update_components(scheduler=None) to have it made anew.",
                name,
                kept,
                value,
            )


SOURCE_ATTRIBUTE = "_perflow_source"
"""On a scheduler that the window set-up made: the ComponentSpec of the one that it was made from."""


def remember_source(made: Any, pipe: Any) -> None:
    """Notes on a scheduler, which is about to replace the pipeline's, where the pipeline's came from."""
    setattr(made, SOURCE_ATTRIBUTE, scheduler_source(pipe))


def scheduler_source(pipe: Any) -> ComponentSpec | None:
    """Where the scheduler was loaded from, or will be, before the window set-up converted it; None for nowhere."""
    current = pipe.scheduler
    converted = current is not None and SOURCE_ATTRIBUTE in vars(current)
    spec = vars(current)[SOURCE_ATTRIBUTE] if converted else pipe.get_component_spec("scheduler")
    return spec if spec is not None and spec.pretrained_model_name_or_path else None
