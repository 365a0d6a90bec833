"""The window set-up: any scheduler becomes PeRFlow's, with the right windows, steps and coefficients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.utils import logging

from perflow_blocks import PeRFlowSDXLAutoBlocks, PeRFlowSetTimestepsStep
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.schedulers import PeRFlowScheduler
from tests.conftest import make_pipeline

pytestmark = pytest.mark.behaviour

BETAS: dict[str, Any] = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}


def set_up(pipe: Any, **inputs: Any) -> Any:
    """The state after the window set-up alone."""
    state = PipelineState()
    for name, value in inputs.items():
        state.set(name, value)
    PeRFlowSetTimestepsStep()(pipe, state)
    return state


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_is_converted_with_its_noise_schedule(kind: Any) -> None:
    pipe = make_pipeline(scheduler=kind(**BETAS))
    state = set_up(pipe)
    assert type(pipe.scheduler) is PeRFlowScheduler
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.001, 0.02, "linear")
    assert (config.prediction_type, config.num_time_windows) == ("ddim_eps", 4)
    assert state.num_inference_steps == 6
    assert state.timesteps.tolist() == [1000, 875, 750, 625, 500, 250]


def test_a_flow_matching_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="has no betas"):
        set_up(make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler()))


def test_a_perflow_scheduler_is_kept_and_a_difference_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    mine = PeRFlowScheduler(prediction_type="velocity", num_time_windows=2)
    pipe = make_pipeline(scheduler=mine)
    caplog_handler(caplog)
    state = set_up(pipe, num_inference_steps=2, delta_recipe=DeltaRecipe(prediction_type="diff_eps"))
    assert pipe.scheduler is mine
    assert state.timesteps.tolist() == [1000, 500]
    assert "prediction_type=velocity" in caplog.text
    assert "diff_eps" in caplog.text


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of this package, each once, by however many handlers it came."""
    records = {id(record): record for record in caplog.records if "perflow_blocks" in record.name}
    return [record.getMessage() for record in records.values()]


def test_a_sampler_that_was_set_is_replaced_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pipeline().save_pretrained(str(tmp_path), overwrite_modular_index=True)
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(str(tmp_path))
    pipe.load_components(names=["scheduler", "unet"])
    caplog_handler(caplog)
    set_up(pipe)
    assert messages(caplog) == []  # the repository's
    pipe.update_components(scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
    for _ in range(2):
        set_up(pipe, delta_recipe=DeltaRecipe(prediction_type="ddim_eps"))
    (message,) = messages(caplog)
    for part in ("DPMSolverMultistepScheduler", "PeRFlowScheduler", "diffusers' own pipelines"):
        assert part in message
    pipe.update_components(scheduler=None)
    set_up(pipe)
    assert len(messages(caplog)) == 1


def test_threads_share_a_scheduler(caplog: pytest.LogCaptureFixture) -> None:
    """The first call converts once, and steps of one thread are not those of another."""
    pipe = make_pipeline(scheduler=DDIMScheduler(**BETAS))
    caplog_handler(caplog)
    barrier = Barrier(4)

    def plans(steps: int) -> tuple[Any, list[Any]]:
        barrier.wait()
        states = [set_up(pipe, num_inference_steps=steps) for _ in range(20)]
        return pipe.scheduler, [state.step_plan for state in states]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(plans, range(4, 8)))
    for steps, (scheduler, made) in zip(range(4, 8), results, strict=True):
        assert scheduler is pipe.scheduler
        assert made == [pipe.scheduler.make_plan(steps)] * 20
    assert len(messages(caplog)) == 1


