"""The basic workflows, for tests that every one of them must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from perflow_blocks.components.delta_files import save_delta
from perflow_blocks.components.delta_recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_mask, tiny_picture, tiny_sdxl_unet

WORKFLOWS = ["text2image", "image2image", "inpainting"]


def workflow_inputs(name: str) -> dict[str, Any]:
    """What a call of the workflow needs besides the prompt; new objects at each call."""
    inputs: dict[str, Any] = {"num_inference_steps": 4}
    if name != "text2image":
        inputs |= {"image": tiny_picture(), "strength": 0.8}
    if name == "inpainting":
        inputs |= {"mask_image": tiny_mask()}
    return inputs


def write_delta(path: Path, recipe: DeltaRecipe | None = None, part: str = "") -> Path:
    """dW from `tiny_sdxl_unet(0)`, the pipeline's, to `tiny_sdxl_unet(1)`; with `part` of the keys that hold it."""
    base, student = tiny_sdxl_unet(0).state_dict(), tiny_sdxl_unet(1).state_dict()
    difference = {name: student[name] - base[name] for name in base if part in name}
    save_delta(difference, path, recipe, dtype=torch.float32, partial=bool(part))
    return path
