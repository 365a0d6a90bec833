r"""Base and refiner: one UNet draws the first part of the image's way from noise to data, another one the rest.

    python workflows/sdxl-base-refiner/recipe.py "a red star on a white background"
    python workflows/sdxl-base-refiner/recipe.py "a lighthouse at dusk" --model . --device cuda \
        --refiner hansyan/perflow-sdxl-dreamshaper --variant v0-fix

The velocity of a PeRFlow student is that of a whole time window, so the hand-over is at a window boundary, the one
nearest to `--share`: with four windows at 0.25, 0.5 or 0.75. A warning names the value used where it is another one.
Without `--refiner` one UNet does both parts, and the image is that of an undivided run. The refiner needs to be
distilled as well (or to have a delta merged in); of SDXL's own refiner there are no such weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.demo import weights_directory


def draw(base: Any, refiner: Any, prompt: str, share: float = 0.5, seed: int = 0, **settings: Any) -> Image.Image:
    """An image of which `base` does this share of the denoising, in (0, 1), and `refiner` the rest.

    `settings` are inputs of both calls; they must agree on the schedule, as by the same `num_inference_steps`.
    """
    latents = base(
        prompt=prompt,
        denoising_end=share,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        output="images",
        **settings,
    )
    return refiner(prompt=prompt, image_latents=latents, denoising_start=share, output="images", **settings)[0]


def load(model: str | None, refiner: str | None, variant: str | None, device: str) -> tuple[Any, Any]:
    """Base and refiner, which share all components but the UNet; without a refiner that too."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    location = model or str(weights_directory())
    first = PeRFlowSDXLAutoBlocks().init_pipeline(location)
    first.load_components(dtype=dtype)
    second = PeRFlowSDXLAutoBlocks().init_pipeline(location)
    loaded = {name: getattr(first, name) for name in first.pretrained_component_names}
    second.update_components(**{name: component for name, component in loaded.items() if component is not None})
    if refiner is not None:
        unet = UNet2DConditionModel.from_pretrained(refiner, subfolder="unet", variant=variant, dtype=dtype)
        second.update_components(unet=unet)
    return first.to(device), second.to(device)


def main(
    prompt: str = "a red star on a white background",
    *,
    share: float = 0.5,
    model: str | None = None,
    refiner: str | None = None,
    variant: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/base_refiner.png"),
) -> Path:
    """Writes the image and returns where; the number of steps is what the weights recommend."""
    image = draw(*load(model, refiner, variant, device), prompt, share, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--share", type=float)
    parser.add_argument("--model")
    parser.add_argument("--refiner")
    parser.add_argument("--variant")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
