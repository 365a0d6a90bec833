"""The teacher solver: against diffusers' DDIM, against known data, over batches, and its complaints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from perflow_blocks.core.distillation import marginal
from perflow_blocks.schedulers import PeRFlowScheduler, PFODESolver, PFODESolverSDXL, pfode_solver
from perflow_blocks.schedulers.pfode_solver import teacher_coefficients
from perflow_blocks.testing.tiny import BETAS, tiny_sdxl_unet

pytestmark = pytest.mark.behaviour


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_scheduler(**settings: Any) -> DDIMScheduler:
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**{**BETAS, **defaults, **settings})


class Teacher:
    """Predicts by a formula of the latents, their timesteps and the prompt; keeps what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.calls: list[dict[str, Any]] = []

    def __call__(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        assert sample.dtype == self.dtype
        self.calls.append({"sample": sample, "timestep": timestep, **kwargs})
        rows = (-1, 1, 1, 1)
        text = kwargs["encoder_hidden_states"].mean((1, 2)).reshape(rows)
        return (torch.tanh(sample) + 0.3 * torch.sin(timestep.reshape(rows) / 200) + text,)


def test_ddim_map_moves_known_data_along_its_marginals() -> None:
    x0, noise = randn(2, 8, seed=1).double(), randn(2, 8, seed=2).double()
    alpha, alpha_next = 0.2, 0.7
    z = marginal(x0, noise, alpha)
    v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
    for prediction_type, output in (("epsilon", noise), ("v_prediction", v)):
        a, b = teacher_coefficients(alpha, alpha_next, prediction_type)
        torch.testing.assert_close(a * z + b * output, marginal(x0, noise, alpha_next))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("final_is_one", [True, False])
def test_a_whole_solve_is_diffusers_ddim(prediction_type: str, final_is_one: bool) -> None:
    scheduler = make_scheduler(
        prediction_type=prediction_type, set_alpha_to_one=final_is_one, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(8)
    teacher, prompt = Teacher(), randn(2, 3, 4, seed=3)
    expected = latents = randn(2, 4, 5, 5, seed=4)
    for t in scheduler.timesteps:
        output = teacher(expected, t.expand(2), encoder_hidden_states=prompt)[0]
        expected = scheduler.step(output, t, expected).prev_sample
    asked = [call["timestep"][0] for call in teacher.calls]
    teacher.calls.clear()
    actual = PFODESolver(scheduler).solve(latents, teacher, 1.0, 0.0, prompt_embeds=prompt, num_steps=8)
    assert [call["timestep"][0] for call in teacher.calls] == asked
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_consecutive_windows_are_one_long_solve() -> None:
    solver, teacher, prompt = PFODESolver(make_scheduler()), Teacher(), randn(2, 3, 4, seed=2)
    latents = randn(2, 4, 5, 5, seed=1)
    whole = solver.solve(latents, teacher, 1.0, 0.0, prompt_embeds=prompt, num_steps=8)
    for start, end in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        latents = solver.solve(latents, teacher, start, end, prompt_embeds=prompt, num_steps=2, num_windows=4)
    torch.testing.assert_close(latents, whole)


def test_unequal_windows_follow_each_rows_own_times() -> None:
    """A teacher that knows the noise lands on the marginal at t_end, whatever the length of the window."""
    scheduler = make_scheduler()
    x0, noise = randn(3, 4, 2, 2, seed=1), randn(3, 4, 2, 2, seed=2)
    t_start, t_end = torch.tensor([1.0, 0.9, 0.3]), torch.tensor([0.9, 0.3, 0.0])
    start = marginal(x0, noise, scheduler.alphas_cumprod[torch.tensor([999, 899, 299])])
    expected = marginal(x0, noise, scheduler.alphas_cumprod[torch.tensor([899, 299, 0])])
    actual = PFODESolver(scheduler).solve(
        start,
        lambda *args, **kwargs: (noise,),
        t_start,
        t_end,
        prompt_embeds=torch.zeros(3, 1, 1),
        num_steps=3,
        num_windows=None,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_one_call_per_step_and_leads_away_from_the_negative_prompt() -> None:
    solver, teacher = PFODESolver(make_scheduler()), Teacher()
    latents, prompt, negative = randn(2, 4, 5, 5, seed=1), randn(2, 3, 4, seed=2), randn(2, 3, 4, seed=3)
    solve: dict[str, Any] = {"t_start": 1.0, "t_end": 0.75, "num_steps": 1, "num_windows": 4}
    plain = solver.solve(latents, teacher, prompt_embeds=prompt, **solve)
    other = solver.solve(latents, teacher, prompt_embeds=negative, **solve)
    both: dict[str, Any] = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, **solve}
    assert torch.equal(solver.solve(latents, teacher, **both), plain)  # a scale of 1 ignores the negative prompt
    assert all(len(call["sample"]) == 2 for call in teacher.calls)
    teacher.calls.clear()
    guided = solver.solve(latents, teacher, guidance_scale=4.0, **both)
    assert len(teacher.calls) == 1 and len(teacher.calls[0]["sample"]) == 4
    torch.testing.assert_close(guided, other + 4.0 * (plain - other), rtol=1e-4, atol=1e-4)


def test_latents_keep_their_type_and_the_teacher_gets_the_prompts() -> None:
    latents, prompt = randn(2, 4, 5, 5, seed=1).requires_grad_(), randn(2, 3, 4).bfloat16()
    solver = PFODESolver(make_scheduler())
    result = solver.solve(latents, Teacher(torch.bfloat16), 1.0, 0.75, prompt_embeds=prompt, num_windows=4)
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_tiny_unet_of_sdxl_sees_every_condition() -> None:
    unet, solver = tiny_sdxl_unet(), PFODESolverSDXL(EulerDiscreteScheduler(**BETAS))
    latents, prompt = randn(2, 4, 16, 16, seed=2), randn(2, 16, 32, seed=1)
    base: dict[str, Any] = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": -prompt,
        "pooled_prompt_embeds": randn(2, 16, seed=3),
        "negative_pooled_prompt_embeds": randn(2, 16, seed=4),
        "guidance_scale": 3.0,
        "num_windows": 4,
        "resolution": 512,
    }
    reference = solver.solve(latents, unet, 1.0, 0.75, **base)
    assert bool(reference.isfinite().all())
    for change in (
        {"pooled_prompt_embeds": randn(2, 16, seed=5)},
        {"negative_pooled_prompt_embeds": randn(2, 16, seed=5)},
        {"negative_prompt_embeds": prompt.flip(1)},
        {"resolution": 64},
    ):
        changed = solver.solve(latents, unet, 1.0, 0.75, **{**base, **change})
        assert not torch.allclose(changed, reference, atol=1e-6), change


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6)])
def test_time_ids_of_any_shape_replace_the_resolution(shape: tuple[int, ...]) -> None:
    solver, teacher = PFODESolverSDXL(make_scheduler()), Teacher()
    ids = torch.tensor([640, 512, 0, 0, 640, 512]).expand(shape)
    pooled = randn(2, 9, seed=4)
    prompts: dict[str, Any] = {"prompt_embeds": randn(2, 3, 4), "negative_prompt_embeds": randn(2, 3, 4, seed=1)}
    prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    solver.solve(randn(2, 4, 5, 5), teacher, 1.0, 0.75, add_time_ids=ids, guidance_scale=2.0, num_windows=4, **prompts)
    added = teacher.calls[0]["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[640, 512, 0, 0, 640, 512]] * 4
    assert torch.equal(added["text_embeds"], torch.cat([pooled, -pooled]))


def test_teachers_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"scheduler=FlowMatchEulerDiscreteScheduler .*alphas_cumprod"):
        PFODESolver(FlowMatchEulerDiscreteScheduler())
    for scheduler in (make_scheduler(prediction_type="sample"), PeRFlowScheduler()):
        value = scheduler.config.prediction_type
        with pytest.raises(ValueError, match=rf"prediction_type='{value}' .*epsilon, v_prediction"):
            PFODESolver(scheduler)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"guidance_scale": 2.0}, r"guidance_scale=2.0 .*negative_prompt_embeds"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"prompt_embeds": torch.zeros(3, 3, 4)}, r"^prompt_embeds .*2 latents.* 3"),
        ({"negative_prompt_embeds": torch.zeros(1, 3, 4)}, r"^negative_prompt_embeds .*2 latents.* 1"),
        ({"negative_prompt_embeds": torch.zeros(2, 5, 4)}, r"negative_prompt_embeds .*\(2, 5, 4\).*\(2, 3, 4\)"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_windows": 2.0}, "num_windows=2.0"),
        ({"num_windows": 501}, r"num_windows=501 .*num_steps=2 .*1000"),
        ({"t_start": 0.5, "t_end": 0.5}, "t_start=0.5 and t_end=0.5"),
        ({"t_start": 1000, "t_end": 750}, "t_start=1000 and t_end=750"),
        ({"t_end": -0.1}, "t_end=-0.1"),
        ({"t_start": torch.tensor([1.0, 0.75]), "t_end": torch.tensor([0.75, 0.8])}, r"t_start=tensor.* t_end=tensor"),
        ({"t_start": torch.ones(3)}, r"t_start of shape \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], rule: str) -> None:
    arguments: dict[str, Any] = {
        "t_start": 1.0,
        "t_end": 0.75,
        "prompt_embeds": torch.zeros(2, 3, 4),
        "num_windows": 4,
    }
    with pytest.raises(ValueError, match=rule):
        PFODESolver(make_scheduler()).solve(torch.zeros(2, 4, 5, 5), Teacher(), **{**arguments, **change})


def test_sdxl_guidance_needs_the_pooled_negative_prompt_too() -> None:
    prompts: dict[str, Any] = {"prompt_embeds": torch.zeros(2, 3, 4), "negative_prompt_embeds": torch.zeros(2, 3, 4)}
    solver = PFODESolverSDXL(make_scheduler())
    with pytest.raises(ValueError, match="negative_pooled_prompt_embeds"):
        solver.solve(
            torch.zeros(2, 4, 5, 5),
            Teacher(),
            1.0,
            0.75,
            pooled_prompt_embeds=torch.zeros(2, 9),
            guidance_scale=2.0,
            **prompts,
        )


def test_uneven_steps_are_warned_of_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pfode_solver.logger, "propagate", True)
    solver, latents, prompt = PFODESolver(make_scheduler()), torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 4)
    for num_steps in (3, 5, 3, 5):
        solver.solve(latents, Teacher(), 1.0, 0.75, prompt_embeds=prompt, num_steps=num_steps, num_windows=4)
    records = [record for record in caplog.records if record.name == pfode_solver.logger.name]
    assert len(records) == 1
    assert "num_windows * num_steps = 12" in records[0].getMessage()
