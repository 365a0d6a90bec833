"""A delta as a LoRA: each linear and convolution layer's dW as a product of two thin matrices.

What a LoRA cannot hold (norms and biases), and the embeddings of time and size, which every layer reads, form the
residual: a small partial delta to merge beside it. What is lost is the share of dW above the rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from diffusers.utils import logging
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import Tensor

from ..atomic_files import atomic_path
from ..core import low_rank
from ..core.windows import require_positive_int
from . import files
from .extract import save_delta, write_tensors
from .recipe import DeltaRecipe

PREFIX = "unet."  # what LoRA files put before the names of the UNet's modules
EMBEDDINGS = ("time_embedding*", "add_embedding*", "class_embedding*")
"""Patterns of the embeddings of time and size; diffusers cannot read the kohya names of some of them."""

Layout = Literal["peft", "kohya"]


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What was kept and lost; prints as a line of text."""

    ranks: Mapping[str, int] = field(default_factory=dict)  # of the layers that the delta changes, by module
    parameters: int = 0  # numbers in the LoRA
    residual_parameters: int = 0  # beside it
    delta_parameters: int = 0  # in the whole delta
    energy: float = 1.0  # share of the squared norm of all factorized layers that was kept, in [0, 1]
    relative_error: float = 0.0  # norm of the error over that of the whole delta; the residual has no error

    def __str__(self) -> str:
        ranks = self.ranks.values() or [0]
        return (
            f"{len(self.ranks)} layers, rank {min(ranks)} to {max(ranks)}, {self.parameters:,} numbers; "
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
    keep_embeddings: bool = True,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    recipe: DeltaRecipe | None = None,
) -> DeltaLora:
    """Factorizes a UNet's delta layer by layer by truncated singular value decomposition.

    Memory holds the result and one layer. diffusers' progress bar shows the layers.

    Args:
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        rank: of every layer; a layer whose full rank is lower gets that.
        energy: instead of `rank`, the share in (0, 1] of each layer's squared Frobenius norm to keep; each layer gets
            the least rank that does, up to `max_rank`.
        max_rank: the bound under `energy`.
        keep: `fnmatch` patterns of further modules for the residual to hold in full: `["conv_in"]` for a LoRA that
            UNets with other input channels, as for inpainting, can load too.
        keep_embeddings: whether the residual holds the embeddings of time and size in full. With False they are in
            the LoRA, for a quantized UNet, whose linear layers no delta can be merged into.
        dtype: in which factors and residual are stored; they are computed in float32 or better.
        device: where to compute, for example "cuda"; by default where the delta is. The result is on the CPU.
        recipe: how the delta is to be sampled; by default what the file says.

    Raises:
        ValueError: neither or both of rank and energy, or one out of range; an unusable file; a delta that is empty,
            a LoRA, whole weights, without a changed layer, or not finite (in `dtype`).
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: pass exactly one of the two.")
    bound = max_rank if rank is None else rank
    require_positive_int("max_rank" if rank is None else "rank", bound)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must be a share in (0, 1], for example 0.9.")
    weights = files.opened(delta)
    modules = _factorized_modules(weights, keep, keep_embeddings)
    lora: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = kept = lost = rest = 0.0  # squared norms: of the layers, what is kept and lost of them, the residual
    for name in logging.tqdm(weights.shapes, desc="delta to LoRA", unit="tensor"):
        tensor = weights.tensor(name)
        if not files.is_finite(tensor):
            raise ValueError(f"the delta is not finite ({name}); extract it again.")
        if name not in modules:
            residual[name] = _stored(tensor, dtype, name)
            rest += float(tensor.double().square().sum())
            continue
        matrix = tensor.to(device, torch.promote_types(tensor.dtype, torch.float32)).flatten(1)
        spectrum = low_rank.leading_spectrum(matrix, min(bound, *matrix.shape))
        if not spectrum.squared_norm:
            continue
        own = min(bound, *matrix.shape) if energy is None else low_rank.rank_for_energy(spectrum, energy)
        factors = low_rank.balanced_factors(spectrum, own)
        shapes = {"A": (own, *tensor.shape[1:]), "B": (len(matrix), own, *(1 for _ in tensor.shape[2:]))}
        for side, factor in (("A", factors.down), ("B", factors.up)):
            key = f"{PREFIX}{modules[name]}.lora_{side}.weight"
            lora[key] = _stored(factor.reshape(shapes[side]), dtype, key)
            factor.copy_(lora[key].flatten(1))  # with the error of its type
        ranks[modules[name]] = own
        whole += spectrum.squared_norm
        kept += low_rank.kept_energy(spectrum, own) * spectrum.squared_norm
        lost += low_rank.squared_error(matrix, factors)
    if not lora:
        raise ValueError("the delta changes no linear or convolution layer; merge it as it is.")
    report = LoraReport(
        ranks=ranks,
        parameters=sum(tensor.numel() for tensor in lora.values()),
        residual_parameters=sum(tensor.numel() for tensor in residual.values()),
        delta_parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
        energy=kept / whole,
        relative_error=math.sqrt(lost / (whole + rest)),
    )
    recipe, digest = recipe or files.read_recipe(weights), files.identity_of(weights)
    return DeltaLora(lora=lora, residual=residual, report=report, recipe=recipe, digest=digest)


def _factorized_modules(weights: files.Weights, keep: Sequence[str], keep_embeddings: bool) -> dict[str, str]:
    """The modules to factorize by the key of their weight: the linear and convolution layers that are not kept."""
    files.require_no_lora(weights)
    layers = [name for name, shape in weights.shapes.items() if len(shape) in (2, 4) and 0 not in shape]
    modules = {name: name.removesuffix(".weight") for name in layers if name.endswith(".weight")}
    for pattern in keep:
        if not any(fnmatchcase(module, pattern) for module in modules.values()):
            raise ValueError(f"keep={keep!r}: {pattern} matches no linear or convolution layer.")
    files.require_differences(weights)
    kept = (*keep, *(EMBEDDINGS if keep_embeddings else ()))
    return {name: module for name, module in modules.items() if not any(fnmatchcase(module, p) for p in kept)}


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not files.is_finite(stored):
        raise ValueError(f"{name} is too large for {dtype}; pass dtype=torch.float32.")
    return stored


def save_lora(converted: DeltaLora, path: str | os.PathLike[str], layout: Layout = "peft") -> None:
    """Writes the LoRA for `pipe.load_lora_weights(path)`, with the recipe; the file appears complete or not at all.

    The metadata name the delta, in `perflow_delta`: a UNet that has it merged already must not get the LoRA too. The
    same LoRA gives the same bytes.

    `layout` "peft" is what diffusers writes itself, "kohya" what other programs read (`lora_unet_...`).

    Raises:
        ValueError: an unknown layout, or an unwritable path.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}.")
    metadata = converted.recipe.to_metadata() | ({files.DIGEST_KEY: converted.digest} if converted.digest else {})
    tensors = dict(converted.lora)
    if layout == "kohya":
        if any(fnmatchcase(name.removeprefix(PREFIX), pattern) for name in tensors for pattern in EMBEDDINGS):
            raise ValueError(
                "layout='kohya' has no names for embeddings; pass keep_embeddings=True, or layout='peft'."
            )
        # Without alphas readers take each layer's rank for them, a factor of 1. Of alphas that differ diffusers 0.42
        # gives attention layers the most common one.
        tensors = {n: t for n, t in convert_state_dict_to_kohya(tensors).items() if not n.endswith(".alpha")}
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        write_tensors(temporary, types, tensors.__getitem__, metadata)


def save_residual(converted: DeltaLora, path: str | os.PathLike[str]) -> None:
    """Writes what is not in the LoRA as a partial delta with the recipe, to be merged beside it."""
    if not converted.residual:
        raise ValueError(f"the LoRA holds the whole delta, so there is no residual for {path}; leave the file out.")
    dtype = next(iter(converted.residual.values())).dtype
    save_delta(converted.residual, path, converted.recipe, dtype, partial=True)
