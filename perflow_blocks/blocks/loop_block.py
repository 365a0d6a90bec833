"""What the denoising loop offers the blocks inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

Repeat = Callable[[int], object]
"""Runs the loop's steps again, from the given one to the last that ran."""

LOOP_PROVIDES = frozenset({"window_index", "stop_requested", "noise_pred", "earlier_step"})
"""What the loop itself puts on the block state: a block may require it, and no caller is asked for it."""


class LoopBlock(ModularPipelineBlocks):
    """A block of the denoising loop that acts before the first step or after the last.

    Like every block in the loop it is called as `block(components, block_state, i=i, t=t)` at each step. Blocks that
    need neither method below may be plain `ModularPipelineBlocks`.
    """

    model_name = "stable-diffusion-xl"

    def start(self, components: Any, block_state: Any) -> None:
        """Called once, before the first step: the place to check inputs and to prepare."""

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        """Called once, after the last step, or after the step at which a block stopped the run.

        The device may be read here. `repeat(first_step)` runs the steps from `first_step` to the last one that ran
        again, on what `block_state` then holds, without calling `start` or `finish`.
        """
