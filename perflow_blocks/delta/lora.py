"""A delta as a LoRA: each linear and convolution layer's dW as a product of two thin matrices.

What a LoRA cannot hold (norms and biases), and the embeddings of time and size, which every layer reads, form the
residual: a small partial delta to merge beside it. What is lost is the share of dW above the rank.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import Tensor

from ..atomic_files import atomic_path
from ..core import low_rank
from ..core.windows import require_positive_int
from . import files
from .extract import save_delta, write_tensors
from .recipe import DeltaRecipe

PREFIX = "unet."
"""What LoRA files put before the names of the UNet's modules."""

KEPT_IN_FULL = ("time_embedding*", "add_embedding*", "class_embedding*")
"""Patterns of the modules that the residual always holds; diffusers cannot read the kohya names of some of them."""

Layout = Literal["peft", "kohya"]


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One layer of the LoRA.

    Attributes:
        name: the UNet's module.
        shape: of its weight: (out, in), or (out, in, k, k).
        rank: of the factors; 0 for a layer that the delta does not change, which the LoRA leaves out.
        energy: share of dW's squared Frobenius norm in the singular values that were kept, in [0, 1].
        squared_norm: dW's squared Frobenius norm.
        relative_error: norm of dW less the product of the factors as they are stored, over norm of dW; at least 0.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    squared_norm: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What was kept and lost; prints as a line of text.

    Attributes:
        layers: in the delta's order.
        parameters, residual_parameters, delta_parameters: numbers in the LoRA, beside it, and in the whole delta.
        energy: share of the squared norm of all factorized layers that was kept, in [0, 1].
        relative_error: norm of the error over that of the whole delta, including the residual, which has no error.
    """

    layers: tuple[LoraLayer, ...] = ()
    parameters: int = 0
    residual_parameters: int = 0
    delta_parameters: int = 0
    energy: float = 1.0
    relative_error: float = 0.0

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers if layer.rank] or [0]
        return (
            f"{len(self.layers)} layers, rank {min(ranks)} to {max(ranks)}, {self.parameters:,} numbers; "
            f"{self.residual_parameters:,} numbers kept in full; of {self.delta_parameters:,} in the delta. "
            f"Energy kept {100 * self.energy:.2f} %, relative error {self.relative_error:.4f}."
        )


@dataclass(frozen=True, kw_only=True)
class DeltaLora:
    """A delta in two parts: W + dW is about W + up @ down, and exact where the residual holds it.

    Attributes:
        lora: `unet.<module>.lora_A.weight`, (rank, in) or (rank, in, k, k), and `unet.<module>.lora_B.weight`,
            (out, rank) or (out, rank, 1, 1), as peft and diffusers name them; to be applied with factor 1.
        residual: the rest of the delta by the UNet's own keys; may be empty.
        report: what was kept and lost.
        recipe: how the delta is to be sampled.
        digest: the delta's `identity_of`, which a `MergeRecord` has too; empty where it is not known.
    """

    lora: Mapping[str, Tensor]
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    report: LoraReport = LoraReport()
    recipe: DeltaRecipe
    digest: str = ""


def delta_to_lora(
    delta: files.Delta,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 128,
    keep: Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    recipe: DeltaRecipe | None = None,
    config: Mapping[str, Any] | None = None,
) -> DeltaLora:
    """Factorizes a UNet's delta layer by layer by truncated singular value decomposition.

    Memory holds the result and one layer. diffusers' progress bar shows the layers.

    Args:
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        rank: of every layer; a layer whose full rank is lower gets that, and the report says so.
        energy: instead of `rank`, the share in (0, 1] of each layer's squared Frobenius norm to keep; each layer gets
            the least rank that does, up to `max_rank`.
        max_rank: the bound under `energy`.
        keep: `fnmatch` patterns of further modules for the residual to hold in full: `["conv_in"]` for a LoRA that
            UNets with other input channels, as for inpainting, can load too.
        dtype: in which factors and residual are stored; they are computed in float32 or better.
        device: where to compute, for example "cuda"; by default where the delta is. The result is on the CPU.
        recipe: how the delta is to be sampled; by default what the file says.
        config: the configuration of the UNet, to translate the original Latent Diffusion names of a delta.

    Raises:
        ValueError: neither or both of rank and energy, or one out of range; an unusable file; a delta that is empty,
            not of a UNet, whole weights, without a changed layer, or not finite (in `dtype`).
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: pass exactly one of the two.")
    require_positive_int("max_rank", max_rank)
    bound = max_rank if rank is None else rank
    require_positive_int("rank", bound)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must be a share in (0, 1], for example 0.9.")
    given = files.opened(delta)
    weights = files.named_as_model(given, files.unet_names(given.shapes), config or {})
    modules = _factorized_modules(weights, keep)
    lora: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    layers: list[LoraLayer] = []
    residual_norm = 0.0
    for name in logging.tqdm(weights.shapes, desc="delta to LoRA", unit="tensor"):
        tensor = weights.tensor(name)
        if not files.is_finite(tensor):
            raise ValueError(f"the delta is not finite ({name}); extract it again.")
        if name in modules:
            layer, pair = _factorize(modules[name], tensor.to(device), bound, energy, dtype)
            layers.append(layer)
            lora |= pair
        else:
            residual[name] = _stored(tensor, dtype, name)
            residual_norm += float(tensor.double().square().sum())
    if not lora:
        raise ValueError("the delta changes no linear or convolution layer; merge it as it is.")
    norm = sum(layer.squared_norm for layer in layers)
    error = sum(layer.relative_error**2 * layer.squared_norm for layer in layers)
    report = LoraReport(
        layers=tuple(layers),
        parameters=sum(tensor.numel() for tensor in lora.values()),
        residual_parameters=sum(tensor.numel() for tensor in residual.values()),
        delta_parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
        energy=sum(layer.energy * layer.squared_norm for layer in layers) / norm,
        relative_error=math.sqrt(error / (norm + residual_norm)),
    )
    recipe, digest = recipe or files.read_recipe(given), files.identity_of(weights)
    return DeltaLora(lora=lora, residual=residual, report=report, recipe=recipe, digest=digest)


