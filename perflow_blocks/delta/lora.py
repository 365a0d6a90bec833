"""A delta as a LoRA: each linear and convolution layer's dW as a product of two thin matrices.

A LoRA is smaller than the delta, can be scaled and mixed with others at run time, and is taken out by unloading. What
it cannot hold (norms, biases) and what little it should not (the embeddings of time and size, which every layer reads)
is the residual, a small partial delta to merge beside it. What is lost is the share of dW above the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..core.low_rank import (
    as_matrix,
    balanced_factors,
    kept_energy,
    leading_spectrum,
    rank_for_energy,
    squared_error,
)
from .lora_input import factorised_modules, opened_tensors
from .lora_report import LoraLayer, LoraReport
from .merge import Delta
from .recipe import DeltaRecipe
from .tensors import is_finite

PREFIX = "unet."
"""What LoRA files put before the names of the UNet's modules."""


@dataclass(frozen=True, kw_only=True)
class DeltaLora:
    """A delta in two parts, W + dW being about W + up @ down, and exactly the residual where it speaks.

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


@dataclass(frozen=True, kw_only=True)
class _Target:
    """How ranks are chosen: one for all layers, or the least that keeps a share of the energy, up to a bound."""

    rank: int | None
    energy: float | None
    max_rank: int

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError(f"rank={self.rank} and energy={self.energy}: pass exactly one of the two.")
        for name, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} is no positive whole number; pass at least 1, 64 for instance.")
        if self.energy is not None and not _is_share(self.energy):
            raise ValueError(f"energy={self.energy!r} is not in (0, 1]; pass a share to keep, 0.9 for instance.")

    @property
    def most(self) -> int:
        return self.max_rank if self.rank is None else self.rank


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

    Files are read one tensor at a time, so memory holds the result and one layer. diffusers' progress bar shows the
    layers; `diffusers.utils.logging.disable_progress_bar()` hides it.

    Args:
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        rank: of every layer; one that allows less gets what it allows, and the report says so.
        energy: instead of `rank`, the share in (0, 1] of each layer's squared Frobenius norm to keep; each layer gets
            the least rank that does, up to `max_rank`.
        max_rank: the bound under `energy`.
        keep: patterns, as of `fnmatch`, of further modules that the residual is to hold in full. `["conv_in"]`, say,
            for a LoRA that UNets with other input channels, as for inpainting, can load too.
        dtype: in which factors and residual are stored; computed is in float32 or better.
        device: where to compute, "cuda" say; by default where the delta's tensors are. The result is on the CPU.
        recipe: how the delta is to be sampled; by default what the file says.
        config: the configuration of the UNet, by which the original Latent Diffusion names of a delta are translated.

    Raises:
        ValueError: neither or both of rank and energy, or one out of range; a delta that is empty, is no UNet's, or
            that changes no layer; whole weights; values that are not finite, or are not in `dtype`; an unusable file
            or device.
    """
    target = _Target(rank=rank, energy=energy, max_rank=max_rank)
    where = _usable_device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot hold factors; pass torch.float16, bfloat16 or float32.")
    tensors, written_recipe = opened_tensors(delta, config)
    modules = factorised_modules(tensors, keep)
    lora: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    layers: list[LoraLayer] = []
    residual_norm = 0.0
    total = 0
    for name in logging.tqdm(tensors, desc="delta to LoRA", unit="tensor"):
        tensor = tensors[name]
        total += tensor.numel()
        if name in modules:
            layer, pair = _factorise(modules[name], tensor.to(where), target, dtype)
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
        delta_parameters=total,
    )
    return DeltaLora(lora=lora, residual=residual, report=report, recipe=recipe or written_recipe)


def _factorise(
    module: str, tensor: Tensor, target: _Target, dtype: torch.dtype
) -> tuple[LoraLayer, dict[str, Tensor]]:
    """The module's line of the report and its pair of tensors; none for a dW of zeros."""
    shape = tuple(tensor.shape)
    matrix = as_matrix(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
    full_rank = min(matrix.shape)
    spectrum = leading_spectrum(matrix, min(target.most, full_rank))
    note = ""
    if not spectrum.squared_norm:
        rank, note = 0, "not changed"
    elif target.rank is not None:
        rank = min(target.rank, full_rank)
        note = "" if rank == target.rank else f"clipped from {target.rank}"
    else:
        assert target.energy is not None
        rank = rank_for_energy(spectrum, target.energy)
        if rank == target.max_rank < full_rank and kept_energy(spectrum, rank) < target.energy:
            note = f"stopped at max_rank={target.max_rank}"
    pair: dict[str, Tensor] = {}
    error = 0.0
    if rank:
        factors = balanced_factors(spectrum, rank)
        name = f"{PREFIX}{module}.lora_"
        down = _stored(factors.down, dtype, f"{name}A.weight")
        up = _stored(factors.up, dtype, f"{name}B.weight")
        error = squared_error(matrix, type(factors)(up=up.to(matrix.device), down=down.to(matrix.device)))
        pair = {
            f"{name}A.weight": down.reshape(rank, *shape[1:]),
            f"{name}B.weight": up.reshape(shape[0], rank, *(1 for _ in shape[2:])),
        }
    layer = LoraLayer(
        name=module,
        shape=shape,
        rank=rank,
        full_rank=full_rank,
        energy=kept_energy(spectrum, rank),
        squared_norm=spectrum.squared_norm,
        squared_error=error,
        note=note,
    )
    return layer, pair


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not is_finite(stored):
        raise ValueError(f"{name} is too large for {dtype}; pass dtype=torch.float32.")
    return stored


def _usable_device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={device!r} cannot be used here ({reason}); pass 'cpu' or leave it out.") from error
    return torch.device(device)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 1
