"""The tiny components of `perflow_blocks.testing`: what they are conditioned on shows, and their seeds decide all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionXLAutoBlocks
from PIL import Image

from perflow_blocks.testing import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_inpainting_unet,
    tiny_inputs,
    tiny_mask,
    tiny_picture,
    tiny_sdxl_components,
)
from perflow_blocks.testing.tiny import IMAGE_WIDTH


def run_stock(pipe: Any, **inputs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(prompt="a star", generator=generator, output="images", **size, **inputs)


def make_stock(**components: Any) -> Any:
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{**tiny_sdxl_components(), **components})
    return pipe


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).std() / a.std())


CONTROLS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "one": (lambda: tiny_controlnet(1), lambda seed: {"control_image": tiny_picture(seed)}),
    "several": (
        lambda: MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]),
        lambda seed: {"control_image": [tiny_picture(0), tiny_picture(seed)]},
    ),
    "union": (
        lambda: tiny_controlnet_union(1),
        lambda seed: {"control_image": [tiny_picture(seed)], "control_mode": [1]},
    ),
}


@pytest.mark.parametrize(("make", "inputs"), CONTROLS.values(), ids=CONTROLS)
def test_control_pictures_show_in_the_result(make: Any, inputs: Any) -> None:
    pipe = make_stock(controlnet=make())
    first, second = run_stock(pipe, **inputs(1)), run_stock(pipe, **inputs(2))
    assert relative_change(first, second) > 0.005
    assert relative_change(run_stock(make_stock()), first) > 0.05


def test_the_kinds_of_a_control_union_differ() -> None:
    pipe = make_stock(controlnet=tiny_controlnet_union())
    results = [run_stock(pipe, control_image=[tiny_picture()], control_mode=[mode]) for mode in (0, 5)]
    assert relative_change(*results) > 0.05


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_for_ip_adapters_show_in_the_result(count: int) -> None:
    pipe = make_stock()
    load_tiny_ip_adapter(pipe, count)
    assert len(pipe.unet.encoder_hid_proj.image_projection_layers) == count
    results = [
        run_stock(pipe, ip_adapter_image=[tiny_picture(0)] * (count - 1) + [tiny_picture(seed)]) for seed in (1, 2)
    ]
    assert relative_change(*results) > 0.01


def test_an_image_encoder_that_is_there_is_kept() -> None:
    encoder = tiny_image_encoder(7)
    pipe = make_stock(image_encoder=encoder)
    load_tiny_ip_adapter(pipe)
    assert pipe.image_encoder is encoder


MAKERS: dict[str, Callable[[int], Any]] = {
    "tiny_controlnet": tiny_controlnet,
    "tiny_controlnet_union": tiny_controlnet_union,
    "tiny_image_encoder": tiny_image_encoder,
    "tiny_inpainting_unet": tiny_inpainting_unet,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_models_are_made_of_their_seed_alone(make: Callable[[int], torch.nn.Module]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = make(0).state_dict(), make(1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_adapters_inputs_and_pictures_leave_the_random_state_alone() -> None:
    pipe = make_stock()
    before = torch.get_rng_state()
    load_tiny_ip_adapter(pipe, 2)
    first, second = tiny_inputs(), tiny_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["latents"], second["latents"])
    assert tiny_picture(3).tobytes() == tiny_picture(3).tobytes() != tiny_picture(4).tobytes()
    procs = pipe.unet.attn_processors["mid_block.attentions.0.transformer_blocks.0.attn2.processor"]
    assert not torch.equal(procs.to_k_ip[0].weight, procs.to_k_ip[1].weight)


def test_pictures_and_masks_have_the_size_that_is_asked_for() -> None:
    assert tiny_picture().size == tiny_mask().size == (32, 32)
    assert tiny_picture(size=(24, 40)).size == tiny_mask((24, 40)).size == (24, 40)
    mask = tiny_mask((8, 4))
    assert [mask.getpixel(at) for at in ((7, 3), (4, 1), (3, 3), (7, 0))] == [255, 255, 0, 0]


def test_encoder_extractor_and_inpainting_unet_fit() -> None:
    pixels = tiny_feature_extractor()(tiny_picture(size=(50, 40)), return_tensors="pt").pixel_values
    assert tiny_image_encoder()(pixels).image_embeds.shape == (1, IMAGE_WIDTH)
    assert tiny_inpainting_unet().conv_in.weight.shape[1] == 9


def test_the_tables_of_tiny_inputs_agree() -> None:
    """Each step starts at a window's start, where the chord is the marginal, and the mask is the picture's."""
    inputs = tiny_inputs()
    signal, sigma = inputs["noise_coefficients"].unbind(1)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(5))
    assert (signal[-1], sigma[-1]) == (1.0, 0.0)
    assert (sigma.diff() < 0).all()
    mask = np.array(tiny_mask().resize((16, 16), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(inputs["mask"][0, 0].numpy() * 255, mask)
