"""The tiny components of `perflow_blocks.testing`: what they are conditioned on shows, and their seeds decide all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionXLAutoBlocks

from perflow_blocks.testing import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_image_encoder,
    tiny_inpainting_unet,
    tiny_inputs,
    tiny_mask,
    tiny_picture,
    tiny_sdxl_components,
)


def run_stock(components: dict[str, Any], adapters: int = 0, **inputs: Any) -> torch.Tensor:
    """Final latents of diffusers' own blocks."""
    pipe: Any = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**tiny_sdxl_components(), **components)
    if adapters:
        load_tiny_ip_adapter(pipe, adapters)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(prompt="a star", generator=torch.Generator().manual_seed(0), output="images", **size, **inputs)


CASES: dict[str, tuple[dict[str, Any], int, Callable[[int], dict[str, Any]]]] = {
    "ControlNets": (
        {"controlnet": MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])},
        0,
        lambda seed: {"control_image": [tiny_picture(0), tiny_picture(seed)]},
    ),
    "union": (
        {"controlnet": tiny_controlnet_union(1)},
        0,
        lambda seed: {"control_image": [tiny_picture(seed)], "control_mode": [1]},
    ),
    "union's kinds": (
        {"controlnet": tiny_controlnet_union()},
        0,
        lambda seed: {"control_image": [tiny_picture()], "control_mode": [seed]},
    ),
    "IP-Adapters": ({}, 2, lambda seed: {"ip_adapter_image": [tiny_picture(0), tiny_picture(seed)]}),
}


@pytest.mark.parametrize(("components", "adapters", "inputs"), CASES.values(), ids=CASES)
def test_images_show_in_the_result(components: Any, adapters: int, inputs: Any) -> None:
    first, second = (run_stock(components, adapters, **inputs(seed)) for seed in (1, 2))
    assert (first - second).std() > 0.005 * first.std()


@pytest.mark.parametrize("make", [tiny_controlnet, tiny_controlnet_union, tiny_image_encoder, tiny_inpainting_unet])
def test_models_are_made_of_their_seed_alone(make: Callable[[int], torch.nn.Module]) -> None:
    before = torch.get_rng_state()
    first, again, other = (make(seed).state_dict() for seed in (0, 0, 1))
    tiny_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_images_and_masks_have_the_size_that_is_asked_for() -> None:
    assert tiny_picture(size=(24, 40)).size == tiny_mask((24, 40)).size == (24, 40)
    mask = tiny_mask((8, 4))
    assert [mask.getpixel(at) for at in ((7, 3), (4, 1), (3, 3), (7, 0))] == [255, 255, 0, 0]
