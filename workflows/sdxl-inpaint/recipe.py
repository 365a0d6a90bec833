"""Inpainting: the white part of a mask is painted anew, every other pixel stays exactly as it is.

    python workflows/sdxl-inpaint/recipe.py "a pink star on a navy background"
    python workflows/sdxl-inpaint/recipe.py "a red boat" --image sea.png --mask mask.png --model . --device cuda

Image and mask are of one size. Without them the image is one that the model draws first, and the mask is a disc
in its middle. `--strength` 1 forgets what was in the hole; less keeps its rough shapes and colours. The embedded demo
model draws, unless `--model` names a directory or repository of SDXL weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.demo import weights_directory


def repaint(
    pipe: Any, image: Image.Image, mask: Image.Image, prompt: str, seed: int = 0, **settings: Any
) -> Image.Image:
    """The image with its masked part as the prompt says; `settings` are further inputs, such as `strength`."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, image=image, mask_image=mask, generator=generator, output="images", **settings)[0]


def disc(size: tuple[int, int]) -> Image.Image:
    """A mask of this width and height: an ellipse that leaves a tenth on every side."""
    width, height = size
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height), fill=255)
    return mask


def load(model: str | None, device: str) -> Any:
    """The pipeline of a directory or repository; the embedded demo model for None."""
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(model or str(weights_directory()))
    pipe.load_components(dtype=torch.float32 if device == "cpu" else torch.float16)
    return pipe.to(device)


def main(
    prompt: str = "a pink star on a navy background",
    *,
    image: Path | None = None,
    mask: Path | None = None,
    strength: float = 1.0,
    model: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/inpaint.png"),
) -> Path:
    """Writes the new image and returns where; the number of steps is what the weights recommend."""
    pipe = load(model, device)
    if image is None:
        first = torch.Generator().manual_seed(1)
        given = pipe(prompt="a yellow circle on a navy background", generator=first, output="images")[0]
    else:
        given = Image.open(image).convert("RGB")
    hole = disc(given.size) if mask is None else Image.open(mask).convert("L")
    painted = repaint(pipe, given, hole, prompt, seed, strength=strength)
    out.parent.mkdir(parents=True, exist_ok=True)
    painted.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
