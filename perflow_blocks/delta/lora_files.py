"""LoRA files of a delta, with the keys of peft and diffusers or of kohya, and the residual beside them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_path
from .fit import PARTIAL_KEY
from .lora import PREFIX, DeltaLora
from .tensors import is_finite, listed

Layout = Literal["peft", "kohya"]


def save_lora(converted: DeltaLora, path: str | os.PathLike[str], layout: Layout = "peft") -> None:
    """Writes the LoRA; the file appears complete or not at all.

    `layout` "peft" is what diffusers writes itself. The file's metadata say each layer's rank and alpha, so that the
    factor is 1 in every layer for readers that would otherwise take the alpha of one for all. "kohya" is what other
    programs read (`lora_unet_...`, with alphas). Both are for `pipe.load_lora_weights(path)`; the recipe is in the
    metadata.

    Raises:
        ValueError: an unknown layout, values that the kohya factors cannot hold in their type, or a path that cannot
            be written.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} is unknown; pass one of {', '.join(get_args(Layout))}.")
    metadata = {"format": "pt", **converted.recipe.to_metadata()}
    if layout == "kohya":
        _write(kohya_state_dict(converted.lora), path, metadata)
    else:
        settings = json.dumps(peft_settings(converted.lora), sort_keys=True)
        _write(converted.lora, path, {**metadata, LORA_ADAPTER_METADATA_KEY: settings})


def save_residual(converted: DeltaLora, path: str | os.PathLike[str]) -> None:
    """Writes what is not in the LoRA as a partial delta with the recipe, to be merged beside it.

    Raises:
        ValueError: there is nothing to write, or the path cannot be written.
    """
    if not converted.residual:
        raise ValueError(f"the LoRA holds the whole delta, so there is no residual for {path}; leave the file out.")
    _write(converted.residual, path, {"format": "pt", PARTIAL_KEY: "true", **converted.recipe.to_metadata()})


def peft_settings(lora: Mapping[str, Tensor]) -> dict[str, object]:
    """The `LoraConfig` arguments of a LoRA in peft's keys whose alphas are its ranks, under "unet." keys."""
    own = {name.removeprefix(PREFIX): tensor for name, tensor in lora.items()}
    # With "^" a name stands for one module, not for every module whose name ends in it.
    ranks = {f"^{name}": tensor.shape[1] for name, tensor in own.items() if ".lora_B." in name}
    settings = get_peft_kwargs(ranks, network_alpha_dict=None, peft_state_dict=own)
    settings["target_modules"] = sorted(settings["target_modules"])
    return {PREFIX + name: value for name, value in settings.items()}


def kohya_state_dict(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA in kohya's keys, with one alpha for all layers.

    One, because diffusers 0.42 does not find the alphas of attention layers where alphas differ, and gives them the
    most common one. A layer of another rank has the ratio in its factors instead: readers multiply by alpha / rank.

    Raises:
        ValueError: factors that are not finite in their type after that.
    """
    alpha = Counter(tensor.shape[1] for name, tensor in lora.items() if ".lora_B." in name).most_common(1)[0][0]
    scaled = {}
    for name, tensor in lora.items():
        rank = tensor.shape[1] if ".lora_B." in name else tensor.shape[0]
        scaled[name] = tensor if rank == alpha else (tensor.float() * (rank / alpha) ** 0.5).to(tensor.dtype)
    bad = [name for name, tensor in scaled.items() if not is_finite(tensor)]
    if bad:
        raise ValueError(
            f"with one alpha={alpha}, {len(bad)} factors are too large for their type ({listed(bad)}); "
            "convert the delta with dtype=torch.float32."
        )
    converted = convert_state_dict_to_kohya(scaled)
    # float32, as half precision rounds alphas above 2048.
    return {
        name: torch.tensor(float(alpha)) if name.endswith(".alpha") else tensor for name, tensor in converted.items()
    }


def _write(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot write {path}: {error}; check the disk's free space and permissions.") from error
