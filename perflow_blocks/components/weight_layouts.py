"""Where weights lie and what they are called: folders, variants, shards, and the names that other tools give."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..core.delta import listed
from .weight_files import FileWeights, MappingWeights, RenamedWeights, Weights

PREFIXES = ("module.", "_orig_mod.", "unet.", "_fsdp_wrapped_module.")
"""What wrappers put before the names of all weights: of distributed training, compilation, and pipelines."""

LDM_PREFIX = "model.diffusion_model."
_LDM_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_LORA = re.compile(r"lora|\.alpha$|hada_|lokr_", re.IGNORECASE)
_STEM = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def open_weights(path: str | os.PathLike[str], variant: str | None = None, *, allow_pickle: bool = False) -> Weights:
    """The weights at a path: a file, the index of shards, or a folder of either, as diffusers saves models.

    A folder may be the model's own or a pipeline's, whose UNet is then meant; `variant` chooses among several files.
    Pickles (.bin, .pt, .ckpt) are read only with `allow_pickle`, memory-mapped and without running code of theirs.

    Raises:
        ValueError: nothing there, several variants and none named, a file that is broken, or a pickle.
    """
    path = Path(path).expanduser()
    found = _in_folder(path, variant) if path.is_dir() else path
    if found.name.endswith(".index.json"):
        return FileWeights(_shards(found), label=path)
    if found.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _pickled(found, allow_pickle)
    return FileWeights([found], label=path)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's, or of one of its relatives."""
    return any(_LORA.search(name) for name in names)


def _in_folder(folder: Path, variant: str | None) -> Path:
    for place in (folder, folder / "unet"):
        files = {_variant(file.name): file for file in sorted(place.glob(f"{_STEM}*")) if _is_whole(file)}
        # An index comes after the files in order of names, so that of two ways to store one variant it is taken.
        safe = {kind: file for kind, file in files.items() if file.suffix in (".safetensors", ".json")}
        if variant in safe:
            return safe[variant]
        if safe:
            names = ", ".join(repr(kind) for kind in safe)
            asked = "no variant was named" if variant is None else f"not {variant!r}"
            raise ValueError(f"{place} holds the variants {names} and {asked}; pass variant= with one of them.")
        if files:
            raise ValueError(
                f"{place} holds pickles only ({listed([f.name for f in files.values()])}); pass the file."
            )
    raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; it is a directory: pass a UNet's, or a file.")


def _is_whole(file: Path) -> bool:
    """Whether it is a checkpoint or the index of one, and no shard."""
    kinds = (".safetensors", ".safetensors.index.json", ".bin")
    indexed = re.fullmatch(r".*\.safetensors\.index(\..+)?\.json", file.name) is not None
    return indexed or (file.name.endswith(kinds) and not _SHARD.search(file.stem.split(".")[0]))


def _variant(name: str) -> str | None:
    rest = name.removeprefix(_STEM).removesuffix(".json")
    for word in (".safetensors", ".index", ".bin"):
        rest = rest.replace(word, "")
    return rest.removeprefix(".") or None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error}); download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ValueError(f"{index} names shards that are not there ({listed(missing)}); download them too.")
    return [index.parent / name for name in names]


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
    names, known = list(weights.shapes), set(model_names)
    if not known.isdisjoint(names):
        return weights
    lora = [name for name in names if _LORA.search(name)]
    if lora:
        raise ValueError(
            f"{weights.label} is a LoRA ({listed(lora, limit=2)}), no delta of full weights; "
            "load it with load_lora_weights."
        )
    short = {_without_prefixes(name): name for name in names}
    if not known.isdisjoint(short):
        return RenamedWeights(weights, short)
    unet = {
        name if name.startswith(LDM_PREFIX) else LDM_PREFIX + name: original
        for name, original in short.items()
        if name.startswith((LDM_PREFIX, *_LDM_UNET))
    }
    if not unet:
        return weights
    try:
        # The converter moves values from name to name: given the old names for values it returns the translation.
        translated = convert_ldm_unet_checkpoint({**_every_block(config), **unet}, dict(config))
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{weights.label} has Latent Diffusion names that are not this UNet's ({error} is missing); "
            "pass a delta that was extracted from the same architecture."
        ) from error
    lost = sorted(set(unet.values()) - set(translated.values()))
    if lost:
        raise ValueError(
            f"{weights.label}: {len(lost)} Latent Diffusion names have no place in this UNet ({listed(lost)}); "
            "pass a delta that was extracted from the same architecture."
        )
    return RenamedWeights(weights, {new: old for new, old in translated.items() if old in weights.shapes})


def _every_block(config: Mapping[str, Any]) -> dict[str, str]:
    """A name in every block, of no layer. The converter counts the blocks, which a partial delta may leave out."""
    count = len(config["block_out_channels"]) * (config["layers_per_block"] + 1)
    numbers = {"input_blocks": count, "middle_block": 3, "output_blocks": count}
    return {f"{LDM_PREFIX}{kind}.{i}.9.none": "" for kind, number in numbers.items() for i in range(number)}


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name
