"""`perflow generate`: pictures from prompts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one picture is drawn from."""

    prompt: str
    negative: str | None
    seed: int
    steps: int | None
    size: tuple[int, int] | None
    delta: Path | None
    guidance: float | None = None

    def call(self, pipeline: Any) -> tuple[Image, int]:
        """The image and its number of steps. The noise is the CPU's, so that a seed means the same on every device."""
        import torch

        arguments = {
            "prompt": self.prompt,
            "negative_prompt": self.negative,
            "num_inference_steps": self.steps,
            "width": self.size and self.size[0],
            "height": self.size and self.size[1],
            "delta": self.delta,
            "guidance_scale": self.guidance,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = pipeline(**given, generator=generator, output=["images", "num_inference_steps"])
        return drawn["images"][0], drawn["num_inference_steps"]


def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, each prompt in quotes.")],
    model: options.Model = None,
    delta: options.Delta = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    seed: options.Seed = 0,
    num_images: Annotated[int, typer.Option(help="Pictures for each prompt, at least 1.")] = 1,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help="Directory for the pictures and their sheet.")] = Path("outputs"),
) -> None:
    """Draw pictures from prompts in a few steps, into PNG files that carry their settings, and one contact sheet."""
    options.require_prompts(prompts)
    _check(steps=steps, guidance=guidance, num_images=num_images, delta=delta, out=out)
    options.require_seeds(seed, len(prompts) * num_images)
    chosen_size = options.parse_size(size)
    place = options.choose_device(device)
    precision = options.choose_dtype(dtype, place)
    from .pipeline import load_pipeline, model_location

    pipeline = load_pipeline(model_location(model), device=place, dtype=precision)
    wanted = [prompt for prompt in prompts for _ in range(num_images)]
    common: dict[str, Any] = {
        "negative": negative,
        "steps": steps,
        "size": chosen_size,
        "delta": delta,
        "guidance": guidance,
    }
    requests = [Request(prompt=prompt, seed=seed + i, **common) for i, prompt in enumerate(wanted)]
    written = draw(pipeline, requests, out, model=model or "embedded")
    typer.echo("\n".join(str(path) for path in written))


def draw(pipeline: Any, requests: list[Request], out: Path, *, model: str) -> list[Path]:
    """Draws and writes every picture as it is done, then the contact sheet; returns the paths, the sheet's last."""
    from ..evaluation.sheet import contact_sheet

    images, paths, captions = [], [], []
    for i, request in enumerate(requests):
        pipeline.set_progress_bar_config(desc=f"picture {i + 1} of {len(requests)}", leave=False)
        image, steps = request.call(pipeline)
        settings = describe(pipeline, request, image, steps, model)
        paths.append(out / f"{i:03d}-{slug(request.prompt)}-seed{request.seed}.png")
        save_png(image, paths[-1], settings)
        images.append(image)
        captions.append(f"{request.prompt}\nseed {request.seed}, {steps} steps")
    sheet = out / "sheet.png"
    save_png(contact_sheet(images, captions), sheet, {})
    return [*paths, sheet]


def describe(pipeline: Any, request: Request, image: Image, steps: int, model: str) -> dict[str, Any]:
    """The settings that a picture was drawn with, as they were in effect."""
    from ..delta.merge import merge_record

    record = merge_record(pipeline.unet)
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": steps,
        "guidance": pipeline.guider.guidance_scale if request.guidance is None else request.guidance,
        "seed": request.seed,
        "size": list(image.size),
        "model": model,
        "delta": record and {"file": Path(record.source).name, "digest": record.digest, "scale": record.scale},
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "versions": {"perflow_blocks": __version__, **{name: version(name) for name in ("diffusers", "torch")}},
    }


def save_png(image: Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes a PNG whole or not at all, with the settings as a text chunk."""
    from PIL.PngImagePlugin import PngInfo

    from ..atomic_files import atomic_path

    info = PngInfo()
    if settings:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def slug(text: str) -> str:
    """A short file name for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "picture"


def _check(*, steps: int | None, guidance: float | None, num_images: int, delta: Path | None, out: Path) -> None:
    from ..atomic_files import require_writable_directory
    from ..core.windows import require_positive_int
    from ..delta.files import read_recipe
    from ..delta.recipe import require_guidance

    if steps is not None:
        require_positive_int("steps", steps)
    if guidance is not None:
        require_guidance(guidance)
    require_positive_int("num-images", num_images)
    if delta is not None:
        read_recipe(delta)
    require_writable_directory(out)
