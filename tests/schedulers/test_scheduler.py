"""PeRFlowScheduler: schedules, steps, noising, configuration, and that nothing is read back in a step."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from perflow_blocks.core.parameterization import PREDICTION_TYPES
from perflow_blocks.schedulers import PeRFlowScheduler, scheduling_perflow
from perflow_blocks.schedulers.scheduling_perflow import PeRFlowSchedulerOutput
from tests.conftest import no_host_reads

pytestmark = pytest.mark.behaviour

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(num_inference_steps: int = 4, **settings: Any) -> PeRFlowScheduler:
    scheduler = PeRFlowScheduler(**settings)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


@pytest.fixture
def perflow_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Records of this package's loggers, whatever they propagate to."""
    logger = diffusers_logging.get_logger("perflow_blocks.schedulers.scheduling_perflow")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("WARNING", logger=logger.name)
    return caplog


# --- schedules -------------------------------------------------------------------------------------------------------


def test_default_schedule_is_four_window_starts(perflow_log: pytest.LogCaptureFixture) -> None:
    scheduler = ready()
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.timesteps.dtype == torch.long
    assert scheduler.num_inference_steps == 4
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    short = ready(4, num_train_timesteps=100)
    assert short.timesteps.tolist() == [100, 75, 50, 25]
    assert len(short) == len(short.alphas_cumprod) == 100
    assert not perflow_log.records


def test_too_few_steps_are_raised_to_the_windows_with_a_warning(perflow_log: pytest.LogCaptureFixture) -> None:
    for calls in (1, 2):  # also where the plan is known already
        scheduler = ready(2)
        assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
        assert perflow_log.text.count("num_inference_steps=2 is below num_time_windows=4") == calls


def test_the_same_schedule_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = ready(7), PeRFlowScheduler()
    monkeypatch.setattr(scheduling_perflow, "build_step_plan", None)
    monkeypatch.setattr(scheduling_perflow, "make_alphas_cumprod", None)
    again.set_timesteps(7)
    assert again.plan is first.plan


def test_tables_lie_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        scheduler = ready(4, beta_start=0.0011)
        assert scheduler.plan is not None and scheduler.plan.coefficients().device.type == "cpu"
    assert scheduler.alphas_cumprod.device.type == "cpu"


