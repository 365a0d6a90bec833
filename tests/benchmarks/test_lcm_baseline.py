"""The baseline is latent consistency distillation: right on a teacher that is known, falling on the demo's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks import lcm_baseline
from benchmarks.consistency import ConsistencyBatch, ConsistencyConfig, ConsistencyLoss, distill_consistency
from benchmarks.lcm_baseline import lcm_sampler, lcm_scheduler, main, perflow_rows
from perflow_blocks.demo import teacher_pipeline
from perflow_blocks.demo.models import SCHEDULE
from perflow_blocks.evaluation.measure import Row
from perflow_blocks.evaluation.samplers import Sampler
from perflow_blocks.schedulers.pfode_solver import Conditioning
from tests.training.conftest import PointTeacher, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCHEDULER = LCMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
CONFIG = ConsistencyConfig(updates=1, batch_size=4, huber_c=0.0)


class Guided:
    """A point teacher whose guided answer is another point than its conditional one."""

    def __init__(self, scale: float) -> None:
        self.point, self.scale = PointTeacher(mean=0.0), scale

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        return self.point(sample, timestep, encoder_hidden_states * self.scale, return_dict=False)


def batch_of(index: list[int], prompt: float = 0.4) -> ConsistencyBatch:
    """Pictures that are the point, at points of the grid; the empty prompt's point is 0."""
    count = len(index)
    return ConsistencyBatch(
        x0=torch.full((count, 4, 2, 2), 0.5 + prompt),
        noise=torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
        index=torch.tensor(index),
        conditioning=Conditioning(prompt_embeds=torch.full((count, 1, 1), prompt)),
        empty=Conditioning(prompt_embeds=torch.zeros(count, 1, 1)),
    )


def test_a_consistent_model_reproduces_its_target() -> None:
    """Data that is one point: the exact prediction is consistent, its function is that point all along the path."""
    loss, point = ConsistencyLoss(CONFIG, SCHEDULER), PointTeacher()
    batch = batch_of([1, 10, 30, 49], prompt=0.0)
    assert float(loss(point, point, point, batch)) < 1e-6
    answer = loss.consistency(point, torch.randn(4, 4, 2, 2), torch.tensor([39, 219, 619, 999]), batch.conditioning)
    torch.testing.assert_close(answer, torch.full_like(answer, 0.5), rtol=0, atol=5e-3)
    other = PointTeacher(mean=0.7)
    assert float(loss(other, point, point, batch)) == pytest.approx(0.2**2, rel=0.02)
    assert float(loss(point, other, point, batch)) == pytest.approx(0.2**2, rel=0.02)


def test_the_first_point_is_left_to_itself() -> None:
    """c_skip is 1 and c_out 0 at timestep 0, the boundary that makes the function unique."""
    loss = ConsistencyLoss(CONFIG, SCHEDULER)
    z = torch.randn(2, 4, 2, 2)
    same = loss.consistency(PointTeacher(), z, torch.tensor([0, 0]), batch_of([0, 0]).conditioning)
    torch.testing.assert_close(same, z)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_goes_a_guided_step_down_the_grid(scale: float) -> None:
    """Guidance moves the point s times as far from that of the empty prompt; DDIM is exact for points."""
    loss = ConsistencyLoss(replace(CONFIG, guidance_scale=scale), SCHEDULER)
    batch, point = batch_of([20, 40]), PointTeacher(mean=0.0)
    alphas = SCHEDULER.alphas_cumprod
    now, before = torch.tensor([419, 819]), torch.tensor([399, 799])
    z = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    found = loss.teacher_step(point, z, now, before, batch)
    x0 = 0.4 * scale
    for row, (t, p) in enumerate(zip(now, before, strict=True)):
        eps = (z[row] - math.sqrt(alphas[t]) * x0) / math.sqrt(1 - alphas[t])
        wanted = math.sqrt(alphas[p]) * x0 + math.sqrt(1 - alphas[p]) * eps
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
    # A student that has the guidance in it is consistent with the teacher that is guided.
    student = Guided(scale)
    guided = replace(batch, x0=torch.full_like(batch.x0, x0))
    assert float(loss(student, student, point, guided)) < 1e-6


def test_huber_is_that_of_the_published_scripts() -> None:
    squares, huber = (ConsistencyLoss(replace(CONFIG, huber_c=c), SCHEDULER) for c in (0.0, 0.5))
    batch, models = batch_of([30, 45], prompt=0.0), (PointTeacher(mean=0.8), PointTeacher(), PointTeacher())
    square = float(squares(*models, batch))
    assert float(huber(*models, batch)) == pytest.approx(math.sqrt(square + 0.25) - 0.5, rel=0.02)


@pytest.fixture(scope="module")
def teacher() -> Any:
    pipe = teacher_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class OnePoint(torch.nn.Module):
    """The exact prediction for data that is one point, which is to be found."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        alpha = SCHEDULER.alphas_cumprod[timestep][:, None, None, None]
        return ((sample - alpha.sqrt() * self.mean) / (1.0 - alpha).sqrt(),)


def near_the_data(seed: int) -> Iterator[ConsistencyBatch]:
    """Batches at the two cleanest points of the grid."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(2, (32,), generator=generator)
        noise = torch.randn(32, 4, 2, 2, generator=generator)
        yield replace(batch_of(index.tolist(), prompt=0.0), noise=noise)


