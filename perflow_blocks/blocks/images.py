"""Images, masks and control images in every form that a call takes them: checked, brought to one form, repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import ControlNetUnionModel, MultiControlNetModel, VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.get_logger(__name__)

IMAGES = ("image", "mask_image", "mask", "control_image", "ip_adapter_image")
"""The inputs that the checks bring to one form."""

IP_ADAPTER_INPUTS = ("ip_adapter_image", "ip_adapter_embeds", "negative_ip_adapter_embeds")

TOLERANCE = 1e-3
"""How far values may lie outside [0, 1], from rounding; they are clipped."""


def check_images(request: Any, prompts: int, images: int, channels: int) -> None:
    """Checks the images and masks to start from, as pixels or as latents of `channels`.

    In the request they become what `standard_images` returns.
    """
    for name in ("image", "mask_image"):
        if getattr(request, name) is not None:
            setattr(request, name, standard_images(name, getattr(request, name), mask=name == "mask_image"))
            require_count(name, count_images(getattr(request, name)), prompts, images)
    for name, wanted in (("image_latents", channels), ("mask", 1), ("masked_image_latents", channels)):
        if getattr(request, name) is not None:
            require_shape(name, getattr(request, name), ("n", wanted, "height/f", "width/f"))
            require_count(name, len(getattr(request, name)), prompts, images)
    if request.mask is not None:
        request.mask = _unit_floats("mask", request.mask)
    for mask_name, image_name in (("mask_image", "image"), ("mask", "image_latents")):
        mask, image = getattr(request, mask_name), getattr(request, image_name)
        if mask is None:
            continue
        if request.denoising_start is not None:
            raise ValueError(f"denoising_start and {mask_name} are both given; leave one out.")
        _warn_of_empty_mask(mask_name, mask, soft=mask_name == "mask" or request.soft_mask)
        if image_size(mask) != image_size(image):
            given, size = (f"{width}x{height}" for height, width in map(image_size, (mask, image)))
            raise ValueError(f"{mask_name} is {given}, {image_name} {size}; resize the mask to {size}.")
    single = isinstance(request.image, Image.Image) and isinstance(request.mask_image, Image.Image)
    if request.padding_mask_crop is not None and not (single and request.output_type == "pil"):
        raise ValueError('padding_mask_crop needs single PIL images as image and mask_image, and output_type="pil".')


def check_controlnet(controlnet: Any, request: Any, prompts: int) -> None:
    """Checks control images for one ControlNet, several, or a ControlNet-Union.

    In the request the images become what `standard_images` returns.
    """
    if request.control_image is None:
        return
    controlnet, given, mode = unwrap_module(controlnet), request.control_image, request.control_mode
    is_union = isinstance(controlnet, ControlNetUnionModel)
    if is_union and mode is None:
        kinds = controlnet.config.num_control_type
        raise ValueError(f"control_mode is missing for a ControlNet-Union; pass 0 to {kinds - 1} for each image.")
    if mode is not None and not is_union:
        kind = type(controlnet).__name__
        raise ValueError(f"control_mode is given for a {kind}; leave it out, or load a ControlNetUnionModel.")
    nets = len(controlnet.nets) if isinstance(controlnet, MultiControlNetModel) else None
    if nets is not None and (not isinstance(given, list) or len(given) != nets):
        raise ValueError(f"control_image holds {len(_listed(given))} images for {nets} ControlNets; pass {nets}.")
    one_each = isinstance(given, list) and (is_union or nets is not None)
    images = [standard_images("control_image", image) for image in (given if one_each else [given])]
    for image in images:
        require_count("control_image", count_images(image), prompts, prompts)
    request.control_image = images if one_each else images[0]
    for name in ("control_guidance_start", "control_guidance_end", "controlnet_conditioning_scale"):
        value = getattr(request, name)
        if isinstance(value, (list, tuple)) and not is_union and len(value) != (nets or 1):
            raise ValueError(f"{name} holds {len(value)} values, and must hold {nets or 1}, one for each ControlNet.")
    start, end = request.control_guidance_start, request.control_guidance_end
    for first, last in np.broadcast(0.0 if start is None else start, 1.0 if end is None else end):
        if not 0.0 <= first < last <= 1.0:
            raise ValueError(f"control_guidance_start={first} must be below control_guidance_end={last}, in [0, 1].")


def check_ip_adapters(unet: Any, request: Any) -> None:
    """Checks that images or embeddings match the loaded IP-Adapters. Images become a list of PIL images for each.

    CLIP's image processor would scale arrays by 1/255 once more, and take tensors as preprocessed.
    """
    adapted = unet.config.encoder_hid_dim_type == "ip_image_proj"
    count = len(unet.encoder_hid_proj.image_projection_layers) if adapted else 0
    given = {name: getattr(request, name) for name in IP_ADAPTER_INPUTS if getattr(request, name) is not None}
    if count and not given:
        raise ValueError(f"ip_adapter_image is missing for {count} loaded IP-Adapters; pass it, or unload them.")
    for name, value in given.items():
        entries = _listed(value)
        if not count:
            raise ValueError(f"{name} is given, but no IP-Adapter is loaded; call pipe.load_ip_adapter(...) first.")
        if len(entries) != count:
            raise ValueError(f"{name} holds {len(entries)} entries for {count} IP-Adapters; pass a list of {count}.")
        if name == "ip_adapter_image":
            request.ip_adapter_image = [
                [pil for one in _listed(entry) for pil in pil_images(_standard(name, one, mask=False))]
                for entry in entries
            ]


def standard_images(name: str, image: Any, mask: bool = False) -> Any:
    """Images or masks as later blocks take them.

    Args:
        name: of the input, for errors.
        image: a PIL image of any mode, an array (height, width, 3), a tensor (3, height, width), a batch (n, ...) of
            either, or a list of these, of one kind and size.
        mask: whether they are masks: (height, width) with one channel or none, or a batch (n, height, width).

    Returns:
        An upright PIL image in RGB or L, a list of these, or a tensor (n, channels, height, width) in [0, 1].

    Raises:
        ValueError: an image is of another kind, shape or range.
    """
    entries = [_standard(name, one, mask) for one in _listed(image)]
    if not entries:
        raise ValueError(f"{name} is an empty list; pass at least one image.")
    kinds = list(dict.fromkeys(map(_describe, entries)))
    if len(kinds) > 1:
        found = ", ".join(kinds)
        raise ValueError(f"{name} holds images of several kinds or sizes ({found}); pass images of one kind and size.")
    if isinstance(entries[0], Tensor):
        return torch.cat(entries)
    return entries if isinstance(image, list) else entries[0]


def _standard(name: str, image: Any, mask: bool) -> Any:
    """One entry of a list: an upright PIL image, or a batch (n, channels, height, width) of anything else."""
    if isinstance(image, Image.Image):
        return _upright(name, image, mask)
    values = _unit_floats(name, image)
    channels, dimensions = (1, (2, 3, 4)) if mask else (3, (3, 4))
    batch = as_batch(values, mask) if values.ndim in dimensions else None
    if batch is None or batch.shape[1] != channels:
        shape = "(3, height, width)" if isinstance(image, Tensor) else "(height, width, 3)"
        wanted = "have one channel, such as (height, width)" if mask else f"be {shape}, a batch or a list of these"
        raise ValueError(f"{name} is {_describe(image)}; it must {wanted}.")
    return batch


def _upright(name: str, image: Image.Image, mask: bool) -> Image.Image:
    """A PIL image of any mode in RGB, turned as its EXIF orientation says; 16-bit values are scaled to 8 bits.

    A mask is in mode L: its transparency if that varies, else its luminance.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} is of mode {image.mode}, which has no fixed range; pass it in mode L or I;16.")
    if image.mode.startswith("I;16"):  # PIL would clip it
        image = Image.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8))
    if mask and image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if len(set(alpha.getextrema())) > 1:
            return alpha
    return image.convert("RGB").convert("L" if mask else "RGB")


