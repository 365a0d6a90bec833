"""What callers get wrong in the images and masks they give: one clear line, before any model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perflow_blocks.blocks.check_images import check_kind
from perflow_blocks.testing.tiny import tiny_mask, tiny_picture
from tests.conftest import make_pipeline, run, watch_models

pytestmark = pytest.mark.behaviour

IMAGE, MASK = tiny_picture(1), tiny_mask()
BYTES = np.asarray(IMAGE)
ARRAY = BYTES / 255.0
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1).float()
HOLE = np.asarray(MASK) / 255.0
CROP = {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": 4, "output_type": "pil"}

MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"image": BYTES}, "image", "uint8"),
    ({"image": torch.from_numpy(BYTES.copy()).permute(2, 0, 1)}, "image", "uint8"),
    ({"image": [ARRAY, BYTES]}, "image", "uint8"),
    ({"image": BYTES.astype(np.int64)}, "image", "int64"),
    ({"image": IMAGE, "mask_image": np.asarray(MASK)}, "mask_image", "uint8"),
    ({"image": IMAGE, "mask_image": HOLE > 0.5}, "mask_image", "bool"),
    ({"image": IMAGE, "mask_image": torch.ones(32, 32, dtype=torch.bool)}, "mask_image", "bool"),
    *[
        ({"image": IMAGE.convert("RGBA").convert(mode)}, 'image.convert("RGB")', f"mode {mode}")
        for mode in ("L", "LA", "P", "RGBA", "1")
    ],
    ({"image": [IMAGE, IMAGE.convert("L")]}, "image", "mode L"),
    ({"image": HOLE}, "image", "(32, 32)"),
    ({"image": ARRAY[None, ..., :1]}, "image", "(1, 32, 32, 1)"),
    ({"image": ARRAY.transpose(2, 0, 1)}, "image", "(3, 32, 32)"),
    ({"image": TENSOR.permute(1, 2, 0)}, "image", "(32, 32, 3)"),
    ({"image": TENSOR[:1]}, "image", "(1, 32, 32)"),
    ({"image": TENSOR[0]}, "image", "(32, 32)"),
    ({"image": [TENSOR.expand(2, -1, -1, -1)]}, "image", "(2, 3, 32, 32)"),
    ({"image": np.array(0.5)}, "image", "()"),
    ({"image": [IMAGE, ARRAY]}, "image", "several kinds"),
    ({"image": [ARRAY, ARRAY[:16]]}, "image", "several kinds"),
    ({"image": (IMAGE, IMAGE)}, "image", "tuple"),
    ({"image": IMAGE, "mask_image": (MASK, MASK)}, "mask_image", "tuple"),
    ({"image": IMAGE, "mask_image": ARRAY}, "mask_image", "(32, 32, 3)"),
    ({"image": IMAGE, "mask_image": ARRAY[None]}, "mask_image", "(1, 32, 32, 3)"),
    ({"image": IMAGE, "mask_image": TENSOR[None]}, "mask_image", "(1, 3, 32, 32)"),
    ({"image": IMAGE, "mask_image": [HOLE[None]]}, "mask_image", "(1, 32, 32)"),
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
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipeline()


@pytest.mark.parametrize(("inputs", "name", "value"), MISTAKES, ids=[f"{n}-{v}" for _, n, v in MISTAKES])
def test_an_error_names_the_argument_and_its_value_before_a_model_runs(
    pipe: Any, inputs: dict[str, Any], name: str, value: str
) -> None:
    ran, stop = watch_models(pipe)
    with pytest.raises(ValueError) as caught:
        pipe(**{"prompt": "a star", "num_inference_steps": 4, **inputs})
    stop()
    assert ran == []
    assert name in str(caught.value)
    assert value in str(caught.value)
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
    picture = {"image": IMAGE, "num_inference_steps": 1}
    expected = run(pipe, **picture, mask_image=MASK)
    assert torch.equal(run(pipe, **picture, mask_image=kinds_of_mask()[kind]), expected)


@pytest.mark.parametrize("image", [ARRAY, ARRAY[None], [ARRAY], TENSOR, TENSOR[None], [TENSOR], [TENSOR[None]]])
def test_one_image_may_be_given_as_any_kind(pipe: Any, image: Any) -> None:
    results = [run(pipe, image=one, num_inference_steps=1, strength=0.3) for one in (IMAGE, image)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_control_images_may_be_of_any_mode() -> None:
    for mode in ("L", "P", "RGBA"):
        check_kind("control_image", IMAGE.convert(mode), any_mode=True)
    check_kind("control_image", [TENSOR, TENSOR], any_mode=True)
    for image, value in ((BYTES, "uint8"), (HOLE, r"\(32, 32\)")):
        with pytest.raises(ValueError, match=f"control_image .*{value}"):
            check_kind("control_image", image, any_mode=True)
