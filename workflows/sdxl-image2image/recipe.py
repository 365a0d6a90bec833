"""Image to image: a given image, drawn again as the prompt says.

    python workflows/sdxl-image2image/recipe.py "a red circle on a navy background"
    python workflows/sdxl-image2image/recipe.py "a lighthouse in winter" --image lighthouse.png --model . --device cuda

`--strength` is the time at which the image enters the path from noise (1) to data (0): 0.3 keeps nearly all of it,
1 nothing. Without `--image` the image is one that the model draws first. The embedded demo model draws, unless
`--model` names a directory or repository of SDXL weights.
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


def redraw(
    pipe: Any, image: Image.Image, prompt: str, strength: float = 0.5, seed: int = 0, **settings: Any
) -> Image.Image:
    """The image as the prompt says; `settings` are further inputs of the call, such as `num_inference_steps`."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, image=image, strength=strength, generator=generator, output="images", **settings)[0]


def load(model: str | None, device: str) -> Any:
    """The pipeline of a directory or repository; the embedded demo model for None."""
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(model or str(weights_directory()))
    pipe.load_components(dtype=torch.float32 if device == "cpu" else torch.float16)
    return pipe.to(device)


def main(
    prompt: str = "a red circle on a navy background",
    *,
    image: Path | None = None,
    strength: float = 0.8,
    model: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/image2image.png"),
) -> Path:
    """Writes the new image and returns where; the number of steps is what the weights recommend."""
    pipe = load(model, device)
    if image is None:
        first = torch.Generator().manual_seed(1)
        given = pipe(prompt="a yellow circle on a navy background", generator=first, output="images")[0]
    else:
        given = Image.open(image).convert("RGB")
    redrawn = redraw(pipe, given, prompt, strength, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    redrawn.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
