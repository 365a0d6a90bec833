"""What image-to-image and inpainting are measured on: rendered inputs, prompts that change them, holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo.models import LATENT_CHANNELS, LATENT_SIZE, VAE_FACTOR
from ..demo.pictures import COLORS, PICTURE_SIZE, SHAPES, Prompt, Scene, render

EDITING_SEED = 30_260  # no training run and no other evaluation draws from it
WORDINGS = ("own", "color", "shape", "both")
"""Prompts name all attributes: the input's own, or with another colour, another shape, or both."""
MARGINS = {"tight": 2, "wide": 10}
"""Holes around the shape, by the pixels that they leave around it. A third hole, `half`, is half the picture."""


@dataclass(frozen=True, kw_only=True)
class EditingSet:
    """Rendered inputs, prompts for each of `WORDINGS`, masks for each kind of hole, and noise.

    Attributes:
        inputs: RGB pictures of 64x64 pixels.
        prompts: wording to one prompt for each input.
        masks: kind of hole to one mask for each input, white where it is painted; holes consist of whole latents.
        latents: the noise of text-to-image and inpainting, (count, 4, 16, 16).
        seed: image-to-image draws picture n from a generator seeded `seed + n`.
    """

    inputs: tuple[Image.Image, ...]
    prompts: dict[str, tuple[Prompt, ...]]
    masks: dict[str, tuple[Image.Image, ...]]
    latents: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.inputs)

    def pixels(self) -> Tensor:
        """The inputs, (count, 3, 64, 64) in [0, 1]."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in self.inputs]))
        return pixels.permute(0, 3, 1, 2).float() / 255.0

    def painted(self, hole: str) -> Tensor:
        """Whether a pixel lies in the hole, bool of shape (count, 1, 64, 64)."""
        masks = np.stack([np.asarray(mask) for mask in self.masks[hole]])
        return torch.from_numpy(masks > 127).unsqueeze(1)


def make_editing_set(count: int, *, seed: int = EDITING_SEED) -> EditingSet:
    """`count` random scenes and all that edits of them need; the same seed gives the same set.

    Raises:
        ValueError: fewer than 2 pictures, which give no standard error.
    """
    if count < 2:
        raise ValueError(f"prompts={count} is below 2; pass at least 2, and 256 or more for figures worth quoting.")
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    inputs = tuple(render(scene, rng) for scene in scenes)
    generator = torch.Generator().manual_seed(seed)
    return EditingSet(
        inputs=inputs,
        prompts=_prompts(scenes, rng),
        masks={
            **{name: tuple(_around_shape(one, margin) for one in inputs) for name, margin in MARGINS.items()},
            "half": tuple(_half_with_shape(one) for one in inputs),
        },
        latents=torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator),
        seed=seed,
    )


def _prompts(scenes: Sequence[Scene], rng: np.random.Generator) -> dict[str, tuple[Prompt, ...]]:
    own = [Prompt.describe(scene, rng, keep=1.0) for scene in scenes]
    colors = [_another(rng, tuple(COLORS), scene.color) for scene in scenes]
    shapes = [_another(rng, SHAPES, scene.shape) for scene in scenes]
    reshaped = [replace(prompt, shape=shape) for prompt, shape in zip(own, shapes, strict=True)]
    return {
        "own": tuple(own),
        "color": tuple(replace(prompt, color=color) for prompt, color in zip(own, colors, strict=True)),
        "shape": tuple(reshaped),
        "both": tuple(replace(prompt, color=color) for prompt, color in zip(reshaped, colors, strict=True)),
    }


def _another(rng: np.random.Generator, options: Sequence[str], value: str) -> str:
    others = [option for option in options if option != value]
    return others[int(rng.integers(len(others)))]


def _around_shape(picture: Image.Image, margin: int) -> Image.Image:
    """The shape's bounding box, wider by `margin` pixels on each side and then out to whole latents.

    The top and bottom rows of latents, where no render has a shape, stay known, so that something always does.
    """
    left, top, right, bottom = _shape_box(picture)
    low = [(edge - margin) // VAE_FACTOR * VAE_FACTOR for edge in (left, top)]
    high = [-(-(edge + margin) // VAE_FACTOR) * VAE_FACTOR for edge in (right, bottom)]
    first, last = VAE_FACTOR, PICTURE_SIZE - VAE_FACTOR
    return _mask(max(0, low[0]), max(first, low[1]), min(PICTURE_SIZE, high[0]), min(last, high[1]))


def _half_with_shape(picture: Image.Image) -> Image.Image:
    """The left or the right half, whichever has the shape's centre."""
    left, _, right, _ = _shape_box(picture)
    middle = PICTURE_SIZE // 2
    start = 0 if left + right < PICTURE_SIZE else middle
    return _mask(start, 0, start + middle, PICTURE_SIZE)


def _shape_box(picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (the latter two exclusive) of what differs from a render's flat background."""
    pixels = np.asarray(picture)
    shape = (pixels != pixels[0, 0]).any(-1)
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _mask(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (PICTURE_SIZE, PICTURE_SIZE), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask
