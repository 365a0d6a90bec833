"""Fine-tunes the demo's teacher on framed pictures: `python -m perflow_blocks.demo.finetune --out runs/finetune`.

The result is a checkpoint that the demo's delta was not made for, like the fine-tunes of SDXL for a delta of SDXL.
Only the UNet is trained; the other parts stay the embedded model's. `perflow evaluate --finetuned runs/finetune`
measures what the delta makes of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel

from . import teacher_pipeline
from .conditioning import CaptionEncoder
from .data import RenderedPictures, render_pictures
from .framed import render_framed
from .train_teacher import fit_teacher
from .train_vae import encode_pictures

SETTINGS_NAME = "finetuning.json"


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """How the fine-tune is trained."""

    pictures: int = 6000
    steps: int = 900
    batch_size: int = 32
    lr: float = 6e-4
    seed: int = 3  # of pictures and training; the base's is 1

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; pass at least 1.")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} is not above 0; pass a learning rate such as 6e-4.")


def main(
    out: Annotated[Path, typer.Option(help="Where the checkpoint and the fine-tuned UNet go.")] = Path(
        "runs/finetune"
    ),
    steps: Annotated[int, typer.Option(help="Training steps.")] = FinetuningConfig.steps,
) -> None:
    """Fine-tune the embedded teacher on framed pictures."""
    torch.set_flush_denormal(True)
    config = FinetuningConfig(steps=steps)
    if (out / SETTINGS_NAME).exists() and read_settings(out) != config:
        raise ValueError(f"{out} was trained with other settings; remove it, or pass another --out.")
    if (out / "unet").is_dir():  # what is saved last
        typer.echo(f"{out / 'unet'} is finished; remove it, or pass another --out, to train anew.")
        return
    pipe = teacher_pipeline()
    pictures = render_pictures(config.pictures, seed=config.seed, renderer=render_framed)
    latents = encode_pictures(pipe.vae, pictures) * pipe.vae.config.scaling_factor
    encoder = CaptionEncoder(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2)
    finetune(pipe.unet, encoder, latents, pictures, out, config)


def finetune(
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    latents: torch.Tensor,
    pictures: RenderedPictures,
    out: Path,
    config: FinetuningConfig,
) -> None:
    """Trains `unet` in place and saves it, in float32, as `out/unet`; the text encoders stay as they are.

    An interrupted training goes on from its last checkpoint in `out`.

    Args:
        unet: the teacher.
        encoder: its text encoders.
        latents: scaled latents of `pictures`, (count, 4, 16, 16).
        pictures: their scenes give the captions.
        out: the directory of `unet`, the checkpoint and the settings.
        config: how to train.
    """
    save_settings(config, out)
    encoder.eval().requires_grad_(False)
    unet.train().requires_grad_(True)
    fit_teacher(
        unet,
        encoder,
        latents,
        pictures,
        out,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
    )
    unet.eval().save_pretrained(out / "unet")


def save_settings(config: FinetuningConfig, out: Path) -> None:
    """Writes what the fine-tune in `out` is trained with; makes the directory."""
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")


def read_settings(out: Path) -> FinetuningConfig:
    """What the fine-tune in `out` is trained with."""
    return FinetuningConfig(**json.loads((out / SETTINGS_NAME).read_text()))


if __name__ == "__main__":
    typer.run(main)
