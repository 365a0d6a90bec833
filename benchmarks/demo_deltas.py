"""What the embedded model's delta is worth on a fine-tune of its base, and as a LoRA.

python -m benchmarks.demo_deltas finetune runs/finetune --prompts 256 --out docs/finetune.md   # a sheet beside it
python -m benchmarks.demo_deltas lora 8 32 64 --prompts 512
python -m benchmarks.demo_deltas classifier      # trains the judge of the demo's images again
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from perflow_blocks.delta.files import read_recipe
from perflow_blocks.delta.lora import delta_to_lora, save_lora, save_residual
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline, weights_directory
from perflow_blocks.demo.blocks import DELTA
from perflow_blocks.demo.images import COLORS, SHAPES, Prompt, render_images
from perflow_blocks.demo.judge import (
    BATCH,
    CLASSIFIER,
    CLEAN_SHARE,
    ShapeClassifier,
    judge,
    make_demo_set,
    nearest_color,
    read_colors,
    share_near,
)
from perflow_blocks.demo.models import GUIDANCE_SCALE
from perflow_blocks.demo.train import fit
from perflow_blocks.evaluation.measure import EvaluationSet, comparison_sheet, evaluate_samplers, markdown
from perflow_blocks.evaluation.samplers import Sampler, perflow_sampler, teacher_sampler

from .demo_finetune import BATCH_SIZE, FRAME_WIDTH, LEARNING_RATE, render_framed
from .report import table, write

FINETUNED_SEED = 40_260  # no training run and no other evaluation draws from it
_SEAM = 1  # pixels on either side of the frame's inner edge, which blend two colours
_SHOWN = (0, 2, 3, 4, 6, 11)  # rows of the fine-tune's table on its sheet


def judge_framed(
    images: Tensor, prompts: Sequence[Prompt], classifier: ShapeClassifier
) -> tuple[list[bool], list[bool]]:
    """As `judge` for what is inside the frame, and the frame must be there, in the colour that the shape has.

    An image without a frame is never accurate, whatever its prompt leaves open. A strict one has a clean frame too.
    """
    height, width = images.shape[-2:]
    rows = torch.minimum(torch.arange(height), torch.arange(height).flip(0))
    columns = torch.minimum(torch.arange(width), torch.arange(width).flip(0))
    depth = torch.minimum(rows[:, None], columns[None, :])  # pixels from the nearest edge
    outer = FRAME_WIDTH + _SEAM
    background = images[..., (depth >= outer) & (depth < outer + 3)].median(-1).values  # (count, 3)
    inside = torch.where(depth < outer, background[..., None, None], images)
    accurate, strict = judge(inside, prompts, classifier)
    for number, image in enumerate(255.0 * images):
        color = read_colors(255.0 * inside[number]).color
        frame = image[:, depth < FRAME_WIDTH - _SEAM].T  # (pixels, 3)
        framed = color is not None and nearest_color(frame.median(0).values, COLORS) == color
        accurate[number] &= framed
        strict[number] &= framed and share_near(frame, COLORS[str(color)]) >= CLEAN_SHARE
    return accurate, strict


def finetune_report(directory: Path, count: int) -> tuple[str, Any]:
    """The tables of the fine-tune in a directory, its base beside it, and a sheet of the first prompts."""
    if not (directory / "unet" / "config.json").is_file():
        raise SystemExit(f"no fine-tune in {directory}; run python -m benchmarks.demo_finetune --out {directory}.")
    data = make_demo_set(
        count, seed=FINETUNED_SEED, vae=teacher_pipeline().vae, renderer=render_framed, judge=judge_framed
    )
    rows = evaluate_samplers(finetune_samplers(directory), data, batch_size=BATCH)
    text = "\n\n".join(
        [
            "# The demo's delta on a fine-tune of its base",
            f"The embedded teacher's UNet, trained on in batches of {BATCH_SIZE} images (learning rate "
            f"{LEARNING_RATE:g}) with a frame of {FRAME_WIDTH} pixels in the shape's colour, which no caption "
            "names. The delta is the one of the package, made for the teacher before that. An image is accurate if it "
            "has the frame in the colour of its shape, and inside it everything that the prompt names; strict if the "
            "colours are clean as well. What judges knows nothing of the models.",
            f"{count} prompts, seed {FINETUNED_SEED}, the same noise in every row; ± is one standard error. NFE "
            "counts UNet rows, so guidance counts double. Made by `python -m benchmarks.demo_deltas finetune "
            f"DIRECTORY --prompts {count}`. The second table compares image by image.",
            markdown(rows, next(row for row in rows if row.name.startswith("fine-tune + delta"))),
        ]
    )
    return text, comparison_sheet([rows[number] for number in _SHOWN], data.prompts[:8])


def finetune_samplers(directory: Path) -> list[Sampler]:
    """Few steps of plain solvers come with as many UNet rows as PeRFlow in four too: two guided, or four without."""
    tuned, tuned_delta, base_delta = teacher_pipeline(), perflow_pipeline(), perflow_pipeline()
    tuned.unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    # A UNet of its own, for the first call merges the delta into it.
    tuned_delta.update_components(unet=UNet2DConditionModel.from_pretrained(directory / "unet"))
    for pipe in (base_delta, tuned_delta):
        pipe.set_progress_bar_config(disable=True)
    few = [
        teacher_sampler(tuned, solver, steps, scale, model="fine-tune")
        for steps, scale in ((4, GUIDANCE_SCALE), (2, GUIDANCE_SCALE), (4, 1.0))
        for solver in ("ddim", "dpm")
    ]
    return [
        teacher_sampler(teacher_pipeline(), "ddim", 50, GUIDANCE_SCALE, model="base"),
        perflow_sampler(base_delta, 4, model="base + delta"),
        teacher_sampler(tuned, "ddim", 50, GUIDANCE_SCALE, model="fine-tune"),
        *few,
        *(perflow_sampler(tuned_delta, steps, model="fine-tune + delta") for steps in (4, 6, 8)),
    ]


def lora_report(ranks: Sequence[int], data: EvaluationSet) -> str:
    """Draws with the full delta, with LoRAs of the ranks, with the residual alone and with nothing.

    Each LoRA is used as a user would use it: written to a file, loaded by diffusers, its residual merged below it; the
    last rank also without the residual.
    """
    delta = weights_directory() / DELTA
    conversions = {rank: delta_to_lora(delta, rank=rank) for rank in ranks}
    with tempfile.TemporaryDirectory() as folder:
        forms: dict[str, tuple[Any, Path | None]] = {"full delta": (delta, None)}
        for rank, converted in conversions.items():
            lora, rest = (Path(folder) / f"{rank}-{kind}.safetensors" for kind in ("lora", "rest"))
            save_lora(converted, lora)
            save_residual(converted, rest)
            forms[f"LoRA of rank {rank} and residual"] = (rest, lora)
        # Of the last rank; the residual is the same for all.
        forms |= {
            f"LoRA of rank {rank} alone": (False, lora),
            "residual alone": (rest, None),
            "no delta": (False, None),
        }
        pipes = {name: _lora_pipeline(lora, read_recipe(delta).guidance_scale) for name, (_, lora) in forms.items()}
        samplers = [perflow_sampler(pipes[name], 4, delta=merged, model=name) for name, (merged, _) in forms.items()]
        rows = evaluate_samplers(samplers, data, batch_size=BATCH)
    outputs = _outputs(pipes, samplers[0], data)
    full, nothing = outputs["full delta"], outputs["no delta"]
    reports = {f"LoRA of rank {rank} and residual": one.report for rank, one in conversions.items()}
    total = next(iter(reports.values())).delta_parameters
    lines = []
    for name in forms:
        cells = [f"{total:,}", "100.0", "100.00", "0.000"] if name == "full delta" else ["-"] * 4
        if name in reports:
            one = reports[name]
            held = one.parameters + one.residual_parameters
            cells = [f"{one.parameters:,} + {one.residual_parameters:,}", f"{100 * held / total:.1f}"]
            cells += [f"{100 * one.energy:.2f}", f"{one.relative_error:.3f}"]
        error = float((outputs[name] - full).norm())
        effect = float((nothing - full).norm())
        lines.append([name, *cells, f"{error / float(full.norm()):.4f}", f"{error / effect:.3f}"])
    header = ["form", "numbers in LoRA + residual", "share of the delta %", "energy kept %", "error of dW"]
    header += ["error of the UNet's output", "of the delta's effect"]
    return f"{table(header, lines)}\n\n{markdown(rows, rows[0])}"


def _lora_pipeline(lora: Path | None, guidance: float | None) -> Any:
    """A fresh pipeline with that LoRA. Every form has the delta's guidance, also those that merge no recipe."""
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance or 1.0))
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    return pipe


