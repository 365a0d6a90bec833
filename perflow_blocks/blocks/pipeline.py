"""The pipeline of this package's presets: diffusers' modular SDXL pipeline with the habits of the classic one."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionXLModularPipeline


class PeRFlowModularPipeline(StableDiffusionXLModularPipeline):
    """A modular SDXL pipeline that refuses unknown inputs and comes back from `save_pretrained` as it was.

    `init_pipeline` of this package's presets, the builder and the demo return it. For blocks that you composed, pass
    them: `PeRFlowModularPipeline(blocks=blocks, pretrained_model_name_or_path=...)`.
    """

    default_blocks_name = None


def stock_class_name(pipe: Any) -> str:
    """The name of the pipeline's nearest class in diffusers, which an index can name."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if kind.__module__.split(".")[0] == "diffusers")
