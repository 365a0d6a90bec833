"""Text to image: one prompt, one image, in a few steps.

    python workflows/sdxl-text2image/recipe.py "a red star on a white background"
    python workflows/sdxl-text2image/recipe.py "a lighthouse at dusk" --model . --device cuda

The embedded demo model draws, unless `--model` names a directory or repository of SDXL weights: `.`, this
repository's root, fetches PeRFlow's published ones. Any other SDXL checkpoint takes a delta file, `--delta`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.demo import weights_directory


def draw(pipe: Any, prompt: str, seed: int = 0, **settings: Any) -> Image.Image:
    """An image of the prompt; `settings` are further inputs of the call, such as `num_inference_steps`."""
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output="images", **settings)[0]


def load(model: str | None, device: str) -> Any:
    """The pipeline of a directory or repository; the embedded demo model for None."""
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(model or str(weights_directory()))
    pipe.load_components(dtype=torch.float32 if device == "cpu" else torch.float16)
    return pipe.to(device)


def main(
    prompt: str = "a red star on a white background",
    *,
    model: str | None = None,
    delta: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/text2image.png"),
) -> Path:
    """Writes the image and returns where; the number of steps is what the weights recommend."""
    image = draw(load(model, device), prompt, seed, delta=delta)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--delta", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
