"""Checkpoints of a whole pipeline in one file, through diffusers' own converters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    LDM_UNET_KEY,
    LDM_VAE_KEYS,
    convert_ldm_unet_checkpoint,
    fetch_diffusers_config,
    is_clip_sdxl_model,
    is_open_clip_sdxl_model,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..delta.files import describe_mismatch

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""What a file may hold."""


def read_shapes(path: str) -> dict[str, Tensor]:
    """The file's tensors without their values, on the device "meta"; reads the header alone.

    Raises:
        ValueError: no file, none of safetensors, or a broken one.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".safetensors":
        state = "does not exist" if not file.exists() else "is no .safetensors file"
        raise ValueError(f"from_single_file: {path} {state}; pass the path of a .safetensors checkpoint.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"from_single_file: {path} is no complete safetensors file ({error}); download it again."
        ) from error


def models_in(shapes: Mapping[str, Tensor]) -> set[str]:
    """Which of `MODELS` the file holds, by the names of its tensors."""
    found = {
        "unet": any(name.startswith(LDM_UNET_KEY) for name in shapes),
        "vae": any(name.startswith(tuple(LDM_VAE_KEYS)) for name in shapes),
        "text_encoder": is_clip_sdxl_model(shapes),
        "text_encoder_2": is_open_clip_sdxl_model(shapes),
    }
    return {name for name, there in found.items() if there}


def config_location(config: str | None, shapes: Mapping[str, Tensor]) -> str:
    """Where the configurations are: as named, else the repository that diffusers infers from the weights."""
    if config is not None:
        return config
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def require_unet(path: str, shapes: Mapping[str, Tensor], unet: Any) -> None:
    """
    Args:
        unet: of the configuration that the file is to be loaded with; may be on "meta".

    Raises:
        ValueError: the file's UNet is of another architecture.
    """
    try:
        converted = convert_ldm_unet_checkpoint(dict(shapes), unet.config)
    except KeyError as error:
        mismatch = f"it has no {error.args[0]}"
    else:
        mismatch = describe_mismatch(
            {name: tuple(tensor.shape) for name, tensor in converted.items()},
            {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()},
            given="the file",
            expected="the configuration",
        )
    if mismatch:
        raise ValueError(
            f"from_single_file: the UNet in {path} is of another family than the configuration: {mismatch}; pass "
            "config= with a pipeline of the same family."
        )


def load_single_file(path: str, config: str, names: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """The models of these names, in evaluation mode on the CPU."""
    left_out = [*(name for name in MODELS if name not in set(names)), "tokenizer", "tokenizer_2", "scheduler"]
    pipeline: Any = StableDiffusionXLPipeline.from_single_file(
        path, config=config, dtype=dtype, add_watermarker=False, **dict.fromkeys(left_out)
    )
    return {name: getattr(pipeline, name) for name in names}
