"""Images, masks, control images and inputs of IP-Adapters, checked and brought to one form for all later blocks.

A plain text-to-image call needs none of this.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetUnionModel, MultiControlNetModel
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from PIL import Image
from torch import Tensor, nn

from .images import (
    as_batch,
    count_images,
    image_size,
    pil_images,
    require_count,
    unit_range,
    upright_mask,
    upright_rgb,
)

logger = logging.get_logger(__name__)

IMAGES = ("image", "mask_image", "mask", "control_image", "ip_adapter_image")
"""The inputs that the checks bring to one form."""

CONTROL_RANGE = ("control_guidance_start", "control_guidance_end")
IP_ADAPTER_INPUTS = ("ip_adapter_image", "ip_adapter_embeds", "negative_ip_adapter_embeds")


def require_shape(name: str, tensor: Any, wanted: tuple[int | str, ...]) -> None:
    """Refuses all but tensors of this shape, in which words stand for any number."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {_describe(tensor)}; it must be a tensor.")
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(not isinstance(w, str) and w != s for s, w in zip(shape, wanted, strict=True)):
        raise ValueError(f"{name} has shape {shape}; it must be ({', '.join(map(str, wanted))}).")


def check_images(request: Any, prompts: int, images: int, channels: int, unet_channels: int, least_size: int) -> None:
    """Checks kind, number, size and values of the images and masks to start from, as pixels or latents.

    In the request they become what `standard_images` returns.
    Latents have `channels`. A UNet takes as many, or `2 channels + 1` if it is made for inpainting. Sides that are not
    resized to the call's `height` or `width` are at least `least_size` pixels.
    """
    masked = request.mask_image is not None or request.mask is not None
    if request.denoising_start is not None and masked and request.latents is None:
        raise ValueError("denoising_start with a mask is given without the latents of an earlier run; pass latents.")
    if unet_channels != channels and not masked:
        raise ValueError(f"mask_image and image are missing: the UNet of {unet_channels} channels is for inpainting.")
    if request.image is not None:
        if isinstance(request.image, Tensor) and request.image.ndim == 4 and request.image.shape[1] == channels:
            raise ValueError(f"image has {channels} channels, as latents have; pass latents as image_latents.")
        request.image = standard_images("image", request.image)
        require_count("image", count_images(request.image), prompts, images)
        height, width = image_size(_listed(request.image)[0])
        if (request.height or height) < least_size or (request.width or width) < least_size:
            raise ValueError(
                f"image is {width}x{height}; each side must be at least {least_size} pixels, or pass height and width."
            )
    if request.mask_image is not None:
        request.mask_image = standard_images("mask_image", request.mask_image, mask=True)
        require_count("mask_image", count_images(request.mask_image), prompts, images)
    for name, wanted in (("image_latents", channels), ("mask", 1), ("masked_image_latents", channels)):
        tensor = getattr(request, name)
        if tensor is not None:
            require_shape(name, tensor, ("n", wanted, "height/f", "width/f"))
            require_count(name, len(tensor), prompts, images)
    if request.mask is not None:
        request.mask = unit_range("mask", request.mask)
    if request.padding_mask_crop is not None:
        _check_crop(request)
    _warn_of_empty_mask("mask_image", request.mask_image, soft=bool(request.soft_mask))
    _warn_of_empty_mask("mask", request.mask, soft=True)
    _check_mask_size("mask_image", request.mask_image, "image", request.image)
    _check_mask_size("mask", request.mask, "image_latents", request.image_latents)


def standard_images(name: str, image: Any, mask: bool = False) -> Any:
    """Images or masks as later blocks take them.

    Args:
        name: of the input, for errors.
        image: a PIL image of any mode, an array (height, width, 3), a tensor (3, height, width), a batch (n, ...) of
            either, or a list of single images of one kind and size.
        mask: whether they are masks: (height, width) with one channel or none, or a batch (n, height, width).

    Returns:
        An upright PIL image in RGB or L, a list of these, or a tensor (n, channels, height, width) in [0, 1].

    Raises:
        ValueError: an image is of another kind, shape or range.
    """
    entries = _standard_entries(name, image, mask)
    kinds = list(dict.fromkeys(map(_describe, entries)))
    if len(kinds) > 1:
        found = ", ".join(kinds)
        raise ValueError(f"{name} holds images of several kinds or sizes ({found}); pass images of one kind and size.")
    if isinstance(entries[0], Tensor):
        return torch.cat(entries)
    return entries if isinstance(image, list) else entries[0]


