"""The report on a fine-tune of the demo's teacher: what the delta, which was made for the teacher, makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..demo import perflow_pipeline, teacher_pipeline
from ..demo.finetune import read_settings
from ..demo.framed import FRAME_WIDTH, render_framed
from ..demo.models import GUIDANCE_SCALE
from .classifier import ShapeClassifier
from .comparison import (
    EvaluationSet,
    Row,
    evaluate_samplers,
    make_evaluation_set,
    markdown_differences,
    markdown_table,
)
from .framed import judge_framed
from .samplers import SOLVERS, Sampler, perflow_sampler, teacher_sampler
from .sheet import contact_sheet

FINETUNED_SEED = 40_260  # no training run and no other evaluation draws from it
ACCELERATED = "fine-tune + delta"
SHOWN = (
    ("base", 50, 100, "DDIM"),
    ("base + delta", 4, 4, "PeRFlow"),
    ("fine-tune", 50, 100, "DDIM"),
    ("fine-tune", 4, 8, "DDIM"),
    ("fine-tune", 2, 4, "DDIM"),
    (ACCELERATED, 4, 4, "PeRFlow"),
)
"""Model, steps, NFE and solver of the samplers on the sheet."""
_SHEET_PICTURES = 8


def make_finetuned_set(count: int) -> EvaluationSet:
    """`count` prompts as in training, with framed renders of them; the same pictures each time.

    Raises:
        ValueError: fewer than 2 prompts, which give no standard error.
    """
    return make_evaluation_set(count, seed=FINETUNED_SEED, renderer=render_framed)


def require_finetune(directory: Path) -> None:
    """Checks that `directory` holds a finished fine-tune.

    Raises:
        ValueError: it does not.
    """
    if not (directory / "unet" / "config.json").is_file():
        raise ValueError(
            f"{directory} holds no finished fine-tune; run python -m perflow_blocks.demo.finetune --out {directory}."
        )


def finetuned_samplers(directory: Path) -> list[Sampler]:
    """The rows of the table for the fine-tune in `directory`, the base beside it.

    The few steps of plain solvers come with as many UNet rows as PeRFlow in four steps too: two steps with guidance,
    or four without.

    Raises:
        ValueError: no finished fine-tune in `directory`.
    """
    require_finetune(directory)
    base, base_delta = teacher_pipeline(), perflow_pipeline()
    tuned, tuned_delta = teacher_pipeline(), perflow_pipeline()
    tuned.unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    # A UNet of its own, for the first call merges the delta into it.
    tuned_delta.update_components(unet=UNet2DConditionModel.from_pretrained(directory / "unet"))
    for pipe in (base_delta, tuned_delta):
        pipe.set_progress_bar_config(disable=True)
    settings = ((4, GUIDANCE_SCALE), (2, GUIDANCE_SCALE), (4, 1.0))
    few = [teacher_sampler(tuned, solver, steps, scale) for steps, scale in settings for solver in SOLVERS]
    return [
        replace(teacher_sampler(base, "DDIM", 50, GUIDANCE_SCALE), model="base"),
        replace(perflow_sampler(base_delta, 4), model="base + delta"),
        *(replace(one, model="fine-tune") for one in (teacher_sampler(tuned, "DDIM", 50, GUIDANCE_SCALE), *few)),
        *(replace(perflow_sampler(tuned_delta, steps), model=ACCELERATED) for steps in (4, 6, 8)),
    ]


def finetuned_report(directory: Path, data: EvaluationSet, classifier: ShapeClassifier) -> str:
    """Draws all prompts with every sampler and writes both tables as Markdown."""
    config = read_settings(directory)
    vae = teacher_pipeline().vae
    rows = evaluate_samplers(finetuned_samplers(directory), data, classifier, vae, judge=judge_framed)
    parts = [
        "# The demo's delta on a fine-tune of its base",
        f"The embedded teacher's UNet, trained for {config.steps:,} steps of {config.batch_size} pictures (learning "
        f"rate {config.lr:g}) on pictures with a frame of {FRAME_WIDTH} pixels in the shape's colour, which no "
        "caption names. The delta is the one of the package, made for the teacher before that. A picture is accurate "
        "if it has the frame in the colour of its shape, and inside it everything that the prompt names; strict if "
        "the colours are clean as well. What judges knows nothing of the models.",
        f"{len(data.prompts)} prompts, seed {FINETUNED_SEED}, the same noise in every row; ± is one standard error. "
        f"NFE counts UNet rows, so guidance counts double. Made by `perflow evaluate --finetuned DIRECTORY "
        f"--prompts {len(data.prompts)}`.",
        markdown_table(rows),
        "The same, prompt by prompt: how much more accurate the fine-tune with the delta is in four steps.",
        markdown_differences(rows, _reference(rows)),
    ]
    return "\n\n".join(parts)


def finetuned_sheet(directory: Path, data: EvaluationSet) -> Image.Image:
    """The first eight prompts of the set: real renders, then a row for each of the samplers of `SHOWN`."""
    samplers = {(one.model, one.steps, one.nfe, one.solver): one for one in finetuned_samplers(directory)}
    prompts = [prompt.text for prompt in data.prompts[:_SHEET_PICTURES]]
    images = _pictures(data.renders[: len(prompts)])
    captions = list(prompts)
    for key in SHOWN:
        sampler = samplers[key]
        images += _pictures(sampler.draw(prompts, data.latents[: len(prompts)]).float().cpu())
        captions += [f"{sampler.label}, NFE {sampler.nfe}", *[""] * (len(prompts) - 1)]
    title = (
        "Real renders of the first prompts, not picked; below them a base, its fine-tune, and the delta of the base."
    )
    return contact_sheet(images, captions, columns=len(prompts), scale=2, title=title)


def _pictures(pictures: Tensor) -> list[Image.Image]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures))


def _reference(rows: Sequence[Row]) -> Row:
    return min((row for row in rows if row.name.startswith(ACCELERATED)), key=lambda row: row.nfe or 0)
