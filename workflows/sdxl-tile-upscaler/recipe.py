"""Upscaling in a few steps: an image two or four times as large, tile by tile, without seams.

    python workflows/sdxl-tile-upscaler/recipe.py "a red star on a white background" --scale 4
    python workflows/sdxl-tile-upscaler/recipe.py "a lighthouse at dusk" --image small.png --scale 4 --model . \
        --controlnet xinsir/controlnet-tile-sdxl-1.0 --device cuda

The image is enlarged, noised to the time `strength`, and drawn again with new detail. A ControlNet for tiles holds
each tile to what it shows; without one only a low `strength` keeps the model from drawing the whole prompt into each.
Tiles are as large as the UNet's own images and are blended at every step. Without `--image` the image is one that
the model draws first. The embedded demo model draws, unless `--model` names a directory or repository of SDXL weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks, PeRFlowTiledControlNetLoopDenoiser, PeRFlowTiledLoopDenoiser
from perflow_blocks.demo import weights_directory


def upscale(
    pipe: Any,
    image: Image.Image,
    prompt: str,
    scale: int = 2,
    strength: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Image.Image:
    """The image `scale` times as large, its sides rounded to multiples of 8 pixels.

    `strength` None is 0.6 with a ControlNet and 0.1 without one. `settings` are further inputs of the call, such as
    `num_inference_steps`, `tile_size` and `tile_overlap`.
    """
    width, height = (max(8, round(side * scale / 8) * 8) for side in image.size)
    large = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    controlled = "controlnet" in pipe.components
    if controlled:
        settings["control_image"] = large
    if strength is None:
        strength = 0.6 if controlled else 0.1
    if max(large.size) > 2048:
        pipe.vae.enable_tiling()  # in one piece it would need more memory than the UNet's tiles
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, image=large, strength=strength, generator=generator, output="images", **settings)[0]


def assemble(*, with_controlnet: bool) -> Any:
    """Image-to-image as the preset has it, but for the block that predicts: its tiled form."""
    blocks = PeRFlowSDXLAutoBlocks().get_workflow("controlnet_image2image" if with_controlnet else "image2image")
    tiled = PeRFlowTiledControlNetLoopDenoiser() if with_controlnet else PeRFlowTiledLoopDenoiser()
    blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = tiled
    return blocks


def load(model: str | None, controlnet: str | None, device: str) -> Any:
    """The pipeline of a directory or repository, the embedded demo model for None, with or without a ControlNet."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = assemble(with_controlnet=controlnet is not None).init_pipeline(model or str(weights_directory()))
    pipe.load_components(dtype=dtype)
    if controlnet is not None:
        pipe.update_components(controlnet=ControlNetModel.from_pretrained(controlnet, dtype=dtype))
    return pipe.to(device)


def main(
    prompt: str = "a red star on a white background",
    image: Path | None = None,
    scale: int = 2,
    strength: float | None = None,
    model: str | None = None,
    controlnet: str | None = None,
    device: str = "cpu",
    steps: int = 4,
    seed: int = 0,
    out: Path = Path("outputs/upscaled.png"),
) -> Path:
    """Writes the larger image and returns where."""
    pipe = load(model, controlnet, device)
    if image is None:
        drawer = PeRFlowSDXLAutoBlocks().init_pipeline(model or str(weights_directory()))
        drawer.update_components(**pipe.components)
        generator = torch.Generator().manual_seed(seed)
        small = drawer(prompt=prompt, generator=generator, output="images")[0]
    else:
        small = Image.open(image)
    large = upscale(pipe, small, prompt, scale, strength, seed, num_inference_steps=steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    large.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--scale", type=int)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--model")
    parser.add_argument("--controlnet")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
