"""An unconditional model from nothing: trained on a folder of images, distilled, and judged in 50 steps and in few.

    python -m benchmarks.unconditional --out runs/unconditional
    python -m benchmarks.unconditional --out runs/flowers --data /data/flowers --size 64 --minutes 240

A `UNet2DModel` is trained for three fifths of the time, on the demo's images unless `--data` names others, and
distilled in the rest as `docs/training/unconditional.toml` says. What is there from an earlier run is kept. Then all
samplers draw from the same noise. Frechet distances are on the features of the demo's shape classifier, which sees 64
pixels: images of another size are resized for it, bilinearly, real ones too. For other images than the demo's that is
a rough measure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import logging
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from perflow_blocks import PeRFlowModularPipeline
from perflow_blocks.atomic_files import atomic_directory
from perflow_blocks.demo.images import IMAGE_SIZE
from perflow_blocks.demo.judge import BATCH, load_classifier, read_colors
from perflow_blocks.demo.models import SCHEDULE
from perflow_blocks.demo.train import as_long_as, fit
from perflow_blocks.evaluation.measure import (
    EvaluationSet,
    Row,
    comparison_sheet,
    evaluate_samplers,
    mean_and_error,
    measure,
    plus_minus,
)
from perflow_blocks.evaluation.samplers import Sampler
from perflow_blocks.training.checkpoints import DELTA, REPORT
from perflow_blocks.training.config import DataConfig, load_config
from perflow_blocks.training.data import open_dataset
from perflow_blocks.training.distillation import distill

from .measure import Setting, time_in_turns
from .report import describe_machine, table, write

SETTINGS = Path(__file__).parent.parent / "docs" / "training" / "unconditional.toml"
TEACHER_SHARE = 0.6  # of the time
MANY, FEW = 50, (8, 4)
_ROUNDS = 7
_MAX_WEIGHT = 20.0  # of the error at high noise, which decides what an image shows


def main(
    out: Annotated[Path, typer.Option(help="Where teacher, student and report go.")] = Path("runs/unconditional"),
    data: Annotated[Path | None, typer.Option(help="A folder of images; by default the demo's are drawn.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images, a multiple of 8.")] = 32,
    minutes: Annotated[float, typer.Option(help="Time of both trainings.")] = 30.0,
    images: Annotated[int, typer.Option(help="The most images to train on.")] = 20_000,
    count: Annotated[int, typer.Option(help="Images of each sampler that are judged.")] = 512,
) -> None:
    """Train, distil, and write report.md and images.png."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, teacher, run = read_images(data, size, images), out / "teacher", out / "distillation"
    if not teacher.is_dir():
        train_teacher(pixels, teacher, TEACHER_SHARE * 60.0 * minutes, device)
    if not (run / REPORT).exists():  # what is written last
        overrides = {"model.teacher": str(teacher), "output.directory": str(run), "output.resume": "latest"}
        overrides |= {"data.resolution": str(size), "optimizer.learning_rate": "5e-4"}
        updates = as_long_as((1.0 - TEACHER_SHARE) * 60.0 * minutes, SETTINGS, overrides, out)
        distill(load_config(SETTINGS, overrides | updates))
    samplers = make_samplers(teacher, run / DELTA, device)
    judged = evaluation_set(pixels, count, with_colors=data is None)
    rows = evaluate_samplers(samplers, judged, batch_size=BATCH)
    comparison_sheet(rows, judged.prompts[: len(rows[0].examples)]).save(out / "images.png")
    about = f"{describe_machine(device)}. {count} images of {size} x {size}; ± is one standard error."
    text = f"# An unconditional model\n\n{about}\n\n{result_table(rows, judged.latents[:BATCH], device)}"
    write(text + "\n", out / "report.md")
    sys.stdout.write(text + "\n")


def read_images(data: Path | None, size: int, most: int) -> Tensor:
    """Images (count, 3, size, size) of 8 bits: the whole batches of an epoch of the trainer's data."""
    source: dict[str, Any] = {"kind": "demo"} if data is None else {"kind": "folder", "path": str(data)}
    config = DataConfig(**source, captions=False, resolution=size, bucketing=False, max_samples=most)
    batches = open_dataset(config, batch_size=BATCH, seed=0)
    pixels = [batch.pixels for batch in takewhile(lambda _: batches.epoch == 0, batches) if batch.pixels is not None]
    return ((torch.cat(pixels) / 2 + 0.5) * 255.0).round().to(torch.uint8)


