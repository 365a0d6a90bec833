"""Mistakes in a request that concern given pictures: image-to-image and inpainting."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..pictures import count_pictures, picture_size


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
    if request.image is not None:
        check_kind("image", request.image, channels)
        _check_count("image", count_pictures(request.image), prompts, pictures)
    if request.mask_image is not None:
        _check_mask_kind("mask_image", request.mask_image)
        _check_count("mask_image", count_pictures(request.mask_image, mask=True), prompts, pictures)
    if request.padding_mask_crop is not None:
        _check_crop(request)
    for name in ("image_latents", "mask", "masked_image_latents"):
        tensor = getattr(request, name)
        if tensor is not None:
            wanted = 1 if name == "mask" else channels
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[1] != wanted:
                raise ValueError(f"{name} is {_describe(tensor)}; pass a tensor (n, {wanted}, height/f, width/f).")
            _check_count(name, int(tensor.shape[0]), prompts, pictures)
    _check_mask_size("mask_image", request.mask_image, "image", request.image)
    _check_mask_size("mask", request.mask, "image_latents", request.image_latents)


def check_kind(name: str, image: Any, channels: int | None, any_mode: bool = False) -> None:
    """
    Args:
        name: of the input, for messages.
        image: one picture, or a list of them: PIL, array (height, width, 3), tensor (3, height, width); the latter two
            also as batches.
        channels: of latents, which a picture is refused for having; None for no such test.
        any_mode: whether PIL pictures may be other than RGB.

    Raises:
        ValueError: no picture, integers, or not of three channels.
    """
    entries = _entries(name, image)
    if channels is not None and isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
        raise ValueError(f"{name} has {channels} channels, as latents have; pass latents as image_latents.")
    for entry in entries:
        if isinstance(entry, Image.Image):
            if entry.mode != "RGB" and not any_mode:
                raise ValueError(f'{name} is a PIL picture of mode {entry.mode}; pass {name}.convert("RGB").')
        elif entry.ndim not in (3, 4) or _channels(entry) != 3 or (isinstance(image, list) and _holds_several(entry)):
            shape = "(3, height, width)" if isinstance(entry, Tensor) else "(height, width, 3)"
            raise ValueError(f"{name} is {_describe(entry)}; pass {shape}, a batch or a list of such.")


def _check_mask_kind(name: str, mask: Any) -> None:
    listed = isinstance(mask, list)
    for entry in _entries(name, mask):
        if isinstance(entry, Image.Image) or entry.ndim == 2:
            continue
        colours = isinstance(entry, np.ndarray) and entry.shape[-1:] in ((3,), (4,))
        right = not colours if entry.ndim == 3 and not listed else entry.ndim in (3, 4) and _channels(entry) == 1
        if not right or (listed and _holds_several(entry)):
            raise ValueError(
                f"{name} is {_describe(entry)}; pass one channel, (height, width), a batch (n, height, width), or a "
                "list of single ones."
            )


def _entries(name: str, image: Any) -> list[Any]:
    """The pictures of a list, or what is given as a list of one.

    Raises:
        ValueError: a tuple, an empty list, no picture, no floating-point numbers, or kinds or shapes that differ.
    """
    if isinstance(image, tuple):
        raise ValueError(f"{name} is a tuple; pass a list.")
    entries = image if isinstance(image, list) else [image]
    if not entries:
        raise ValueError(f"{name} is an empty list; pass at least one picture.")
    for entry in entries:
        if not isinstance(entry, (Image.Image, np.ndarray, Tensor)):
            kind = type(entry).__name__
            raise ValueError(f"{name} is of type {kind}; pass a PIL picture, an array, a tensor, or a list.")
        if not isinstance(entry, Image.Image) and not _is_floating(entry):
            dtype = str(entry.dtype).removeprefix("torch.")
            remedy = f"{name} * 1.0" if dtype == "bool" else f"{name} / 255"
            raise ValueError(f"{name} holds {dtype}; pass values in [0, 1], {remedy}, or a PIL picture.")
    shapes = {"PIL" if isinstance(entry, Image.Image) else _describe(entry) for entry in entries}
    if len(shapes) > 1:
        raise ValueError(f"{name} holds pictures of several kinds or shapes; pass all of one.")
    return list(entries)


def _is_floating(image: np.ndarray | Tensor) -> bool:
    return image.is_floating_point() if isinstance(image, Tensor) else bool(np.issubdtype(image.dtype, np.floating))


def _channels(image: np.ndarray | Tensor) -> int:
    return int(image.shape[-3] if isinstance(image, Tensor) else image.shape[-1])


def _holds_several(image: np.ndarray | Tensor) -> bool:
    return image.ndim == 4 and image.shape[0] != 1


def _check_crop(request: Any) -> None:
    crop = request.padding_mask_crop
    if isinstance(crop, bool) or not isinstance(crop, Integral) or int(crop) < 0:
        raise ValueError(f"padding_mask_crop={crop!r} is no whole number of at least 0; pass for example 32.")
    if not (isinstance(request.image, Image.Image) and isinstance(request.mask_image, Image.Image)):
        raise ValueError("padding_mask_crop needs image and mask_image as one PIL picture each; pass such.")
    if request.output_type != "pil":
        raise ValueError(
            f'padding_mask_crop lays PIL pictures over the given one, not output_type="{request.output_type}"; pass '
            'output_type="pil".'
        )
    if request.mask_image.convert("L").getbbox() is None:
        raise ValueError("padding_mask_crop crops to the mask, and mask_image is all black; paint some of it white.")


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
    if unet_channels != channels and not masked:
        raise ValueError(
            f"the UNet takes {unet_channels} channels and is made for inpainting; pass image and mask_image, or load "
            f"one of {channels} channels."
        )


def _check_count(name: str, count: int, prompts: int, pictures: int) -> None:
    if count not in (1, prompts, pictures):
        raise ValueError(
            f"{name} holds {count} pictures for {prompts} prompts; pass one for all, one for each prompt, or one for "
            f"each of the {pictures} pictures."
        )


def _check_mask_size(mask_name: str, mask: Any, image_name: str, image: Any) -> None:
    if mask is None or image is None:
        return
    sizes = {picture_size(entry) for entry in _listed(image)}
    mask_sizes = {picture_size(entry, mask=not isinstance(mask, list)) for entry in _listed(mask)}
    if sizes != mask_sizes and len(mask_sizes) == len(sizes) == 1:
        (height, width), (mask_height, mask_width) = sizes.pop(), mask_sizes.pop()
        raise ValueError(
            f"{mask_name} is {mask_width}x{mask_height}, {image_name} {width}x{height}; pass two of one size, for "
            f"example by resizing the mask to {width}x{height}."
        )


def _listed(image: Any) -> list[Any]:
    return image if isinstance(image, list) else [image]


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