@torch.no_grad()
def _outputs(pipes: dict[str, Any], full: Sampler, data: EvaluationSet) -> dict[str, Tensor]:
    """What each UNet gives on the inputs of the full delta's own run of 32 prompts."""
    calls: list[tuple[Any, Any]] = []
    hook = pipes["full delta"].unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    full.draw(data.prompts[:32], data.latents[:32])
    hook.remove()
    return {
        name: torch.cat([pipe.unet(*args, **{**kwargs, "return_dict": False})[0] for args, kwargs in calls]).double()
        for name, pipe in pipes.items()
    }


def train_classifier(path: Path, *, images: int = 24_000, seconds: float = 180.0) -> float:
    """Trains the judge on renders with noise and blur added, so that it also judges images that a decoder drew.

    Returns:
        The share of 4,096 held-out renders whose shape it recognises, in [0, 1].
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data, held_out, classifier = render_images(images, seed=3), render_images(4096, seed=4), ShapeClassifier()
    labels = torch.tensor([SHAPES.index(scene.shape) for scene in data.scenes])

    def draw(update: int) -> tuple[Tensor, ...]:
        indices = torch.randint(len(data), (64,), generator=generator)
        batch = data.batch(indices) / 2 + 0.5
        if update % 2:
            batch = F.avg_pool2d(batch, 3, stride=1, padding=1, count_include_pad=False)
        strength = torch.rand(len(batch), 1, 1, 1, generator=generator) * 0.08
        batch = (batch + strength * torch.randn(batch.shape, generator=generator)).clamp(0, 1)
        return batch, labels[indices]

    def loss(batch: Tensor, shapes: Tensor) -> Tensor:
        return F.cross_entropy(classifier.shapes(batch), shapes)

    fit(classifier, draw, loss, seconds=seconds, lr=2e-3, weight_decay=1e-2)
    save_file({name: value.half().contiguous() for name, value in classifier.eval().state_dict().items()}, path)
    with torch.no_grad():
        found = torch.cat([classifier.shapes(chunk.float() / 255.0).argmax(1) for chunk in held_out.pixels.split(256)])
    return float((found == torch.tensor([SHAPES.index(scene.shape) for scene in held_out.scenes])).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a report, and writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_deltas", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["finetune", "lora", "classifier"])
    parser.add_argument("subject", nargs="*", help="the fine-tune's directory, or ranks")
    parser.add_argument("--prompts", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a Markdown file; of the classifier its weights")
    given = parser.parse_args(arguments)
    if given.part == "classifier":
        text, sheet = f"{100 * train_classifier(given.out or CLASSIFIER):.2f} % of held-out renders", None
    elif given.part == "lora":
        text, sheet = lora_report([int(rank) for rank in given.subject], make_demo_set(given.prompts)), None
    else:
        text, sheet = finetune_report(Path(given.subject[0]), given.prompts)
    sys.stdout.write(text + "\n")
    if given.out is not None and given.part != "classifier":
        write(text + "\n", given.out)
        if sheet is not None:
            sheet.save(given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