def _standard_entries(name: str, image: Any, mask: bool = False) -> list[Any]:
    """The images of a list, or the one image: upright PIL images, and batches of all others."""
    if not _listed(image):
        raise ValueError(f"{name} is an empty list; pass at least one image.")
    upright, channels, dimensions = (upright_mask, 1, (2, 3, 4)) if mask else (upright_rgb, 3, (3, 4))
    entries = []
    for entry in _listed(image):
        if isinstance(entry, Image.Image):
            entries.append(upright(name, entry))
            continue
        values = _unit_floats(name, entry)
        colours = mask and isinstance(values, np.ndarray) and values.ndim == 3 and values.shape[-1] in (3, 4)
        batch = as_batch(values, mask) if values.ndim in dimensions and not colours else None
        if batch is None or batch.shape[1] != channels or (isinstance(image, list) and len(batch) > 1):
            shape = "(3, height, width)" if isinstance(entry, Tensor) else "(height, width, 3)"
            wanted = (
                "have one channel, such as (height, width)" if mask else f"be {shape}, or a batch or list of these"
            )
            raise ValueError(f"{name} is {_describe(entry)}; it must {wanted}.")
        entries.append(batch)
    return entries


def check_controlnet(controlnet: Any, request: Any, prompts: int) -> None:
    """Checks control images and the settings of one ControlNet, several, a ControlNet-Union, or None.

    In the request the images become what `standard_images` returns.
    """
    if request.control_image is None:
        return
    controlnet = unwrap_module(controlnet)  # compiled or not
    images = _listed(request.control_image)
    scales: int | None = None
    ranges: int | None = None
    if isinstance(controlnet, ControlNetUnionModel):
        _check_control_types(controlnet.config.num_control_type, len(images), request.control_mode)
        scales = len(images)
    elif request.control_mode is not None:
        kind = type(controlnet).__name__
        raise ValueError(f"control_mode is given for a {kind}; leave it out, or load a ControlNetUnionModel.")
    elif isinstance(controlnet, MultiControlNetModel):
        scales = ranges = len(controlnet.nets)
        if not isinstance(request.control_image, list) or len(images) != scales:
            raise ValueError(
                f"control_image holds {len(images)} images, but there are {scales} ControlNets; "
                f"pass a list of {scales} images."
            )
    else:
        images = [request.control_image]
    images = [standard_images("control_image", image) for image in images]
    for image in images:
        require_count("control_image", count_images(image), prompts, prompts)
    single = scales is None or not isinstance(request.control_image, list)
    request.control_image = images[0] if single else images
    _check_numbers(request, "controlnet_conditioning_scale", scales)
    starts, ends = (_check_numbers(request, name, ranges) for name in CONTROL_RANGE)
    for i in range(max(len(starts), len(ends))):
        first, last = starts[i % len(starts)], ends[i % len(ends)]
        if not 0.0 <= first < last <= 1.0:
            raise ValueError(f"control_guidance_start={first} must be below control_guidance_end={last}, in [0, 1].")


def check_ip_adapters(layers: list[nn.Module], request: Any, encodes: bool) -> None:
    """Checks that images or embeddings match the loaded IP-Adapters. Images become a list of PIL images for each.

    CLIP's image processor would scale arrays by 1/255 once more, and take tensors as preprocessed.
    `layers` holds the image projection of each adapter; `encodes` tells whether a block encodes images.
    """
    image, embeds, negative = (getattr(request, name) for name in IP_ADAPTER_INPUTS)
    count = len(layers)
    if layers and image is None and embeds is None:
        name = "ip_adapter_image" if encodes else "ip_adapter_embeds"
        raise ValueError(f"{name} is missing for {count} loaded IP-Adapters; pass it or call unload_ip_adapter().")
    for name, given in zip(IP_ADAPTER_INPUTS, (image, embeds, negative), strict=True):
        if given is None:
            continue
        if not layers:
            raise ValueError(f"{name} is given, but no IP-Adapter is loaded; call pipe.load_ip_adapter(...) first.")
        entries, encoded = _listed(given), name != "ip_adapter_image"
        if encoded and not isinstance(given, list):
            raise ValueError(
                f"{name} is {_describe(given)}; it must be a list with one tensor for each of {count} IP-Adapters."
            )
        if len(entries) != count:
            raise ValueError(f"{name} holds {len(entries)} entries for {count} IP-Adapters; pass a list of {count}.")
        if encoded:
            for entry, layer in zip(entries, layers, strict=True):
                _check_image_embeddings(name, entry, layer)
        else:
            request.ip_adapter_image = [_adapter_images(name, entry) for entry in entries]


def _adapter_images(name: str, image: Any) -> list[Image.Image]:
    return [one for entry in _standard_entries(name, image) for one in pil_images(entry)]


