"""`perflow compare`: one prompt, drawn by the teacher and by PeRFlow, side by side with the times it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .generate import save_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..evaluation.samplers import Sampler

TEACHER_STEPS = 50
SDXL_GUIDANCE = 5.0  # StableDiffusionXLPipeline's default


def compare(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.")],
    model: options.Model = None,
    delta: options.Delta = None,
    steps: Annotated[int, typer.Option(help="Steps of the two columns of few steps, at least 4.")] = 4,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance of the teacher, at least 0. By default what the demo was distilled with, else 5."),
    ] = None,
    seed: options.Seed = 0,
    num_images: Annotated[int, typer.Option(help="Rows of the sheet, each with another seed, at least 1.")] = 3,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="The sheet, a PNG file.")] = Path("outputs/compare.png"),
) -> None:
    """Draw one prompt with the teacher in 50 steps, with DDIM in few steps, and with PeRFlow in as few."""
    options.require_prompts([prompt])
    _check(steps=steps, guidance=guidance, num_images=num_images, model=model, delta=delta, out=out)
    options.require_seeds(seed, num_images)
    place = options.choose_device(device)
    precision = options.choose_dtype(dtype, place)
    from ..demo.models import GUIDANCE_SCALE
    from ..evaluation.sheet import contact_sheet
    from .pipeline import load_pipeline, model_location

    pipeline = load_pipeline(model_location(model), device=place, dtype=precision)
    default = GUIDANCE_SCALE if model is None else SDXL_GUIDANCE
    columns = _samplers(pipeline, steps, default if guidance is None else guidance, delta)
    images, captions = [], []
    drawn = [_draw(pipeline, sampler, prompt, seed, num_images) for sampler in columns]
    for row in range(num_images):
        for sampler, (pictures, seconds) in zip(columns, drawn, strict=True):
            images.append(pictures[row])
            captions.append(f"{sampler.label}\nNFE {sampler.nfe}, {seconds[row]:.2f} s, seed {seed + row}")
    title = f"{prompt} (same noise in each row)"
    save_png(contact_sheet(images, captions, columns=len(columns), title=title), out, {})
    typer.echo(str(out))


def _samplers(pipeline: Any, steps: int, guidance: float, delta: Path | None) -> list[Sampler]:
    """The columns. The teacher's come first: PeRFlow's first picture merges the delta into the UNet they share."""
    from diffusers import StableDiffusionXLPipeline

    from ..evaluation.samplers import perflow_sampler, teacher_sampler

    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts = {name: getattr(pipeline, name) for name in names}
    teacher = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return [
        teacher_sampler(teacher, "DDIM", TEACHER_STEPS, guidance),
        teacher_sampler(teacher, "DDIM", steps, guidance),
        teacher_sampler(teacher, "DDIM", steps, 1.0),
        perflow_sampler(pipeline, steps, delta=delta),
    ]


def _draw(pipeline: Any, sampler: Sampler, prompt: str, seed: int, count: int) -> tuple[list[Image], list[float]]:
    """The pictures and the seconds of each, one by one after an untimed first."""
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from tqdm.auto import tqdm

    pictures, seconds = [], []
    size = pipeline.unet.config.sample_size
    for row in tqdm(range(-1, count), desc=sampler.label):
        generator = torch.Generator("cpu").manual_seed(seed + max(row, 0))
        latents = torch.randn(1, pipeline.num_channels_latents, size, size, generator=generator)
        began = time.perf_counter()
        image = sampler.draw([prompt], latents.to(pipeline.unet.device, pipeline.unet.dtype)).float().cpu()
        if row >= 0:
            seconds.append(time.perf_counter() - began)
            pictures += VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))
    return pictures, seconds


def _check(
    *, steps: int, guidance: float | None, num_images: int, model: str | None, delta: Path | None, out: Path
) -> None:
    from ..atomic_files import require_writable_directory
    from ..core.windows import require_positive_int
    from ..delta.files import read_recipe
    from ..delta.recipe import require_guidance

    require_positive_int("steps", steps)
    if guidance is not None:
        require_guidance(guidance)
    require_positive_int("num-images", num_images)
    if model is not None and delta is None:
        raise ValueError("--model without --delta leaves no teacher to compare with; pass a base and its delta.")
    if delta is not None:
        read_recipe(delta)
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory; name a PNG file.")
    require_writable_directory(out.parent)
