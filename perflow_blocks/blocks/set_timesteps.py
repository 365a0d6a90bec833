"""The window set-up: whatever scheduler the repository brought becomes PeRFlow's, and the steps become a table."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.utils import logging
from torch import Tensor

from ..core.step_plan import StepPlan, truncated_timestep
from ..core.windows import TimeWindows, tile_windows
from ..delta.model_lock import model_lock
from ..delta.recipe import DeltaRecipe
from ..schedulers.scheduling_perflow import PeRFlowScheduler, is_perflow_scheduler
from .declare import declared
from .inputs import shared_input, shared_inputs
from .specs import (
    SCHEDULER_SETTINGS,
    guider_spec,
    schedule_config_specs,
    scheduler_spec,
    unet_spec,
    usual_recipe,
)

logger = logging.get_logger(__name__)

OWN_ATTRIBUTE = "_perflow_made_in_set_up"
"""On a scheduler that this block made: the configuration (`source`) and the place (`spec`) of the one it replaced."""


class PeRFlowSetTimestepsStep(ModularPipelineBlocks):
    """Sets up the time windows of a text-to-image run (arXiv 2405.07510).

    An argument of the call wins over the configuration, which wins over the merged delta's recipe, which wins over
    what is usual for the model (SDXL: `ddim_eps`, 4 windows, 6 steps). The noise schedule is the delta's where it
    names one, else that of the scheduler that is replaced. A PeRFlowScheduler that you set stays as it is; one that
    this block made follows configuration and delta from call to call.

    Raises:
        ValueError: steps, timesteps or `denoising_end` make no schedule, or the scheduler has no betas.
    """

    model_name = "stable-diffusion-xl"
    description = (
        "Turns the scheduler into a PeRFlowScheduler with the windows the weights were distilled for, lays the steps "
        "over the windows and puts each step's coefficients on the device."
    )
    # The guider is unused here: the first block that names it decides its default.
    expected_components = declared(guider_spec(), scheduler_spec(), unet_spec())
    expected_configs = declared(*schedule_config_specs())
    inputs = declared(*shared_inputs("num_inference_steps", "timesteps", "denoising_end", "delta_recipe"))
    intermediate_outputs = declared(
        OutputParam("timesteps", Tensor, "Timesteps (num_steps,), integers on the device."),
        OutputParam("num_inference_steps", int, "Number of denoising steps that are run."),
        OutputParam("step_plan", StepPlan, "The steps on the host: times, windows, coefficients."),
        OutputParam("step_coefficients", Tensor, "The plan's table (num_steps, 4) on the device, float32."),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        self.prepare(components, block_state, components._execution_device)
        self.set_block_state(state, block_state)
        return components, state

    def prepare(self, components: Any, block_state: Any, device: torch.device) -> PeRFlowScheduler:
        """Puts the scheduler in place, which it returns, and what the loop needs of a plan on `block_state`.

        The scheduler gets the plan too, for loops that call its `step`. This package's loops do not read it there,
        since other threads may use the scheduler at other steps.
        """
        recipe = block_state.delta_recipe
        scheduler = _place_scheduler(components, recipe)
        steps = None
        if block_state.timesteps is None:
            recommended = None if recipe is None else recipe.num_inference_steps
            configured = components.config.default_num_inference_steps
            usual = usual_recipe(components).num_inference_steps
            steps = _first(block_state.num_inference_steps, configured, recommended, usual)
        plan = self.section(scheduler, scheduler.make_plan(steps, block_state.timesteps), block_state)
        block_state.timesteps = torch.tensor(plan.timesteps).to(device)
        block_state.num_inference_steps = len(plan)
        block_state.step_plan = plan
        block_state.step_coefficients = plan.coefficients(device)
        scheduler.keep_plan(plan, block_state.timesteps, block_state.step_coefficients)
        return scheduler

    def section(self, scheduler: PeRFlowScheduler, whole: StepPlan, block_state: Any) -> StepPlan:
        """The part of the scheduler's plan that is run: here all of it, or the part before `denoising_end`."""
        check_denoising_range(None, block_state.denoising_end)
        return _before(whole, _end_time(scheduler.windows, block_state.denoising_end))


def _entry_inputs(strength: float) -> list[InputParam]:
    """Where a given image enters the path, with the default strength of a task."""
    return [shared_input("strength", default=strength), *shared_inputs("denoising_start", "noising")]