def caplog_handler(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers' log does not propagate to pytest's handler by itself."""
    logging.get_logger("perflow_blocks.blocks.set_timesteps").addHandler(caplog.handler)


def test_the_configuration_decides_the_windows(caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline()
    caplog_handler(caplog)
    pipe.update_components(prediction_type="diff_eps", num_time_windows=2, default_num_inference_steps=3)
    recipe = DeltaRecipe(prediction_type="velocity", window_boundaries=(1.0, 0.4, 0.0), num_inference_steps=8)
    state = set_up(pipe, delta_recipe=recipe)
    assert pipe.scheduler.config.prediction_type == "diff_eps"
    assert "prediction_type=diff_eps is used, but the merged delta was distilled with velocity" in caplog.text
    assert state.step_plan.window_start == (1.0, 1.0, 0.5)


def test_the_recipe_decides_where_the_configuration_is_silent() -> None:
    pipe = make_pipeline()
    recipe = DeltaRecipe(prediction_type="velocity", window_boundaries=(1.0, 0.4, 0.0), num_inference_steps=3)
    state = set_up(pipe, delta_recipe=recipe)
    assert pipe.scheduler.config.prediction_type == "velocity"
    assert state.timesteps.tolist() == [1000, 700, 400]
    assert set_up(pipe, delta_recipe=recipe, num_inference_steps=2).num_inference_steps == 2


def test_custom_timesteps_win_over_a_number_of_steps() -> None:
    state = set_up(make_pipeline(), num_inference_steps=8, timesteps=[1000, 900, 750, 500, 250])
    assert state.num_inference_steps == 5
    assert state.step_plan.timesteps == (1000, 900, 750, 500, 250)


def test_the_table_on_the_device_is_the_plan() -> None:
    state = set_up(make_pipeline(), num_inference_steps=4)
    table = state.step_coefficients
    assert table.shape == (4, 4)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:, 0].double(), torch.tensor(state.step_plan.sample_coeff, dtype=torch.float64))
    torch.testing.assert_close(table[:, 1].double(), torch.tensor(state.step_plan.output_coeff, dtype=torch.float64))


def test_the_scheduler_that_the_block_made_follows_the_recipe_of_each_call() -> None:
    pipe = make_pipeline()
    set_up(pipe)
    assert pipe.scheduler.config.prediction_type == "ddim_eps"
    set_up(pipe, delta_recipe=DeltaRecipe(prediction_type="velocity", num_time_windows=2))
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.num_time_windows) == ("velocity", 2)
    kept = pipe.scheduler
    set_up(pipe, delta_recipe=DeltaRecipe(prediction_type="velocity", num_time_windows=2))
    assert pipe.scheduler is kept
    set_up(pipe)
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.num_time_windows) == ("ddim_eps", 4)


def test_unequal_windows_of_a_recipe_are_not_dropped_silently(caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline()
    caplog_handler(caplog)
    pipe.update_components(num_time_windows=2)
    set_up(pipe, delta_recipe=DeltaRecipe(window_boundaries=(1.0, 0.4, 0.0)))
    assert "windows=(1.0, 0.5, 0.0) is used, but the merged delta was distilled with (1.0, 0.4, 0.0)" in caplog.text
    caplog.clear()
    set_up(pipe, delta_recipe=DeltaRecipe(window_boundaries=(1.0, 0.4, 0.0)))
    assert not caplog.records  # the scheduler in place was made from the same


def test_a_delta_brings_the_noise_schedule_it_was_distilled_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog_handler(caplog)
    recipe = DeltaRecipe(scheduler_config={**BETAS, "_class_name": "DDIMScheduler", "clip_sample": True})
    for given in (EulerDiscreteScheduler(beta_end=0.012, beta_schedule="linear"), None):
        pipe = make_pipeline(scheduler=given) if given else make_pipeline()
        if given is None:
            pipe.update_components(scheduler=None)
        set_up(pipe, delta_recipe=recipe)
        config = pipe.scheduler.config
        assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.001, 0.02, "linear")
    (message,) = (text for text in messages(caplog) if "was distilled" in text)
    assert "beta_start=0.001, beta_end=0.02; this replaces the scheduler's 0.0001, 0.012" in message
