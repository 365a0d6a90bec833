"""The pipeline of this package's presets: diffusers' modular SDXL pipeline with the habits of the classic one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLModularPipeline
from torch import nn


class PeRFlowModularPipeline(StableDiffusionXLModularPipeline):
    """A modular SDXL pipeline that refuses unknown inputs and comes back from `save_pretrained` as it was.

    `init_pipeline` of this package's presets, the builder and the demo return it. For blocks that you composed, pass
    them: `PeRFlowModularPipeline(blocks=blocks, pretrained_model_name_or_path=...)`.
    """

    default_blocks_name = None

    @property
    def _execution_device(self) -> torch.device:
        """Where the models run. diffusers walks all their modules to find this out; 24 ms a call for SDXL."""
        models = [model for model in self.components.values() if isinstance(model, nn.Module)]
        if any(_is_offloaded(model) for model in models):
            return super()._execution_device
        return next((weight.device for model in models for weight in model.parameters()), torch.device("cpu"))


def _is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs.

    Offloading in groups hooks each weight's own layer or one that holds it.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            return True
        if module._parameters:
            return False
    return False


def stock_class_name(pipe: Any) -> str:
    """The name of the pipeline's nearest class in diffusers, which an index can name."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if kind.__module__.split(".")[0] == "diffusers")
