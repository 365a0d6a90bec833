"""A custom pipeline: the preset with a block of your own in its denoising loops.

    python workflows/custom_block/recipe.py "a green triangle on a navy background, in the middle"
    python workflows/custom_block/recipe.py "a palace by a lake" --mirror-steps 3 --model . --device cuda

The block here makes images symmetric: after each step the right half of the latents becomes the mirror image of
the left one. With `--mirror-steps` only the first steps do so, and what the later ones add is free. As it is put into
every loop, it works for image-to-image, inpainting and ControlNets too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks, insert_loop_block
from perflow_blocks.demo import weights_directory


class MirrorStep(ModularPipelineBlocks):
    """Makes the latents symmetric from left to right. Belongs after the solver."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Loop step that makes the right half of the latents the mirror image of the left one."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents",
                required=True,
                type_hint=torch.Tensor,
                description="Latents (batch, channels, height/f, width/f) of this step.",
            ),
            InputParam("mirror_steps", type_hint=int, description="How many of the first steps do so. None: all."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Symmetric latents, while it is in force.")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        if block_state.mirror_steps is None or i < block_state.mirror_steps:
            latents = block_state.latents
            width = latents.shape[-1]
            left, middle = latents[..., : width // 2], latents[..., width // 2 : (width + 1) // 2]
            block_state.latents = torch.cat([left, middle, left.flip(-1)], dim=-1)
        return components, block_state


def mirrored_blocks() -> PeRFlowSDXLAutoBlocks:
    """The preset with a `MirrorStep` after the solver of every loop."""
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "mirror", MirrorStep, after="solver")
    return blocks


def draw(pipe: Any, prompt: str, mirror_steps: int | None = None, seed: int = 0, **settings: Any) -> Image.Image:
    """An image of the prompt; the new block's input is an input of the pipeline like any other."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, mirror_steps=mirror_steps, generator=generator, output="images", **settings)[0]


def load(model: str | None, device: str) -> Any:
    """The pipeline of a directory or repository; the embedded demo model for None."""
    pipe = mirrored_blocks().init_pipeline(model or str(weights_directory()))
    pipe.load_components(dtype=torch.float32 if device == "cpu" else torch.float16)
    return pipe.to(device)


def main(
    prompt: str = "a green triangle on a navy background, in the middle",
    *,
    mirror_steps: int | None = None,
    model: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/custom_block.png"),
) -> Path:
    """Writes the image and returns where; the number of steps is what the weights recommend."""
    image = draw(load(model, device), prompt, mirror_steps, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--mirror-steps", type=int)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
