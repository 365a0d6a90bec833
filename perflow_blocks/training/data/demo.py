"""The demo's procedural pictures: drawn when they are wanted, as many as one likes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...demo.images import IMAGE_SIZE, Prompt, Scene, render
from .batch import Size

DEFAULT_COUNT = 10_000


class DemoRecords:
    """Random scenes of 64x64 pixels, each with a caption that leaves some of it open, settled by `seed`."""

    def __init__(self, count: int | None, seed: int) -> None:
        self.size: Size | None = (IMAGE_SIZE, IMAGE_SIZE)
        self._count = DEFAULT_COUNT if count is None else count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def captions(self, index: int) -> tuple[str, ...]:
        return (Prompt.describe(self._scene(index), self._rng(index, "caption")).text,)

    def picture(self, index: int) -> Image.Image:
        return render(self._scene(index), self._rng(index, "drawing"))

    def describe(self) -> str:
        return "the demo's drawings"

    def _scene(self, index: int) -> Scene:
        return Scene.random(self._rng(index, "scene"))

    def _rng(self, index: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, index, ("scene", "caption", "drawing").index(purpose)])
