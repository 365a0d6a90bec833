"""What a LoRA is made from: the tensors of a UNet's delta, in memory or in a file, and which are factorised."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.delta import is_finite, listed
from .delta_recipe import DeltaRecipe

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

KEPT_IN_FULL = ("time_embedding*", "add_embedding*", "class_embedding*")
"""Patterns of the modules that the residual always holds; diffusers cannot read the kohya names of some of them."""


def factorised_modules(tensors: Mapping[str, Tensor], keep: Sequence[str]) -> dict[str, str]:
    """What is to be factorised: the module by the key of its weight. Reads every tensor once, to check its values.

    These are the linear and convolution layers, less the embeddings and the modules that a pattern of `keep` matches.

    Raises:
        ValueError: a delta that is empty or no UNet's, values that are not finite, or a pattern that matches nothing.
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
    unmatched = [p for p in keep if not fnmatch.filter(modules.values(), p)]
    if unmatched:
        raise ValueError(
            f"keep={list(keep)}: {listed(unmatched)} matches no linear or convolution layer of the delta; name "
            f"modules as in {next(iter(modules.values()), 'conv_in')!r}."
        )
    kept = (*KEPT_IN_FULL, *keep)
    return {name: module for name, module in modules.items() if not any(fnmatch.fnmatchcase(module, p) for p in kept)}


class _FileTensors(Mapping[str, Tensor]):
    """The tensors of an opened safetensors file; each is read when it is asked for and not kept."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def opened_tensors(
    delta: Mapping[str, Tensor] | str | os.PathLike[str],
) -> Iterator[tuple[Mapping[str, Tensor], DeltaRecipe]]:
    """The delta's tensors by name, and its recipe; those of a file are read one at a time, as they are asked for.

    Raises:
        ValueError: there is no such file, or it is broken.
    """
    if isinstance(delta, Mapping):
        yield delta, DeltaRecipe()
        return
    if not isinstance(delta, (str, os.PathLike)):
        raise ValueError(f"delta is a {type(delta).__name__}; pass what extract_delta returned, or a file's path.")
    path = Path(delta)
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"delta {path} {kind}; pass the path of a .safetensors file.")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); download or extract it again.") from error
    with file as opened:
        yield _FileTensors(opened), DeltaRecipe.from_metadata(opened.metadata() or {})
