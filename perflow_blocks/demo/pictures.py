"""Procedurally rendered, captioned pictures: the data the demo model learns from and is judged by.

A picture shows one coloured shape on a plain background. Captions always name the shape and name each other attribute
with probability one half, so that most captions leave something open: a model then has to choose, which is what
few-step samplers without distillation are bad at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

PICTURE_SIZE = 64
_OVERSAMPLING = 4
_COLOR_JITTER = 10

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
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


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; every field is a key of the tables above."""

    shape: str
    color: str
    background: str
    size: str
    position: str

    @classmethod
    def random(cls, rng: np.random.Generator) -> Scene:
        """Draws every attribute uniformly and independently."""
        return cls(
            shape=_choose(rng, SHAPES),
            color=_choose(rng, tuple(COLORS)),
            background=_choose(rng, tuple(BACKGROUNDS)),
            size=_choose(rng, tuple(SIZES)),
            position=_choose(rng, tuple(POSITIONS)),
        )


@dataclass(frozen=True, kw_only=True)
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

        def maybe(value: str) -> str | None:
            return value if rng.random() < keep else None

        return cls(
            shape=scene.shape,
            color=maybe(scene.color),
            background=maybe(scene.background),
            size=maybe(scene.size),
            position=maybe(scene.position),
        )

    @classmethod
    def random(cls, rng: np.random.Generator, keep: float = 0.5) -> Prompt:
        """A prompt with the statistics of the training captions."""
        return cls.describe(Scene.random(rng), rng, keep)

    @property
    def text(self) -> str:
        """The caption, such as "a small red star on a white background, on the left"."""
        words = [word for word in (self.size, self.color, self.shape) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        caption = f"{article} {' '.join(words)}"
        if self.background:
            caption += f" on a {self.background} background"
        if self.position:
            caption += f", {self.position}"
        return caption


def all_captions() -> list[str]:
    """Every caption the grammar can produce; the demo's tokenizers are built from these."""
    return [
        Prompt(shape=shape, color=color, background=background, size=size, position=position).text
        for shape in SHAPES
        for color in (None, *COLORS)
        for background in (None, *BACKGROUNDS)
        for size in (None, *SIZES)
        for position in (None, *POSITIONS)
    ]


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws `scene` with jittered place, size, angle and colours.

    Returns:
        An RGB picture of 64x64 pixels, drawn at four times that size and reduced.
    """
    size = PICTURE_SIZE * _OVERSAMPLING
    canvas = Image.new("RGB", (size, size), jitter(BACKGROUNDS[scene.background], rng))
    center_x = PICTURE_SIZE / 2 + POSITIONS[scene.position] + rng.uniform(-2.0, 2.0)
    center_y = PICTURE_SIZE / 2 + rng.uniform(-3.0, 3.0)
    radius = SIZES[scene.size] * rng.uniform(0.93, 1.07)
    angle = math.radians(rng.uniform(-12.0, 12.0))
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    for polygon, value in _outline(scene.shape):
        points = np.asarray(polygon) * radius
        rotated = points @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        placed = (rotated + np.array([center_x, center_y])) * _OVERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=value)
    canvas.paste(jitter(COLORS[scene.color], rng), mask=mask)
    return canvas.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[Sequence[tuple[float, float]], int]]:
    """Polygons of a shape inside the unit circle, y downwards, each with its fill (0 cuts a hole)."""
    match shape:
        case "circle":
            return [(_regular(48, 0.92), 255)]
        case "square":
            return [(_regular(4, 1.1, math.pi / 4), 255)]
        case "triangle":
            return [(_regular(3, 1.1, -math.pi / 2), 255)]
        case "star":
            return [(_star(5, 1.15, 0.48), 255)]
        case "ring":
            return [(_regular(48, 1.0), 255), (_regular(48, 0.52), 0)]
        case "cross":
            arm = 0.34
            half = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
            outline = [*half, *((-x, -y) for x, y in half)]
            return [(outline, 255)]
        case "heart":
            turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
            x = 16 * np.sin(turns) ** 3
            y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
            return [([(float(a) / 16, -float(b) / 16) for a, b in zip(x, y, strict=True)], 255)]
        case "diamond":
            return [([(0, -1.2), (0.72, 0), (0, 1.2), (-0.72, 0)], 255)]
        case _:
            raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}.")


def _regular(corners: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    return [_on_circle(radius, start + 2 * math.pi * k / corners) for k in range(corners)]


def _star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    turn = math.pi / points
    return [_on_circle(inner if k % 2 else outer, -math.pi / 2 + turn * k) for k in range(2 * points)]


def _on_circle(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def jitter(color: RGB, rng: np.random.Generator) -> RGB:
    """`color` with each channel off by up to 10 levels, within 0 to 255."""
    red, green, blue = np.clip(np.asarray(color) + rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]
