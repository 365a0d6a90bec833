"""`perflow generate`: images from prompts."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from .. import batches
from . import options

FILE_HELP = (
    "Prompts from a file: .txt with one a line, or .csv or .jsonl with columns prompt, negative, seed, size, steps, "
    "image. A row that fails does not stop the others."
)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw, each prompt in quotes.")] = None,
    prompts_file: Annotated[Path | None, options.file(FILE_HELP)] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    model: options.Model = None,
    unet: options.Unet = None,
    delta: Annotated[Path | None, options.path("Delta to merge, or the LoRA that to-lora made of one.")] = None,
    lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA; may be repeated.")] = None,
    image: Annotated[Path | None, options.file("Image to start from, for rows without one.")] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="How far to leave the image, 0 to 1.")] = None,
    mask: Annotated[Path | None, options.file("What to paint anew in the image: the white parts.")] = None,
    control: Annotated[Path | None, options.file("Image for the ControlNet.")] = None,
    controlnet: Annotated[str | None, typer.Option(help="Repository or directory of a ControlNet.")] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    seed_for_all: Annotated[bool, typer.Option("--seed-for-all", help="The same seeds for every prompt.")] = False,
    num_images: options.NumImages = 1,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: Annotated[
        Literal["model", "group"] | None, typer.Option(help="Keep models, or their layers, on the CPU while unused.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the networks at the first image.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of MODEL, for blocks of its own.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for images, sheet and manifest.")] = Path("outputs"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep images that were drawn with these settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Draw images in a few steps, into PNG files that carry their settings, and one contact sheet.

    On several devices: accelerate launch -m perflow_blocks.cli generate --prompts-file FILE
    """
    from ..atomic_files import require_writable_directory
    from .pipeline import find_model, load_pipeline, quiet_libraries, vae_factor

    if (prompts_file is None) == (not prompts):
        raise ValueError("pass prompts in quotes, or --prompts-file FILE, and not both.")
    location, merged = find_model(model, unet)
    factor = vae_factor(location)
    usual = {"negative": negative, "size": batches.parse_size(size, factor), "steps": steps, "image": image}
    if prompts_file is None:
        entries = [batches.check_entry({"prompt": prompt}, Path(), factor) for prompt in prompts or ()]
    else:
        entries = batches.read_prompts(prompts_file, factor)
    rows = batches.make_rows(entries, seed=seed, num_images=num_images, seed_for_all=seed_for_all, **usual)
    has_image = any(row.image for row in rows)
    files = {name: path for name, path in (("image", image), ("mask", mask), ("control", control)) if path}
    for name, path in files.items():
        batches.require_image(f"--{name}", path)
    loras = [options.parse_lora(text) for text in lora or ()]
    if (strength is not None or mask) and not has_image:
        raise ValueError("--strength and --mask are for images to start from; pass --image FILE.")
    if bool(control) != bool(controlnet):
        raise ValueError("--control FILE and --controlnet MODEL need each other; pass both.")
    if offload and compile:
        raise ValueError("--compile does not work with --offload; leave one of the two out.")
    if loras and not find_spec("peft"):
        raise ValueError("--lora needs peft; install it with pip install peft.")
    require_writable_directory(out)
    place, processes = options.choose_place(device)
    quiet_libraries()
    from ..delta.files import is_lora, open_weights

    is_delta = delta is None or not is_lora(open_weights(delta).shapes)
    if delta is not None and not is_delta:
        loras.insert(0, (delta, 1.0))
    sources = {"model": location, "unet": merged, "delta": delta, "controlnet": controlnet, **files}
    settings = {
        "guidance": guidance,
        "dtype": dtype,
        "strength": strength,
        **{name: name_of(path) for name, path in sources.items() if path},
        "model": name_of(location) if model else "embedded",
        "loras": [{"file": path.name, "scale": scale, "digest": batches.fingerprint(path)} for path, scale in loras],
        "sources": {name: batches.fingerprint(path) for name, path in sources.items() if path},
    }
    inputs = {
        "guidance_scale": guidance,
        "delta": delta if is_delta else False,
        "strength": strength,
        "mask_image": mask and batches.open_image(mask),
        "control_image": control and batches.open_image(control),
    }

    def load() -> Any:
        with Console(stderr=True, quiet=quiet).status(f"loading {settings['model']}"):
            return load_pipeline(
                location,
                device=place,
                dtype=options.choose_dtype(dtype, place),
                images=has_image,
                unet=merged,
                controlnet=controlnet,
                loras=loras,
                offload=offload,
                compile=compile,
                trust_remote_code=trust_remote_code,
            )

    show = partial(show_entry, out, as_json)
    job = batches.Job(rows, out, load, inputs, settings, resume, prompts_file is not None, not quiet, show)
    run(job, processes, as_json)


def show_entry(out: Path, as_json: bool, entry: dict[str, Any]) -> None:
    if entry["error"]:
        typer.echo(f"{entry['file']} failed: {entry['error']}", err=True)
    elif not as_json:
        typer.echo(out / entry["file"])


def run(job: batches.Job, processes: Any, as_json: bool = False) -> None:
    """Draws the rows and sums up.

    Raises:
        typer.Exit: with status 1, if rows failed.
    """
    result = batches.run(job, processes)
    if result is None:
        return
    failed = [entry for entry in result.entries if entry["error"]]
    whole = [entry for entry in result.entries if not entry["error"]]
    if as_json:
        seeds, times = ([entry[name] for entry in whole] for name in ("seed", "seconds"))
        found = {"files": list(map(str, result.settings)), "seeds": seeds, "seconds": times}
        found |= {"settings": list(result.settings.values()), "failed": failed}
        typer.echo(json.dumps(found, ensure_ascii=False))
    elif whole:
        typer.echo(job.out / batches.SHEET)
    if job.progress:
        new, there = result.count - len(failed), len(job.rows) - result.count
        rate = new / max(result.seconds, 1e-9)  # a clock may stand still
        typer.echo(f"{new} images, {rate:.3g} images per second; {there} were there already", err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(job.rows)} images failed; {job.out / batches.MANIFEST} says why.", err=True)
        raise typer.Exit(1)


def name_of(place: str | Path) -> str:
    """The last part of a path that is there; a repository as it is."""
    return path.resolve().name if (path := Path(place).expanduser()).exists() else str(place)
