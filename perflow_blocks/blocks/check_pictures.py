"""Mistakes in a request that concern given pictures: image-to-image and inpainting."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .pictures import count_pictures, picture_size


def check_pictures(request: Any, prompts: int, pictures: int, channels: int, unet_channels: int) -> None:
    """
    Args:
        request: the block state of `PeRFlowCheckInputsStep`.
        prompts: number of prompts.
        pictures: number of pictures to make.
        channels: of the latents.
        unet_channels: what the UNet takes: `channels`, or `2 channels + 1` for one made for inpainting.

    Raises:
        ValueError: pictures that do not match in kind, number or size, or what one argument needs another for.
    """
    _check_combination(request, channels, unet_channels)
    for name in ("image", "mask_image"):
        if getattr(request, name) is not None:
            _check_kind(name, getattr(request, name), channels)
            _check_count(name, count_pictures(getattr(request, name)), prompts, pictures)
    for name in ("image_latents", "mask", "masked_image_latents"):
        tensor = getattr(request, name)
        if tensor is not None:
            wanted = 1 if name == "mask" else channels
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[1] != wanted:
                raise ValueError(f"{name} is {_describe(tensor)}; pass a tensor (n, {wanted}, height/f, width/f).")
            _check_count(name, int(tensor.shape[0]), prompts, pictures)
    _check_mask_size("mask_image", request.mask_image, "image", request.image)
    _check_mask_size("mask", request.mask, "image_latents", request.image_latents)


def _check_combination(request: Any, channels: int, unet_channels: int) -> None:
    picture = request.image is not None or request.image_latents is not None
    masked = request.mask_image is not None or request.mask is not None
    if request.image is not None and request.image_latents is not None:
        raise ValueError("both image and image_latents are given; pass the one or the other.")
    if masked and not picture:
        raise ValueError("a mask is given but no picture; pass image beside mask_image.")
    if request.mask_image is not None and request.image is None:
        raise ValueError("mask_image goes with image; pass image, or mask beside image_latents.")
    if request.mask is not None and request.image_latents is None:
        raise ValueError("mask goes with image_latents; pass these, or mask_image beside image.")
    if request.denoising_start is not None and not picture:
        raise ValueError(
            "denoising_start goes on from latents of an earlier run, and none are given; pass them as image_latents."
        )
    if request.denoising_start is not None and masked and request.latents is None:
        raise ValueError(
            "denoising_start with a mask goes on from latents of an earlier run; pass them as latents beside image."
        )
    if request.padding_mask_crop is not None and not (
        isinstance(request.image, Image.Image) and isinstance(request.mask_image, Image.Image)
    ):
        raise ValueError("padding_mask_crop needs image and mask_image as one PIL picture each; pass such.")
    if unet_channels != channels and not masked:
        raise ValueError(
            f"the UNet takes {unet_channels} channels and is made for inpainting; pass image and mask_image, or load "
            f"one of {channels} channels."
        )


def _check_kind(name: str, image: Any, channels: int) -> None:
    entries = image if isinstance(image, (list, tuple)) else [image]
    if not entries:
        raise ValueError(f"{name} is an empty list; pass at least one picture.")
    wrong = [entry for entry in entries if not isinstance(entry, (Image.Image, np.ndarray, Tensor))]
    if wrong:
        raise ValueError(
            f"{name} is of type {type(wrong[0]).__name__}; pass a PIL picture, an array, a tensor, or a list."
        )
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
        raise ValueError(f"{name} has {channels} channels, as latents have; pass latents as image_latents.")


def _check_count(name: str, count: int, prompts: int, pictures: int) -> None:
    if count not in (1, prompts, pictures):
        raise ValueError(
            f"{name} holds {count} pictures for {prompts} prompts; pass one for all, one for each prompt, or one for "
            f"each of the {pictures} pictures."
        )


def _check_mask_size(mask_name: str, mask: Any, image_name: str, image: Any) -> None:
    if mask is None or image is None:
        return
    sizes = {picture_size(entry) for entry in _entries(image)}
    mask_sizes = {picture_size(entry) for entry in _entries(mask)}
    if sizes != mask_sizes and len(mask_sizes) == len(sizes) == 1:
        (height, width), (mask_height, mask_width) = sizes.pop(), mask_sizes.pop()
        raise ValueError(
            f"{mask_name} is {mask_width}x{mask_height}, {image_name} {width}x{height}; pass two of one size, for "
            f"example by resizing the mask to {width}x{height}."
        )


def _entries(image: Any) -> list[Any]:
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _describe(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