def test_a_few_updates_find_what_the_teacher_knows() -> None:
    """From the boundary at timestep 0 alone, whose target is the teacher's own step: a wrong sign would diverge."""
    config = ConsistencyConfig(updates=200, batch_size=32, learning_rate=0.1, guidance_scale=1.0, huber_c=0.0)
    loss, teacher, student = ConsistencyLoss(config, SCHEDULER), OnePoint(0.5), OnePoint(-0.5)
    fixed = next(near_the_data(9))
    before = float(loss(student, student, teacher, fixed).detach())
    result = distill_consistency(teacher, student, near_the_data(1), config, loss)
    assert not result.training and result is not student
    assert result.mean.item() == pytest.approx(0.5, abs=0.05)
    assert float(loss(result, result, teacher, fixed)) < 0.3 * before
    assert teacher.mean.item() == 0.5


def test_lcm_samples_with_the_noise_that_is_given(teacher: Any) -> None:
    scheduler = lcm_scheduler(teacher, 50)
    assert scheduler.config.beta_start == teacher.scheduler.config.beta_start
    sampler = lcm_sampler(teacher, teacher.unet, scheduler, 4)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = sampler.draw(["a star", "a ring"], noise)
    assert drawn.shape == (2, 3, 64, 64) and sampler.nfe == 4
    torch.testing.assert_close(sampler.draw(["a star", "a ring"], noise), drawn)
    assert (sampler.draw(["a star", "a ring"], -noise) - drawn).abs().max() > 0.05


def counted_rows(config: Any) -> int:
    """The rows of a distillation, counted as they go through the UNets."""
    from perflow_blocks.training.loop import Session, TrainingRun

    session = Session(config)
    rows: list[int] = []

    def count(module: Any, args: Any) -> None:
        rows.append(len(args[0]))

    hooks = [unet.register_forward_pre_hook(count) for unet in (session.student, session.teacher.unet)]
    run = TrainingRun(session)
    run.start(None)
    run.finish()
    for hook in hooks:
        hook.remove()
    return sum(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher__starts": "noised"},
        {"teacher__starts": "noised", "teacher__cfg_mode": "fixed"},
        {"teacher__starts": "trajectory", "teacher__on_policy_share": 0.5, "teacher__cfg_mode": "fixed"},
    ],
)
def test_the_budget_is_that_of_a_distillation(settings: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "optimizer__max_steps": 5,
        "optimizer__gradient_accumulation_steps": 2,
        "output__checkpoint_every": 99,
    }
    config = tiny_config(tmp_path, "demo", **settings, **more)
    assert perflow_rows(config) == counted_rows(config)


def test_the_script_keeps_to_its_budget_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samplers: list[Any] = []

    def evaluate(given: list[Any], *rest: Any, **more: Any) -> list[Any]:
        samplers.extend(given)
        return []

    monkeypatch.setattr(lcm_baseline, "evaluate_samplers", evaluate)
    monkeypatch.setattr(lcm_baseline, "make_demo_set", lambda count: None)
    monkeypatch.setattr(lcm_baseline, "quality_tables", lambda rows: ["| the table |"])
    arguments = ["--budget", "50", "--batch-size", "4", "--out", str(tmp_path), "--device", "cpu"]
    main(arguments)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["updates"], settings["rows"], settings["guidance_scale"]) == (3, 48, 3.0)
    text = (tmp_path / "report.md").read_text()
    assert (
        text in capsys.readouterr().out
        and "3 updates of 4 rows" in text
        and "48 rows through a UNet of a budget of 50" in text
        and "| the table |" in text
    )
    assert [(sampler.model, sampler.steps) for sampler in samplers] == [
        (model, steps) for model in ("teacher", "latent consistency", "student") for steps in (4, 8)
    ]
    student = UNet2DConditionModel.from_pretrained(tmp_path / "student")
    assert student.config.cross_attention_dim == 128

    def untouched(*given: Any) -> None:
        raise AssertionError("it was trained before")

    monkeypatch.setattr(lcm_baseline, "distill_consistency", untouched)
    (tmp_path / "report.md").unlink()
    main(["--trained", "--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "report.md").read_text() == text


def test_each_of_perflow_s_rows_is_compared_with_all_others() -> None:
    hits = {("teacher", "DDIM"): [1, 0, 0, 0], ("latent consistency", "LCM"): [1, 1, 0, 0]}
    hits[("student", "PeRFlow")] = [1, 1, 1, 0]
    rows = [
        Row(
            name=f"{model}, {solver}",
            sampler=Sampler(model=model, solver=solver, steps=steps, guidance_scale=1.0, draw=lambda *_: Tensor()),
            seconds=0.1,
            scores={"accuracy %": 100.0 * torch.tensor(hit)},
            examples=torch.zeros(0, 3, 4, 4),
        )
        for (model, solver), hit in hits.items()
        for steps in (4, 8)
    ]
    table, *differences = lcm_baseline.quality_tables(rows)
    assert table.count("\n") == 7 and len(differences) == 2
    for steps, text in zip((4, 8), differences, strict=True):
        assert text.startswith(f"| student, PeRFlow, {steps} steps, less") and text.count("\n") == 6
        assert "| latent consistency, LCM, 4 steps | 4 | +25 ± 25 |" in text


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a budget of 100 rows is below the 128 of one update"):
        main(["--budget", "100", "--out", str(tmp_path / "out")])
    (tmp_path / "prompts.txt").write_text("a star\n")
    path = write_config(tmp_path, "demo")
    text = path.read_text().replace('kind = "demo"', f'kind = "prompts"\npath = "{tmp_path / "prompts.txt"}"')
    path.write_text(text.replace("[teacher]", '[teacher]\nstarts = "trajectory"'))
    with pytest.raises(ValueError, match=r"data.kind='prompts' has no images"):
        main(["--like", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
