"""Every kind of image and mask that a call takes is read alike; what is ambiguous is refused or warned of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VaeImageProcessor
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from PIL import Image
from torch import Tensor

from perflow_blocks.blocks.images import as_batch, count_images, image_size
from perflow_blocks.testing.tiny import load_tiny_ip_adapter, tiny_controlnet, tiny_image, tiny_mask
from tests.blocks.conftest import as_a_camera_stores
from tests.conftest import generator, make_pipeline, refusal, run

pytestmark = pytest.mark.behaviour

IMAGE, MASK = tiny_image(1), tiny_mask()
BYTES = np.asarray(IMAGE)
ARRAY = BYTES / 255.0
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1).float()
HOLE = np.asarray(MASK) / 255.0
GIVEN = tiny_image(2, (40, 24))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipeline()


@pytest.fixture(scope="module")
def equipped() -> Any:
    """With a ControlNet and an IP-Adapter."""
    pipe = make_pipeline(controlnet=tiny_controlnet())
    load_tiny_ip_adapter(pipe)
    return pipe


every_input = pytest.mark.parametrize("name", ["image", "control_image", "ip_adapter_image"])


@pytest.mark.parametrize(
    ("image", "mask", "shape"),
    [
        (np.zeros((4, 6, 3)), False, (1, 3, 4, 6)),
        (torch.zeros(3, 4, 6), False, (1, 3, 4, 6)),
        (torch.zeros(2, 3, 4, 6), False, (2, 3, 4, 6)),
        (np.zeros((4, 6)), True, (1, 1, 4, 6)),
        (np.zeros((4, 6, 1)), True, (1, 1, 4, 6)),
        (np.zeros((2, 4, 6)), True, (2, 1, 4, 6)),
        (np.zeros((2, 4, 6, 1)), True, (2, 1, 4, 6)),
        (torch.zeros(2, 4, 6), True, (2, 1, 4, 6)),
    ],
)
def test_arrays_and_tensors_are_batches_as_diffusers_reads_them(
    image: Any, mask: bool, shape: tuple[int, ...]
) -> None:
    batch = as_batch(image, mask)
    processor = VaeImageProcessor(do_resize=False, do_convert_grayscale=mask)
    assert batch.shape == processor.preprocess(image).shape == shape
    assert count_images(batch) == shape[0] and image_size(batch) == (4, 6)


def bad_forms() -> dict[str, tuple[Any, str]]:
    """What is refused in every image input, and a part of the message."""
    return {
        "bytes": (BYTES, "holds uint8; pass floats in [0, 1], such as {} / 255"),
        "to 255": (BYTES.astype("float32"), "to 255, not in [0, 1]; pass {} / 255"),
        "from -1": (2 * TENSOR - 1, "({} + 1) / 2 if its range is [-1, 1]"),
        "NaN": (TENSOR * float("nan"), "from nan to nan, not in [0, 1]"),
        "grey": (HOLE, "(32, 32)"),
        "channels first": (ARRAY.transpose(2, 0, 1), "(3, 32, 32)"),
        "empty": (ARRAY[:0], "(0, 32, 3)"),
        "a tuple": ((IMAGE, IMAGE), "{} is of type tuple"),
        "F": (IMAGE.convert("F"), "mode F, which has no fixed range"),
    }


@pytest.mark.parametrize("form", bad_forms())
@every_input
def test_every_image_input_refuses_the_same_forms(equipped: Any, name: str, form: str) -> None:
    image, text = bad_forms()[form]
    assert text.format(*[name] * 2) in refusal(equipped, **{name: image})


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"image": [IMAGE, ARRAY]}, "image holds images of several kinds or sizes"),
        ({"image": [IMAGE, tiny_image(1, (64, 32))]}, "a PIL image of 32x32, a PIL image of 64x32"),
        ({"image": IMAGE, "mask_image": np.asarray(MASK)}, "mask_image holds uint8"),
        ({"image": IMAGE, "mask_image": 255 * HOLE}, "mask_image holds values from 0 to 255"),
        ({"image": IMAGE, "mask_image": [MASK, tiny_mask((64, 32))]}, "mask_image holds images of several kinds"),
        ({"image": IMAGE, "mask_image": TENSOR[None]}, "mask_image is of shape (1, 3, 32, 32); it must have one"),
        ({"image": IMAGE, "mask_image": np.stack([HOLE] * 2)}, "mask_image has 2 entries for 1 prompts"),
    ],
)
def test_images_of_a_list_are_alike_and_masks_have_one_channel(pipe: Any, inputs: dict[str, Any], text: str) -> None:
    assert text in refusal(pipe, **inputs)


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


@every_input
def test_pil_images_are_read_in_colour_upright_and_from_16_bits(equipped: Any, name: str) -> None:
    for mode in ("1", "L", "P", "CMYK", "LA", "RGBA"):
        assert standard(equipped, name, GIVEN.convert(mode)) == GIVEN.convert(mode).convert("RGB"), mode
    stored = as_a_camera_stores(GIVEN)
    np.testing.assert_array_equal(standard(equipped, name, stored), GIVEN)
    assert stored.size == (24, 40)  # the caller's own image stays as it is
    ramp = np.linspace(0, 65535, 40 * 24).round().reshape(24, 40)
    for mode in ("<u2", ">u2"):
        image = standard(equipped, name, Image.fromarray(ramp.astype(mode)))
        np.testing.assert_allclose(np.asarray(image)[..., 1], ramp / 257, atol=0.5)


@every_input
def test_values_that_rounding_put_outside_the_range_are_clipped(equipped: Any, name: str) -> None:
    """A value below 0 would tell diffusers that all are in [-1, 1]."""
    outside = np.asarray(GIVEN) / 255.0
    outside[0, 0, :2] = -1e-7, 1.0 + 1e-7
    image = np.asarray(standard(equipped, name, outside), float)
    assert (image.min(), image.max()) == (0.0, 255.0 if name == "ip_adapter_image" else 1.0)
    assert outside.min() < 0.0  # the caller's own array stays as it is


@every_input
def test_every_form_of_an_image_is_taken_alike(equipped: Any, name: str) -> None:
    array = np.asarray(GIVEN) / 255.0
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = taken(equipped, name, GIVEN)
    for image in (array, tensor[None], [as_a_camera_stores(GIVEN)]):
        torch.testing.assert_close(taken(equipped, name, image), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_takes_several_images_in_any_form(equipped: Any) -> None:
    other = tiny_image(3, (16, 32))
    array, tensor = np.asarray(GIVEN) / 255.0, torch.from_numpy(np.asarray(other) / 255.0).permute(2, 0, 1)
    expected = torch.cat([taken(equipped, "ip_adapter_image", image) for image in (GIVEN, other)])
    embeds = taken(equipped, "ip_adapter_image", [[array, tensor]])
    torch.testing.assert_close(embeds.flatten(0, -2), expected.flatten(0, -2))


def kinds_of_mask() -> dict[str, Any]:
    hole, black = torch.from_numpy(HOLE), Image.new("L", MASK.size)
    return {
        **{mode: MASK.convert(mode) for mode in ("1", "P", "RGB")},
        "opaque": Image.merge("LA", (MASK, Image.new("L", MASK.size, 255))),
        "transparent": Image.merge("RGBA", [black] * 3 + [MASK]),
        "I;16": Image.fromarray(np.asarray(MASK).astype(np.uint16) * 200),  # PIL's own conversion clips it
        "turned": as_a_camera_stores(MASK),
        "list": [MASK],
        "booleans": HOLE > 0.5,
        "h-w": HOLE,
        "1-h-w-1": HOLE[None, ..., None],
        "tensor 1-h-w": hole[None],
        "list of tensors": [hole[None]],
    }


def test_one_mask_may_be_given_as_any_kind(pipe: Any) -> None:
    picture = {"image": IMAGE, "num_inference_steps": 1}
    expected = run(pipe, **picture, mask_image=MASK)
    for kind, mask in kinds_of_mask().items():
        assert torch.equal(run(pipe, **picture, mask_image=mask), expected), kind


def warnings_of(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if part in entry.getMessage()]


EMPTY_MASKS: dict[str, Any] = {
    "PIL": Image.new("L", (32, 32), 100),
    "transparent": Image.merge("LA", (Image.new("L", (32, 32), 255), MASK.point(lambda value: value // 3))),
    "array": HOLE * 0.4,
    "list of tensors": [torch.from_numpy(HOLE * 0.4)],
}


@pytest.mark.parametrize("kind", EMPTY_MASKS)
def test_a_mask_that_paints_nothing_is_warned_of_once(pipe: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = {"image": IMAGE, "mask_image": EMPTY_MASKS[kind], "num_inference_steps": 1}
    run(pipe, **inputs)
    (warning,) = warnings_of(caplog, "paints nothing")
    assert warning.startswith("mask_image paints nothing: its highest value is 0.")
    caplog.clear()
    run(pipe, **inputs, soft_mask=True)
    run(pipe, **{**inputs, "mask_image": MASK})
    assert not warnings_of(caplog, "paints nothing")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"height": 40}, "image is 50x35, not a multiple of 8; it is resized to 48x40."),
        ({"height": 32, "width": 48}, None),
    ],
)
def test_a_changed_size_is_warned_of(
    pipe: Any, sizes: dict[str, int], text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for image in (tiny_image(1, (50, 35)), np.asarray(tiny_image(1, (50, 35))) / 255.0):
        for task in ({"strength": 0.3}, {"mask_image": np.ones((35, 50))}):
            caplog.clear()
            run(pipe, image=image, **task, **sizes, num_inference_steps=1)
            found = warnings_of(caplog, "resized")
            assert [entry[: len(text or "")] for entry in found] == ([] if text is None else [text])


@pytest.mark.parametrize(("size", "squeezed"), [((64, 64), False), ((64, 60), False), ((64, 32), True)])
def test_a_control_image_that_is_squeezed_is_warned_of(
    equipped: Any, size: tuple[int, int], squeezed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"control_image": tiny_image(1, size), "ip_adapter_image": IMAGE}
    run(equipped, **images, num_inference_steps=1)
    warnings = warnings_of(caplog, f"control_image is {size[0]}x{size[1]}, the output 32x32")
    assert len(warnings) == squeezed
