"""Procedurally rendered, captioned images: the data the demo model learns from and is judged by.

Captions always name the shape, and each other attribute with probability one half, so that most leave something open:
a model then has to choose, which is what few-step samplers without distillation are bad at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

RGB = tuple[int, int, int]
Polygon = list[tuple[float, float]]
Renderer = Callable[["Scene", np.random.Generator], Image.Image]
"""Draws a scene as an RGB image of 64x64 pixels."""

IMAGE_SIZE = 64
_OVERSAMPLING = 4
_COLOR_JITTER = 10
_CHUNK = 500

COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (247, 138, 20),
    "yellow": (250, 218, 50),
    "green": (46, 158, 72),
    "cyan": (30, 190, 205),
    "blue": (44, 90, 220),
    "purple": (132, 52, 178),
    "pink": (244, 120, 180),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (244, 244, 244),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "beige": (226, 204, 166),
    "navy": (22, 28, 84),
    "mint": (170, 232, 204),
}
SIZES: dict[str, float] = {"small": 11.0, "big": 18.0}  # radius in pixels
POSITIONS: dict[str, float] = {"on the left": -11.0, "in the middle": 0.0, "on the right": 11.0}  # offset in pixels


def _on_circle(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def _regular(corners: int, radius: float, start: float = 0.0) -> Polygon:
    return [_on_circle(radius, start + 2 * math.pi * k / corners) for k in range(corners)]


def _star(points: int, outer: float, inner: float) -> Polygon:
    turn = math.pi / points
    return [_on_circle(inner if k % 2 else outer, -math.pi / 2 + turn * k) for k in range(2 * points)]


def _cross(arm: float) -> Polygon:
    half = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    return [*half, *((-x, -y) for x, y in half)]


def _heart() -> Polygon:
    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(a) / 16, -float(b) / 16) for a, b in zip(x, y, strict=True)]


_OUTLINES: dict[str, list[tuple[Polygon, int]]] = {
    "circle": [(_regular(48, 0.92), 255)],
    "square": [(_regular(4, 1.1, math.pi / 4), 255)],
    "triangle": [(_regular(3, 1.1, -math.pi / 2), 255)],
    "star": [(_star(5, 1.15, 0.48), 255)],
    "ring": [(_regular(48, 1.0), 255), (_regular(48, 0.52), 0)],
    "cross": [(_cross(0.34), 255)],
    "heart": [(_heart(), 255)],
    "diamond": [([(0, -1.2), (0.72, 0), (0, 1.2), (-0.72, 0)], 255)],
}
"""Polygons of each shape inside the unit circle, y downwards, each with its fill (0 cuts a hole)."""
SHAPES: tuple[str, ...] = tuple(_OUTLINES)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows, each of `ATTRIBUTES`."""

    shape: str
    color: str
    background: str
    size: str
    position: str

    @classmethod
    def random(cls, rng: np.random.Generator) -> Scene:
        """Draws every attribute uniformly and independently."""
        return cls(**{name: options[int(rng.integers(len(options)))] for name, options in ATTRIBUTES.items()})

    def numbers(self) -> list[int]:
        """The place of each attribute among its options."""
        return [options.index(getattr(self, name)) for name, options in ATTRIBUTES.items()]


@dataclass(frozen=True)
class Prompt:
    """What a caption names. `None` leaves an attribute open."""

    shape: str
    color: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None

    @classmethod
    def describe(cls, scene: Scene, rng: np.random.Generator, keep: float = 0.5) -> Prompt:
        """Names the shape of `scene`, and each other attribute with probability `keep`."""
        others = list(ATTRIBUTES)[1:]
        return cls(shape=scene.shape, **{name: getattr(scene, name) for name in others if rng.random() < keep})

    @property
    def text(self) -> str:
        """The caption, such as "a small red star on a white background, on the left"."""
        words = " ".join(word for word in (self.size, self.color, self.shape) if word)
        background = f" on a {self.background} background" if self.background else ""
        position = f", {self.position}" if self.position else ""
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{background}{position}"


def all_captions() -> list[str]:
    """Every caption the grammar can produce; the demo's tokenizers are built from these."""
    options: list[Any] = [(None, *values) for values in list(ATTRIBUTES.values())[1:]]
    return [Prompt(*values).text for values in itertools.product(SHAPES, *options)]


def caption_numbers(scenes: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    """The places (n,) in `all_captions` of what is `named` (n, 4) in scenes of these `Scene.numbers` (n, 5)."""
    number = scenes[:, 0]
    for k, options in enumerate(list(ATTRIBUTES.values())[1:]):
        number = number * (len(options) + 1) + torch.where(named[:, k], scenes[:, k + 1] + 1, 0)
    return number


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws `scene` with jittered place, size, angle and colours, at four times the size, then reduced."""
    size = IMAGE_SIZE * _OVERSAMPLING
    canvas = Image.new("RGB", (size, size), jitter(BACKGROUNDS[scene.background], rng))
    center_x = IMAGE_SIZE / 2 + POSITIONS[scene.position] + rng.uniform(-2.0, 2.0)
    center_y = IMAGE_SIZE / 2 + rng.uniform(-3.0, 3.0)
    radius = SIZES[scene.size] * rng.uniform(0.93, 1.07)
    angle = math.radians(rng.uniform(-12.0, 12.0))
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    for polygon, value in _OUTLINES[scene.shape]:
        points = np.asarray(polygon) * radius
        rotated = points @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        placed = (rotated + np.array([center_x, center_y])) * _OVERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=value)
    canvas.paste(jitter(COLORS[scene.color], rng), mask=mask)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


@dataclass(frozen=True, kw_only=True)
class RenderedImages:
    """Images (count, 3, 64, 64) as uint8, and the scene of each."""

    pixels: torch.Tensor
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Images (len(indices), 3, 64, 64) as float32 in [-1, 1]."""
        return self.pixels[indices].float() / 127.5 - 1.0


def render_images(count: int, seed: int, *, renderer: Renderer = render, workers: int | None = None) -> RenderedImages:
    """Renders `count` random scenes, on all cores; `seed` gives the same images whatever the number of workers."""
    sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(partial(_render_chunk, renderer=renderer), sizes, seeds)
        pixels, scenes = zip(*tqdm(parts, "render", len(sizes), unit_scale=_CHUNK, unit="image"), strict=True)
    return RenderedImages(pixels=torch.from_numpy(np.concatenate(pixels)), scenes=tuple(itertools.chain(*scenes)))


def _render_chunk(size: int, seed: np.random.SeedSequence, renderer: Renderer) -> tuple[np.ndarray, list[Scene]]:
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(size)]
    return render_scenes(scenes, rng, renderer), scenes


def render_scenes(scenes: Sequence[Scene], rng: np.random.Generator, renderer: Renderer = render) -> np.ndarray:
    """Images (count, 3, 64, 64) as uint8 of scenes, drawn in turn; without torch, whose threads survive no fork."""
    return np.stack([np.asarray(renderer(scene, rng)).transpose(2, 0, 1) for scene in scenes])


def jitter(color: RGB, rng: np.random.Generator) -> RGB:
    """`color` with each channel off by up to 10 levels, within 0 to 255."""
    red, green, blue = np.clip(np.asarray(color) + rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, 3), 0, 255)
    return int(red), int(green), int(blue)
