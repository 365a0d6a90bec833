"""How pictures, prompts and generators are matched: a batch holds the pictures of the first prompt first."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def one_for_each_picture(name: str, tensor: Tensor, prompts: int, images_per_prompt: int) -> Tensor:
    """The tensor with one row for each picture, from one row for all, one for each prompt, or one for each picture.

    Raises:
        ValueError: another number of rows.
    """
    rows, pictures = tensor.shape[0], prompts * images_per_prompt
    if rows not in (1, prompts, pictures):
        raise ValueError(
            f"{name} holds {rows} entries for {prompts} prompts; pass one for all, one for each prompt, or one "
            f"for each of the {pictures} pictures."
        )
    return tensor if rows == pictures else tensor.repeat_interleave(pictures // rows, dim=0)


def count_pictures(image: Any, mask: bool = False) -> int:
    """How many pictures an `image` argument holds: a list, a batched array or tensor, or one picture.

    Args:
        image: what was given.
        mask: whether it is a mask, of which an array or tensor (n, height, width) is a batch, as for diffusers.
    """
    if isinstance(image, list):
        return len(image)
    return int(image.shape[0]) if _is_batch(image, mask) else 1


def first_picture(image: Any) -> Any:
    """The first entry of a list, else what is given."""
    return image[0] if isinstance(image, list) else image


def repeat_pictures(image: Any, count: int, mask: bool = False) -> Any:
    """`image` with `count` pictures, each of its own repeated in place; `count` is a multiple of how many it holds."""
    times = count // count_pictures(image, mask)
    if times == 1:
        return image
    if isinstance(image, list):
        return [picture for picture in image for _ in range(times)]
    if isinstance(image, Tensor):
        return torch.repeat_interleave(image if _is_batch(image, mask) else image[None], times, dim=0)
    if isinstance(image, np.ndarray):
        return np.repeat(image if _is_batch(image, mask) else image[None], times, axis=0)
    return [image] * times


def picture_size(image: Any, mask: bool = False) -> tuple[int, int]:
    """Height and width of a PIL picture, an array (..., height, width, channels), or a tensor (..., height, width).

    With `mask` also of an array (height, width) or (n, height, width).
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    flat = image.ndim == 2 or (image.ndim == 3 and _is_batch(image, mask))
    if isinstance(image, Tensor) or flat:
        return int(image.shape[-2]), int(image.shape[-1])
    return image.shape[-3], image.shape[-2]


def _is_batch(image: Any, mask: bool) -> bool:
    if not isinstance(image, (np.ndarray, Tensor)):
        return False
    one_channel_last = isinstance(image, np.ndarray) and image.shape[-1] == 1
    return image.ndim == 4 or (mask and image.ndim == 3 and not one_channel_last)
