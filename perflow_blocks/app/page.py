"""The page itself: what is on it, and what its buttons do. Everything that is drawn comes from a `Studio`."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import torch
from PIL import Image, ImageOps

from ..batches import save_image
from .studio import Event, Request, Studio, edited

KEPT = 24  # images of a user's gallery
WAITING = 32  # requests in the queue, after which further ones are refused
MOST_STEPS, MOST_GUIDANCE, TEACHER_STEPS = 32, 15, 50
LARGEST_UPLOAD = "20mb"
EDITABLE = 512  # pixels that the shorter side has at least in the editor, so that a brush can draw on small images
FILL = "#image img, #teacher img {width: 100%; height: 100%; object-fit: contain}"
FORGET = (600, 86400)  # seconds: every ten minutes, files of yesterday go
LOCAL_FONTS: dict[str, Any] = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["monospace"],
}  # others come from a server

FIELDS = ("prompt", "negative", "model", "delta", "steps", "guidance", "seed", "anew", "editor", "strength")
Entry = tuple[str, str, dict[str, Any]]
"""An image of the gallery: its file, its caption and its settings."""


@contextmanager
def served(studio: Studio, host: str = "127.0.0.1", port: int | None = None, **settings: Any) -> Iterator[gr.Blocks]:
    """Serves the page, from threads of its own, until the context ends; by default at the first free port.

    Fonts and scripts are the server's own, and nothing is reported to anyone.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    with tempfile.TemporaryDirectory(prefix="perflow-app-") as folder:
        page = make_page(studio, Path(folder)).queue(max_size=WAITING)
        settings |= {"theme": gr.themes.Default(**LOCAL_FONTS), "css": FILL, "footer_links": [], "ssr_mode": False}
        settings |= {"prevent_thread_lock": True, "quiet": True, "share": False, "max_file_size": LARGEST_UPLOAD}
        try:
            try:
                page.launch(server_name=host, server_port=port, **settings)
            except OSError as error:
                raise OSError(f"host={host}, port={port}: the page cannot listen there; pass another port.") from error
            yield page
        finally:
            page.close(verbose=False)


