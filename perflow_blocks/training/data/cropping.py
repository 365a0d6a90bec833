"""From stored samples to a batch: caption drawn, picture resized to cover its bucket, cut, perhaps mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from .batch import Size, TrainingBatch
from .config import DataConfig
from .pictures import open_picture
from .records import StoredPicture


@dataclass(frozen=True, kw_only=True)
class View:
    """One row of a batch. `picture` has `target_size`, or is None."""

    prompt: str
    picture: Image.Image | None
    original_size: Size
    crop_top_left: Size
    target_size: Size


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """How captions and pictures become rows; all that is random comes from the generator of the row."""

    trigger: str
    center_crop: bool
    random_flip: bool

    @classmethod
    def of(cls, config: DataConfig) -> Cutter:
        return cls(trigger=config.trigger, center_crop=config.center_crop, random_flip=config.random_flip)

    def view(
        self, captions: Sequence[str], stored: StoredPicture | None, target: Size, rng: np.random.Generator
    ) -> View:
        """One row, cut to `target`.

        Raises:
            BadPicture: the picture cannot be decoded.
        """
        prompt = captions[int(rng.integers(len(captions)))]
        prompt = f"{self.trigger}, {prompt}" if self.trigger else prompt
        if stored is None:
            return View(prompt=prompt, picture=None, original_size=target, crop_top_left=(0, 0), target_size=target)
        return self._cut(prompt, open_picture(stored), target, rng)

    def _cut(self, prompt: str, picture: Image.Image, target: Size, rng: np.random.Generator) -> View:
        height, width = target
        covering = ImageOps.cover(picture, (width, height), Image.Resampling.LANCZOS)
        room = covering.height - height, covering.width - width
        drawn = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
        top, left = (room[0] // 2, room[1] // 2) if self.center_crop else drawn
        cut = covering.crop((left, top, left + width, top + height))
        if self.random_flip and rng.random() < 0.5:
            # The same pixels as cut from the mirrored picture, and that is where the time ids say they are.
            cut, left = ImageOps.mirror(cut), room[1] - left
        return View(
            prompt=prompt,
            picture=cut,
            original_size=(picture.height, picture.width),
            crop_top_left=(top, left),
            target_size=target,
        )


def stack(views: Sequence[View]) -> TrainingBatch:
    """Rows of one target size as a batch."""
    pictures = [view.picture for view in views if view.picture is not None]
    return TrainingBatch(
        prompts=[view.prompt for view in views],
        pixels=VaeImageProcessor(do_resize=False).preprocess(pictures) if pictures else None,
        original_sizes=[view.original_size for view in views],
        crop_tops_lefts=[view.crop_top_left for view in views],
        target_sizes=[view.target_size for view in views],
    )