class PeRFlowImg2ImgSetTimestepsStep(PeRFlowSetTimestepsStep):
    """Sets up the time windows of a run that starts from an image (arXiv 2405.07510).

    The run takes a first step from the time `strength` and then the steps of the whole schedule below it: of 4 steps,
    strength 0.3 leaves two (from 0.3 and 0.25), 0.8 four and 0.1 one. With `denoising_start` the run starts at the
    window boundary nearest to where the earlier run ended, and `strength` is ignored.

    Raises:
        ValueError: `strength`, `denoising_start` or `denoising_end` is outside its range, nothing is left to run,
            `noising` is unknown, or what the parent raises.
    """

    description = (
        "The window set-up for a run that starts from an image, at `strength` or where an earlier run left off; says "
        "how to noise an image at each step."
    )
    inputs = declared(*PeRFlowSetTimestepsStep.inputs, *_entry_inputs(0.3))
    intermediate_outputs = declared(
        *PeRFlowSetTimestepsStep.intermediate_outputs,
        OutputParam("noise_coefficients", Tensor, "(P, Q) of `P x0 + Q noise` at each step and the end, float32."),
    )

    def prepare(self, components: Any, block_state: Any, device: torch.device) -> PeRFlowScheduler:
        scheduler = super().prepare(components, block_state, device)
        table = scheduler.noise_coefficients(block_state.step_plan, block_state.noising)
        block_state.noise_coefficients = table.float().to(device)
        return scheduler

    def section(self, scheduler: PeRFlowScheduler, whole: StepPlan, block_state: Any) -> StepPlan:
        """The part from `strength` or `denoising_start` to `denoising_end`."""
        check_denoising_range(block_state.denoising_start, block_state.denoising_end)
        if block_state.denoising_start is None:
            check_strength(block_state.strength)
            start = min(float(block_state.strength), whole.times[0])  # custom schedules may begin below 1
        else:
            start = _snap(scheduler.windows, "denoising_start", block_state.denoising_start)
        end = _end_time(scheduler.windows, block_state.denoising_end)
        last, first = (truncated_timestep(t, scheduler.windows.num_train_timesteps) for t in (end, start))
        if max(1, first) <= last:
            raise ValueError(
                f"nothing is left to run from time {start:.4g} to time {end:.4g} (1 is noise, 0 the image); lower "
                "denoising_start, or raise denoising_end or strength."
            )
        plan = _before(scheduler.plan_from(start, whole), end)
        logger.info("%d of %d steps are run, from time %.4g to %.4g.", len(plan), len(whole), plan.times[0], end)
        return plan


class PeRFlowInpaintSetTimestepsStep(PeRFlowImg2ImgSetTimestepsStep):
    """The same for inpainting, where the hole is painted anew unless `strength` says otherwise."""

    inputs = declared(*PeRFlowSetTimestepsStep.inputs, *_entry_inputs(1.0))


def check_strength(strength: Any) -> None:
    """Raises a ValueError for a strength that is not a number in (0, 1]."""
    if not _is_share(strength):
        raise ValueError(f"strength={strength!r} must be above 0 (keep the image) and at most 1 (redraw everything).")


def check_denoising_range(start: Any, end: Any) -> None:
    """Raises a ValueError unless `denoising_start` in (0, 1) and `denoising_end` in (0, 1] leave a part to run."""
    if start is not None and (not _is_share(start) or start == 1.0):
        raise ValueError(f"denoising_start={start!r} must be above 0 and below 1; leave it out to start at the noise.")
    if end is not None and not _is_share(end):
        raise ValueError(f"denoising_end={end!r} must be above 0 and at most 1; leave it out to run to the end.")
    if start is not None and end is not None and end <= start:
        raise ValueError(f"denoising_end={end} must be above denoising_start={start}.")


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0.0 < float(value) <= 1.0


def _end_time(windows: TimeWindows, denoising_end: float | None) -> float:
    """The time at which a run ends: the end of the last window, or the boundary nearest to `denoising_end`."""
    if denoising_end is None or denoising_end == 1.0:
        return windows.boundaries[-1]
    return _snap(windows, "denoising_end", denoising_end)


def _before(plan: StepPlan, time: float) -> StepPlan:
    """The steps of the plan that start before it reaches `time`, a window boundary."""
    count = sum(start > time for start in plan.times)
    return plan if count == len(plan) else plan.section(0, count)


def _snap(windows: TimeWindows, name: str, share: float) -> float:
    """The inner boundary nearest to time 1 - share. A velocity is that of its whole window, so cuts are made there."""
    inner = windows.boundaries[1:-1]
    if not inner:
        raise ValueError(f"{name}={share} cannot cut a schedule of one window; leave it out.")
    nearest = min(inner, key=lambda boundary: abs(boundary - (1.0 - share)))
    used = 1.0 - nearest
    if abs(used - share) * windows.num_train_timesteps >= 0.5:
        logger.warning("%s=%s lies inside a time window; %s=%.4g is used, a window boundary.", name, share, name, used)
    return nearest


def _place_scheduler(components: Any, recipe: DeltaRecipe | None) -> PeRFlowScheduler:
    """Puts a PeRFlowScheduler in place that follows configuration and recipe, unless the user set one; returns it."""
    config = components.config
    made_from = (recipe, *(repr(config[name]) for name in SCHEDULER_SETTINGS))  # some may be arrays
    with model_lock(components):  # threads that make the first call convert once
        current: Any = components.scheduler
        own = None if current is None else vars(current).get(OWN_ATTRIBUTE)
        if own is not None and own["made_from"] == made_from:
            return current
        recipe = recipe or DeltaRecipe()
        noise_schedule = recipe.noise_schedule()
        settings = {**_window_settings(config, recipe), **noise_schedule}
        if own is None and is_perflow_scheduler(current):
            for name, kept, value in _differences(current.config, settings):
                logger.warning(
                    f"The scheduler in place has {name}={kept}, where configuration and delta say {value}; the "
                    "scheduler is kept. Call update_components(scheduler=None) to have it made anew."
                )
            return current
        source = own["source"] if own is not None else current and dict(current.config)
        usual = usual_recipe(components).prediction_type
        wanted = PeRFlowScheduler.from_scheduler(source, **{"prediction_type": usual, **settings})
        _warn_of_replacing(current, _differences(source or {}, noise_schedule))
        spec = scheduler_source(components)
        setattr(wanted, OWN_ATTRIBUTE, {"source": source, "spec": spec, "made_from": made_from})
        components.update_components(scheduler=wanted)
        return wanted


def _warn_of_replacing(scheduler: Any, differences: list[tuple[str, Any, Any]]) -> None:
    """Warns that a scheduler which a user set is replaced, and that a delta's noise schedule differs from its own."""
    # diffusers marks the components that it loaded or made for a pipeline; one that a user made has no mark.
    if scheduler is not None and not {OWN_ATTRIBUTE, "_diffusers_load_id"} & vars(scheduler).keys():
        logger.warning(
            f"{type(scheduler).__name__}, the scheduler that was set, is replaced by a PeRFlowScheduler, the only one "
            "that these blocks run; other samplers run in diffusers' own pipelines, such as StableDiffusionXLPipeline."
        )
    if differences:
        used = ", ".join(f"{name}={value}" for name, _, value in differences)
        replaced = ", ".join(str(value) for _, value, _ in differences)
        logger.warning(f"The merged delta was distilled with {used}; this replaces the scheduler's {replaced}.")


def _window_settings(config: Any, recipe: DeltaRecipe) -> dict[str, Any]:
    """The settings of a PeRFlowScheduler that configuration or recipe name; the configuration wins.

    Number and boundaries of the windows belong together, so both come from one of the two.
    """
    configured, distilled = _boundaries(config), _boundaries(recipe)
    windows = recipe if configured is None else config
    usual = TimeWindows.equal(4).boundaries
    theta = _first(config.theta, recipe.theta if configured in (None, distilled or usual) else None)
    settings = {
        "prediction_type": _first(config.prediction_type, recipe.prediction_type),
        "num_time_windows": windows.num_time_windows,
        "window_boundaries": windows.window_boundaries,
        "solver_order": _first(config.solver_order, recipe.solver_order),
        "theta": None if theta is None else torch.as_tensor(theta, dtype=torch.float64).tolist(),
    }
    pairs = {"prediction_type": (config.prediction_type, recipe.prediction_type), "windows": (configured, distilled)}
    for name, (used, other) in pairs.items():
        if None not in (used, other) and used != other:
            logger.warning(
                f"The configuration's {name}={used} is used, but the merged delta was distilled with {other}."
            )
    return {name: value for name, value in settings.items() if value is not None}


def _boundaries(source: Any) -> tuple[float, ...] | None:
    """The windows that a configuration or a recipe describes; None where it describes none."""
    if source.num_time_windows is None and source.window_boundaries is None:
        return None
    count, boundaries = source.num_time_windows, source.window_boundaries
    # To be compared only: the scheduler that is made checks that each window holds one of its timesteps.
    return tile_windows(num_windows=count, boundaries=boundaries, num_train_timesteps=10**6).boundaries


def _differences(config: Mapping[str, Any], settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, the configuration's value, the setting) for each setting that differs from the configuration."""
    as_saved = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return [
        (name, config[name], settings[name]) for name, value in as_saved.items() if config.get(name, value) != value
    ]


def _first(*values: Any) -> Any:
    """The first that is not None (0 counts as given, so that it is refused rather than replaced)."""
    return next((value for value in values if value is not None), None)


def scheduler_source(pipe: Any) -> ComponentSpec | None:
    """Where the scheduler was loaded from, or will be, before the window set-up converted it; None for nowhere."""
    own = None if pipe.scheduler is None else vars(pipe.scheduler).get(OWN_ATTRIBUTE)
    spec = pipe.get_component_spec("scheduler") if own is None else own["spec"]
    return spec if spec is not None and spec.pretrained_model_name_or_path else None
