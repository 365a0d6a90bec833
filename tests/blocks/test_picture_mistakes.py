"""What callers get wrong in the pictures and masks they give: one clear line, before any model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perflow_blocks.blocks.checks.pictures import check_kind
from perflow_blocks.testing.tiny import tiny_mask, tiny_picture
from tests.conftest import make_pipeline, run, watch_models

pytestmark = pytest.mark.behaviour

PICTURE, MASK = tiny_picture(1), tiny_mask()
BYTES = np.asarray(PICTURE)
ARRAY = BYTES / 255.0
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1).float()
HOLE = np.asarray(MASK) / 255.0
CROP = {"image": PICTURE, "mask_image": MASK, "padding_mask_crop": 4, "output_type": "pil"}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image": BYTES}, "image holds uint8; pass values in .0, 1., image / 255, or a PIL picture"),
    ({"image": torch.from_numpy(BYTES.copy()).permute(2, 0, 1)}, "image holds uint8"),
    ({"image": [ARRAY, BYTES]}, "image holds uint8"),
    ({"image": BYTES.astype(np.int64)}, "image holds int64"),
    ({"image": PICTURE, "mask_image": np.asarray(MASK)}, "mask_image holds uint8; .* mask_image / 255"),
    ({"image": PICTURE, "mask_image": HOLE > 0.5}, "mask_image holds bool; pass values in .0, 1., mask_image . 1.0"),
    ({"image": PICTURE, "mask_image": torch.ones(32, 32, dtype=torch.bool)}, "mask_image holds bool"),
    *[
        ({"image": PICTURE.convert("RGBA").convert(mode)}, f"PIL picture of mode {mode}; pass image.convert..RGB..")
        for mode in ("L", "LA", "P", "RGBA", "1")
    ],
    ({"image": [PICTURE, PICTURE.convert("L")]}, "image is a PIL picture of mode L"),
    ({"image": HOLE}, r"image is an array of shape \(32, 32\); pass \(height, width, 3\)"),
    ({"image": ARRAY[None, ..., :1]}, r"image is an array of shape \(1, 32, 32, 1\)"),
    ({"image": ARRAY.transpose(2, 0, 1)}, r"image is an array of shape \(3, 32, 32\)"),
    ({"image": TENSOR.permute(1, 2, 0)}, r"image is of shape \(32, 32, 3\); pass \(3, height, width\)"),
    ({"image": TENSOR[:1]}, r"image is of shape \(1, 32, 32\)"),
    ({"image": TENSOR[0]}, r"image is of shape \(32, 32\)"),
    ({"image": [TENSOR.expand(2, -1, -1, -1)]}, r"image is of shape \(2, 3, 32, 32\)"),
    ({"image": np.array(0.5)}, r"image is an array of shape \(\)"),
    ({"image": [PICTURE, ARRAY]}, "image holds pictures of several kinds or shapes"),
    ({"image": [ARRAY, ARRAY[:16]]}, "image holds pictures of several kinds or shapes"),
    ({"image": (PICTURE, PICTURE)}, "image is a tuple; pass a list"),
    ({"image": PICTURE, "mask_image": (MASK, MASK)}, "mask_image is a tuple; pass a list"),
    ({"image": PICTURE, "mask_image": ARRAY}, r"mask_image is an array of shape \(32, 32, 3\); pass one channel"),
    ({"image": PICTURE, "mask_image": ARRAY[None]}, r"mask_image is an array of shape \(1, 32, 32, 3\)"),
    ({"image": PICTURE, "mask_image": TENSOR[None]}, r"mask_image is of shape \(1, 3, 32, 32\)"),
    ({"image": PICTURE, "mask_image": [HOLE[None]]}, r"mask_image is an array of shape \(1, 32, 32\)"),
    ({"image": PICTURE, "mask_image": np.array(0.5)}, r"mask_image is an array of shape \(\)"),
    ({"image": PICTURE, "mask_image": np.stack([HOLE] * 2)}, "mask_image holds 2 pictures for 1 prompts"),
    ({"image": PICTURE, "mask_image": torch.ones(2, 32, 32)}, "mask_image holds 2 pictures for 1 prompts"),
    ({"image": PICTURE, "mask_image": HOLE[None, :16]}, "mask_image is 32x16, image 32x32"),
    ({**CROP, "output_type": "np"}, "padding_mask_crop lays PIL pictures .* not output_type=.np.; pass"),
    ({**CROP, "output_type": "latent"}, "padding_mask_crop lays PIL pictures"),
    ({**CROP, "padding_mask_crop": -1}, "padding_mask_crop=-1 is no whole number of at least 0"),
    ({**CROP, "padding_mask_crop": 4.0}, "padding_mask_crop=4.0 is no whole number"),
    ({**CROP, "padding_mask_crop": True}, "padding_mask_crop=True is no whole number"),
    ({**CROP, "mask_image": Image.new("L", (32, 32))}, "mask_image is all black; paint some of it white"),
    ({**CROP, "mask_image": HOLE}, "padding_mask_crop needs image and mask_image as one PIL picture each"),
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipeline()


@pytest.mark.parametrize(("inputs", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_mistake(pipe: Any, inputs: dict[str, Any], message: str) -> None:
    ran, stop = watch_models(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"prompt": "a star", "num_inference_steps": 4, **inputs})
    stop()
    assert ran == []
    assert "\n" not in str(caught.value)


def kinds_of_mask() -> dict[str, Any]:
    hole = torch.from_numpy(HOLE)
    white = Image.merge("LA", (MASK, Image.new("L", MASK.size, 255)))
    return {
        **{mode: MASK.convert(mode) for mode in ("1", "P", "RGB")},
        "LA": white,
        "RGBA": white.convert("RGBA"),
        "list": [MASK],
        **{"h-w": HOLE, "h-w-1": HOLE[..., None], "1-h-w": HOLE[None], "1-h-w-1": HOLE[None, ..., None]},
        **{"tensor h-w": hole, "tensor 1-h-w": hole[None], "tensor 1-1-h-w": hole[None, None]},
        **{"list h-w": [HOLE], "list h-w-1": [HOLE[..., None]], "list tensor 1-h-w": [hole[None]]},
    }


@pytest.mark.parametrize("kind", kinds_of_mask())
def test_one_mask_may_be_given_as_any_kind(pipe: Any, kind: str) -> None:
    picture = {"image": PICTURE, "num_inference_steps": 1}
    expected = run(pipe, **picture, mask_image=MASK)
    assert torch.equal(run(pipe, **picture, mask_image=kinds_of_mask()[kind]), expected)


@pytest.mark.parametrize("image", [ARRAY, ARRAY[None], [ARRAY], TENSOR, TENSOR[None], [TENSOR], [TENSOR[None]]])
def test_one_picture_may_be_given_as_any_kind(pipe: Any, image: Any) -> None:
    results = [run(pipe, image=one, num_inference_steps=1, strength=0.3) for one in (PICTURE, image)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_control_pictures_may_be_of_any_mode() -> None:
    for mode in ("L", "P", "RGBA"):
        check_kind("control_image", PICTURE.convert(mode), channels=None, any_mode=True)
    check_kind("control_image", [TENSOR, TENSOR], channels=None, any_mode=True)
    with pytest.raises(ValueError, match="control_image holds uint8"):
        check_kind("control_image", BYTES, channels=None, any_mode=True)
    with pytest.raises(ValueError, match="control_image is an array of shape"):
        check_kind("control_image", HOLE, channels=None, any_mode=True)
