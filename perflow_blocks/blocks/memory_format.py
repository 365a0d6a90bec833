"""Lays the convolution weights out as the device likes them, before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec
from torch import nn

from .declare import Assembled
from .specs import controlnet_spec, memory_format_config_specs, unet_spec


class PeRFlowMemoryFormatStep(ModularPipelineBlocks):
    """Lays the UNet's convolution weights out as `channels_last`, or back, if the configuration says so.

    With such weights the activations take the same layout, and convolutions need not transpose them: the usual
    advice for half precision on GPUs with tensor cores
    (https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html). The values are the same, so results
    agree to rounding. Runs at every call, and where nothing is to be done it does nothing.

    Raises:
        ValueError: `channels_last` is neither True, False nor None.
    """

    model_name = "stable-diffusion-xl"

    models: tuple[str, ...] = ("unet",)
    """The components that are laid out."""

    @property
    def description(self) -> str:
        return (
            "Lays convolution weights out as `channels_last` where the configuration asks for it: "
            "pipe.update_components(channels_last=True)."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [unet_spec()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return memory_format_config_specs()

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        wanted = components.config.channels_last
        if wanted not in (None, True, False):
            raise ValueError(f"channels_last={wanted!r} is no choice; pass True, False, or None to leave it as it is.")
        if wanted is not None:
            memory_format = torch.channels_last if wanted else torch.contiguous_format
            for name in self.models:
                _lay_out(getattr(components, name), memory_format)
        return components, state


class PeRFlowControlNetMemoryFormatStep(PeRFlowMemoryFormatStep):
    """The same for UNet and ControlNets."""

    models = ("unet", "controlnet")

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, controlnet_spec()]


class PeRFlowAutoMemoryFormatStep(Assembled, AutoPipelineBlocks):
    """UNet and ControlNets where there is a control image, else the UNet."""

    block_classes = [PeRFlowControlNetMemoryFormatStep, PeRFlowMemoryFormatStep]
    block_names = ["controlnet", "unet"]
    block_trigger_inputs = ["control_image", None]

    @property
    def description(self) -> str:
        return "Lays the weights of the UNet, and with `control_image` of the ControlNets too, out as configured."


def _lay_out(model: Any, memory_format: torch.memory_format) -> None:
    if not all(weight.is_contiguous(memory_format=memory_format) for weight in _kernels(model)):
        model.to(memory_format=memory_format)


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    """The weights that have a layout to choose."""
    return [weight for weight in model.parameters() if weight.ndim == 4]
