"""A tiny preset pipeline and what the block tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import tiny_sdxl_components


def make_pipeline(blocks: Any = None, **components: Any) -> Any:
    pipe = (blocks or PeRFlowSDXLAutoBlocks()).init_pipeline()
    pipe.update_components(**{**tiny_sdxl_components(), **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Any, **inputs: Any) -> torch.Tensor:
    """Final latents (pictures, 4, 16, 16) of a seeded run."""
    inputs = {"prompt": "a red star", "generator": generator(), "output_type": "latent", **inputs}
    return pipe(output="images", **inputs)


def count_unet_calls(pipe: Any) -> list[int]:
    """The batch sizes of the UNet's calls, appended to as they happen."""
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    return batches


def watch_models(pipe: Any) -> tuple[list[str], Callable[[], None]]:
    """The names of the pipeline's models, appended to as they run, and a function that ends the watch.

    A model whose methods run its parts without calling the model itself, as the VAE's `encode` and `decode` do, is
    noted by its parts.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, model in pipe.components.items()
        if isinstance(model, nn.Module)
        for module in (model, *model.children())
    ]

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return ran, stop
