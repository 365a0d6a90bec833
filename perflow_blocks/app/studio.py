"""What the page asks for: one pipeline and its teacher, drawing for one user at a time and reporting as it goes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from diffusers import VaeImageProcessor
from diffusers.modular_pipelines import PipelineState
from PIL import Image, ImageChops

from ..batches import draw_image, require_prompts
from ..blocks.merge_delta import PeRFlowMergeDeltaStep
from ..delta.merge import merge_records
from ..evaluation.samplers import seeded_latents, teacher_sampler

OWN, NONE = "as the model says", "none"
"""Choices of a delta besides files: the one that the model's repository names, and the base without one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. What is None is left to the weights.

    Attributes:
        model, delta: names of the studio's choices.
        image, mask: an image to start from, RGB, and what to paint anew in it, L; of any size, the same for both.
        strength: how far to leave the image, 0 to 1.
        seed: from 0 to 2**63 - 1.
    """

    prompt: str
    model: str
    delta: str
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Event:
    """What is to be shown: a line of text, and an image where there is one; the last one has settings."""

    text: str
    image: Image.Image | None = None
    settings: Mapping[str, Any] | None = None


Report = Callable[[Event], bool]
"""Shows an event, and says whether nobody watches any more."""


@dataclass(frozen=True)
class Opened:
    """A loaded model: the pipeline, whose blocks take callbacks; its teacher as a classic pipeline; its guidance."""

    pipeline: Any
    classic: Any
    teacher_guidance: float


class Studio:
    """Draws for several users, one after another, with one model loaded at a time.

    Args:
        models: where models are, by the names that users see.
        deltas: files or folders of deltas, by such names.
        load: loads a model from its place.
    """

    def __init__(self, models: Mapping[str, str], deltas: Mapping[str, Path], load: Callable[[str], Opened]) -> None:
        self.models, self._load = dict(models), load
        self.deltas: dict[str, Path | bool | None] = {**deltas, OWN: None, NONE: False}
        self._opened: tuple[str, Opened] | None = None
        self._merged: str | None = None
        self._lock = threading.Lock()

    def draw(self, request: Request) -> Iterator[Event]:
        """The image as each step predicts it, then the image itself and its settings."""

        def work(report: Report) -> None:
            opened = self._open(request)
            shown: list[Image.Image] = []

            def step(info: Any) -> bool:
                where = f"window {info.window_index + 1}, step {info.step + 1} of {info.num_steps}"
                return report(Event(where, shown[-1]))

            inputs = {
                **self._inputs(request, opened.pipeline),
                "preview_callback": lambda number, images: shown.append(images[0]),
                "step_callback": step,
            }
            report(self._result(opened.pipeline, request, inputs))

        return self._watched(work)

    def compare(self, request: Request, teacher_steps: int) -> Iterator[Event]:
        """The teacher's image by DDIM in its steps, then PeRFlow's, from the same noise; each with its time.

        Times are from prompt to image, without loading and merging.

        Raises:
            ValueError: neither request nor model has a delta; without one the UNet has no teacher to show.
        """

        def work(report: Report) -> None:
            opened = self._open(request)
            if not merge_records(opened.pipeline.unet):
                hint = "choose a delta, or start the page with --delta FILE"
                raise ValueError(f"{request.model} without a delta has no teacher to compare with; {hint}.")
            latents = seeded_latents(opened.classic, [request.seed])
            teacher = teacher_sampler(opened.classic, "ddim", teacher_steps, opened.teacher_guidance)
            report(Event(f"the teacher draws in {teacher_steps} steps"))
            merge(opened.pipeline, False)
            started = time.monotonic()
            drawn = teacher.draw([request.prompt], latents)
            image = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(drawn))[0]
            guidance = f"guidance {teacher.guidance_scale:g}"
            text = f"Teacher, DDIM, {teacher_steps} steps, {guidance}: {time.monotonic() - started:.2f} s"
            if report(Event(text, image)):
                return
            merge(opened.pipeline, self.deltas[request.delta])
            report(self._result(opened.pipeline, request, self._inputs(request, opened.pipeline)))

        return self._watched(work)

    def _watched(self, work: Callable[[Report], None]) -> Iterator[Event]:
        """What `work` reports from a thread of its own; errors of it are raised here.

        When the iterator is closed, as when a user stops, the run ends with the step that it is at.
        """
        events: Queue[Event | None] = Queue()
        stopped = threading.Event()

        def report(event: Event) -> bool:
            events.put(event)
            return stopped.is_set()

        def task() -> None:
            try:
                with self._lock:
                    if not stopped.is_set():
                        work(report)
            finally:
                events.put(None)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(task)
            try:
                while (event := events.get()) is not None:
                    yield event
            finally:
                stopped.set()
            future.result()

    def _open(self, request: Request) -> Opened:
        """The request's model, loaded, and in its UNet the request's delta and no other."""
        require_prompts([request.prompt])
        if request.model not in self.models or request.delta not in self.deltas:
            raise ValueError("this model or delta is not offered; choose one of the lists.")
        if self._opened is None or self._opened[0] != request.model:
            self._opened = self._merged = None  # so that two models are never in memory
            self._opened = request.model, self._load(self.models[request.model])
        opened = self._opened[1]
        if self._merged not in (None, request.delta):
            merge(opened.pipeline, False)
        self._merged = request.delta
        merge(opened.pipeline, self.deltas[request.delta])
        return opened

    def _inputs(self, request: Request, pipeline: Any) -> dict[str, Any]:
        image, mask = fitted(request.image, pipeline), fitted(request.mask, pipeline, Image.Resampling.NEAREST)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative or None,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "image": image,
            "mask_image": mask,
            "strength": request.strength if image else None,
            "delta": self.deltas[request.delta],
        }

    def _result(self, pipeline: Any, request: Request, inputs: Mapping[str, Any]) -> Event:
        given = {"image": inputs["image"] and "uploaded", "mask": inputs["mask_image"] and "drawn"}
        settings = {"model": request.model, "strength": inputs["strength"], **given}
        started = time.monotonic()
        image, settings = draw_image(pipeline, inputs, request.seed, settings)
        numbers = f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {settings['seed']}"
        return Event(f"PeRFlow, {numbers}: {time.monotonic() - started:.2f} s", image, settings)


def merge(pipeline: Any, delta: Path | bool | None) -> None:
    """Puts into the UNet what a call with this `delta` asks for, so that the call itself need not."""
    state = PipelineState()
    state.set("delta", delta)
    PeRFlowMergeDeltaStep()(pipeline, state)


def fitted(
    image: Image.Image | None, pipeline: Any, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image | None:
    """The image in as many pixels as the model was trained for, in its own proportions; None for None."""
    if image is None:
        return None
    factor, area = pipeline.image_processor.config.vae_scale_factor, pipeline.default_height * pipeline.default_width
    scale = math.sqrt(area / (image.width * image.height))
    size = [max(1, round(side * scale / factor)) * factor for side in image.size]
    return image.resize((size[0], size[1]), resample)


def edited(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The image and the mask of an editor's value, whose layers are what was drawn upon the image.

    Transparent parts of the image are white. Without an image both are None, where nothing was drawn the mask.
    """
    if value is None or value["background"] is None:
        return None, None
    background = value["background"].convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background).convert("RGB")
    mask = Image.new("L", image.size)
    for layer in value["layers"]:
        drawn = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 127))
        mask = ImageChops.lighter(mask, drawn.resize(image.size, Image.Resampling.NEAREST))
    return image, mask if mask.getbbox() else None
