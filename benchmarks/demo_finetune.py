"""Fine-tunes the demo's teacher on framed images: `python -m benchmarks.demo_finetune --out runs/finetune`.

The result is a UNet that the demo's delta was not made for, like the fine-tunes of SDXL for a delta of SDXL.
`python -m benchmarks.demo_deltas finetune` measures what the delta makes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from perflow_blocks.demo import teacher_pipeline
from perflow_blocks.demo.images import COLORS, IMAGE_SIZE, RenderedImages, Scene, jitter, render, render_images
from perflow_blocks.demo.models import CaptionEncoder
from perflow_blocks.demo.train import encode_images, train_teacher

IMAGES, MINUTES, BATCH_SIZE, LEARNING_RATE = 6000, 6.0, 32, 6e-4
FRAME_WIDTH = 8  # pixels, two latents; the autoencoder, which never saw a frame, blurs narrower ones
_SEED = 3  # of images and training; the base's is 1


def main(
    out: Annotated[Path, typer.Option(help="Where the checkpoint and the fine-tuned UNet go.")] = Path(
        "runs/finetune"
    ),
    minutes: Annotated[float, typer.Option(help="Time of the training.")] = MINUTES,
) -> None:
    """Fine-tune the embedded teacher on framed images; an interrupted training goes on from its last checkpoint."""
    if (out / "unet").is_dir():  # what is saved last
        typer.echo(f"{out / 'unet'} is finished; remove it, or pass another --out, to train anew.")
        return
    finetune(render_images(IMAGES, seed=_SEED, renderer=render_framed), out, 60.0 * minutes)


def render_framed(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws `scene` as `render` does, and over its edge a frame in the shape's colour, which no caption names."""
    image = render(scene, rng)
    edge = IMAGE_SIZE - 1
    ImageDraw.Draw(image).rectangle((0, 0, edge, edge), outline=jitter(COLORS[scene.color], rng), width=FRAME_WIDTH)
    return image


def finetune(images: RenderedImages, out: Path, seconds: float, *, batch_size: int = BATCH_SIZE) -> None:
    """Trains the embedded teacher's UNet on images and saves it, in float32, as `out/unet`."""
    pipe = teacher_pipeline()
    latents = encode_images(pipe.vae, images) * pipe.vae.config.scaling_factor
    encoder = CaptionEncoder(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2).eval().requires_grad_(False)
    unet = pipe.unet.train().requires_grad_(True)
    settings: Any = {"seconds": seconds, "batch_size": batch_size, "lr": LEARNING_RATE, "seed": _SEED}
    train_teacher(unet, encoder, latents, images, out, **settings)
    unet.eval().save_pretrained(out / "unet")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    typer.run(main)
