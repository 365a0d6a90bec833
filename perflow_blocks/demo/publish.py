"""Gives the embedded model a student: `python -m perflow_blocks.demo.publish runs/demo-student`.

What `perflow distill` wrote stays as it is; the model gets its delta, in half precision. Before anything is written,
the delta is compared with the student and the base: merged into the base as published, it gives the student.
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
from torch import Tensor

from ..atomic_files import atomic_directory
from ..delta.extract import extract_delta, save_delta
from ..delta.files import listed, read_recipe
from ..training.checkpoints import DELTA as RUN_DELTA
from ..training.checkpoints import STUDENT
from .blocks import DELTA
from .conditioning import CaptionEncoder
from .models import build_teacher_scheduler

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
    """Writes the delta of a finished distillation, as float16, beside the base that it belongs to.

    Args:
        run: output directory of the distillation, whose student has full weights.
        weights: directory of the published model.
        base: what `save_base` wrote, to be put there as well; by default `weights` has its base already.

    Raises:
        ValueError: no base, no finished student, or one of another base; nothing is written then.
    """
    if not ((base or weights) / "unet").is_dir():
        raise ValueError(f"no base in {base or weights}; name the directory of the demo model.")
    unet = UNet2DConditionModel.from_pretrained(base or weights, subfolder="unet", dtype=torch.float32)
    delta, partial = read_matching_delta(run, unet)
    recipe = replace(read_recipe(run / RUN_DELTA), base_model=BASE_NAME)
    if base is not None:
        shutil.copytree(base, weights, dirs_exist_ok=True)
    save_delta(delta, weights / DELTA, recipe, partial=partial, base=unet)


def read_matching_delta(run: Path, base: UNet2DConditionModel) -> tuple[dict[str, Tensor], bool]:
    """The delta in `run` as it is stored, and whether it leaves weights out, which are then the base's.

    Raises:
        ValueError: no finished student, or the delta is not the student less this base, rounded to its type.
    """
    if not ((run / STUDENT / "config.json").is_file() and (run / RUN_DELTA).is_file()):
        raise ValueError(
            f"{run} holds no finished student with full weights; let perflow distill finish, or name its "
            "output.directory."
        )
    delta = load_file(run / RUN_DELTA)
    whole = extract_delta(UNet2DConditionModel.from_pretrained(run / STUDENT, dtype=torch.float32), base)
    wrong = [name for name, difference in whole.items() if not _is_rounded(difference, delta.get(name))]
    wrong += sorted(delta.keys() - whole.keys())
    if wrong:
        raise ValueError(
            f"{run / RUN_DELTA} does not lead from the base that is published to the student ({listed(wrong)}); "
            "distil from that base."
        )
    return delta, len(delta) < len(whole)


def _is_rounded(difference: Tensor, stored: Tensor | None) -> bool:
    if stored is None:
        return not difference.any()
    return torch.equal(difference.to(stored.dtype), stored)


def save_base(vae: AutoencoderKL, unet: UNet2DConditionModel, encoder: CaptionEncoder, directory: Path) -> None:
    """Writes the base as a folder for each part, as `perflow distill` and pipelines load it; complete or not at all.

    The models are in half precision afterwards, and so is what the student is distilled from: a delta against the
    weights before rounding would not fit those that are published.
    """
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
