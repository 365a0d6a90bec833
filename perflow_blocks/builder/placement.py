"""Where models run and in which type: asked of the machine, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import get_device

from .problems import Problems
from .settings import OFFLOAD_MODES, BuilderSettings

CPU = torch.device("cpu")

ONE_TYPE = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet")
"""The models that hand tensors to one another, and so have one type."""

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float16 on other accelerators, float32 on the CPU."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "xpu" and torch.xpu.is_bf16_supported():
        return torch.bfloat16
    return torch.float16


def resolve_device(settings: BuilderSettings, problems: Problems) -> torch.device:
    """Where the models run. Without a wish: the accelerator if models are offloaded from it, else the CPU."""
    if settings.offload is not None and settings.offload not in OFFLOAD_MODES:
        problems.add(f"offload({settings.offload!r}) is unknown; pass one of {', '.join(OFFLOAD_MODES)}, or None.")
    device = _device(settings, problems)
    if settings.offload in OFFLOAD_MODES and device.type == "cpu":
        problems.add(
            f"offload({settings.offload!r}) keeps models on the CPU while they do not run, and they run on the CPU; "
            'name another device with on("cuda"), say, or leave it out.'
        )
    if settings.offload is not None and settings.compile is not None:
        problems.add(
            f"with_compile and offload({settings.offload!r}) exclude each other, since the hooks that move models "
            "cannot be compiled; leave one of them out."
        )
    return device


def _device(settings: BuilderSettings, problems: Problems) -> torch.device:
    given = settings.device
    if given is None:
        return torch.empty(0, device=get_device()).device if settings.offload is not None else CPU
    try:
        return torch.empty(0, device=given).device  # "cuda" is a device with a number
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        problems.add(f"on({given!r}) is no device that can be used here ({reason}); pass one such as 'cpu' or 'cuda'.")
    return CPU


def resolve_dtype(
    settings: BuilderSettings, given: Mapping[str, Any], device: torch.device, problems: Problems
) -> torch.dtype:
    """The type of all models.

    Args:
        given: the models that the user gave, by name.
    """
    wanted: Any = settings.dtype
    of_models = {name: model.dtype for name, model in given.items() if name in ONE_TYPE}
    if wanted == "auto":
        wanted = next(iter(of_models.values()), None) or best_dtype(device)
    elif wanted not in FLOATING:
        problems.add(f"dtype={wanted!r} is wrong for models; pass 'auto', or one of {_listed(FLOATING)}.")
        return best_dtype(device)
    for name, found in of_models.items():
        if found != wanted:
            problems.add(
                f"the {name} that is given is {found}, the other models are {wanted}; pass {name}.to({wanted}), or "
                f"dtype={found}."
            )
    return wanted


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
