"""How images are read, counted, sized and matched to prompts, whatever they are given as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VaeImageProcessor
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from PIL import Image
from torch import Tensor

from perflow_blocks.blocks.before_denoise import one_for_each_image
from perflow_blocks.blocks.images import as_batch, count_images, image_size, repeat_images
from perflow_blocks.testing.tiny import load_tiny_ip_adapter, tiny_controlnet, tiny_picture
from tests.blocks.conftest import as_a_camera_stores
from tests.conftest import generator, make_pipeline

PIL_IMAGE = Image.new("RGB", (6, 4))
TWO_PIL = [PIL_IMAGE, Image.new("RGB", (6, 4), "white")]


@pytest.mark.parametrize(
    ("image", "mask", "shape"),
    [
        (np.zeros((4, 6, 3)), False, (1, 3, 4, 6)),
        (np.zeros((2, 4, 6, 3)), False, (2, 3, 4, 6)),
        (torch.zeros(3, 4, 6), False, (1, 3, 4, 6)),
        (torch.zeros(2, 3, 4, 6), False, (2, 3, 4, 6)),
        (np.zeros((4, 6)), True, (1, 1, 4, 6)),
        (np.zeros((4, 6, 1)), True, (1, 1, 4, 6)),
        (np.zeros((2, 4, 6)), True, (2, 1, 4, 6)),
        (np.zeros((2, 4, 6, 1)), True, (2, 1, 4, 6)),
        (torch.zeros(4, 6), True, (1, 1, 4, 6)),
        (torch.zeros(2, 4, 6), True, (2, 1, 4, 6)),
        (torch.zeros(2, 1, 4, 6), True, (2, 1, 4, 6)),
    ],
)
def test_arrays_and_tensors_are_batches_as_diffusers_reads_them(
    image: Any, mask: bool, shape: tuple[int, ...]
) -> None:
    processor = VaeImageProcessor(do_resize=False, do_convert_grayscale=mask)
    batch = as_batch(image, mask)
    assert batch.shape == processor.preprocess(image).shape == shape
    assert count_images(batch) == shape[0] and image_size(batch) == (4, 6)


def test_count_and_size_of_pil_images() -> None:
    assert (count_images(PIL_IMAGE), count_images(TWO_PIL)) == (1, 2)
    assert image_size(PIL_IMAGE) == image_size(TWO_PIL) == image_size([np.zeros((4, 6, 3))]) == (4, 6)


def test_repeated_images_stand_side_by_side() -> None:
    assert repeat_images(TWO_PIL, 4) == [TWO_PIL[0], TWO_PIL[0], TWO_PIL[1], TWO_PIL[1]]
    assert repeat_images(PIL_IMAGE, 2) == [PIL_IMAGE, PIL_IMAGE]
    tensors = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 6)
    assert repeat_images(tensors, 4)[:, 0, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_rows_are_matched_to_prompts_in_order() -> None:
    rows = torch.arange(2.0)[:, None]
    assert one_for_each_image("rows", rows, 2, 2).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert one_for_each_image("rows", rows[1:], 2, 2).flatten().tolist() == [1.0] * 4
    assert one_for_each_image("rows", rows, 1, 2) is rows
    with pytest.raises(ValueError, match="rows has 2 entries for 3 prompts"):
        one_for_each_image("rows", rows, 3, 1)


GIVEN = tiny_picture(2, (40, 24))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """With a ControlNet and an IP-Adapter."""
    pipe = make_pipeline(controlnet=tiny_controlnet())
    load_tiny_ip_adapter(pipe)
    return pipe


def standard(pipe: Any, name: str, image: Any) -> Any:
    """What the first block hands on of an image."""
    inputs = {"ip_adapter_image": GIVEN, name: image, "prompt": "a"}
    check = pipe._blocks.sub_blocks["check_inputs"]
    defaults = {entry.name: entry.default for entry in check.inputs}
    _, state = check(pipe, PipelineState(values={**defaults, **inputs}))
    return state.get(name)[0][0] if name == "ip_adapter_image" else state.get(name)


def taken(pipe: Any, name: str, image: Any) -> Tensor:
    """What the networks get of an image: latents, a control image, or an embedding."""
    inputs = {"ip_adapter_image": GIVEN, "height": 24, "width": 40, name: image, "num_inference_steps": 1}
    state = pipe(prompt="a", **inputs, output_type="latent", generator=generator())
    seen = state.get({"image": "image_latents", "control_image": "controlnet_cond"}.get(name, "ip_adapter_embeds"))
    return seen[0] if name == "ip_adapter_image" else seen


EVERY_INPUT = pytest.mark.parametrize("name", ["image", "control_image", "ip_adapter_image"])


@EVERY_INPUT
@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA"])
def test_opaque_images_of_any_mode_are_taken_in_colour(pipe: Any, name: str, mode: str) -> None:
    image = GIVEN.convert("P").convert("PA") if mode == "PA" else GIVEN.convert(mode)
    assert standard(pipe, name, image) == image.convert("RGB")


@EVERY_INPUT
def test_images_are_turned_as_their_exif_says(pipe: Any, name: str) -> None:
    stored = as_a_camera_stores(GIVEN)
    np.testing.assert_array_equal(standard(pipe, name, stored), GIVEN)
    assert stored.size == (24, 40)  # the caller's own image stays as it is


@EVERY_INPUT
@pytest.mark.parametrize("mode", ["<u2", ">u2"])
def test_16_bits_are_scaled(pipe: Any, name: str, mode: str) -> None:
    ramp = np.linspace(0, 65535, 40 * 24).round().reshape(24, 40)
    image = standard(pipe, name, Image.fromarray(ramp.astype(mode)))
    np.testing.assert_allclose(np.asarray(image)[..., 1], ramp / 257, atol=0.5)


@EVERY_INPUT
def test_values_that_rounding_put_outside_the_range_are_clipped(pipe: Any, name: str) -> None:
    """A value below 0 would tell diffusers that all are in [-1, 1]."""
    outside = np.asarray(GIVEN) / 255.0
    outside[0, 0, :2] = -1e-7, 1.0 + 1e-7
    image = np.asarray(standard(pipe, name, outside), float)
    assert image.min() == 0.0
    assert image.max() == (255.0 if name == "ip_adapter_image" else 1.0)
    assert outside.min() < 0.0  # the caller's own array stays as it is


@pytest.mark.behaviour
@EVERY_INPUT
def test_every_form_of_an_image_is_taken_alike(pipe: Any, name: str) -> None:
    array = np.asarray(GIVEN) / 255.0
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = taken(pipe, name, GIVEN)
    for image in (array, tensor[None], [as_a_camera_stores(GIVEN)]):
        torch.testing.assert_close(taken(pipe, name, image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.behaviour
def test_an_adapter_takes_several_images_in_any_form(pipe: Any) -> None:
    other = tiny_picture(3, (16, 32))
    array, tensor = np.asarray(GIVEN) / 255.0, torch.from_numpy(np.asarray(other) / 255.0).permute(2, 0, 1)
    expected = torch.cat([taken(pipe, "ip_adapter_image", image) for image in (GIVEN, other)])
    embeds = taken(pipe, "ip_adapter_image", [[array, tensor]])
    torch.testing.assert_close(embeds.flatten(0, -2), expected.flatten(0, -2))
