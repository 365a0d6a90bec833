"""Tiny repositories on the disk, and a count of what is loaded from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from perflow_blocks import PeRFlowPipelineBuilder
from perflow_blocks.testing.tiny import tiny_sdxl_components

from .blocks_support import run

LOADABLE = (
    UNet2DConditionModel,
    AutoencoderKL,
    ControlNetModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    EulerDiscreteScheduler,
)
ALIGNMENT = 64
"""In bytes: that of torch's own memory on the CPU."""

WHOLE = sorted([*(kind.__name__ for kind in LOADABLE if kind is not ControlNetModel), "CLIPTokenizer"])
"""What a pipeline of `tiny_sdxl_components` loads."""


def save_repository(folder: Path, **components: Any) -> Path:
    """The tiny SDXL pipeline as diffusers saves it, in float32."""
    pipe = StableDiffusionXLPipeline(**{**tiny_sdxl_components(), **components}, add_watermarker=False)
    pipe.save_pretrained(folder)
    return folder


def builder(repository: Path, **settings: Any) -> PeRFlowPipelineBuilder:
    return PeRFlowPipelineBuilder(**settings).from_pretrained(repository)


def latents(pipe: Any, **inputs: Any) -> torch.Tensor:
    """Those of a run, the same to the bit for the same weights, wherever those came from.

    Weights of a mapped file lie at any address, and matrix products round by the alignment of what they multiply.
    """
    for model in pipe.components.values():
        for weight in model.parameters() if isinstance(model, torch.nn.Module) else ():
            if weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone(memory_format=torch.preserve_format)
    pipe.set_progress_bar_config(disable=True)
    return run(pipe, **{"num_inference_steps": 4, **inputs})


def problems(built: PeRFlowPipelineBuilder) -> str:
    """The text of the error that `build` raises, which says what `problems` says."""
    with pytest.raises(ValueError) as caught:
        built.build()
    text = str(caught.value)
    assert all(problem in text for problem in built.problems())
    return text