def _check_image_embeddings(name: str, embeds: Any, layer: nn.Module) -> None:
    """Embeddings are (images, ..., width), of the width that the first layer of the IP-Adapter takes."""
    width = next(part.in_features for part in layer.modules() if isinstance(part, nn.Linear))
    if not isinstance(embeds, Tensor) or embeds.ndim < 3 or embeds.shape[-1] != width:
        raise ValueError(f"{name} holds an entry {_describe(embeds)}; it must be a tensor (images, 1, {width}).")


def _check_crop(request: Any) -> None:
    if request.image is None or request.mask_image is None:
        raise ValueError(
            "padding_mask_crop is given without an image; pass image and mask_image, or leave padding_mask_crop out."
        )
    if not (isinstance(request.image, Image.Image) and isinstance(request.mask_image, Image.Image)):
        raise ValueError("padding_mask_crop is given, so image and mask_image must be single PIL images.")
    if request.output_type != "pil":
        raise ValueError(f'padding_mask_crop is given, so output_type={request.output_type!r} must be "pil".')
    if request.mask_image.getbbox() is None:
        raise ValueError("padding_mask_crop crops to the mask, but mask_image is all black; paint some of it white.")


def _warn_of_empty_mask(name: str, mask: Any, soft: bool) -> None:
    """Warns of a mask that paints nothing: without a value above 0 or, unless it is soft, of at least one half."""
    if mask is None:
        return
    painted = "above 0" if soft else "of at least 0.5 (soft_mask=True: above 0)"
    values = [_highest(one) for one in ([mask] if isinstance(mask, Image.Image) else mask)]
    for i, highest in enumerate(values):
        if highest == 0.0 or not (soft or highest >= 0.5):
            which = f"{name}[{i}]" if len(values) > 1 else name
            logger.warning(
                f"{which} paints nothing: its highest value is {highest:.3g}, and values {painted} are painted."
            )


def _highest(mask: Any) -> float:
    return np.asarray(mask).max() / 255 if isinstance(mask, Image.Image) else float(mask.max())


def _check_mask_size(mask_name: str, mask: Any, image_name: str, image: Any) -> None:
    if mask is not None and image is not None and image_size(mask) != image_size(image):
        given, wanted = (f"{width}x{height}" for height, width in map(image_size, (mask, image)))
        raise ValueError(f"{mask_name} is {given}, {image_name} {wanted}; resize the mask to {wanted}.")


def _unit_floats(name: str, values: Any) -> Any:
    if not isinstance(values, (np.ndarray, Tensor)):
        raise ValueError(f"{name} is {_describe(values)}; pass a PIL image, an array, a tensor, or a list of them.")
    if 0 in values.shape:
        raise ValueError(f"{name} is {_describe(values)}, without a pixel; pass at least one image.")
    return unit_range(name, _floats(name, values))


def _floats(name: str, values: Any) -> Any:
    """Floats as they are, booleans as 0 and 1; refuses other values."""
    kind, is_tensor = str(values.dtype), isinstance(values, Tensor)
    if "float" in kind:
        return values
    if "bool" not in kind and "int" not in kind:
        raise ValueError(f"{name} holds {kind}; pass floats in [0, 1], booleans, or a PIL image.")
    floats = values.float() if is_tensor else values.astype(np.float32)
    if "bool" in kind:
        return floats
    cast = "float()" if is_tensor else 'astype("float32")'
    remedy = f"{name}.{cast}" if 0 <= floats.min() and floats.max() <= 1 else f"{name} / 255"
    raise ValueError(f"{name} holds {kind}; pass values in [0, 1], {remedy}, or a PIL image.")


def _check_control_types(kinds: int, images: int, given: Any) -> None:
    if given is None:
        raise ValueError(f"control_mode is missing for a ControlNet-Union; pass 0 to {kinds - 1} for each image.")
    modes = _listed(given)
    if len(modes) != images:
        raise ValueError(f"control_mode holds {len(modes)} numbers, but there are {images} control images.")
    for mode in modes:
        if type(mode) is not int or not 0 <= mode < kinds:
            raise ValueError(f"control_mode={mode!r} must be an integer from 0 to {kinds - 1}.")


def _check_numbers(request: Any, name: str, count: int | None) -> list[float]:
    """The numbers of a ControlNet setting: one, or a list of `count` where that is allowed; the default if None."""
    value = getattr(request, name)
    if value is None:
        return [0.0 if name == "control_guidance_start" else 1.0]
    numbers = _listed(value)
    finite = all(type(entry) in (int, float) and math.isfinite(entry) for entry in numbers)
    if not finite or (isinstance(value, list) and len(value) != count):
        allowed = "a number" if count is None else f"a number or a list of {count} numbers"
        raise ValueError(f"{name}={value!r} must be {allowed}.")
    return numbers


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _describe(value: Any) -> str:
    if isinstance(value, Image.Image):
        return f"a PIL image of {value.width}x{value.height}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
