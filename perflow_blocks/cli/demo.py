"""`perflow demo`: a first sheet of images, with nothing to choose."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..batches import Job, make_rows
from . import options
from .generate import run, show_entry

PROMPTS: tuple[str, ...] = (
    "a red star on a white background",
    "a big blue circle on a beige background",
    "a small yellow heart on a navy background",
    "a green triangle on a black background, on the left",
    "a purple ring on a mint background, in the middle",
    "a big pink diamond on a gray background, on the right",
    "an orange cross on a white background",
    "a small cyan square on a black background",
    "a star",
    "a heart on a mint background",
    "a blue diamond",
    "a big ring, on the left",
)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the images and their sheet.")] = Path("outputs/demo"),
) -> None:
    """Draw twelve prompts in four steps with the embedded model. Prompts and seeds are fixed, nothing is picked."""
    from ..atomic_files import require_writable_directory
    from .pipeline import load_pipeline, model_location

    location = model_location(None)
    require_writable_directory(out)
    place, processes = options.choose_place("cpu")
    load = partial(load_pipeline, location, device=place, dtype=options.choose_dtype(None, place))
    rows = make_rows([{"prompt": prompt} for prompt in PROMPTS], steps=4)
    run(Job(rows, out, load, {}, {"model": "embedded"}, noted=partial(show_entry, out, False)), processes)
