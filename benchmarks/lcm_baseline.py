"""The demo's teacher distilled by latent consistency instead of PeRFlow, for the same budget, and judged alike.

    python -m benchmarks.lcm_baseline --like distill.toml --delta out/delta.safetensors --out lcm
    python -m benchmarks.lcm_baseline --budget 500000 --out lcm
    python -m benchmarks.lcm_baseline --trained --out lcm --prompts 1024

A budget is a number of rows that go forward through a UNet, the teacher's, the student's and the target's alike, as in
a PeRFlow distillation of a configuration (`--like`). That favours the baseline: more of its rows are trained on, and
passes back are not counted. It sees the trainer's own images, captions and latents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor

from perflow_blocks.atomic_files import atomic_directory
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.recipe import noise_schedule_of
from perflow_blocks.demo import teacher_pipeline, weights_directory
from perflow_blocks.demo.judge import BATCH, make_demo_set
from perflow_blocks.evaluation.measure import Row, evaluate_samplers, markdown_differences, markdown_table
from perflow_blocks.evaluation.samplers import Sampler, perflow_sampler, teacher_sampler
from perflow_blocks.training.buckets import TrainingBatch
from perflow_blocks.training.config import DataConfig, DistillConfig, load_config
from perflow_blocks.training.data import open_dataset
from perflow_blocks.training.pairs import sizes_of
from perflow_blocks.training.teacher import LatentEncoder, PromptEncoder

from .consistency import ConsistencyBatch, ConsistencyConfig, ConsistencyLoss, distill_consistency
from .report import describe_machine, write

STEPS = (4, 8)
STUDENT, SETTINGS = "student", "settings.json"
_CACHE = 4096  # prompts


def perflow_rows(config: DistillConfig) -> int:
    """The rows that go forward through a UNet in a PeRFlow distillation, those of validation left out."""
    teacher, settings = config.teacher, config.optimizer
    windows = config.windows.tile().num_windows
    guided = teacher.cfg_mode == "fixed" and teacher.guidance_scale > 1
    solve = teacher.steps_per_window * (2 if guided else 1)
    micro_steps, batch = settings.max_steps * settings.gradient_accumulation_steps, settings.batch_size
    if teacher.starts == "noised":
        return micro_steps * batch * (solve + 1)
    every = teacher.solve_every or windows
    solves = range(0, micro_steps, every)
    begins = teacher.on_policy_from * settings.max_steps * settings.gradient_accumulation_steps
    on_policy = sum(number >= begins for number in solves) if teacher.on_policy_share > 0 else 0
    return batch * (len(solves) * windows * solve + on_policy * (windows - 1) + micro_steps)


def lcm_scheduler(teacher: StableDiffusionXLPipeline, ddim_steps: int) -> LCMScheduler:
    """diffusers' scheduler on the teacher's noise schedule and the grid of the training."""
    return LCMScheduler(
        **noise_schedule_of(teacher.scheduler.config),
        original_inference_steps=ddim_steps,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="epsilon",
    )


def make_batches(
    teacher: StableDiffusionXLPipeline, data: DataConfig, config: ConsistencyConfig, device: torch.device
) -> Iterator[ConsistencyBatch]:
    """Endless batches of images at random points of the grid."""
    encoder = PromptEncoder(teacher, device, _CACHE)
    latents = LatentEncoder(teacher.vae, device)
    generator = torch.Generator().manual_seed(config.seed)
    for batch in open_dataset(data, batch_size=config.batch_size, seed=config.seed):
        yield make_batch(batch, encoder, latents, config.ddim_steps, generator)


def make_batch(
    batch: TrainingBatch, encoder: PromptEncoder, latents: LatentEncoder, ddim_steps: int, generator: torch.Generator
) -> ConsistencyBatch:
    if batch.pixels is None:
        raise ValueError("the data has no images, which latent consistency is trained on; pass data of images.")
    x0 = latents.encode(batch.pixels, generator)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    index = torch.randint(ddim_steps, (len(x0),), generator=generator).to(x0.device)
    conditions = encoder.conditioning(batch.prompts, sizes_of(batch))
    return ConsistencyBatch(x0=x0, noise=noise, index=index, conditioning=conditions, empty=encoder.empty(conditions))


def lcm_sampler(teacher: StableDiffusionXLPipeline, unet: Any, scheduler: LCMScheduler, steps: int) -> Sampler:
    """The student under diffusers' `LCMScheduler`, whose own noise is the same in every call."""
    pipe = StableDiffusionXLPipeline(
        **{**teacher.components, "unet": unet, "scheduler": scheduler}, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        return pipe(
            prompt=list(prompts),
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    return Sampler(model="latent consistency", solver="LCM", steps=steps, guidance_scale=1.0, draw=draw)


def samplers(
    directory: Path,
    teacher: StableDiffusionXLPipeline,
    unet: Any,
    config: ConsistencyConfig,
    delta: Path | None,
) -> list[Sampler]:
    """The teacher under DPM-Solver++, the baseline and PeRFlow, each in 4 and 8 steps."""
    student = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(directory))
    student.load_components(dtype=torch.float32)
    student.set_progress_bar_config(disable=True)
    student.to(teacher.device)
    scheduler = lcm_scheduler(teacher, config.ddim_steps)
    return [
        *(teacher_sampler(teacher, "dpm", steps, config.guidance_scale) for steps in STEPS),
        *(lcm_sampler(teacher, unet, scheduler, steps) for steps in STEPS),
        *(perflow_sampler(student, steps, delta=delta) for steps in STEPS),
    ]


def train(options: argparse.Namespace, directory: Path, device: torch.device) -> None:
    """Distils by latent consistency, and writes student and settings into `options.out`."""
    like = None if options.like is None else load_config(options.like)
    budget = options.budget if like is None else perflow_rows(like)
    baked = like.teacher.guidance_scale if like is not None and like.teacher.cfg_mode == "fixed" else None
    data = DataConfig(kind="demo", resolution=64, bucket_step=8) if like is None else like.data
    if data.kind == "prompts":
        raise ValueError("data.kind='prompts' has no images, which latent consistency needs; pass --budget.")
    one = ConsistencyConfig(
        updates=1,
        batch_size=options.batch_size if like is None else like.optimizer.batch_size,
        guidance_scale=options.guidance_scale if baked is None else baked,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    if budget < one.rows_per_update:
        raise ValueError(f"a budget of {budget} rows is below the {one.rows_per_update} of one update; pass more.")
    config = replace(one, updates=budget // one.rows_per_update)
    teacher = teacher_pipeline(directory).to(device)
    student = UNet2DConditionModel.from_pretrained(directory, subfolder="unet", dtype=torch.float32).to(device)
    loss = ConsistencyLoss(config, lcm_scheduler(teacher, config.ddim_steps), device)
    unet = distill_consistency(teacher.unet, student, make_batches(teacher, data, config, device), config, loss)
    with atomic_directory(options.out / STUDENT) as folder:
        unet.save_pretrained(folder)
    settings = {**asdict(config), "budget": budget, "rows": config.updates * config.rows_per_update}
    write(json.dumps(settings, indent=2) + "\n", options.out / SETTINGS)


def quality_tables(rows: Sequence[Row]) -> list[str]:
    """All rows, and for each of PeRFlow's by how much it is more accurate than the others."""
    students = [row for row in rows if row.name.startswith("student")]
    return [markdown_table(rows), *(markdown_differences(rows, student) for student in students)]


def run(options: argparse.Namespace) -> str:
    """Trains, unless it was done before, and returns the table, which goes into `options.out` too."""
    device, directory = torch.device(options.device), weights_directory()
    if not options.trained:
        train(options, directory, device)
    settings = json.loads((options.out / SETTINGS).read_text())
    config = ConsistencyConfig(**{name: value for name, value in settings.items() if name not in ("budget", "rows")})
    unet = UNet2DConditionModel.from_pretrained(options.out / STUDENT, dtype=torch.float32).to(device).eval()
    teacher = teacher_pipeline(directory).to(device)
    teacher.set_progress_bar_config(disable=True)
    drawn = samplers(directory, teacher, unet, config, options.delta)
    rows = evaluate_samplers(drawn, make_demo_set(options.prompts), batch_size=BATCH)
    text = "\n\n".join(
        [
            "# Latent consistency beside PeRFlow",
            f"{describe_machine(device)}. {options.prompts} prompts; ± is one standard error.",
            f"Latent consistency: {config.updates:,} updates of {config.batch_size} rows, learning rate "
            f"{config.learning_rate:g}, {settings['rows']:,} rows through a UNet of a budget of "
            f"{settings['budget']:,}.",
            *quality_tables(rows),
        ]
    )
    write(text + "\n", options.out / "report.md")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the baseline and prints its table."""
    options = _parser().parse_args(arguments)
    sys.stdout.write(run(options) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lcm_baseline", description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=int, help="rows that go forward through a UNet")
    budget.add_argument(
        "--like", type=Path, help="configuration of a PeRFlow distillation: budget, batch size, guidance, data"
    )
    budget.add_argument("--trained", action="store_true", help="judge the student that is in --out from before")
    parser.add_argument("--out", type=Path, required=True, help="directory of student, settings and report")
    parser.add_argument("--delta", type=Path, help="PeRFlow's delta (default: that of the embedded model)")
    parser.add_argument("--prompts", type=int, default=512, help="of the evaluation (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="with --budget (default: %(default)s)")
    parser.add_argument(
        "--guidance-scale", type=float, default=3.0, help="unless --like bakes one in (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="the highest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
