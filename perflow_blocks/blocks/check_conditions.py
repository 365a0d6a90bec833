"""Mistakes in a request that concern ControlNets and IP-Adapters."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetUnionModel, MultiControlNetModel
from diffusers.utils.torch_utils import unwrap_module

from .pictures import count_pictures

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
    for image in [request.control_image] if one else _listed(request.control_image, None):
        if count_pictures(image) not in (1, prompts):
            raise ValueError(
                f"control_image holds {count_pictures(image)} pictures for {prompts} prompts; pass one, or one "
                "for each prompt."
            )
    _check_range(request.control_guidance_start, request.control_guidance_end)


def check_ip_adapters(unet: Any, request: Any) -> None:
    """
    Raises:
        ValueError: pictures or embeddings for another number of IP-Adapters than the UNet has loaded, or none.
    """
    adapters = len(unet.encoder_hid_proj.image_projection_layers) if _has_ip_adapters(unet) else 0
    if request.ip_adapter_image is not None and request.ip_adapter_embeds is not None:
        raise ValueError("both ip_adapter_image and ip_adapter_embeds are given; pass the one or the other.")
    name = "ip_adapter_image" if request.ip_adapter_embeds is None else "ip_adapter_embeds"
    given = getattr(request, name)
    if given is None:
        if adapters:
            raise ValueError(
                f"the UNet has {adapters} IP-Adapter(s) loaded, but ip_adapter_image is missing; pass it, or call "
                "pipe.unload_ip_adapter()."
            )
        return
    if not adapters:
        raise ValueError(f"{name} is given, but no IP-Adapter is loaded; call pipe.load_ip_adapter(...) first.")
    count = len(given) if isinstance(given, (list, tuple)) else 1
    if count != adapters:
        raise ValueError(
            f"{name} is given for {count} IP-Adapters, and {adapters} are loaded; pass a list with one entry for each."
        )


def _check_range(start: Any, end: Any) -> None:
    starts, ends = _listed(start, 0.0), _listed(end, 1.0)
    count = max(len(starts), len(ends))
    starts, ends = (values * count if len(values) == 1 else values for values in (starts, ends))
    if len(starts) != len(ends):
        raise ValueError(
            f"control_guidance_start holds {len(starts)} values and control_guidance_end {len(ends)}; pass as many."
        )
    for first, last in zip(starts, ends, strict=True):
        if not 0.0 <= first < last <= 1.0:
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
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode < kinds:
            raise ValueError(f"control_mode={mode!r} is no kind of this ControlNet-Union; pass 0 to {kinds - 1}.")
    for name in ("control_guidance_start", "control_guidance_end"):
        if isinstance(getattr(request, name), list):
            raise ValueError(f"{name} is a list, but a ControlNet-Union takes one number; pass one.")


def _check_several(nets: int, request: Any) -> None:
    if not isinstance(request.control_image, list) or len(request.control_image) != nets:
        given = len(request.control_image) if isinstance(request.control_image, list) else 1
        raise ValueError(f"{given} control image(s) for {nets} ControlNets; pass a list with one for each.")
    for name in CONTROLNET_SETTINGS[1:4]:
        value = getattr(request, name)
        if isinstance(value, list) and len(value) != nets:
            raise ValueError(f"{name} holds {len(value)} values for {nets} ControlNets; pass one, or one for each.")


def _listed(value: Any, default: Any) -> list[Any]:
    if value is None:
        return [default]
    return list(value) if isinstance(value, (list, tuple)) else [value]
