"""A delta as a LoRA: each linear and convolution layer's dW as a product of two thin matrices.

A LoRA is smaller than the delta, can be scaled and mixed with others at run time, and unloading removes it. Norms and
biases, which it cannot hold, and the embeddings of time and size, which every layer reads, form the residual: a small
partial delta to merge beside it. What is lost is the share of dW above the rank.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_files import atomic_path
from ..core.low_rank import (
    Factors,
    balanced_factors,
    kept_energy,
    leading_spectrum,
    rank_for_energy,
    squared_error,
)
from ..core.windows import require_positive_int
from .apply import PARTIAL_KEY
from .files import (
    WHOLE_NORM,
    Delta,
    Weights,
    is_finite,
    listed,
    mean_norm_scale,
    named_as_model,
    opened,
    read_recipe,
    unet_names,
)
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
        squared_error: that of dW less the product of the factors as they are stored, so with their rounding.
        note: why the rank is not the one asked for; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    squared_norm: float
    squared_error: float
    note: str = ""

    @property
    def full_rank(self) -> int:
        """The most that the shape allows, min(out, in * k * k)."""
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def relative_error(self) -> float:
        """Norm of the error over norm of dW, at least 0; 0 for a layer that the delta does not change."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """The layers of a LoRA in the delta's order, and the residual; printed as a Markdown table.

    Attributes:
        layers: of the LoRA; none for a LoRA that was trained, not made from a delta.
        residual: number of tensors kept in full.
        residual_parameters: numbers in them.
        residual_squared_norm: sum of their squares.
        delta_parameters: numbers in the whole delta.
    """

    layers: tuple[LoraLayer, ...] = ()
    residual: int = 0
    residual_parameters: int = 0
    residual_squared_norm: float = 0.0
    delta_parameters: int = 0

    @property
    def energy(self) -> float:
        """Share of the squared norm of all factorised layers that was kept, in [0, 1]."""
        total = sum(layer.squared_norm for layer in self.layers)
        return sum(layer.energy * layer.squared_norm for layer in self.layers) / total if total else 1.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over that of the whole delta, including the residual, which has no error."""
        error = sum(layer.squared_error for layer in self.layers)
        whole = sum(layer.squared_norm for layer in self.layers) + self.residual_squared_norm
        return math.sqrt(error / whole) if whole else 0.0

    @property
    def parameters(self) -> int:
        """Numbers in the LoRA, without the residual."""
        return sum(layer.rank * (layer.shape[0] + math.prod(layer.shape[1:])) for layer in self.layers)

    def summary(self) -> str:
        """The whole in one line of text."""
        ranks = [layer.rank for layer in self.layers if layer.rank]
        span = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no rank"
        return (
            f"{len(ranks)} layers, {span}, {self.parameters:,} numbers; {self.residual} tensors kept in full, "
            f"{self.residual_parameters:,} numbers; of {self.delta_parameters:,} in the delta. "
            f"Energy kept {100 * self.energy:.2f} %, relative error {self.relative_error:.4f}, "
            f"{sum(1 for layer in self.layers if layer.note)} layers of another rank than asked for."
        )

    def table(self, layers: Sequence[LoraLayer] | None = None) -> str:
        """The given layers, by default all, as a Markdown table, energy in per cent."""
        lines = ["| layer | shape | rank | energy kept % | relative error | note |", "|---|---|---|---|---|---|"]
        for layer in self.layers if layers is None else layers:
            shape = " x ".join(map(str, layer.shape))
            lines.append(
                f"| {layer.name} | {shape} | {layer.rank} of {layer.full_rank} | {100 * layer.energy:.2f} | "
                f"{layer.relative_error:.4f} | {layer.note} |"
            )
        return "\n".join(lines)

    def worst(self, count: int) -> tuple[LoraLayer, ...]:
        """The `count` layers that lose most of their energy, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.energy)[:count])

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"


@dataclass(frozen=True, kw_only=True)
class DeltaLora:
    """A delta in two parts: W + dW is about W + up @ down, and exact where the residual holds it.

    Attributes:
        lora: `unet.<module>.lora_A.weight`, (rank, in) or (rank, in, k, k), and `unet.<module>.lora_B.weight`,
            (out, rank) or (out, rank, 1, 1), as peft and diffusers name them; to be applied with factor 1.
        residual: the rest of the delta by the UNet's own keys; may be empty.
        report: what was kept and lost.
        recipe: how the delta is to be sampled.
    """

    lora: Mapping[str, Tensor]
    residual: Mapping[str, Tensor]
    report: LoraReport
    recipe: DeltaRecipe


def delta_to_lora(
    delta: Delta,
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
    """Factorises a UNet's delta layer by layer by truncated singular value decomposition.

    Memory holds the result and one layer. diffusers' progress bar shows the layers;
    `diffusers.utils.logging.disable_progress_bar()` hides it.

    Args:
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        rank: of every layer; one that allows less gets what it allows, and the report says so.
        energy: instead of `rank`, the share in (0, 1] of each layer's squared Frobenius norm to keep; each layer gets
            the least rank that does, up to `max_rank`.
        max_rank: the bound under `energy`.
        keep: `fnmatch` patterns of further modules for the residual to hold in full: `["conv_in"]` for a LoRA that
            UNets with other input channels, as for inpainting, can load too.
        dtype: in which factors and residual are stored; they are computed in float32 or better.
        device: where to compute, for example "cuda"; by default where the delta is. The result is on the CPU.
        recipe: how the delta is to be sampled; by default what the file says.
        config: the configuration of the UNet, by which the original Latent Diffusion names of a delta are translated.

    Raises:
        ValueError: neither or both of rank and energy, or one out of range; an unusable file or device; a delta that
            is empty, not of a UNet, whole weights, without a changed layer, or not finite (in `dtype`).
    """
    _require_settings(rank, energy, max_rank, keep, dtype, device)
    given = opened(delta)
    weights = named_as_model(given, unet_names(given.shapes), config or {})
    modules = _factorised_modules(weights, keep)
    lora: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    layers: list[LoraLayer] = []
    residual_norm = 0.0
    for name in logging.tqdm(weights.shapes, desc="delta to LoRA", unit="tensor"):
        tensor = weights.tensor(name)
        if name in modules:
            layer, pair = _factorise(modules[name], tensor.to(device), rank, energy, max_rank, dtype)
            layers.append(layer)
            lora |= pair
        else:
            residual[name] = _stored(tensor, dtype, name)
            residual_norm += float(tensor.double().square().sum())
    if not lora:
        raise ValueError("the delta changes no linear or convolution layer; merge it as it is.")
    report = LoraReport(
        layers=tuple(layers),
        residual=len(residual),
        residual_parameters=sum(tensor.numel() for tensor in residual.values()),
        residual_squared_norm=residual_norm,
        delta_parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
    )
    return DeltaLora(lora=lora, residual=residual, report=report, recipe=recipe or read_recipe(given))


def _require_settings(
    rank: int | None, energy: float | None, max_rank: int, keep: Sequence[str], dtype: torch.dtype, device: Any
) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: pass exactly one of the two.")
    if rank is not None:
        require_positive_int("rank", rank)
    require_positive_int("max_rank", max_rank)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must be a share in (0, 1], 0.9 for instance.")
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} must be a list of patterns: keep=[{keep!r}].")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type: torch.float16, bfloat16 or float32.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={device!r} cannot be used here ({reason}); pass 'cpu' or leave it out.") from error


def _factorised_modules(weights: Weights, keep: Sequence[str]) -> dict[str, str]:
    """The modules to factorise, by the key of their weight. Reads every tensor once, to check its values.

    These are the linear and convolution layers, less the embeddings and the modules that a pattern of `keep` matches.
    """
    foreign = [name for name in weights.shapes if name not in unet_names([name])]
    if foreign:
        raise ValueError(
            f"{len(foreign)} tensors are not weights of a UNet ({listed(foreign)}); pass a delta of a UNet, by its "
            "own state-dict keys."
        )
    bad = [name for name in weights.shapes if not is_finite(weights.tensor(name))]
    if bad:
        raise ValueError(f"{len(bad)} tensors hold values that are not finite ({listed(bad)}); extract it again.")
    if (mean_norm_scale(weights) or 0.0) > WHOLE_NORM:
        raise ValueError(
            "these are a model's whole weights, not their difference from a base; pass a delta, such as what "
            "open_difference(it, base) or perflow extract gives."
        )
    shapes = {name: shape for name, shape in weights.shapes.items() if name.endswith(".weight") and 0 not in shape}
    modules = {name: name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) in (2, 4)}
    unmatched = [pattern for pattern in keep if not any(fnmatchcase(m, pattern) for m in modules.values())]
    if unmatched:
        raise ValueError(f"keep={list(keep)}: {listed(unmatched)} matches no linear or convolution layer.")
    kept = (*KEPT_IN_FULL, *keep)
    return {name: module for name, module in modules.items() if not any(fnmatchcase(module, p) for p in kept)}


def _factorise(
    module: str, tensor: Tensor, rank: int | None, energy: float | None, max_rank: int, dtype: torch.dtype
) -> tuple[LoraLayer, dict[str, Tensor]]:
    """The module's line of the report and its pair of tensors; none for a dW of zeros."""
    shape = tuple(tensor.shape)
    matrix = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).flatten(1)
    full_rank = min(matrix.shape)
    spectrum = leading_spectrum(matrix, min(rank or max_rank, full_rank))
    note = ""
    if not spectrum.squared_norm:
        chosen, note = 0, "not changed"
    elif rank is not None:
        chosen = min(rank, full_rank)
        note = "" if chosen == rank else f"clipped from {rank}"
    else:
        assert energy is not None
        chosen = rank_for_energy(spectrum, energy)
        if chosen == max_rank < full_rank and kept_energy(spectrum, chosen) < energy:
            note = f"stopped at max_rank={max_rank}"
    pair: dict[str, Tensor] = {}
    error = 0.0
    if chosen:
        factors = balanced_factors(spectrum, chosen)
        name = f"{PREFIX}{module}.lora_"
        down = _stored(factors.down, dtype, f"{name}A.weight")
        up = _stored(factors.up, dtype, f"{name}B.weight")
        error = squared_error(matrix, Factors(up=up.to(matrix.device), down=down.to(matrix.device)))
        pair = {
            f"{name}A.weight": down.reshape(chosen, *shape[1:]),
            f"{name}B.weight": up.reshape(shape[0], chosen, *(1 for _ in shape[2:])),
        }
    kept, norm = kept_energy(spectrum, chosen), spectrum.squared_norm
    layer = LoraLayer(
        name=module, shape=shape, rank=chosen, energy=kept, squared_norm=norm, squared_error=error, note=note
    )
    return layer, pair


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not is_finite(stored):
        raise ValueError(f"{name} is too large for {dtype}; pass dtype=torch.float32.")
    return stored


