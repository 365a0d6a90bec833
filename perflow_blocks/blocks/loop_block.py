"""What a block in the denoising loop may do besides its step: prepare before the first, conclude after the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

Repeat = Callable[[int], object]
"""Runs the loop's steps again, from the given one to the last that ran."""


class LoopBlock(ModularPipelineBlocks):
    """A block of the denoising loop that wants to know when the loop starts and ends.

    Like every block in the loop it is called as `block(components, block_state, i=i, t=t)` at each step; plain
    `ModularPipelineBlocks` serve as well where neither method below is needed.
    """

    model_name = "stable-diffusion-xl"

    def start(self, components: Any, block_state: Any) -> None:
        """Called once, before the first step: the place for what the steps add to, and for errors."""

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        """Called once, after the last step, or after the step at which a block stopped the run.

        Here the device may be read. `repeat(first_step)` runs the steps from `first_step` to the last one that ran
        again, on what `block_state` then holds, without calling `start` or `finish`.
        """
