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


def as_batch(image: Any, mask: bool = False) -> Any:
    """An array or tensor of one image or several as a tensor (n, channels, height, width); anything else as it is.

    Without a batch's axis, arrays are (height, width, channels) and tensors (channels, height, width). With `mask`
    they may also be (height, width) or (n, height, width), as in diffusers.
    """
    if isinstance(image, np.ndarray):
        last = image.ndim == 4 or (image.ndim == 3 and (not mask or image.shape[-1] == 1))
        image = torch.tensor(np.moveaxis(image, -1, -3) if last else image)
    if not isinstance(image, Tensor) or image.ndim == 4:
        return image
    if image.ndim == 2:
        return image[None, None]
    return image[:, None] if mask else image[None]


def pil_images(image: Image.Image | Tensor) -> list[Image.Image]:
    """PIL images of one PIL image, or of a tensor (n, channels, height, width) in [0, 1], rounded to 8 bits."""
    if isinstance(image, Image.Image):
        return [image]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image))


def mask_processor(components: Any, block_state: Any) -> VaeImageProcessor:
    """The pipeline's processor of masks, or with `soft_mask` one like it that keeps grey values."""
    processor = components.mask_processor
    return VaeImageProcessor.from_config(processor.config, do_binarize=False) if block_state.soft_mask else processor


def require_count(name: str, count: int, prompts: int, images: int) -> None:
    """Refuses a `count` other than 1, the number of prompts, or the number of images."""
    if count not in (1, prompts, images):
        allowed = " or ".join(str(number) for number in sorted({1, prompts, images}))
        raise ValueError(f"{name} has {count} entries for {prompts} prompts and {images} images; pass {allowed}.")


def count_images(image: Image.Image | list[Any] | Tensor) -> int:
    """How many images a PIL image, a list or a batch holds."""
    return 1 if isinstance(image, Image.Image) else len(image)


def repeat_images(image: Any, count: int) -> Any:
    """`count` images, copies of one side by side, of a PIL image, a list or a batch that divide `count`."""
    times = count // count_images(image)
    if times == 1:
        return image
    if isinstance(image, Tensor):
        return image.repeat_interleave(times, dim=0)
    return [one for one in (image if isinstance(image, list) else [image]) for _ in range(times)]


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of an image in any form, or of the first of a list."""
    first = as_batch(image[0] if isinstance(image, list) else image)
    return (first.height, first.width) if isinstance(first, Image.Image) else tuple(first.shape[-2:])
