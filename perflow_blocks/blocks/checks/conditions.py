"""Mistakes in a request that concern ControlNets and IP-Adapters."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from diffusers import ControlNetUnionModel, MultiControlNetModel
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from ..pictures import count_pictures
from .pictures import check_kind

CONTROLNET_SETTINGS = (
    "control_mode",
    "control_guidance_start",
    "control_guidance_end",
    "controlnet_conditioning_scale",
    "guess_mode",
)


def check_controlnet(controlnet: Any, request: Any, prompts: int) -> None:
    """
    Args:
        controlnet: the component, None where there is none.
        request: the block state of `PeRFlowCheckInputsStep`.
        prompts: number of prompts.

    Raises:
        ValueError: settings without a control image, control images that do not match the ControlNets or the modes, or
            values out of range.
    """
    for name in ("control_image", *CONTROLNET_SETTINGS):
        if isinstance(getattr(request, name), tuple):
            raise ValueError(f"{name} is a tuple; pass a list, or one value.")
    if request.control_image is None:
        given = [name for name in CONTROLNET_SETTINGS if getattr(request, name) is not None]
        if given:
            raise ValueError(f"{given[0]} is given but control_image is missing; pass control_image, or leave it out.")
        return
    controlnet = unwrap_module(controlnet)  # compiled or not
    if isinstance(controlnet, ControlNetUnionModel):
        _check_union(controlnet, request)
    elif request.control_mode is not None:
        raise ValueError(
            f"control_mode is given, but the controlnet is a {type(controlnet).__name__}; leave it out, or load a "
            "ControlNetUnionModel."
        )
    if isinstance(controlnet, MultiControlNetModel):
        _check_several(len(controlnet.nets), request)
    one = not isinstance(controlnet, (ControlNetUnionModel, MultiControlNetModel))
    if one:
        _check_lengths(request, None, CONTROLNET_SETTINGS[1:4], "single ControlNet")
    for image in [request.control_image] if one else _listed(request.control_image, None):
        check_kind("control_image", image, channels=None, any_mode=True)
        if count_pictures(image) not in (1, prompts):
            raise ValueError(
                f"control_image holds {count_pictures(image)} pictures for {prompts} prompts; pass one, or one "
                "for each prompt."
            )
    _check_range(request.control_guidance_start, request.control_guidance_end)


def check_ip_adapters(unet: Any, guider: Any, request: Any, encodes: bool) -> None:
    """
    Args:
        unet: the component.
        guider: the component.
        request: the block state of `PeRFlowCheckInputsStep`.
        encodes: whether the pipeline has a block that encodes pictures for IP-Adapters.

    Raises:
        ValueError: pictures or embeddings for another number of IP-Adapters than the UNet has loaded, or none.
    """
    adapters = len(unet.encoder_hid_proj.image_projection_layers) if _has_ip_adapters(unet) else 0
    if request.ip_adapter_image is not None and request.ip_adapter_embeds is not None:
        raise ValueError("both ip_adapter_image and ip_adapter_embeds are given; pass the one or the other.")
    wanted = "ip_adapter_image" if encodes else "ip_adapter_embeds"
    name = "ip_adapter_image" if request.ip_adapter_image is not None else "ip_adapter_embeds"
    given = getattr(request, name)
    if given is None:
        if adapters:
            raise ValueError(
                f"the UNet has {adapters} IP-Adapter(s) loaded, but {wanted} is missing; pass it, or call "
                "pipe.unload_ip_adapter()."
            )
        return
    if not adapters:
        raise ValueError(f"{name} is given, but no IP-Adapter is loaded; call pipe.load_ip_adapter(...) first.")
    count = len(given) if isinstance(given, list) else 1
    if count != adapters:
        raise ValueError(
            f"{name} is given for {count} IP-Adapters, and {adapters} are loaded; pass a list with one entry for each."
        )
    if name == "ip_adapter_embeds":
        _check_image_embeddings(request, adapters, guided=guider.num_conditions > 1)


def _check_image_embeddings(request: Any, adapters: int, *, guided: bool) -> None:
    negative = request.negative_ip_adapter_embeds
    if guided and negative is None:
        raise ValueError("negative_ip_adapter_embeds are missing under guidance; pass them, zeros as a rule.")
    for name in ("ip_adapter_embeds", "negative_ip_adapter_embeds"):
        embeds = getattr(request, name)
        if embeds is None:
            continue
        if not isinstance(embeds, list) or not all(isinstance(e, Tensor) and e.ndim >= 3 for e in embeds):
            raise ValueError(
                f"{name} is no list of tensors (pictures, 1, width); pass one tensor for each IP-Adapter."
            )
        if len(embeds) != adapters:
            raise ValueError(f"{name} holds {len(embeds)} tensors for {adapters} IP-Adapters; pass one for each.")


def _check_range(start: Any, end: Any) -> None:
    starts, ends = _listed(start, 0.0), _listed(end, 1.0)
    count = max(len(starts), len(ends))
    starts, ends = (values * count if len(values) == 1 else values for values in (starts, ends))
    if len(starts) != len(ends):
        raise ValueError(
            f"control_guidance_start holds {len(starts)} values and control_guidance_end {len(ends)}; pass as many."
        )
    for first, last in zip(starts, ends, strict=True):
        if not isinstance(first, Real) or not isinstance(last, Real) or not 0.0 <= float(first) < float(last) <= 1.0:
            raise ValueError(
                f"control_guidance_start={first} and control_guidance_end={last} are no range in [0, 1]; pass a start "
                "below the end."
            )


def _has_ip_adapters(unet: Any) -> bool:
    return unet.config.encoder_hid_dim_type == "ip_image_proj"


def _check_union(controlnet: Any, request: Any) -> None:
    kinds = controlnet.config.num_control_type
    if request.control_mode is None:
        raise ValueError(
            f"control_mode is missing, which a ControlNet-Union needs; pass a number from 0 to {kinds - 1} for each "
            "control image."
        )
    images, modes = _listed(request.control_image, None), _listed(request.control_mode, None)
    if len(images) != len(modes):
        raise ValueError(f"{len(images)} control images for {len(modes)} modes in control_mode; pass one for each.")
    for mode in modes:
        if isinstance(mode, bool) or not isinstance(mode, Integral) or not 0 <= int(mode) < kinds:
            raise ValueError(f"control_mode={mode!r} is no kind of this ControlNet-Union; pass 0 to {kinds - 1}.")
    _check_lengths(request, len(images), CONTROLNET_SETTINGS[3:4], "controls")
    _check_lengths(request, None, CONTROLNET_SETTINGS[1:3], "ControlNet-Union")


def _check_several(nets: int, request: Any) -> None:
    if not isinstance(request.control_image, list) or len(request.control_image) != nets:
        given = len(request.control_image) if isinstance(request.control_image, list) else 1
        raise ValueError(f"{given} control image(s) for {nets} ControlNets; pass a list with one for each.")
    _check_lengths(request, nets, CONTROLNET_SETTINGS[1:4], "ControlNets")


def _check_lengths(request: Any, count: int | None, names: Sequence[str], of: str) -> None:
    """Each setting is a number, or a list of `count` of them; with None no list is taken."""
    for name in names:
        value = getattr(request, name)
        if isinstance(value, list) and count is None:
            raise ValueError(f"{name} is a list, but a {of} takes one number; pass one.")
        if isinstance(value, list) and len(value) != count:
            raise ValueError(f"{name} holds {len(value)} values for {count} {of}; pass one, or one for each.")


def _listed(value: Any, default: Any) -> list[Any]:
    if value is None:
        return [default]
    return value if isinstance(value, list) else [value]