def train_teacher(images: Tensor, directory: Path, seconds: float, device: torch.device) -> None:
    """Trains a small UNet to predict the noise, and writes its averaged weights as a `DDPMPipeline`."""
    torch.manual_seed(0)
    # Noisier schedules, such as DDPM's own, amplify the first predictions, which a short training leaves bad.
    scheduler, generator = DDPMScheduler(**SCHEDULE), torch.Generator().manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")}
    widths: dict[str, Any] = {"block_out_channels": (32, 64, 96), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DModel(sample_size=images.shape[-1], **blocks, **widths).to(device, memory_format=torch.channels_last)

    def draw(update: int) -> tuple[Tensor, ...]:
        clean = images[torch.randint(len(images), (BATCH,), generator=generator)] / 127.5 - 1.0
        timesteps = torch.randint(len(scheduler.alphas_cumprod), (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        weights = 1.0 / scheduler.alphas_cumprod[timesteps].clamp(min=1.0 / _MAX_WEIGHT)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return tuple(tensor.to(device) for tensor in (noisy, noise, timesteps, weights))

    def loss(noisy: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor) -> Tensor:
        errors = (unet(noisy, timesteps).sample - noise).square().flatten(1).mean(1)
        return (errors * weights).mean()

    fit(unet, draw, loss, seconds=seconds, lr=1e-3, beta2=0.99, weight_decay=1e-2, ema_decay=0.999)
    with atomic_directory(directory) as folder:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)


def make_samplers(teacher: Path, delta: Path, device: torch.device) -> list[Sampler]:
    """The teacher under diffusers' solvers in many steps and few, and the student in few."""
    unet = UNet2DModel.from_pretrained(teacher, subfolder="unet").to(device).eval()
    # DDIM clips what it predicts to the range of pixels, as in DDIMPipeline, which helps it in few steps.
    kinds: dict[str, Any] = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}
    found = []
    for name, kind in kinds.items():
        scheduler = kind.from_pretrained(teacher, subfolder="scheduler", timestep_spacing="trailing")
        for steps in (MANY, *FEW):
            draw = partial(draw_with, unet, scheduler, steps)
            found.append(Sampler(model="teacher", solver=name, steps=steps, guidance_scale=1.0, draw=draw))
    pipe: Any = PeRFlowModularPipeline.from_pretrained(teacher)
    pipe.load_components()
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw_few(prompts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
        given = {"latents": latents, "num_inference_steps": steps, "delta": delta}
        return pipe(**given, output_type="pt", output="images")

    for steps in FEW:
        draw = partial(draw_few, steps=steps)
        found.append(Sampler(model="student", solver="PeRFlow", steps=steps, guidance_scale=1.0, draw=draw))
    return found


@torch.no_grad()
def draw_with(unet: Any, scheduler: Any, steps: int, prompts: Sequence[str], latents: Tensor) -> Tensor:
    """Images (count, 3, height, width) in [0, 1] from noise, as diffusers' pipelines draw them."""
    scheduler.set_timesteps(steps)
    sample = latents.to(unet.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample = scheduler.step(unet(scheduler.scale_model_input(sample, t), t).sample, t, sample).prev_sample
    return (sample / 2 + 0.5).clamp(0, 1)


def evaluation_set(images: Tensor, count: int, *, with_colors: bool) -> EvaluationSet:
    """Noise, and the measures: the distance to one half of the images, and of the demo's whether colours are clean.

    A row of images of the other half shows what the measures are for real ones.
    """
    resize = nn.Upsample(IMAGE_SIZE, mode="bilinear")
    features: Any = nn.Sequential(resize, load_classifier())
    features.num_features = 64
    distance = FrechetInceptionDistance(feature=features, reset_real_features=False)
    real, others = images.tensor_split(2)
    for chunk in real[:4096].split(256):
        distance.update(chunk / 255.0, real=True)

    def clean(drawn: Tensor, where: slice) -> dict[str, Tensor]:
        return {"clean colours %": 100.0 * torch.tensor([read_colors(255.0 * one).clean for one in resize(drawn)])}

    noise = torch.randn(count, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    scorers: Any = [clean] if with_colors else []
    names = [f"noise {number}" for number in range(count)]
    data = EvaluationSet(prompts=names, latents=noise, scorers=scorers, distances={"Frechet": distance})
    data.floors.append(measure("real images", others[:count], data))
    return data


def result_table(rows: Sequence[Row], noise: Tensor, device: torch.device) -> str:
    """What the images are like, and how long they take: all samplers take turns on the same batch of noise."""
    samplers = [row.sampler for row in rows if row.sampler]
    drawers = {sampler: partial(sampler.draw, [""] * len(noise), noise) for sampler in samplers}
    timings = time_in_turns(drawers, Setting(device=device), rounds=_ROUNDS, label="time", warm_up=1)
    many, lines = timings[samplers[0]].median, []
    for row in rows:
        scores = [plus_minus(*mean_and_error(values)) for values in row.scores.values()]
        cells = ["-"] * 3
        if row.sampler:
            seconds = timings[row.sampler].median
            cells = [str(row.sampler.steps), f"{1000 * seconds / len(noise):.1f}", f"{many / seconds:.2f}"]
        lines.append([row.name, cells[0], *scores, f"{row.distances['Frechet'][0]:.2f}", *cells[1:]])
    speeds = ("ms per image", f"times as fast as {MANY} steps")
    return table(["sampler", "steps", *rows[0].scores, "Frechet", *speeds], lines)


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_flush_denormal(True)
    typer.run(main)