@pytest.mark.parametrize("steps", [0, -1, True, 4.0, "4", float("nan"), [1000, 750, 500, 250]])
def test_step_counts_that_are_none(steps: Any) -> None:
    ready(4)
    ready(np.int64(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(f"num_inference_steps={steps!r}")):
        PeRFlowScheduler().set_timesteps(steps)


def test_exactly_one_of_steps_and_timesteps() -> None:
    for arguments in ({}, {"num_inference_steps": 4, "timesteps": [1000, 750, 500, 250]}):
        with pytest.raises(ValueError, match=r"exactly one of num_inference_steps=.* timesteps="):
            PeRFlowScheduler().set_timesteps(**arguments)


def test_plans_are_made_without_changing_the_scheduler() -> None:
    scheduler = ready(4)
    before = dict(vars(scheduler))
    plan = scheduler.make_plan(6)
    assert plan.timesteps == (1000, 875, 750, 625, 500, 250)
    assert scheduler.make_plan(timesteps=[600, 500, 250]).timesteps == (600, 500, 250)
    assert scheduler.plan_from(0.7, plan).timesteps == (700, 625, 500, 250)
    assert vars(scheduler) == before


def test_more_steps_than_timesteps_do_not_fit() -> None:
    ready(1000)
    with pytest.raises(ValueError, match=r"timesteps .* fewer than 1500 steps"):
        ready(1500)


def test_custom_timesteps() -> None:
    scheduler = PeRFlowScheduler()
    for timesteps in ([1000, 900, 750, 500, 250], [1000, 750, 500, 250, 1], [600, 500, 250], [40, 20]):
        for given in (timesteps, torch.tensor(timesteps), np.array(timesteps), tuple(timesteps)):
            scheduler.set_timesteps(timesteps=given)
            assert scheduler.timesteps.tolist() == timesteps
            assert scheduler.num_inference_steps == len(timesteps)


@pytest.mark.parametrize(
    ("timesteps", "rule"),
    [
        ([], r"=\[\]"),
        ([1000, 750, 750, 500, 250], " .*750 is followed by 750"),
        ([250, 500, 750, 1000], " .*250 is followed by 500"),
        ([1001, 750, 500, 250], r"=\[1001\] .*\[1, 1000\]"),
        ([1000, 750, 500, 250, 0], r"=\[0\] .*\[1, 1000\]"),
        ([1000, 750.5, 500, 250], r"=\[1000, 750.5, 500, 250\]"),
        ([True], r"=\[True\]"),
        (1000, "=1000"),
        ("1000, 750", "='1000, 750'"),
        ([[1000], [750, 500]], r"=\[\[1000\], \[750, 500\]\]"),
        ([1000, 750, 250], " .*insert 500"),
        ([1000, 900], " .*insert 750, 500, 250"),
        ([600, 400, 250], " .*insert 500"),
    ],
)
def test_custom_timesteps_that_make_no_schedule(timesteps: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^timesteps{rule}"):
        PeRFlowScheduler().set_timesteps(timesteps=timesteps)


def test_unequal_windows_and_partial_time() -> None:
    scheduler = ready(3, window_boundaries=(1.0, 0.6, 0.1, 0.0))
    assert scheduler.timesteps.tolist() == [1000, 600, 100]
    assert scheduler.config.num_time_windows == 3
    part = ready(4, num_time_windows=2, t_noise=0.8, t_clean=0.2)
    assert part.timesteps.tolist() == [800, 650, 500, 350]
    assert part.plan is not None and part.plan.next_times[-1] == 0.2
    with pytest.raises(ValueError, match=r"timesteps=\[200\] .*\[201, 800\]"):
        part.set_timesteps(timesteps=[800, 500, 200])


def test_a_new_schedule_replaces_the_old_one() -> None:
    scheduler = ready(8)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep=875 .*\[1000, 750, 500, 250\]"):
        scheduler.step(randn(1, 4), 875, randn(1, 4))


# --- steps -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_timestep_gives_the_same_step() -> None:
    scheduler = ready(6)
    sample, output = randn(2, 4, 3, 3, seed=1), randn(2, 4, 3, 3, seed=2)
    before = dict(vars(scheduler))
    expected = scheduler.step(output, 875, sample)
    assert isinstance(expected, PeRFlowSchedulerOutput)
    scheduler.step(output, 250, sample)  # a step is pure and may be taken anywhere
    kinds: list[Any] = [875.0, np.int64(875), torch.tensor(875), torch.tensor([875]), torch.tensor(875.0)]
    for timestep in [*kinds, scheduler.timesteps[1]]:
        prev_sample, pred_original_sample = scheduler.step(output, timestep, sample, return_dict=False)
        assert torch.equal(prev_sample, expected.prev_sample)
        assert torch.equal(pred_original_sample, expected.pred_original_sample)
    assert vars(scheduler) == before


def test_device_lookup_agrees_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for accelerators, run on the CPU: the same numbers to float32, nan for an unknown timestep."""
    scheduler = ready(6)
    sample, output = randn(2, 4, 3, 3, seed=1), randn(2, 4, 3, 3, seed=2)
    expected = [scheduler.step(output, t, sample, return_dict=False) for t in scheduler.timesteps.tolist()]
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: _PretendAccelerator()))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    for t, (prev_sample, x0) in zip(scheduler.timesteps.unbind(), expected, strict=True):
        with no_host_reads(methods=False):
            result = scheduler.step(output, t, sample)
        np.testing.assert_allclose(result.prev_sample.numpy(), prev_sample.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.pred_original_sample.numpy(), x0.numpy(), rtol=1e-5, atol=1e-5)
    assert np.isnan(scheduler.step(output, torch.tensor(333), sample).prev_sample.numpy()).all()


class _PretendAccelerator:
    type = "pretend"


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_loop_reads_nothing_back(prediction_type: str) -> None:
    scheduler = ready(6, prediction_type=prediction_type)
    sample = randn(1, 4, 3, 3)
    with no_host_reads(methods=False):
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(sample), t, scheduler.scale_model_input(sample, t)).prev_sample
    assert bool(sample.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_results_have_the_samples_type_and_are_rounded_once(dtype: torch.dtype, prediction_type: str) -> None:
    scheduler = ready(5, prediction_type=prediction_type)
    sample, output = randn(2, 4, 3, 3, seed=1).to(dtype), randn(2, 4, 3, 3, seed=2).to(dtype)
    for t in scheduler.timesteps:
        result = scheduler.step(output, t, sample)
        exact = scheduler.step(output.double(), t, sample.double())
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        for actual, expected in zip(result.values(), exact.values(), strict=True):
            torch.testing.assert_close(
                actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5, msg=f"at timestep {int(t)}"
            )


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_a_student_that_knows_the_noise_denoises_exactly(set_alpha_to_one: bool) -> None:
    """With the true noise as prediction every step stays on the chord, and each preview is the data itself."""
    scheduler = ready(10, set_alpha_to_one=set_alpha_to_one)
    x0, noise = randn(2, 4, 3, 3, seed=1).double(), randn(2, 4, 3, 3, seed=2).double()
    sample = scheduler.add_noise(x0, noise, torch.tensor([1000]))
    for t in scheduler.timesteps:
        torch.testing.assert_close(sample, scheduler.add_noise_chord(x0, noise, t), rtol=1e-5, atol=1e-5)
        sample, preview = scheduler.step(noise, t, sample, return_dict=False)
        torch.testing.assert_close(preview, x0, rtol=1e-4, atol=1e-4)
    expected = x0 if set_alpha_to_one else scheduler.add_noise(x0, noise, torch.tensor([1]))
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


def test_steps_need_a_known_timestep_and_a_schedule() -> None:
    sample = randn(1, 4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        PeRFlowScheduler().step(sample, 1000, sample)
    for timestep in (999, 0, 749.5, torch.tensor(1), float("nan")):
        with pytest.raises(ValueError, match=rf"timestep={float(timestep):g} .*\[1000, 750, 500, 250\]"):
            ready().step(sample, timestep, sample)
    with pytest.raises(ValueError, match=r"timestep of shape \(2,\)"):
        ready().step(sample, torch.tensor([1000, 750]), sample)


# --- noising ---------------------------------------------------------------------------------------------------------


def test_marginal_noise_counts_timesteps_from_one() -> None:
    scheduler = PeRFlowScheduler()
    original, noise = torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    noisy = scheduler.add_noise(original, noise, torch.tensor([1000, 500, 1, 0]))
    expected = scheduler.alphas_cumprod[torch.tensor([999, 499, 0, 0])].sqrt()
    torch.testing.assert_close(noisy[:, 0, 0, 0], expected)


def test_chord_noise_is_the_marginal_at_window_starts_and_between_them_inside() -> None:
    scheduler = PeRFlowScheduler()
    original, noise = randn(4, 1, 2, 2, seed=1), randn(4, 1, 2, 2, seed=2)
    starts = torch.tensor([1000, 750, 500, 250])
    torch.testing.assert_close(
        scheduler.add_noise_chord(original, noise, starts), scheduler.add_noise(original, noise, starts)
    )
    upper, lower = (scheduler.add_noise(original, noise, torch.tensor(t)) for t in (500, 250))
    at_400 = scheduler.add_noise_chord(original, noise, torch.tensor(400))
    torch.testing.assert_close(at_400, upper + 0.4 * (lower - upper), rtol=1e-5, atol=1e-6)
    assert (at_400 - scheduler.add_noise(original, noise, torch.tensor(400))).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["add_noise", "add_noise_chord"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_noising_keeps_shape_and_type_for_any_timesteps(method: str, dtype: torch.dtype) -> None:
    original, noise = randn(2, 4, 3, 3, seed=1).to(dtype), randn(2, 4, 3, 3, seed=2).to(dtype)
    add = getattr(PeRFlowScheduler(), method)
    expected = add(original, noise, torch.tensor([600, 600]))
    assert (expected.shape, expected.dtype) == (original.shape, dtype)
    for timesteps in (torch.tensor([600]), torch.tensor(600), 600, [600, 600], torch.tensor([600.0])):
        assert torch.equal(add(original, noise, timesteps), expected)
    alone = [add(original[:1], noise[row : row + 1], 600) for row in range(2)]
    assert torch.equal(add(original[:1], noise, 600), torch.cat(alone))  # one image with several noises


# --- configuration ---------------------------------------------------------------------------------------------------


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    scheduler = PeRFlowScheduler(prediction_type="velocity", window_boundaries=(1.0, 0.6, 0.0), set_alpha_to_one=True)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["window_boundaries"] == [1.0, 0.6, 0.0]
    assert saved["num_time_windows"] == 2
    for again in (PeRFlowScheduler.from_pretrained(tmp_path), PeRFlowScheduler.from_config(scheduler.config)):
        assert again.windows == scheduler.windows
        assert again.config.prediction_type == "velocity"
        assert again.final_alpha_cumprod == 1.0
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
        assert {k: v for k, v in again.config.items() if k in saved and k[0] != "_"} == {
            k: v for k, v in saved.items() if k[0] != "_"
        }


@pytest.mark.parametrize("source_type", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_are_taken_over(source_type: Any) -> None:
    source = source_type(**SD_BETAS, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r'ddim_eps, diff_eps, velocity.*from_config\(config, prediction_type="ddim'):
        PeRFlowScheduler.from_config(source.config)
    by_config = PeRFlowScheduler.from_config(source.config, prediction_type="diff_eps", num_time_windows=2)
    by_scheduler = PeRFlowScheduler.from_scheduler(source, prediction_type="diff_eps", num_time_windows=2)
    for scheduler in (by_config, by_scheduler):
        assert scheduler.windows.num_windows == 2
        assert scheduler.config.prediction_type == "diff_eps"
        torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod, rtol=1e-5, atol=1e-8)


def test_from_scheduler_uses_the_noise_schedule_and_nothing_else(perflow_log: pytest.LogCaptureFixture) -> None:
    source = DDIMScheduler(beta_start=0.002, set_alpha_to_one=True, prediction_type="v_prediction")  # other defaults
    for given in (source, source.config, dict(source.config)):
        scheduler = PeRFlowScheduler.from_scheduler(given)
        torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod, rtol=1e-5, atol=1e-8)
        assert scheduler.config.prediction_type == "ddim_eps"
        assert scheduler.config.set_alpha_to_one is False
    assert PeRFlowScheduler.from_scheduler(None).config == PeRFlowScheduler().config
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"scheduler=FlowMatchEulerDiscreteScheduler .*betas"):
        PeRFlowScheduler.from_scheduler(flow)
    assert PeRFlowScheduler.from_scheduler(flow, **SD_BETAS).windows.num_windows == 4
    assert not perflow_log.records
    zero = PeRFlowScheduler.from_scheduler(DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True))
    assert "rescale_betas_zero_snr" in perflow_log.text
    assert torch.equal(zero.alphas_cumprod, PeRFlowScheduler().alphas_cumprod)


@pytest.mark.parametrize(
    "base",
    [
        DDIMScheduler(**SD_BETAS, set_alpha_to_one=False, clip_sample=False, steps_offset=1),
        EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", use_karras_sigmas=True),
        EulerDiscreteScheduler.from_config({**SD_BETAS, "clip_sample": False, "skip_prk_steps": True}),
    ],
)
def test_the_way_back_gives_the_bases_settings(base: Any, tmp_path: Path) -> None:
    made = PeRFlowScheduler.from_scheduler(base, num_time_windows=2)
    made.save_pretrained(tmp_path)
    for scheduler in (made, PeRFlowScheduler.from_pretrained(tmp_path), PeRFlowScheduler.from_scheduler(made)):
        for kind in (type(base), PNDMScheduler):
            expected = dict(kind.from_config(base.config).config)
            back = dict(kind.from_config(scheduler.config).config)
            assert {key: back[key] for key in expected if key[0] != "_"} == {
                key: value for key, value in expected.items() if key[0] != "_"
            }


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler])
@pytest.mark.parametrize("base_type", ["epsilon", "v_prediction"])
def test_another_class_gets_what_the_base_predicts_and_gives_perflows_type_back(
    kind: Any, base_type: str, tmp_path: Path
) -> None:
    base = DDIMScheduler(**SD_BETAS, prediction_type=base_type)
    made = PeRFlowScheduler.from_scheduler(base, prediction_type="diff_eps", num_time_windows=2)
    made.save_pretrained(tmp_path)
    again = (
        PeRFlowScheduler.from_config(made.config),
        PeRFlowScheduler.from_config(base.config, prediction_type="diff_eps", num_time_windows=2),
        PeRFlowScheduler.from_pretrained(tmp_path),
        PeRFlowScheduler.from_scheduler(made, prediction_type="diff_eps", num_time_windows=2),
        copy.deepcopy(made),
    )
    for scheduler in (made, *again):
        config = scheduler.config
        assert copy.deepcopy(config) == config and "diff_eps" in repr(config)
        assert config.prediction_type == config["prediction_type"] == dict(config)["prediction_type"] == "diff_eps"
        other = kind.from_config(config)
        assert other.config.prediction_type == base_type
        torch.testing.assert_close(other.alphas_cumprod, made.alphas_cumprod, rtol=1e-5, atol=1e-8)
        back = PeRFlowScheduler.from_config(other.config)
        assert (back.config.prediction_type, back.windows) == ("diff_eps", made.windows)
        changed = PeRFlowScheduler.from_config(other.config, prediction_type="velocity")
        back = PeRFlowScheduler.from_config(kind.from_config(changed.config).config)
        assert back.config.prediction_type == changed.config.prediction_type == "velocity"
    assert EulerDiscreteScheduler.from_config(PeRFlowScheduler().config).config.beta_start == 0.00085  # its default


def test_unknown_settings_are_named() -> None:
    for settings in (
        {"prediction_type": "v_prediction"},
        {"beta_schedule": "sigmoid"},
        {"window_boundaries": (0.9, 0.5, 0.0)},
        {"num_time_windows": 0},
        {"num_time_windows": True},
        {"num_time_windows": 10**12},
        {"num_train_timesteps": 1000.0},
    ):
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=re.escape(f"{name.removeprefix('num_time_')}={value!r}")):
            PeRFlowScheduler(**settings)
