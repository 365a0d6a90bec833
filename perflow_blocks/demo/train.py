"""Makes the demo model from nothing: `python -m perflow_blocks.demo.train --out runs/demo`.

Pictures, autoencoder, teacher, student; then the weights are written in half precision, base and delta
apart. Every stage keeps its result under `--out` and is skipped when that exists, and teacher and student go on from
their last checkpoint, so an interrupted run loses minutes. On two CPU cores the whole takes about an hour and a half.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..components.delta_files import save_delta
from ..components.delta_recipe import DeltaRecipe
from ..core.delta import extract_delta
from .conditioning import CaptionEncoder
from .data import RenderedPictures, render_pictures
from .distill import PREDICTION_TYPE, SETTINGS_NAME, DistillationConfig, distill, is_frozen, read_settings
from .models import SCHEDULE, build_teacher_scheduler
from .train_teacher import train_teacher
from .train_vae import encode_pictures, reconstruction_psnr, train_vae

WEIGHTS = Path(__file__).parent / "weights"
DELTA_NAME = "perflow_delta.safetensors"
BASE_NAME = "perflow_blocks demo teacher"
_PICTURES = 32_000
_HELD_OUT = 512


def main(
    out: Annotated[Path, typer.Option(help="Where checkpoints and full-precision results go.")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="Where the half-precision model goes.")] = WEIGHTS,
    teacher_steps: Annotated[int, typer.Option(help="Training steps of the teacher.")] = 3800,
    rounds: Annotated[int, typer.Option(help="Rounds of the distillation.")] = DistillationConfig.rounds,
    guidance: Annotated[
        float, typer.Option(help="Guidance baked into the student.")
    ] = DistillationConfig.guidance_scale,
) -> None:
    """Train every part of the demo model."""
    torch.set_flush_denormal(True)
    held_out = render_pictures(_HELD_OUT, seed=2)

    if (out / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(out / "vae")
    else:
        vae = train_vae(training_pictures(), out / "vae")
    typer.echo(f"autoencoder: {reconstruction_psnr(vae, held_out):.1f} dB on held-out renders")
    if (out / "scheduler").is_dir():  # what is saved last
        unet, encoder = load_teacher(out)
    else:
        latents = encode_pictures(vae, training_pictures()) * vae.config.scaling_factor
        unet, encoder = train_teacher(latents, training_pictures(), out, steps=teacher_steps)
    config = DistillationConfig(rounds=rounds, guidance_scale=guidance)
    if (out / "student" / SETTINGS_NAME).exists():
        if read_settings(out) != config:
            raise ValueError(f"{out / 'student'} was distilled with other settings; remove it, or pass another --out.")
        student = UNet2DConditionModel.from_pretrained(out / "student")
    else:
        student = distill(unet, encoder, out, config)
    publish(vae, unet, encoder, student, config, weights)


@cache
def training_pictures() -> RenderedPictures:
    """Rendered once, and only if a stage still needs them."""
    return render_pictures(_PICTURES, seed=1)


def load_teacher(directory: Path) -> tuple[UNet2DConditionModel, CaptionEncoder]:
    """What `train_teacher` saved."""
    encoder = CaptionEncoder(
        CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        CLIPTextModel.from_pretrained(directory / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2"),
    )
    return UNet2DConditionModel.from_pretrained(directory / "unet"), encoder


def publish(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    student: UNet2DConditionModel,
    config: DistillationConfig,
    weights: Path,
) -> None:
    """Writes the base in half precision and the delta against that rounded base, so that merging gives the student.

    The student had guidance baked in, which the delta's recipe says: scale 1, one UNet row a step.
    """
    unet.half().save_pretrained(weights / "unet")
    vae.half().save_pretrained(weights / "vae")
    for name in ("text_encoder", "text_encoder_2"):
        model = getattr(encoder, name).half()
        model.save_pretrained(weights / name)
        # transformers loads the type that a config names, diffusers float32: make both load the same.
        model.config.dtype = torch.float32
        model.config.save_pretrained(weights / name)
    for name in ("tokenizer", "tokenizer_2"):
        encoder.tokenizer.save_pretrained(weights / name)
    build_teacher_scheduler().save_pretrained(weights / "scheduler")
    recipe = DeltaRecipe(
        prediction_type=PREDICTION_TYPE,
        num_time_windows=config.num_windows,
        num_inference_steps=config.num_windows,
        guidance_scale=1.0,
        base_model=BASE_NAME,
        scheduler_config=SCHEDULE,
    )
    delta = {name: value for name, value in extract_delta(student, unet).items() if not is_frozen(name, config)}
    save_delta(delta, weights / DELTA_NAME, recipe, partial=True, base=unet)


if __name__ == "__main__":
    typer.run(main)
