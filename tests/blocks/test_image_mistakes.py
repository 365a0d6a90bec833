"""What callers get wrong in the images and masks they give: one clear line, before any model runs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from perflow_blocks.testing.tiny import load_tiny_ip_adapter, tiny_controlnet, tiny_mask, tiny_picture
from tests.blocks.conftest import as_a_camera_stores
from tests.conftest import make_pipeline, refusal, run

pytestmark = pytest.mark.behaviour

IMAGE, MASK = tiny_picture(1), tiny_mask()
BYTES = np.asarray(IMAGE)
ARRAY = BYTES / 255.0
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1).float()
HOLE = np.asarray(MASK) / 255.0
CROP = {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": 4, "output_type": "pil"}

MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"image": torch.from_numpy(BYTES.copy()).permute(2, 0, 1)}, "image", "uint8"),
    ({"image": [ARRAY, BYTES]}, "image", "uint8"),
    ({"image": BYTES.astype(np.int64)}, "image", "int64"),
    ({"image": IMAGE, "mask_image": np.asarray(MASK)}, "mask_image", "uint8"),
    ({"image": IMAGE, "mask_image": np.eye(32, dtype=np.uint8)}, "uint8", 'mask_image.astype("float32")'),
    ({"image": IMAGE, "mask_image": torch.eye(32, dtype=torch.int64)}, "int64", "mask_image.float()"),
    ({"image": IMAGE, "mask_image": HOLE > 0.5, "soft_mask": "yes"}, "soft_mask", "'yes' must be True, False or None"),
    ({"image": tiny_picture(1, (100, 5))}, "image is 100x5", "at least 8 pixels"),
    ({"image": IMAGE, "height": 36}, "height=36 must be a multiple of the image processor's factor 8", "pass 32"),
    ({"image": ARRAY[None, ..., :1]}, "image", "(1, 32, 32, 1)"),
    ({"image": ARRAY.transpose(2, 0, 1)}, "image", "(3, 32, 32)"),
    ({"image": TENSOR.permute(1, 2, 0)}, "image", "(32, 32, 3)"),
    ({"image": TENSOR[:1]}, "image", "(1, 32, 32)"),
    ({"image": TENSOR[0]}, "image", "(32, 32)"),
    ({"image": [TENSOR.expand(2, -1, -1, -1)]}, "image", "(2, 3, 32, 32)"),
    ({"image": np.array(0.5)}, "image", "()"),
    ({"image": [IMAGE, ARRAY]}, "image", "several kinds"),
    ({"image": [ARRAY, ARRAY[:16]]}, "image", "several kinds"),
    ({"image": [IMAGE, tiny_picture(1, (64, 32))]}, "image", "a PIL image of 32x32, a PIL image of 64x32"),
    ({"image": IMAGE, "mask_image": [MASK, tiny_mask((64, 32))]}, "mask_image", "a PIL image of 64x32"),
    ({"image": IMAGE, "mask_image": 255 * HOLE}, "mask_image", "to 255"),
    ({"image": IMAGE, "mask_image": MASK.convert("F")}, "mask_image", "mode F"),
    ({"image_latents": torch.zeros(1, 4, 16, 16), "mask": torch.full((1, 1, 16, 16), 2.0)}, "mask", "from 2 to 2"),
    ({"soft_mask": True}, "soft_mask", "mask_image"),
    ({"image": (IMAGE, IMAGE)}, "image", "tuple"),
    ({"image": IMAGE, "mask_image": (MASK, MASK)}, "mask_image", "tuple"),
    ({"image": IMAGE, "mask_image": ARRAY}, "mask_image", "(32, 32, 3)"),
    ({"image": IMAGE, "mask_image": ARRAY[None]}, "mask_image", "(1, 32, 32, 3)"),
    ({"image": IMAGE, "mask_image": TENSOR[None]}, "mask_image", "(1, 3, 32, 32)"),
    ({"image": IMAGE, "mask_image": [HOLE[None].repeat(2, 0)]}, "mask_image", "(2, 32, 32)"),
    ({"image": IMAGE, "mask_image": np.array(0.5)}, "mask_image", "()"),
    ({"image": IMAGE, "mask_image": np.stack([HOLE] * 2)}, "mask_image", "2"),
    ({"image": IMAGE, "mask_image": torch.ones(2, 32, 32)}, "mask_image", "2"),
    ({"image": IMAGE, "mask_image": HOLE[None, :16]}, "mask_image", "32x16"),
    ({**CROP, "output_type": "np"}, "padding_mask_crop", "output_type='np'"),
    ({**CROP, "output_type": "latent"}, "padding_mask_crop", "output_type='latent'"),
    ({**CROP, "padding_mask_crop": -1}, "padding_mask_crop", "-1"),
    ({**CROP, "padding_mask_crop": 4.0}, "padding_mask_crop", "4.0"),
    ({**CROP, "padding_mask_crop": True}, "padding_mask_crop", "True"),
    ({**CROP, "mask_image": Image.new("L", (32, 32))}, "mask_image", "black"),
    ({**CROP, "mask_image": HOLE}, "mask_image", "PIL"),
    ({"padding_mask_crop": 4}, "padding_mask_crop", "pass image and mask_image, or leave padding_mask_crop out"),
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipeline()


@pytest.fixture(scope="module")
def equipped() -> Any:
    """With a ControlNet and an IP-Adapter."""
    pipe = make_pipeline(controlnet=tiny_controlnet())
    load_tiny_ip_adapter(pipe)
    return pipe


@pytest.mark.parametrize(("inputs", "name", "value"), MISTAKES, ids=[f"{n}-{v}" for _, n, v in MISTAKES])
def test_an_error_names_the_argument_and_its_value_before_a_model_runs(
    pipe: Any, inputs: dict[str, Any], name: str, value: str
) -> None:
    text = refusal(pipe, **inputs)
    assert name in text
    assert value in text


def bad_forms() -> dict[str, tuple[Any, str]]:
    """What is refused in every image input, and a part of the message."""
    transparent = IMAGE.convert("RGBA")
    transparent.putalpha(MASK)
    return {
        "bytes": (BYTES, "holds uint8; pass values in [0, 1], {} / 255"),
        "to 255": (BYTES.astype("float32"), "to 255, not in [0, 1]; pass {} / 255"),
        "tensor to 255": (255 * TENSOR, "to 255, not in [0, 1]; pass {} / 255"),
        "from -1": (2 * ARRAY - 1, "({} + 1) / 2 if its range is [-1, 1]"),
        "above 1": ([ARRAY + 0.1], "pass {}.clip(0, 1)"),
        "NaN": (TENSOR * float("nan"), "from nan to nan, not in [0, 1]; pass finite values"),
        "text": (BYTES.astype(str), "holds <U3; pass floats in [0, 1], booleans, or a PIL image"),
        "objects": (BYTES.astype(object), "holds object; pass floats in [0, 1], booleans, or a PIL image"),
        "grey": (HOLE, "(32, 32)"),
        "empty": (ARRAY[:0], "(0, 32, 3), without a pixel"),
        "no image": ([], "{} is an empty list"),
        **{
            mode: (transparent.convert(mode), "is transparent in places; give it a background")
            for mode in ("RGBA", "LA", "P")
        },
        **{mode: (IMAGE.convert(mode), f"mode {mode}, which has no fixed range") for mode in ("I", "F")},
    }


@pytest.mark.parametrize("form", bad_forms())
@pytest.mark.parametrize("name", ["image", "control_image", "ip_adapter_image"])
def test_every_image_input_refuses_the_same_forms(equipped: Any, name: str, form: str) -> None:
    image, text = bad_forms()[form]
    nested = [image] if name == "ip_adapter_image" and isinstance(image, list) else image
    assert text.format(*[name] * 2) in refusal(equipped, **{name: nested})


def kinds_of_mask() -> dict[str, Any]:
    hole = torch.from_numpy(HOLE)
    white = Image.merge("LA", (MASK, Image.new("L", MASK.size, 255)))
    soft_edge = MASK.copy()
    soft_edge.paste(100, (0, 7, 32, 8))
    return {
        **{mode: MASK.convert(mode) for mode in ("1", "P", "RGB")},
        "LA": white,
        "RGBA": white.convert("RGBA"),
        "transparent": Image.merge("RGBA", [Image.new("L", MASK.size)] * 3 + [MASK]),
        "transparent LA": Image.merge("LA", [Image.new("L", MASK.size), MASK]),
        "white LA with a soft edge": Image.merge("LA", [soft_edge.point(lambda value: 255 * (value > 0)), soft_edge]),
        "I;16": Image.fromarray(np.asarray(MASK).astype(np.uint16) * 200),  # PIL's own conversion clips it
        "turned": as_a_camera_stores(MASK),
        "list": [MASK],
        **{"booleans": HOLE > 0.5, "tensor of booleans": hole > 0.5},
        **{"h-w": HOLE, "h-w-1": HOLE[..., None], "1-h-w": HOLE[None], "1-h-w-1": HOLE[None, ..., None]},
        **{"tensor h-w": hole, "tensor 1-h-w": hole[None], "tensor 1-1-h-w": hole[None, None]},
        **{
            "list h-w": [HOLE],
            "list h-w-1": [HOLE[..., None]],
            "list 1-h-w": [HOLE[None]],
            "list tensor 1-h-w": [hole[None]],
        },
    }


@pytest.mark.parametrize("kind", kinds_of_mask())
def test_one_mask_may_be_given_as_any_kind(pipe: Any, kind: str) -> None:
    picture = {"image": IMAGE, "num_inference_steps": 1}
    expected = run(pipe, **picture, mask_image=MASK)
    assert torch.equal(run(pipe, **picture, mask_image=kinds_of_mask()[kind]), expected)


@pytest.mark.parametrize("luminance", [MASK, ImageOps.invert(MASK)])
def test_a_mask_of_which_transparency_and_luminance_disagree_is_refused(pipe: Any, luminance: Image.Image) -> None:
    alpha = MASK.copy() if luminance is not MASK else Image.new("L", MASK.size, 255)
    alpha.putpixel((0, 0), 254)
    mask_image = Image.merge("LA", (luminance, alpha)).convert("RGBA")
    text = refusal(pipe, image=IMAGE, mask_image=mask_image)
    remedies = re.findall(r"mask_image\.convert\S*\)", text)
    assert [eval(remedy, {"mask_image": mask_image}) for remedy in remedies] == [luminance, alpha]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_the_advice_for_a_transparent_image_is_taken(pipe: Any, mode: str) -> None:
    image = IMAGE.convert("RGBA")
    image.putalpha(MASK)
    image = image.convert(mode)
    advice = re.search(r"Image\.alpha_composite.*\)", refusal(pipe, image=image))
    assert advice is not None
    run(pipe, image=eval(advice[0]), num_inference_steps=1)


@pytest.mark.parametrize("image", [ARRAY > 0.5, TENSOR > 0.5])
def test_booleans_are_black_and_white(pipe: Any, image: Any) -> None:
    results = [run(pipe, image=one, num_inference_steps=1, strength=0.3) for one in (image, image * 1.0)]
    assert torch.equal(*results)


@pytest.mark.parametrize("image", [ARRAY, ARRAY[None], [ARRAY], TENSOR, TENSOR[None], [TENSOR], [TENSOR[None]]])
def test_one_image_may_be_given_as_any_kind(pipe: Any, image: Any) -> None:
    results = [run(pipe, image=one, num_inference_steps=1, strength=0.3) for one in (IMAGE, image)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def warnings_of(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if part in entry.getMessage()]


GREY = HOLE * 0.4
EMPTY_MASKS: dict[str, Any] = {
    "PIL": Image.new("L", (32, 32), 100),
    "transparent": Image.merge("LA", (Image.new("L", (32, 32), 255), MASK.point(lambda value: value // 3))),
    "array": GREY,
    "batch": GREY[None, ..., None],
    "tensor": torch.from_numpy(GREY),
    "list": [GREY],
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


def test_each_mask_counts_at_the_latents_size_too(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.zeros(2, 1, 16, 16)
    mask[0] = 0.1
    latents = {"prompt": ["a star"] * 2, "image_latents": torch.zeros(2, 4, 16, 16), "num_inference_steps": 1}
    run(pipe, **latents, mask=mask)
    assert len(warnings_of(caplog, "mask[1] paints nothing: its highest value is 0, ")) == 1
    assert len(warnings_of(caplog, "paints nothing")) == 1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "image is 50x35, not a multiple of 8; it is resized to 48x32."),
        ({"height": 40}, "image is 50x35, not a multiple of 8; it is resized to 48x40."),
        ({"height": 32, "width": 48}, None),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_a_changed_size_is_warned_of(
    pipe: Any, sizes: dict[str, int], text: str | None, array: bool, caplog: pytest.LogCaptureFixture
) -> None:
    image: Any = tiny_picture(1, (50, 35))
    image = np.asarray(image) / 255.0 if array else image
    for task in ({"strength": 0.3}, {"mask_image": np.ones((35, 50))}):
        caplog.clear()
        run(pipe, image=image, **task, **sizes, num_inference_steps=1)
        found = warnings_of(caplog, "resized")
        assert [entry[: len(text or "")] for entry in found] == ([] if text is None else [text])


@pytest.mark.parametrize(
    ("size", "squeezed"), [((32, 32), False), ((64, 64), False), ((64, 60), False), ((64, 32), True)]
)
def test_a_control_image_that_is_squeezed_is_warned_of(
    equipped: Any, size: tuple[int, int], squeezed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"control_image": tiny_picture(1, size), "ip_adapter_image": IMAGE}
    run(equipped, **images, num_inference_steps=1)
    warnings = warnings_of(caplog, f"control_image is {size[0]}x{size[1]}, the output 32x32")
    assert len(warnings) == squeezed
