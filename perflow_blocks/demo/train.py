"""Makes the demo model from nothing: `python -m perflow_blocks.demo.train --out runs/demo`.

Pictures, autoencoder, teacher; the base that these are in half precision, and the student that is distilled from it as
`distill.toml` says; then base and delta are published. Every stage keeps its result under `--out` and is skipped when
that exists, and teacher and student go on from their last checkpoint, so an interrupted run loses minutes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .conditioning import CaptionEncoder
from .data import RenderedPictures, render_pictures
from .publish import WEIGHTS, publish, save_base
from .student import SETTINGS, distil_student
from .train_teacher import train_teacher
from .train_vae import encode_pictures, reconstruction_psnr, train_vae

_PICTURES = 32_000
_HELD_OUT = 512


def main(
    out: Annotated[Path, typer.Option(help="Where checkpoints and full-precision results go.")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="Where the half-precision model goes.")] = WEIGHTS,
    teacher_steps: Annotated[int, typer.Option(help="Training steps of the teacher.")] = 3800,
    settings: Annotated[Path, typer.Option(help="Of the student, as `perflow distill` takes them.")] = SETTINGS,
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
    save_base(vae, unet, encoder, out / "base")
    distil_student(out / "base", out / "distillation", settings)
    publish(out / "distillation", weights, out / "base")


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


if __name__ == "__main__":
    typer.run(main)
