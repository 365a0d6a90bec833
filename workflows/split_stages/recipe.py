"""Split stages: encode a prompt once, denoise many times, with blocks taken out of the preset.

    python workflows/split_stages/recipe.py "a red star on a white background"
    python workflows/split_stages/recipe.py "a harbour" --model . --device cuda --guidance-scales 1.5 2 2.5

Each stage is a pipeline of its own that loads only what its blocks need: the text encoders are in one, the UNet in
another. What one returns, the next is given by name. On a GPU one ComponentsManager brings the models of all stages
there as they are needed, and back to the CPU when memory runs short.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ClassifierFreeGuidance, ComponentsManager
from diffusers.utils import make_image_grid
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.demo import weights_directory


class Stages(NamedTuple):
    """The preset in four pipelines."""

    text: Any
    image: Any
    denoise: Any
    decode: Any


def take_apart(location: str | None = None, manager: ComponentsManager | None = None) -> Stages:
    """The stages, for the weights of a directory or repository; no component is loaded yet."""
    blocks = PeRFlowSDXLAutoBlocks()
    text, image, decode = (blocks.sub_blocks.pop(name) for name in ("text_encoder", "vae_encoder", "decode"))
    parts = (text, image, blocks, decode)  # `blocks` is what is left: checks, delta, IP-Adapter and denoising
    return Stages(*(part.init_pipeline(location, components_manager=manager) for part in parts))


def encode(stages: Stages, image: Image.Image | None = None, generator: Any = None, **texts: Any) -> dict[str, Any]:
    """What the denoising stage is given: embeddings, and the latents of an image to start from where there is one.

    `texts` are inputs of the text stage, such as `prompt` and `negative_prompt`; the generator is for the image.
    """
    encoded = stages.text(**texts).get_by_kwargs("denoiser_input_fields")
    if image is not None:
        encoded["image_latents"] = stages.image(image=image, generator=generator, output="image_latents")
    return encoded


def draw(
    stages: Stages, encoded: dict[str, Any], generator: torch.Generator, guidance: float | None = None, **settings: Any
) -> Image.Image:
    """An image of what is encoded, with this guidance scale; None keeps the guider that is in place.

    `settings` are further inputs of the denoising stage, such as `num_inference_steps` and `strength`.
    """
    if guidance is not None:
        stages.denoise.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
    latents = stages.denoise(**encoded, generator=generator, output="latents", **settings)
    return stages.decode(latents=latents, output="images")[0]


def load(model: str | None, device: str) -> Stages:
    """The stages with their components, of which the VAE serves three."""
    manager = ComponentsManager()
    stages = take_apart(model or str(weights_directory()), manager)
    for stage in (stages.text, stages.denoise):
        stage.load_components(dtype=torch.float32 if device == "cpu" else torch.float16)
    for stage in (stages.image, stages.decode):
        stage.update_components(vae=stages.denoise.vae)
    if device != "cpu":
        manager.enable_auto_cpu_offload(device=device)
    return stages


def main(
    prompt: str = "a red star on a white background",
    *,
    guidance_scales: Sequence[float | None] = (None,),
    num_images: int = 4,
    model: str | None = None,
    device: str = "cpu",
    out: Path = Path("outputs/split_stages.png"),
) -> Path:
    """Writes a sheet with a row for each guidance scale and a column for each seed from 0 on, and returns where."""
    stages = load(model, device)
    encoded = encode(stages, prompt=prompt)
    images = [
        draw(stages, encoded, torch.Generator().manual_seed(seed), guidance)
        for guidance in guidance_scales
        for seed in range(num_images)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(guidance_scales), cols=num_images).save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--guidance-scales", type=float, nargs="+")
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
