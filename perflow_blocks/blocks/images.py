"""Images in every form that a call takes them: PIL, arrays, tensors, lists; counted, measured and repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def require_count(name: str, count: int, prompts: int, images: int) -> None:
    """Refuses a `count` other than 1, the number of prompts, or the number of images."""
    if count not in (1, prompts, images):
        allowed = " or ".join(str(number) for number in sorted({1, prompts, images}))
        raise ValueError(f"{name} has {count} entries for {prompts} prompts and {images} images; pass {allowed}.")


def count_images(image: Any, mask: bool = False) -> int:
    """How many images an `image` argument holds: a list, a batched array or tensor, or one image.

    With `mask`, an array or tensor (n, height, width) is a batch, as in diffusers.
    """
    if isinstance(image, list):
        return len(image)
    return int(image.shape[0]) if _is_batch(image, mask) else 1


def repeat_images(image: Any, count: int, mask: bool = False) -> Any:
    """`image` with `count` images, copies of one side by side; `count` is a multiple of how many it holds."""
    times = count // count_images(image, mask)
    if times == 1:
        return image
    if isinstance(image, list):
        return [entry for entry in image for _ in range(times)]
    if isinstance(image, Tensor):
        return torch.repeat_interleave(image if _is_batch(image, mask) else image[None], times, dim=0)
    if isinstance(image, np.ndarray):
        return np.repeat(image if _is_batch(image, mask) else image[None], times, axis=0)
    return [image] * times


def image_size(image: Any, mask: bool = False) -> tuple[int, int]:
    """Height and width of a PIL image, an array (..., height, width, channels), or a tensor (..., height, width).

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
