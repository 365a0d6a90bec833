"""What a LoRA is made from: the tensors of a UNet's delta in any layout, and which of them are factorised."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .files import Weights
from .merge import Delta, read_recipe
from .recipe import DeltaRecipe
from .summary import hold_whole
from .tensors import is_finite, listed
from .weight_layouts import UNET_PARTS, open_weights, translated_names, unet_names

KEPT_IN_FULL = ("time_embedding*", "add_embedding*", "class_embedding*")
"""Patterns of the modules that the residual always holds; diffusers cannot read the kohya names of some of them."""


def factorised_modules(tensors: Mapping[str, Tensor], keep: Sequence[str]) -> dict[str, str]:
    """What is to be factorised: the module by the key of its weight. Reads every tensor once, to check its values.

    These are the linear and convolution layers, less the embeddings and the modules that a pattern of `keep` matches.

    Raises:
        ValueError: a delta that is empty or no UNet's, values that are not finite, whole weights, or a pattern that
            matches nothing.
    """
    if not len(tensors):
        raise ValueError("the delta holds no tensors; pass what extract_delta returned.")
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is one string; pass a list of patterns: keep=[{keep!r}].")
    foreign = [name for name in tensors if name.split(".")[0] not in UNET_PARTS]
    if foreign:
        raise ValueError(
            f"{len(foreign)} tensors are no weights of a UNet ({listed(foreign)}); pass a delta of a UNet, by its own "
            "state-dict keys."
        )
    bad: list[str] = []
    modules: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor):
            bad.append(name)
        elif name.endswith(".weight") and tensor.ndim in (2, 4) and tensor.numel():
            modules[name] = name.removesuffix(".weight")
    if bad:
        raise ValueError(
            f"{len(bad)} tensors hold values that are no finite numbers ({listed(bad)}); extract it again."
        )
    if hold_whole(tensors, tensors.__getitem__):
        raise ValueError(
            "these are a model's whole weights, not their difference from a base; pass a delta, such as what "
            "open_difference(it, base) or perflow extract gives."
        )
    unmatched = [p for p in keep if not fnmatch.filter(modules.values(), p)]
    if unmatched:
        raise ValueError(
            f"keep={list(keep)}: {listed(unmatched)} matches no linear or convolution layer of the delta; name "
            f"modules as in {next(iter(modules.values()), 'conv_in')!r}."
        )
    kept = (*KEPT_IN_FULL, *keep)
    return {name: module for name, module in modules.items() if not any(fnmatch.fnmatchcase(module, p) for p in kept)}


class _NamedTensors(Mapping[str, Tensor]):
    """Tensors under other names, {new: old}; each is read when it is asked for and not kept."""

    def __init__(self, tensors: Mapping[str, Tensor] | Weights, names: Mapping[str, str]) -> None:
        self._read = tensors.tensor if isinstance(tensors, Weights) else tensors.__getitem__
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def opened_tensors(delta: Delta, config: Mapping[str, Any] | None = None) -> tuple[Mapping[str, Tensor], DeltaRecipe]:
    """The delta's tensors by a UNet's own names, and its recipe; those of a file are read as they are asked for.

    Raises:
        ValueError: there is no such file, it is broken or a LoRA, or has original names that `config` does not fit.
    """
    if isinstance(delta, (str, os.PathLike)):
        delta = open_weights(delta)
    if isinstance(delta, Weights):
        names, label, recipe = list(delta.shapes), delta.label, read_recipe(delta)
    elif isinstance(delta, Mapping):
        names, label, recipe = list(delta), "the mapping", DeltaRecipe()
    else:
        raise ValueError(f"delta is a {type(delta).__name__}; pass what extract_delta returned, or a file's path.")
    renamed = translated_names(names, unet_names(names), config or {}, label)
    if renamed is None and isinstance(delta, Mapping):
        return delta, recipe
    return _NamedTensors(delta, renamed or dict(zip(names, names, strict=True))), recipe