def _unit_floats(name: str, values: Any) -> Any:
    """An array or tensor of floats in [0, 1]: booleans as 0 and 1, values that rounding put outside clipped."""
    if not isinstance(values, (np.ndarray, Tensor)) or 0 in values.shape:
        raise ValueError(f"{name} is {_describe(values)}; pass a PIL image, an array, a tensor, or a list of them.")
    kind = str(values.dtype)
    if "bool" in kind:
        return values.float() if isinstance(values, Tensor) else values.astype(np.float32)
    if "float" not in kind:
        raise ValueError(f"{name} holds {kind}; pass floats in [0, 1], such as {name} / 255, or a PIL image.")
    low, high = float(values.min()), float(values.max())
    if not (-TOLERANCE <= low and high <= 1.0 + TOLERANCE):  # NaN counts as outside
        raise ValueError(
            f"{name} holds values from {low:g} to {high:g}, not in [0, 1]; pass {name} / 255, ({name} + 1) / 2 if its "
            f"range is [-1, 1], or {name}.clip(0, 1)."
        )
    return values.clip(0.0, 1.0) if low < 0.0 or high > 1.0 else values


def _warn_of_empty_mask(name: str, mask: Any, soft: Any) -> None:
    """Warns of a mask that paints nothing: without a value above 0 or, unless it is soft, of at least one half."""
    painted = "above 0" if soft else "of at least 0.5 (soft_mask=True: above 0)"
    for one in [mask] if isinstance(mask, Image.Image) else mask:
        highest = np.asarray(one).max() / 255 if isinstance(one, Image.Image) else float(one.max())
        if highest == 0.0 or (highest < 0.5 and not soft):
            logger.warning(
                f"{name} paints nothing: its highest value is {highest:.3g}, and values {painted} are painted."
            )


def require_shape(name: str, tensor: Any, wanted: tuple[int | str, ...]) -> None:
    """Refuses all but tensors of this shape, in which words stand for any number."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {_describe(tensor)}; it must be a tensor.")
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(not isinstance(w, str) and w != s for s, w in zip(shape, wanted, strict=True)):
        raise ValueError(f"{name} has shape {shape}; it must be ({', '.join(map(str, wanted))}).")


def require_count(name: str, count: int, prompts: int, images: int) -> None:
    """Refuses a `count` other than 1, the number of prompts, or the number of images."""
    if count not in (1, prompts, images):
        allowed = " or ".join(str(number) for number in sorted({1, prompts, images}))
        raise ValueError(f"{name} has {count} entries for {prompts} prompts and {images} images; pass {allowed}.")


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
    return [one for one in _listed(image) for _ in range(times)]


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of an image in any form, or of the first of a list."""
    first = as_batch(image[0] if isinstance(image, list) else image)
    return (first.height, first.width) if isinstance(first, Image.Image) else tuple(first.shape[-2:])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _describe(value: Any) -> str:
    if isinstance(value, Image.Image):
        return f"a PIL image of {value.width}x{value.height}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