def make_page(studio: Studio, folder: Path) -> gr.Blocks:
    """The page, which keeps its images in `folder` while their user is there."""
    models, deltas = list(studio.models), list(studio.deltas)
    with gr.Blocks(title="PeRFlow", analytics_enabled=False, delete_cache=FORGET) as page:
        gr.Markdown("# PeRFlow\nImages in a few steps. Steps and guidance at 0 are what the weights recommend.")
        kept = gr.State([], delete_callback=forget)
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", value="a red star on a white background", lines=2)
                negative = gr.Textbox(label="Negative prompt", placeholder="needs a guidance above 1")
                with gr.Row():
                    model = gr.Dropdown(models, value=models[0], label="Model")
                    delta = gr.Dropdown(deltas, value=deltas[0], label="Delta")
                with gr.Row():
                    steps = gr.Slider(0, MOST_STEPS, 0, step=1, precision=0, label="Steps")
                    guidance = gr.Slider(0, MOST_GUIDANCE, 0, step=0.1, label="Guidance", info="1 is none")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
                    anew = gr.Checkbox(False, label="A new seed each time")
                with gr.Accordion("From an image", open=False) as drawer:
                    gr.Markdown("The whole image is redrawn, or, where you draw upon it, what you cover.")
                    brush = gr.Brush(colors=["#ff00ff"])
                    editor = gr.ImageEditor(type="pil", label="Image and mask", brush=brush, buttons=["fullscreen"])
                    strength = gr.Slider(0, 1, 0.8, label="Strength", info="how far to leave the image")
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Stop")
                with gr.Row(equal_height=True):
                    compare = gr.Button("Compare with the teacher")
                    teacher_steps = gr.Slider(1, 100, TEACHER_STEPS, step=1, precision=0, label="Teacher's steps")
            with gr.Column(scale=3):
                status = gr.Markdown("", elem_id="status")
                with gr.Row():
                    look: dict[str, Any] = {"type": "pil", "format": "png", "height": 384, "interactive": False}
                    look["buttons"] = ["download", "fullscreen"]  # by default also one that uploads
                    other = gr.Image(label="Teacher", elem_id="teacher", visible=False, **look)
                    image = gr.Image(label="PeRFlow", elem_id="image", **look)
                again = gr.Button("Start from this image", size="sm")
                gallery = gr.Gallery(
                    label="Your images", columns=4, fit_columns=False, height=360, allow_preview=False, buttons=[]
                )
                chosen = gr.JSON(label="Settings of the chosen image")

        asked = [prompt, negative, model, delta, steps, guidance, seed, anew, editor, strength]
        shown = [seed, status, image, other, gallery, kept]

        def drawing(entries: list[Entry], *values: Any) -> Iterator[dict[Any, Any]]:
            request = make_request(*values)
            yield {seed: request.seed, status: "waiting", other: gr.Image(visible=False)}
            for event in studio.draw(request):
                yield {status: event.text, image: event.image, **keep(event, entries)}

        def comparing(entries: list[Entry], teacher_steps: int, *values: Any) -> Iterator[dict[Any, Any]]:
            request = make_request(*values, from_image=False)
            yield {seed: request.seed, status: "waiting", image: None, other: gr.Image(None, visible=True)}
            lines: list[str] = []
            for event in studio.compare(request, teacher_steps):
                lines += [event.text] if event.image else []
                where = image if event.settings else other
                found = {where: event.image} if event.image else {}
                yield {status: "\n\n".join(lines) or event.text, **found, **keep(event, entries)}

        def shows_errors(run: Any) -> Any:
            """What the user can change is said on the page; a defect goes to the server's log alone."""

            def shown(*values: Any) -> Iterator[dict[Any, Any]]:
                try:
                    yield from run(*values)
                except (ValueError, OSError, torch.OutOfMemoryError) as error:
                    places = (*studio.models.values(), *studio.deltas.values())
                    yield {status: f"**Not drawn:** {without_paths(str(error), places)}"}

            return shown

        def keep(event: Event, entries: list[Entry]) -> dict[Any, Any]:
            """Puts a finished image, in a file with its settings, first in the gallery, and the oldest one out."""
            if event.settings is None or event.image is None:
                return {}
            path = folder / f"{uuid4()}.png"
            save_image(event.image, path, event.settings)
            entries.insert(0, (str(path), event.settings["prompt"], dict(event.settings)))
            forget(entries[KEPT:])
            del entries[KEPT:]
            return {image: str(path), gallery: [entry[:2] for entry in entries], kept: entries}

        def choose(entries: list[Entry], event: gr.SelectData) -> dict[str, Any]:
            return entries[event.index][2]

        private: dict[str, Any] = {"api_visibility": "private"}
        queued = {**private, "concurrency_limit": 1, "concurrency_id": "device", "show_progress_on": image}
        runs = [
            gr.on([draw.click, prompt.submit], shows_errors(drawing), [kept, *asked], shown, **queued),
            compare.click(shows_errors(comparing), [kept, teacher_steps, *asked], shown, **queued),
        ]
        stop.click(lambda: "stopped", None, status, cancels=runs, queue=False, **private)
        gallery.select(choose, kept, chosen, **private)
        again.click(editable, image, [editor, drawer], **private)
    return page


def editable(image: Image.Image | None) -> tuple[Image.Image | None, gr.Accordion]:
    if image is not None and (scale := EDITABLE / min(image.size)) > 1:
        image = ImageOps.scale(image, scale)
    return image, gr.Accordion(open=True)


def make_request(*values: Any, from_image: bool = True) -> Request:
    """What the values of `FIELDS` ask for; those that are 0 are left to the weights."""
    given = dict(zip(FIELDS, values, strict=True))
    anew, editor = given.pop("anew"), given.pop("editor")
    given |= {name: given[name] or None for name in ("steps", "guidance")}
    given["seed"] = random.randrange(2**32) if anew else given["seed"] or 0
    image, mask = edited(editor) if from_image else (None, None)
    return Request(**given, image=image, mask=mask)


def without_paths(message: str, places: Iterable[Any]) -> str:
    """The message with names in place of paths, which are the server's."""
    known = [str(place) for place in places if isinstance(place, (str, Path)) and Path(place).is_absolute()]
    for place in sorted(known, key=len, reverse=True):
        message = message.replace(place, Path(place).name)
    return re.sub(r"(?<![\w:/.])(?:~|\.{1,2})?/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"\1", message)


def forget(entries: list[Entry]) -> None:
    for file, *_ in entries:
        Path(file).unlink(missing_ok=True)
