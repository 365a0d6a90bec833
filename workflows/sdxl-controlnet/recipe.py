"""ControlNet: the edges of an image say where things are, the prompt says what they are.

    python workflows/sdxl-controlnet/recipe.py photo.png "a watercolour of a harbour"

Full-size SDXL on a GPU: PeRFlow's published weights, unless `--model` names others, and a ControlNet for edges.
Another kind of control image needs the ControlNet for it (`--controlnet`, `--variant`) and its own way of making
the image, in place of `edges`. A ControlNet-Union goes the same way, with `control_mode=` in the call of `draw`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageFilter

from perflow_blocks import PeRFlowSDXLAutoBlocks

HERE = Path(__file__).parent
"""This workflow's repository, whose index names PeRFlow's published weights for SDXL."""


def draw(
    pipe: Any, control_image: Image.Image, prompt: str, scale: float = 0.7, seed: int = 0, **settings: Any
) -> Image.Image:
    """An image of the prompt along the control image; `scale` is the ControlNet's weight, 0 for none."""
    return pipe(
        prompt=prompt,
        control_image=control_image,
        controlnet_conditioning_scale=scale,
        generator=torch.Generator().manual_seed(seed),
        output="images",
        **settings,
    )[0]


def edges(image: Image.Image, threshold: float = 12.0) -> Image.Image:
    """White edges on black, as ControlNets for Canny edges take them: where brightness changes faster than so.

    The threshold is in levels, of 255, for each pixel.
    """
    brightness = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(1)), dtype=float)
    slope = np.hypot(*np.gradient(brightness))
    return Image.fromarray(np.where(slope > threshold, 255, 0).astype(np.uint8)).convert("RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The image with a longer side of `size` pixels, both sides multiples of 8 as SDXL needs them."""
    scale = size / max(image.size)
    width, height = (max(8, 8 * round(side * scale / 8)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def load(model: str, controlnet: str, variant: str | None, device: str) -> Any:
    """The pipeline of a directory or repository, with the ControlNet of another."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(model)
    pipe.load_components([name for name in pipe.pretrained_component_names if name != "controlnet"], dtype=dtype)
    pipe.update_components(controlnet=ControlNetModel.from_pretrained(controlnet, variant=variant, dtype=dtype))
    return pipe.to(device)


def main(
    image: Path,
    prompt: str,
    *,
    scale: float = 0.7,
    size: int = 1024,
    model: str = str(HERE),
    controlnet: str = "diffusers/controlnet-canny-sdxl-1.0",
    variant: str | None = "fp16",
    device: str = "cuda",
    seed: int = 0,
    out: Path = Path("outputs/controlnet.png"),
) -> Path:
    """Writes an image of the given one's shape, its longer side `size` pixels, and returns where."""
    pipe = load(model, controlnet, variant, device)
    control_image = edges(fitted(Image.open(image).convert("RGB"), size))
    width, height = control_image.size
    drawn = draw(pipe, control_image, prompt, scale, seed, width=width, height=height)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--size", type=int)
    parser.add_argument("--model")
    parser.add_argument("--controlnet")
    parser.add_argument("--variant")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
