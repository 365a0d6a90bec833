"""Weights in every layout that they are published in, under the names that a model of diffusers has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from .files import FileWeights, MappingWeights, RenamedWeights, Weights
from .tensors import listed
from .weight_folders import find_weights, shards_of

PREFIXES = ("module.", "_orig_mod.", "unet.", "_fsdp_wrapped_module.")
"""What wrappers put before the names of all weights: of distributed training, compilation, and pipelines."""

UNET_PARTS = (
    "conv_in",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)
"""The modules that a `UNet2DConditionModel` is made of, as its weights are named."""

LDM_PREFIX = "model.diffusion_model."
_LDM_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_LORA = re.compile(r"lora|\.alpha$|hada_|lokr_", re.IGNORECASE)
_CONFIG_KEYS = ("block_out_channels", "layers_per_block")
"""What translating Latent Diffusion names takes of a UNet's configuration."""


def open_weights(path: str | os.PathLike[str], variant: str | None = None, *, allow_pickle: bool = False) -> Weights:
    """The weights at a path: a file, the index of shards, or a folder of either, as diffusers saves models.

    A folder may be the model's own or a pipeline's, whose UNet is then meant; of several variants `variant` chooses
    one. Pickles (.bin, .pt, .ckpt) are read only with `allow_pickle`, memory-mapped and without running their code.

    Raises:
        ValueError: nothing there, several variants and none named, a file that is broken, or a pickle.
    """
    path = Path(path).expanduser()
    found = find_weights(path, variant) if path.is_dir() else path
    if found.suffix == ".json":
        return FileWeights(shards_of(found), label=path)
    if found.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _pickled(found, allow_pickle)
    return FileWeights([found], label=path)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's, or of one of its relatives."""
    return any(_LORA.search(name) for name in names)


def _pickled(path: Path, allow_pickle: bool) -> Weights:
    if not allow_pickle:
        raise ValueError(f"{path} is a pickle, which can hold code; convert it, or pass allow_pickle=True.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(f"cannot read {path} as weights ({error}); download it again.") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return MappingWeights(tensors, label=str(path))


def named_as_model(weights: Weights, model_names: Iterable[str], config: Mapping[str, Any]) -> Weights:
    """The weights under the names of a diffusers UNet, with that UNet's configuration.

    Prefixes of wrappers are taken away, and original Latent Diffusion names, as single-file checkpoints have, are
    translated by diffusers' own converter; what else such a checkpoint holds (text encoders, VAE) is left out. Names
    that are none of these stay, for the caller to refuse.

    Raises:
        ValueError: the weights are a LoRA, or have Latent Diffusion names that do not fit the configuration.
    """
    names = translated_names(weights.shapes, model_names, config, weights.label)
    return weights if names is None else RenamedWeights(weights, names)


def named_alike(one: Weights, other: Weights, config: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """Two UNets' weights under the same names, diffusers' where they differ; `config` as in `named_as_model`.

    Raises:
        ValueError: as `named_as_model`.
    """
    if one.shapes.keys() == other.shapes.keys():
        return one, other
    known = unet_names((*one.shapes, *other.shapes))
    return named_as_model(one, known, config), named_as_model(other, known, config)


def translated_names(
    names: Iterable[str], model_names: Iterable[str], config: Mapping[str, Any], label: str
) -> dict[str, str] | None:
    """What `named_as_model` renames: {new name: old name}; None where nothing is to be renamed."""
    names, known = list(names), set(model_names)
    if not known.isdisjoint(names):
        return None
    lora = [name for name in names if _LORA.search(name)]
    if lora:
        raise ValueError(
            f"{label} is a LoRA ({listed(lora, limit=2)}), no delta of full weights; load it with load_lora_weights."
        )
    short = {_without_prefixes(name): name for name in names}
    if not known.isdisjoint(short):
        return short
    unet = {
        name if name.startswith(LDM_PREFIX) else LDM_PREFIX + name: original
        for name, original in short.items()
        if name.startswith((LDM_PREFIX, *_LDM_UNET))
    }
    return _from_latent_diffusion(unet, config, label) if unet else None


def _from_latent_diffusion(unet: dict[str, str], config: Mapping[str, Any], label: str) -> dict[str, str]:
    if any(key not in config for key in _CONFIG_KEYS):
        raise ValueError(
            f"{label} has original Latent Diffusion names, which it takes the UNet's configuration to translate; pass "
            "config= with the UNet's configuration (on the command line --config with its folder)."
        )
    try:
        # The converter moves values from name to name: given the old names for values it returns the translation.
        translated = convert_ldm_unet_checkpoint({**_every_block(config), **unet}, dict(config))
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{label} has Latent Diffusion names that are not this UNet's ({error} is missing); "
            "pass a delta that was extracted from the same architecture."
        ) from error
    lost = sorted(set(unet.values()) - set(translated.values()))
    if lost:
        raise ValueError(
            f"{label}: {len(lost)} Latent Diffusion names have no place in this UNet ({listed(lost)}); "
            "pass a delta that was extracted from the same architecture."
        )
    originals = set(unet.values())
    return {new: old for new, old in translated.items() if old in originals}


def _every_block(config: Mapping[str, Any]) -> dict[str, str]:
    """A name in every block, of no layer. The converter counts the blocks, which a partial delta may leave out."""
    count = len(config["block_out_channels"]) * (config["layers_per_block"] + 1)
    numbers = {"input_blocks": count, "middle_block": 3, "output_blocks": count}
    return {f"{LDM_PREFIX}{kind}.{i}.9.none": "" for kind, number in numbers.items() for i in range(number)}


def unet_names(names: Iterable[str]) -> set[str]:
    """Those that a UNet of diffusers has, or may have, without what wrappers put before them."""
    return {short for name in names if (short := _without_prefixes(name)).split(".")[0] in UNET_PARTS}


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name
