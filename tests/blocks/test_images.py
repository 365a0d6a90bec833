"""How images are counted, sized and matched to prompts, whatever they are given as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VaeImageProcessor
from PIL import Image

from perflow_blocks.blocks.before_denoise import one_for_each_image
from perflow_blocks.blocks.images import (
    count_images,
    image_size,
    repeat_images,
)

PIL_IMAGE = Image.new("RGB", (6, 4))
TWO_PIL = [PIL_IMAGE, Image.new("RGB", (6, 4), "white")]


@pytest.mark.parametrize(
    ("image", "count", "size"),
    [
        (PIL_IMAGE, 1, (4, 6)),
        (TWO_PIL, 2, (4, 6)),
        (np.zeros((4, 6, 3)), 1, (4, 6)),
        (np.zeros((4, 6)), 1, (4, 6)),
        (np.zeros((2, 4, 6, 3)), 2, (4, 6)),
        (torch.zeros(3, 4, 6), 1, (4, 6)),
        (torch.zeros(2, 3, 4, 6), 2, (4, 6)),
        ([np.zeros((4, 6, 3))] * 3, 3, (4, 6)),
    ],
)
def test_count_and_size(image: Any, count: int, size: tuple[int, int]) -> None:
    assert count_images(image) == count
    assert image_size(image[0] if isinstance(image, list) else image) == size


@pytest.mark.parametrize(
    ("mask", "count", "size"),
    [
        (Image.new("L", (6, 4)), 1, (4, 6)),
        (np.zeros((4, 6)), 1, (4, 6)),
        (np.zeros((4, 6, 1)), 1, (4, 6)),
        (np.zeros((1, 4, 6)), 1, (4, 6)),
        (np.zeros((2, 4, 6)), 2, (4, 6)),
        (np.zeros((2, 4, 6, 1)), 2, (4, 6)),
        (torch.zeros(4, 6), 1, (4, 6)),
        (torch.zeros(1, 4, 6), 1, (4, 6)),
        (torch.zeros(2, 4, 6), 2, (4, 6)),
        (torch.zeros(2, 1, 4, 6), 2, (4, 6)),
    ],
)
def test_masks_are_counted_sized_and_repeated_as_diffusers_reads_them(
    mask: Any, count: int, size: tuple[int, int]
) -> None:
    processor = VaeImageProcessor(
        do_normalize=False, do_binarize=True, do_convert_grayscale=True, do_resize=isinstance(mask, Image.Image)
    )
    size = (8, 8) if isinstance(mask, Image.Image) else size
    mask = mask.resize((8, 8)) if isinstance(mask, Image.Image) else mask
    assert processor.preprocess(mask).shape == (count, 1, *size)
    assert count_images(mask, mask=True) == count
    assert image_size(mask, mask=True) == size
    repeated = repeat_images(mask, 4, mask=True)
    assert processor.preprocess(repeated).shape == (4, 1, *size)


def test_repeated_masks_stand_side_by_side() -> None:
    numbers = np.arange(2.0)[:, None, None] * np.ones((2, 4, 6))
    for masks in (numbers, torch.from_numpy(numbers)):
        assert repeat_images(masks, 4, mask=True)[:, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_repeated_images_stand_side_by_side() -> None:
    assert repeat_images(TWO_PIL, 4) == [TWO_PIL[0], TWO_PIL[0], TWO_PIL[1], TWO_PIL[1]]
    assert repeat_images(PIL_IMAGE, 2) == [PIL_IMAGE, PIL_IMAGE]
    numbers = np.arange(2.0)[:, None, None, None] * np.ones((2, 4, 6, 3))
    assert repeat_images(numbers, 4)[:, 0, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    tensors = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 6)
    assert repeat_images(tensors, 4)[:, 0, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert repeat_images(np.zeros((4, 6, 3)), 2).shape == (2, 4, 6, 3)
    assert repeat_images(torch.zeros(3, 4, 6), 2).shape == (2, 3, 4, 6)


def test_rows_are_matched_to_prompts_in_order() -> None:
    rows = torch.arange(2.0)[:, None]
    assert one_for_each_image("rows", rows, 2, 2).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert one_for_each_image("rows", rows[1:], 2, 2).flatten().tolist() == [1.0] * 4
    assert one_for_each_image("rows", rows, 1, 2) is rows
    with pytest.raises(ValueError, match="rows has 2 entries for 3 prompts"):
        one_for_each_image("rows", rows, 3, 1)