def save_lora(converted: DeltaLora, path: str | os.PathLike[str], layout: Layout = "peft") -> None:
    """Writes the LoRA for `pipe.load_lora_weights(path)`, with the recipe; the file appears complete or not at all.

    `layout` "peft" is what diffusers writes itself. Its metadata hold each layer's rank and alpha, for readers that
    would otherwise use one layer's alpha for all. "kohya" is what other programs read (`lora_unet_...`, with alphas).

    Raises:
        ValueError: an unknown layout, values that the kohya factors cannot hold in their type, or a path that cannot
            be written.
    """
    metadata = {"format": "pt", **converted.recipe.to_metadata()}
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}.")
    if layout == "peft":
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(peft_settings(converted.lora), sort_keys=True)
    _write(converted.lora if layout == "peft" else kohya_state_dict(converted.lora), path, metadata)


def save_residual(converted: DeltaLora, path: str | os.PathLike[str]) -> None:
    """Writes what is not in the LoRA as a partial delta with the recipe, to be merged beside it."""
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

    Where alphas differ, diffusers 0.42 gives attention layers the most common one. A layer of another rank has the
    ratio in its factors instead: readers multiply by alpha / rank.
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
    return converted | {name: torch.tensor(float(alpha)) for name in converted if name.endswith(".alpha")}


def _write(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot write {path}: {error}; check the disk's free space and permissions.") from error
