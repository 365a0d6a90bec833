"""Gives the embedded model a student: `python -m perflow_blocks.demo.publish runs/demo-student`.

What `perflow distill` wrote stays as it is; the model gets its delta, in half precision.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from ..atomic_files import atomic_directory
from ..delta.extract import extract_delta, save_delta
from ..delta.files import listed, read_recipe
from ..training.checkpoints import DELTA as RUN_DELTA
from ..training.checkpoints import STUDENT
from .blocks import DELTA
from .models import CaptionEncoder, build_teacher_scheduler

WEIGHTS = Path(__file__).parent / "weights"
BASE_NAME = "perflow_blocks demo teacher"


def main(
    run: Annotated[Path, typer.Argument(help="What `perflow distill` wrote, its output.directory.")],
    weights: Annotated[Path, typer.Option(help="The half-precision model that gets the delta.")] = WEIGHTS,
) -> None:
    """Put the delta of a distilled student into the demo model."""
    publish(run, weights)
    typer.echo(weights / DELTA)


def publish(run: Path, weights: Path, base: Path | None = None) -> None:
    """Writes the delta of a finished distillation of full weights into `weights`.

    `base` is what `save_base` wrote, to be put there as well; by default `weights` has it already. Nothing is written
    where the delta does not lead from this base to the student.
    """
    unet = UNet2DConditionModel.from_pretrained(base or weights, subfolder="unet", dtype=torch.float32)
    student = UNet2DConditionModel.from_pretrained(run / STUDENT, dtype=torch.float32)
    delta, whole = load_file(run / RUN_DELTA), extract_delta(student, unet)
    wrong = [
        name
        for name, change in whole.items()
        if not (torch.equal(change.to(delta[name].dtype), delta[name]) if name in delta else not change.any())
    ]
    if wrong:
        what = f"{run / RUN_DELTA} does not lead from the base that is published to the student ({listed(wrong)})"
        raise ValueError(f"{what}; distil from that base.")
    recipe = replace(read_recipe(run / RUN_DELTA), base_model=BASE_NAME)
    if base is not None:
        shutil.copytree(base, weights, dirs_exist_ok=True)
    save_delta(delta, weights / DELTA, recipe, partial=len(delta) < len(whole))


def save_base(vae: AutoencoderKL, unet: UNet2DConditionModel, encoder: CaptionEncoder, directory: Path) -> None:
    """Writes the base as a folder for each part, in half precision, from which the student is distilled too."""
    with atomic_directory(directory) as temporary:
        unet.half().save_pretrained(temporary / "unet")
        vae.half().save_pretrained(temporary / "vae")
        for name in ("text_encoder", "text_encoder_2"):
            model = getattr(encoder, name).half()
            model.save_pretrained(temporary / name)
            # transformers loads the type that a config names, diffusers float32: make both load the same.
            model.config.dtype = torch.float32
            model.config.save_pretrained(temporary / name)
        for name in ("tokenizer", "tokenizer_2"):
            encoder.tokenizer.save_pretrained(temporary / name)
        build_teacher_scheduler().save_pretrained(temporary / "scheduler")


if __name__ == "__main__":
    typer.run(main)
