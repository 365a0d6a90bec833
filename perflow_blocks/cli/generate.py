"""`perflow generate`: images from prompts."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from . import options

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA_KEY = "parameters"
"""The PNG text chunk that holds the settings, as JSON."""


def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, each prompt in quotes.")],
    model: options.Model = None,
    delta: options.Delta = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: options.Seed = 0,
    num_images: options.NumImages = 1,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Directory for the images and their sheet.")] = Path("outputs"),
) -> None:
    """Draw images from prompts in a few steps, into PNG files that carry their settings, and one contact sheet."""
    from ..atomic_files import require_writable_directory

    options.require_prompts(prompts)
    require_writable_directory(out)
    width, height = options.parse_size(size) or (None, None)
    inputs = {
        "negative_prompt": negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "delta": delta,
        "width": width,
        "height": height,
    }
    place = options.choose_device(device)
    from .pipeline import load_pipeline, model_location

    pipeline = load_pipeline(model_location(model), device=place, dtype=options.choose_dtype(dtype, place))
    inputs = {name: value for name, value in inputs.items() if value is not None}
    draw(pipeline, [prompt for prompt in prompts for _ in range(num_images)], seed, out, model or "embedded", inputs)


def draw(pipeline: Any, prompts: list[str], seed: int, out: Path, model: str, inputs: dict[str, Any]) -> None:
    """Writes every image as it is done, with its settings, then the contact sheet; prints the paths, the sheet's last.

    The noise is the CPU's, so that a seed means the same on every device.
    """
    import torch

    from ..evaluation.sheet import contact_sheet

    images, captions = [], []
    for i, prompt in enumerate(prompts):
        pipeline.set_progress_bar_config(desc=f"image {i + 1} of {len(prompts)}", leave=False)
        generator = torch.Generator("cpu").manual_seed(seed + i)
        drawn = pipeline(prompt=prompt, generator=generator, **inputs, output=["images", "num_inference_steps"])
        image, steps = drawn["images"][0], drawn["num_inference_steps"]
        settings = {
            "prompt": prompt,
            "negative": inputs.get("negative_prompt"),
            "steps": steps,
            "guidance": inputs.get("guidance_scale", pipeline.guider.guidance_scale),
            "seed": seed + i,
            "size": list(image.size),
            "model": model,
            **_weights(pipeline.unet),
        }
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "image"
        path = out / f"{i:03d}-{slug}-seed{seed + i}.png"
        save_png(image, path, settings)
        typer.echo(path)
        images.append(image)
        captions.append(f"{prompt}\nseed {seed + i}, {steps} steps")
    save_png(contact_sheet(images, captions), out / "sheet.png")
    typer.echo(out / "sheet.png")


def _weights(unet: Any) -> dict[str, Any]:
    """The weights and versions that an image was drawn with."""
    from ..delta.merge import merge_record

    record = merge_record(unet)
    return {
        "delta": record and {"file": Path(record.source).name, "digest": record.digest, "scale": record.scale},
        "dtype": str(unet.dtype).removeprefix("torch."),
        "versions": {"perflow_blocks": __version__, **{name: version(name) for name in ("diffusers", "torch")}},
    }


def save_png(image: Image, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG whole or not at all, with the settings as a text chunk."""
    from PIL.PngImagePlugin import PngInfo

    from ..atomic_files import atomic_path

    info = PngInfo()
    if settings:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