def _factorized_modules(weights: files.Weights, keep: Sequence[str]) -> dict[str, str]:
    """The modules to factorize by the key of their weight: the linear and convolution layers that are not kept."""
    foreign = [name for name in weights.shapes if name not in files.unet_names([name])]
    if foreign:
        raise ValueError(
            f"{len(foreign)} tensors are not weights of a UNet ({files.listed(foreign)}); pass a UNet's delta."
        )
    shapes = {name: shape for name, shape in weights.shapes.items() if name.endswith(".weight") and 0 not in shape}
    modules = {name: name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) in (2, 4)}
    unmatched = [pattern for pattern in keep if not any(fnmatchcase(m, pattern) for m in modules.values())]
    if unmatched:
        raise ValueError(f"keep={list(keep)}: {files.listed(unmatched)} matches no linear or convolution layer.")
    if files.holds_differences(weights) is False:
        raise ValueError(
            "these are a model's whole weights, not their difference from a base; pass a delta, such as what "
            "open_difference(it, base) or perflow extract gives."
        )
    kept = (*KEPT_IN_FULL, *keep)
    return {name: module for name, module in modules.items() if not any(fnmatchcase(module, p) for p in kept)}


def _factorize(
    module: str, tensor: Tensor, bound: int, energy: float | None, dtype: torch.dtype
) -> tuple[LoraLayer, dict[str, Tensor]]:
    """A module's line of the report and its pair of tensors, at the rank `bound`, or up to it for a given energy."""
    shape = tuple(tensor.shape)
    matrix = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).flatten(1)
    most = min(bound, *matrix.shape)
    spectrum = low_rank.leading_spectrum(matrix, most)
    norm = spectrum.squared_norm
    rank = 0 if not norm else most if energy is None else low_rank.rank_for_energy(spectrum, energy)
    pair: dict[str, Tensor] = {}
    error = 0.0
    if rank:
        factors = low_rank.balanced_factors(spectrum, rank)
        name = f"{PREFIX}{module}.lora_"
        down = _stored(factors.down, dtype, f"{name}A.weight")
        up = _stored(factors.up, dtype, f"{name}B.weight")
        stored = low_rank.Factors(up=up.to(matrix.device), down=down.to(matrix.device))
        error = math.sqrt(low_rank.squared_error(matrix, stored) / norm)
        pair = {
            f"{name}A.weight": down.reshape(rank, *shape[1:]),
            f"{name}B.weight": up.reshape(shape[0], rank, *(1 for _ in shape[2:])),
        }
    kept = low_rank.kept_energy(spectrum, rank)
    layer = LoraLayer(name=module, shape=shape, rank=rank, energy=kept, squared_norm=norm, relative_error=error)
    return layer, pair


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not files.is_finite(stored):
        raise ValueError(f"{name} is too large for {dtype}; pass dtype=torch.float32.")
    return stored


def save_lora(converted: DeltaLora, path: str | os.PathLike[str], layout: Layout = "peft") -> None:
    """Writes the LoRA for `pipe.load_lora_weights(path)`, with the recipe; the file appears complete or not at all.

    The metadata name the delta, in `perflow_delta`: a UNet that has it merged already must not get the LoRA too. The
    same LoRA gives the same bytes.

    `layout` "peft" is what diffusers writes itself, with each layer's rank and alpha in the metadata. "kohya" is what
    other programs read (`lora_unet_...`, with alphas).

    Raises:
        ValueError: an unknown layout, factors too large for their type in the kohya layout, or an unwritable path.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}.")
    metadata = converted.recipe.to_metadata()
    if converted.digest:
        metadata[files.DIGEST_KEY] = converted.digest
    if layout == "peft":
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(peft_settings(converted.lora), sort_keys=True)
    tensors = converted.lora if layout == "peft" else kohya_state_dict(converted.lora)
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        write_tensors(temporary, types, tensors.__getitem__, metadata)


def save_residual(converted: DeltaLora, path: str | os.PathLike[str]) -> None:
    """Writes what is not in the LoRA as a partial delta with the recipe, to be merged beside it."""
    if not converted.residual:
        raise ValueError(f"the LoRA holds the whole delta, so there is no residual for {path}; leave the file out.")
    dtype = next(iter(converted.residual.values())).dtype
    save_delta(converted.residual, path, converted.recipe, dtype, partial=True)


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

    Where alphas differ, diffusers 0.42 gives attention layers the most common one. A layer of another rank has the
    ratio in its factors instead: readers multiply by alpha / rank.
    """
    alpha = Counter(tensor.shape[1] for name, tensor in lora.items() if ".lora_B." in name).most_common(1)[0][0]
    scaled = {}
    for name, tensor in lora.items():
        rank = tensor.shape[1] if ".lora_B." in name else tensor.shape[0]
        scaled[name] = tensor if rank == alpha else _stored(tensor.float() * (rank / alpha) ** 0.5, tensor.dtype, name)
    converted = convert_state_dict_to_kohya(scaled)
    # float32, as half precision rounds alphas above 2048.
    return converted | {name: torch.tensor(float(alpha)) for name in converted if name.endswith(".alpha")}
