"""Rendered data sets as tensors, and the table of tokenized captions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .pictures import PICTURE_SIZE, Scene, render

_CHUNK = 500

Renderer = Callable[[Scene, np.random.Generator], Image.Image]


@dataclass(frozen=True, kw_only=True)
class RenderedPictures:
    """Pictures (count, 3, 64, 64) as uint8, and the scene of each."""

    pixels: torch.Tensor
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Pictures (len(indices), 3, 64, 64) as float32 in [-1, 1]."""
        return self.pixels[indices].float() / 127.5 - 1.0

    def unit_interval(self) -> torch.Tensor:
        """All pictures (count, 3, 64, 64) as float32 in [0, 1], as pipelines return them."""
        return self.pixels.float() / 255.0


def render_pictures(count: int, seed: int, *, renderer: Renderer = render, workers: int = 2) -> RenderedPictures:
    """Renders `count` random scenes; the same `seed` gives the same pictures whatever the number of workers.

    `renderer` draws a scene as an RGB picture of 64x64 pixels; it is a function of a module, which workers can find.
    """
    sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    pixels = np.empty((count, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    scenes: list[Scene] = []
    with ProcessPoolExecutor(workers) as pool, tqdm(total=count, desc="render", unit="picture") as progress:
        for chunk, chunk_scenes in pool.map(partial(_render_chunk, renderer=renderer), sizes, seeds):
            pixels[len(scenes) : len(scenes) + len(chunk_scenes)] = chunk
            scenes += chunk_scenes
            progress.update(len(chunk_scenes))
    return RenderedPictures(pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2), scenes=tuple(scenes))


def _render_chunk(size: int, seed: np.random.SeedSequence, renderer: Renderer) -> tuple[np.ndarray, list[Scene]]:
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(size)]
    return np.stack([np.asarray(renderer(scene, rng)) for scene in scenes]), scenes
