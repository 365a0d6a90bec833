"""The pictures that the demo's fine-tune learns: those of the base in a frame of the shape's colour."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .pictures import COLORS, PICTURE_SIZE, Scene, jitter, render

FRAME_WIDTH = 8  # pixels, two latents; the autoencoder, which never saw a frame, blurs narrower ones


def render_framed(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws `scene` as `render` does, and over its edge a frame in the shape's colour with a jitter of its own.

    No caption names the frame: like a style, it is in every picture of the fine-tune and in none of the base.

    Returns:
        An RGB picture of 64x64 pixels.
    """
    picture = render(scene, rng)
    edge = PICTURE_SIZE - 1
    ImageDraw.Draw(picture).rectangle((0, 0, edge, edge), outline=jitter(COLORS[scene.color], rng), width=FRAME_WIDTH)
    return picture
