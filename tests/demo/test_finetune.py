"""A fine-tune of the demo's teacher: its pictures, their judge, its training, and the delta of the base on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from perflow_blocks.delta.merge import merge_delta, unmerge_delta
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline, train_teacher, weights_directory
from perflow_blocks.demo.conditioning import CaptionEncoder
from perflow_blocks.demo.data import RenderedPictures, render_pictures
from perflow_blocks.demo.finetune import FinetuningConfig, finetune, read_settings, save_settings
from perflow_blocks.demo.framed import FRAME_WIDTH, render_framed
from perflow_blocks.demo.models import build_text_encoders, build_tokenizer, build_unet
from perflow_blocks.demo.pictures import COLORS, Prompt, render
from perflow_blocks.evaluation import finetuned
from perflow_blocks.evaluation.classifier import load_classifier
from perflow_blocks.evaluation.comparison import EvaluationSet
from perflow_blocks.evaluation.framed import judge_framed, without_frame
from perflow_blocks.evaluation.samplers import SOLVERS, Sampler, perflow_sampler, teacher_sampler

Run = Callable[..., tuple[int, str, str]]
DELTA = weights_directory() / "perflow_delta.safetensors"


@pytest.fixture(scope="module")
def pictures() -> RenderedPictures:
    return render_pictures(96, seed=8, renderer=render_framed, workers=1)


@pytest.fixture
def encoder() -> CaptionEncoder:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return CaptionEncoder(tokenizer, *build_text_encoders(tokenizer))


def full_prompts(pictures: RenderedPictures) -> list[Prompt]:
    return [Prompt.describe(scene, np.random.default_rng(0), keep=1.0) for scene in pictures.scenes]


def with_frame(pixels: torch.Tensor, name: str, width: int = FRAME_WIDTH) -> torch.Tensor:
    """Pictures (count, 3, 64, 64) in [0, 1] with their outer `width` pixels in a colour."""
    framed = (torch.tensor(COLORS[name]) / 255.0)[:, None, None].expand_as(pixels).clone()
    framed[..., width:-width, width:-width] = pixels[..., width:-width, width:-width]
    return framed


def test_a_framed_picture_is_that_of_the_base_inside_its_frame(pictures: RenderedPictures) -> None:
    scene = replace(pictures.scenes[0], color="green")
    framed = np.asarray(render_framed(scene, np.random.default_rng(1)), dtype=int)
    plain = np.asarray(render(scene, np.random.default_rng(1)), dtype=int)
    inside = np.s_[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH]
    assert (framed[inside] == plain[inside]).all()
    frame = np.ones(framed.shape[:2], bool)
    frame[inside] = False
    assert np.abs(framed[frame] - COLORS["green"]).max() <= 10


def test_the_judge_accepts_framed_renders_and_only_with_their_own_prompts(pictures: RenderedPictures) -> None:
    prompts = full_prompts(pictures)
    verdicts = judge_framed(pictures.unit_interval(), prompts, load_classifier())
    assert verdicts.accurate.float().mean() > 0.97 and verdicts.strict.float().mean() > 0.97
    others = judge_framed(pictures.unit_interval(), prompts[1:] + prompts[:1], load_classifier())
    assert others.accurate.float().mean() < 0.1


def test_no_frame_or_one_of_another_colour_is_wrong_whatever_the_prompt_leaves_open(
    pictures: RenderedPictures,
) -> None:
    prompts = [Prompt(shape=scene.shape) for scene in pictures.scenes]
    plain = render_pictures(96, seed=8, workers=1)
    assert not judge_framed(plain.unit_interval(), prompts, load_classifier()).accurate.any()
    blue = judge_framed(with_frame(pictures.unit_interval(), "blue"), prompts, load_classifier())
    assert blue.accurate.tolist() == [scene.color == "blue" for scene in pictures.scenes]


def test_a_frame_of_two_colours_is_not_strict(pictures: RenderedPictures) -> None:
    prompts = [Prompt(shape=scene.shape) for scene in pictures.scenes]
    spoilt = with_frame(pictures.unit_interval(), "red", width=3)  # less than half of what is read
    verdicts = judge_framed(spoilt, prompts, load_classifier())
    assert verdicts.accurate.float().mean() > 0.97
    assert verdicts.strict.tolist() == [scene.color == "red" for scene in pictures.scenes]


def test_taking_the_frame_off_changes_nothing_inside(pictures: RenderedPictures) -> None:
    before = pictures.unit_interval()
    after = without_frame(before)
    edge = FRAME_WIDTH + 1
    assert torch.equal(after[..., edge:-edge, edge:-edge], before[..., edge:-edge, edge:-edge])
    assert torch.equal(after[..., :edge, :], after[..., :1, :1].expand_as(after[..., :edge, :]))


def train(encoder: CaptionEncoder, pictures: RenderedPictures, out: Path, **settings: Any) -> Any:
    """A small UNet, fine-tuned on random latents, and it and `train_teacher`'s loss of it before that."""
    torch.manual_seed(1)
    unet = build_unet((16, 32, 32), 1)
    latents = torch.randn(len(pictures), 4, 16, 16, generator=torch.Generator().manual_seed(2))
    config = FinetuningConfig(pictures=len(pictures), **settings)

    @torch.no_grad()
    def loss() -> float:
        return float(train_teacher.teacher_loss(unet, encoder, latents, pictures, 32, (9, 9)))

    before = loss()
    finetune(unet, encoder, latents, pictures, out, config)
    assert read_settings(out) == config
    return unet, before, loss()


def test_finetuning_trains_the_unet_and_nothing_else(
    encoder: CaptionEncoder, pictures: RenderedPictures, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    unet, loss_before, loss_after = train(encoder, pictures, tmp_path, steps=30, batch_size=8, lr=3e-3)
    assert loss_after < 0.8 * loss_before
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in unet.state_dict().items())


def test_an_interrupted_finetuning_goes_on_as_if_nothing_had_happened(
    encoder: CaptionEncoder, pictures: RenderedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_teacher, "_CHECKPOINT_EVERY", 2)
    settings = {"steps": 4, "batch_size": 2}
    unbroken, _, _ = train(encoder, pictures, tmp_path / "unbroken", **settings)
    step, taken = EMAModel.step, []

    def interrupt(self: EMAModel, parameters: object) -> None:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        step(self, parameters)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EMAModel, "step", interrupt)
        train(encoder, pictures, tmp_path / "broken", **settings)
    assert not (tmp_path / "broken" / "unet").exists()
    averages: list[EMAModel] = []

    def note(self: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> None:
        averages.append(self)
        step(self, parameters)

    monkeypatch.setattr(EMAModel, "step", note)
    resumed, _, _ = train(encoder, pictures, tmp_path / "broken", **settings)
    assert len(averages) == 2  # steps 3 and 4; the first two were not done again
    for weight, average in zip(resumed.parameters(), averages[-1].shadow_params, strict=True):
        assert torch.equal(weight, average)
    for (name, weight), other in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(other, weight, msg=name)


def test_another_seed_is_another_training(encoder: CaptionEncoder, pictures: RenderedPictures, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        unet, _, _ = train(encoder, pictures, tmp_path / name, steps=2, batch_size=2, seed=seed)
        weights.append(unet.conv_out.weight)
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"pictures": 0}, "pictures=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"lr": 0.0}, "lr=0"),
    ],
)
def test_settings_that_train_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuningConfig(**settings)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The directory of a fine-tune that is the base with other weights, and those."""
    directory = tmp_path_factory.mktemp("finetune")
    unet = teacher_pipeline().unet
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(directory / "unet")
    save_settings(FinetuningConfig(), directory)
    return directory, {name: value.clone() for name, value in unet.state_dict().items()}


def test_the_delta_of_the_base_goes_into_a_finetune_and_out_again(
    changed: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, weights = changed
    unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    delta = load_file(DELTA)
    merge_delta(unet, DELTA)
    for name, value in unet.state_dict().items():
        expected = weights[name] + delta[name].float() if name in delta else weights[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7, msg=name)
    unmerge_delta(unet)
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


def test_each_row_of_the_table_draws_with_the_model_that_it_names(
    changed: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    samplers = finetuned.finetuned_samplers(changed[0])
    assert [(one.model, one.solver, one.steps, one.nfe) for one in samplers] == [
        ("base", "DDIM", 50, 100),
        ("base + delta", "PeRFlow", 4, 4),
        ("fine-tune", "DDIM", 50, 100),
        *(("fine-tune", solver, steps, nfe) for steps, nfe in ((4, 8), (2, 4), (4, 4)) for solver in SOLVERS),
        *(("fine-tune + delta", "PeRFlow", steps, steps) for steps in (4, 6, 8)),
    ]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = {(one.model, one.nfe): one.draw(["a star"], latents) for one in samplers if one.nfe <= 8}
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn["base + delta", 4], perflow_sampler(pipe, 4).draw(["a star"], latents))
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.load_state_dict(changed[1])
    torch.testing.assert_close(drawn["fine-tune + delta", 4], perflow_sampler(pipe, 4).draw(["a star"], latents))
    teacher = teacher_pipeline()
    teacher.unet.load_state_dict(changed[1])
    plain = teacher_sampler(teacher, "DPM-Solver++", 4, 1.0)  # the last of the rows of 4
    torch.testing.assert_close(drawn["fine-tune", 4], plain.draw(["a star"], latents))


def test_the_report_and_its_sheet(run: Run, changed: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def small_set(count: int) -> EvaluationSet:
        data = make_finetuned_set(count)
        return replace(data, reference=data.reference[:32])  # each row's distance is measured to all of them

    def short_samplers(directory: Path) -> list[Sampler]:
        short = samplers[1].draw
        return [replace(one, draw=short) if one.steps == 50 else one for one in samplers]

    make_finetuned_set, samplers = finetuned.make_finetuned_set, finetuned.finetuned_samplers(changed[0])
    monkeypatch.setattr(finetuned, "finetuned_samplers", short_samplers)
    monkeypatch.setattr(finetuned, "make_finetuned_set", small_set)
    path = tmp_path / "finetune.md"
    status, out, _ = run("evaluate", "--finetuned", changed[0], "--prompts", 2, "--out", path)
    assert status == 0 and path.read_text().strip() == out.strip()
    lines = out.splitlines()
    assert sum(line.startswith("| fine-tune, ") and line.count("|") == 9 for line in lines) == 7
    assert any(line.startswith("| fine-tune + delta, PeRFlow, 4 steps, against |") for line in lines)
    assert "| real renders | - | - | - | 100.0 ± 0.0 | 100.0 ± 0.0 |" in out
    assert f"{FinetuningConfig().steps} steps of {FinetuningConfig().batch_size} pictures" in out
    with Image.open(path.with_suffix(".png")) as sheet:
        assert 2 * 128 < sheet.width < 3 * 128 and sheet.height > (1 + len(finetuned.SHOWN)) * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "holds no finished fine-tune; run python -m perflow_blocks.demo.finetune --out"),
        (("--quick",), "--quick"),
        (("--editing",), "pass one of them"),
        (("--prompts", 1), "prompts=1"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, changed: tuple[Path, Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    directory = changed[0] if "--prompts" in arguments else tmp_path
    status, out, err = run("evaluate", "--finetuned", directory, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err
