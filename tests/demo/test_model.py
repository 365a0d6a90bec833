"""The embedded model: what it is, how large it is, and that four steps draw what the prompts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors import safe_open

from perflow_blocks.delta.files import read_recipe
from perflow_blocks.delta.merge import merge_record
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline, weights_directory
from perflow_blocks.demo.judge import CLASSIFIER, make_demo_set
from perflow_blocks.evaluation.measure import evaluate_samplers, markdown, measure
from perflow_blocks.evaluation.samplers import perflow_sampler, teacher_sampler


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = perflow_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weight_files() -> list[Path]:
    return [*weights_directory().rglob("*.safetensors"), CLASSIFIER]


def test_all_weights_are_half_precision_and_under_twenty_megabytes() -> None:
    files = weight_files()
    assert len(files) == 6  # UNet, VAE, two text encoders, the delta, the classifier
    assert sum(path.stat().st_size for path in files) < 20_000_000
    for path in files:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert kinds <= {"F16"}, path


def test_it_is_of_sdxl_architecture() -> None:
    teacher = teacher_pipeline()
    unet = teacher.unet.config
    assert unet.addition_embed_type == "text_time" and unet.cross_attention_dim == 128
    assert 5e6 < sum(p.numel() for p in teacher.unet.parameters()) < 7e6
    assert teacher.scheduler.config.prediction_type == "epsilon"
    assert teacher.text_encoder_2.config.projection_dim == 64


def test_the_delta_brings_its_recipe() -> None:
    recipe = read_recipe(weights_directory() / "perflow_delta.safetensors")
    assert (recipe.prediction_type, recipe.num_time_windows, recipe.guidance_scale) == ("ddim_eps", 4, 1.0)
    assert recipe.num_inference_steps == 4


def test_four_steps_make_four_calls_of_one_row_with_the_recommended_settings(pipe: Any) -> None:
    sizes: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        images = pipe(prompt="a red star", generator=torch.manual_seed(0), output="images")
    finally:
        handle.remove()
    assert sizes == [1] * 4 and images[0].size == (64, 64)
    record = merge_record(pipe.unet)
    assert record is not None and record.scale == 1.0


def test_four_steps_draw_what_the_prompts_say(pipe: Any) -> None:
    data = make_demo_set(48, seed=4, references=32)
    (row,) = evaluate_samplers([perflow_sampler(pipe, 4)], data, batch_size=32)
    assert float(row.scores["accuracy %"].mean()) >= 60.0
    shuffled = perflow_sampler(pipe, 4).draw(data.prompts, data.latents).roll(1, 0)
    assert float(measure("", (255 * shuffled).to(torch.uint8), data).scores["accuracy %"].mean()) <= 25.0


def test_the_same_seed_draws_the_same_image(pipe: Any) -> None:
    first, second, other = (
        pipe(prompt="a blue ring", generator=torch.manual_seed(seed), output_type="pt", output="images")
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_table_has_floors_and_a_row_for_each_sampler(pipe: Any) -> None:
    teacher = teacher_pipeline()
    data = make_demo_set(6, vae=teacher.vae, references=32)
    samplers = [teacher_sampler(teacher, "dpm", 2, 2.0), perflow_sampler(pipe, 4)]
    rows = evaluate_samplers(samplers, data, teacher=teacher_sampler(teacher, "ddim", 3, 2.0), batch_size=4)
    assert [(row.name, row.sampler and row.sampler.nfe) for row in rows] == [
        ("real renders", None),
        ("VAE reconstructions", None),
        ("teacher, DDIM", 6),
        ("teacher, DPM-Solver++", 4),
        ("student, PeRFlow", 4),
    ]
    assert float(rows[0].scores["accuracy %"].mean()) >= 80.0
    assert rows[0].distances["Frechet"][0] < rows[3].distances["Frechet"][0]
    assert "| student, PeRFlow, 4 steps, less | NFE | accuracy % | strict % | PSNR dB | SSIM |" in markdown(rows)


def test_unknown_solvers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heun.*stock, ddim, dpm, euler"):
        teacher_sampler(teacher_pipeline(), "heun", 4, 2.0)


def test_fewer_steps_than_windows_are_refused_rather_than_mislabelled(pipe: Any) -> None:
    with pytest.raises(ValueError, match="steps=2 is below the model's 4 time windows"):
        perflow_sampler(pipe, 2)
    assert perflow_sampler(pipe, 4).nfe == 4


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_the_teacher_is_sampled_from_pure_noise_and_unclipped_whatever_its_scheduler(solver: str) -> None:
    teacher = teacher_pipeline()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = teacher_sampler(teacher, solver, 4, 2.0).draw(["a star"] * 2, latents)
    teacher.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    actual = teacher_sampler(teacher, solver, 4, 2.0).draw(["a star"] * 2, latents)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
