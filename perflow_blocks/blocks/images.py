"""Images in every form that a call takes them: PIL, arrays, tensors, lists; standardised, counted and repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

TOLERANCE = 1e-3
"""How far values may lie outside [0, 1], from rounding; they are clipped."""


def upright_rgb(name: str, image: Image.Image) -> Image.Image:
    """A PIL image of any mode in RGB, turned as its EXIF orientation says; 16-bit values are scaled to 8 bits.

    Raises:
        ValueError: the image is transparent somewhere, or its mode (I, F) does not say what white is.
    """
    image = _upright(name, image)
    alpha = _alpha(image)
    if alpha is not None and alpha.getextrema() != (255, 255):
        raise ValueError(
            f"{name} is transparent in places; give it a background: "
            f'Image.alpha_composite(Image.new("RGBA", {name}.size, "white"), {name}.convert("RGBA")).'
        )
    return image.convert("RGB")


def upright_mask(name: str, image: Image.Image) -> Image.Image:
    """A PIL mask in mode L, turned like `upright_rgb`: its transparency if that varies, else its luminance.

    Raises:
        ValueError: the image's mode (I, F) does not say what white is, or transparency and luminance are two masks.
    """
    image = _upright(name, image)
    luminance, alpha = image.convert("RGB").convert("L"), _alpha(image)
    if alpha is None or len(set(alpha.getextrema())) == 1:
        return luminance
    white, opacity = np.asarray(luminance) >= 128, np.asarray(alpha)
    # White at the edge of a shape may be half transparent.
    if white.any() and not white.all() and np.where(white, opacity == 0, opacity >= 128).any():
        raise ValueError(
            f"{name} has a transparency and a luminance that disagree on what is painted; pass "
            f'{name}.convert("RGB").convert("L") to paint what is white, or {name}.convert("RGBA").getchannel("A") to '
            "paint what is opaque."
        )
    return alpha


def _upright(name: str, image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} is a PIL image of mode {image.mode}, which has no fixed range; scale its values to 0 to 255 and "
            'pass it in mode "L", or to 0 to 65535 in mode "I;16".'
        )
    if image.mode.startswith("I;16"):  # PIL would clip it
        return Image.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8))
    return image


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def unit_range(name: str, values: Any) -> Any:
    """An array or tensor of values in [0, 1]; those that rounding put outside are clipped.

    Raises:
        ValueError: values lie outside or are not finite; the message names their range.
    """
    low, high = float(values.min()), float(values.max())
    if not (-TOLERANCE <= low and high <= 1.0 + TOLERANCE):  # NaN counts as outside
        if not np.isfinite([low, high]).all():
            remedy = "finite values"
        elif low < 0.0:
            remedy = f"({name} + 1) / 2 if its range is [-1, 1], or {name}.clip(0, 1)"
        else:
            remedy = f"{name} / 255" if high > 2.0 else f"{name}.clip(0, 1)"
        raise ValueError(f"{name} holds values from {low:g} to {high:g}, not in [0, 1]; pass {remedy}.")
    return values.clip(0.0, 1.0) if low < 0.0 or high > 1.0 else values


def pil_images(image: Image.Image | np.ndarray | Tensor) -> list[Image.Image]:
    """PIL images of one image or a batch of values in [0, 1], rounded to 8 bits."""
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, Tensor):
        image = VaeImageProcessor.pt_to_numpy(image if image.ndim == 4 else image[None])
    return VaeImageProcessor.numpy_to_pil(image)


def mask_processor(components: Any, block_state: Any) -> VaeImageProcessor:
    """The pipeline's processor of masks, or with `soft_mask` one like it that keeps grey values."""
    processor = components.mask_processor
    return VaeImageProcessor.from_config(processor.config, do_binarize=False) if block_state.soft_mask else processor


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
