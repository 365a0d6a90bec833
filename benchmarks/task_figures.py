"""Draws the images of the task pages with the embedded model; needs what `benchmarks.quantized` needs.

python -m benchmarks.task_figures --out docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from perflow_blocks import PeRFlowSDXLAutoBlocks, PeRFlowTiledLoopDenoiser
from perflow_blocks.demo import perflow_pipeline, weights_directory
from perflow_blocks.demo.images import SHAPES
from perflow_blocks.evaluation.sheet import contact_sheet

from .editing import HOLES, STRENGTHS, Edit, EditingSet, draw, make_editing_set
from .quantized import METHODS
from .quantized import pipeline as quantized_pipeline
from .task_models import PROMPTS, Cells, seeded

SHOWN_INPUTS = (0, 1)
"""The first two inputs of the set that docs/editing.md measures: none is picked."""
SHOWN_METHODS = ("float32", "torchao int8", "torchao int4, groups of 32", "bitsandbytes nf4")


def image_to_image(data: EditingSet) -> Cells:
    """Each input, and what every strength makes of it, by its own prompt and by another one."""
    pipe, cells = perflow_pipeline(), Cells()
    for wording in ("own", "both"):
        for number in SHOWN_INPUTS:
            cells += [(data.inputs[number], f"input; prompt: {data.prompts[wording][number].text}")]
            cells += [_edited(pipe, data, Edit(wording=wording, strength=s), number) for s in STRENGTHS]
    return cells


def inpainting(data: EditingSet) -> Cells:
    """Each input, its hole, and what is painted there at two strengths."""
    pipe, cells = perflow_pipeline(), Cells()
    for hole, wording in HOLES.items():
        for number in SHOWN_INPUTS:
            mask = data.masks[hole][number].point(lambda value: 200 * value // 255)  # white has no edge on the sheet
            cells += [(data.inputs[number], f"input; prompt: {data.prompts[wording][number].text}")]
            cells += [(mask, f"{hole} hole (light)")]
            cells += [_edited(pipe, data, Edit(wording=wording, hole=hole, strength=s), number) for s in (1.0, 0.8)]
    return cells


def _edited(pipe: Any, data: EditingSet, edit: Edit, number: int) -> tuple[Image.Image, str]:
    images = draw(pipe, data, edit, slice(number, number + 1)).images
    return VaeImageProcessor().postprocess(2.0 * images - 1.0, "pil")[0], f"strength {edit.strength:g}"


def deltas() -> Cells:
    """Four steps of the base alone, and with the delta, from the same noise."""
    pipe, cells = perflow_pipeline(), Cells()
    for prompt in PROMPTS:
        for delta, caption in ((False, f"{prompt}: base alone"), (None, "with the delta")):
            image = pipe(prompt, delta=delta, num_inference_steps=4, guidance_scale=1, generator=seeded()).images[0]
            cells.append((image, caption))
    return cells


def guidance() -> Cells:
    """Each prompt at several scales, and with a negative prompt, from the same noise."""
    pipe, cells = perflow_pipeline(), Cells()
    for prompt in PROMPTS:
        for scale in (1.0, 1.5, 2.0, 3.0):
            image = pipe(prompt, guidance_scale=scale, generator=seeded()).images[0]
            cells.append((image, f"{prompt}: scale {scale:g}"))
        negative = f"a small {next(shape for shape in SHAPES if shape in prompt)}"
        image = pipe(prompt, negative_prompt=negative, guidance_scale=2.0, generator=seeded()).images[0]
        cells.append((image, f"scale 2, negative prompt: {negative}"))
    return cells


def refiner() -> Cells:
    """What the base hands over, what the refiner makes of it, and a run that is not divided."""
    pipe, cells = perflow_pipeline(), Cells()
    for prompt in PROMPTS:
        latents = pipe(prompt, denoising_end=0.5, generator=seeded(), output_type="latent").images
        cells += [
            (pipe(prompt, denoising_end=0.5, generator=seeded()).images[0], f"{prompt}: handed over at 0.5"),
            (pipe(prompt, image_latents=latents, denoising_start=0.5).images[0], "finished by the refiner"),
            (pipe(prompt, generator=seeded()).images[0], "one run, not divided"),
        ]
    return cells


def upscaling() -> Cells:
    """An image of 64 pixels, enlarged to 128, and drawn again at that size."""
    pipe, cells = perflow_pipeline(), Cells()
    blocks = PeRFlowSDXLAutoBlocks().get_workflow("image2image")
    blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledLoopDenoiser()
    tiled = blocks.init_pipeline(weights_directory())
    tiled.load_components(dtype=torch.float32)
    for prompt in PROMPTS[:2]:
        small = pipe(prompt, generator=seeded()).images[0]
        large = small.resize((128, 128), Image.Resampling.LANCZOS)
        again = tiled(prompt, image=large, strength=0.1, generator=seeded()).images[0]
        cells += [(small.resize((128, 128), Image.Resampling.NEAREST), f"{prompt}: 64 x 64")]
        cells += [(large, "enlarged to 128 x 128"), (again, "drawn again in tiles")]
    return cells


def quantized() -> Cells:
    """The same prompts and noise by the UNet in float32, 8 and 4 bits."""
    pipes = {name: quantized_pipeline(METHODS[name], None) for name in SHOWN_METHODS}
    drawn = {name: pipe(list(PROMPTS), generator=seeded()).images for name, pipe in pipes.items()}
    return [(drawn[name][row], f"{name}: {prompt}") for row, prompt in enumerate(PROMPTS) for name in SHOWN_METHODS]


def main(out: Annotated[Path, typer.Option(help="The directory of the images.")] = Path("docs")) -> None:
    """Write the images."""
    data = make_editing_set(256)
    title = "On a schedule of four steps: the first two images of the set, not picked."
    sheets: dict[str, tuple[Cells, dict[str, Any]]] = {
        "image-to-image": (image_to_image(data), {"columns": 8, "scale": 2, "title": title}),
        "inpainting": (inpainting(data), {"columns": 8, "scale": 2, "title": title}),
        "deltas": (deltas(), {"columns": 6, "scale": 2}),
        "guidance": (guidance(), {"columns": 5, "scale": 2}),
        "refiner": (refiner(), {"columns": 3, "scale": 3}),
        "upscaling": (upscaling(), {"columns": 3, "scale": 2}),
        "quantized": (quantized(), {"columns": 4, "scale": 3}),
    }
    for name, (cells, layout) in sheets.items():
        images, captions = zip(*cells, strict=True)
        contact_sheet(images, captions, **layout).save(out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    typer.run(main)
