"""Where a delta goes in a model, and changing the weights there: base plus the sum of the deltas, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .files import (
    RenamedWeights,
    Weights,
    describe_mismatch,
    floating_entries,
    is_finite,
    listed,
    named_as_model,
    row_chunks,
    rows_of,
)

INPUT_WEIGHT = "conv_in.weight"
"""The one UNet weight, (output channels, input channels, k, k), whose shape depends on what the UNet is fed."""

LATENT_CHANNELS = 4
"""Input channels of a UNet that is fed noisy latents only. An inpainting UNet has 9: these, then the mask and the
latents of the masked image."""

BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."
"""What peft puts into the name of a weight that it has wrapped."""

PARTIAL_KEY = "perflow.partial"
"""In a file's metadata, with the value "true": the model may have weights that the file does not name."""

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The types of weights that a delta can be merged into, and integers of their size."""

GPU_CHUNKS = 8
"""How many chunks at a time on a GPU, where every one costs some waiting."""

Piece = tuple[str, int, int]
"""Rows of a weight: its name, the first row, the last row + 1."""


@dataclass(frozen=True)
class Term:
    """A delta, under the model's names, with its factors."""

    weights: Weights
    scale: float
    scales: tuple[tuple[str, float], ...] = ()

    def factor(self, name: str) -> float:
        """Of one weight; 0 where the delta does not hold it."""
        if name not in self.weights.shapes:
            return 0.0
        return self.scale * next((factor for pattern, factor in self.scales if fnmatchcase(name, pattern)), 1.0)


def factors(terms: Sequence[Term], name: str) -> list[tuple[Weights, float]]:
    """Which deltas change a weight, and by what factor."""
    return [(term.weights, factor) for term in terms if (factor := term.factor(name))]


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, and without those of the adapters."""
    state = module.state_dict(keep_vars=True)
    return {n.replace(WRAPPED, "."): t for n, t in state.items() if not any(part in f".{n}" for part in BESIDE)}


def under_own_names(weights: Weights, module: nn.Module) -> Weights:
    """The weights under the model's names, as far as they are in another layout of them."""
    return named_as_model(weights, own_weights(module), getattr(module, "config", {}))


def require_architecture(weights: Weights, module: nn.Module) -> Weights:
    """The delta under the model's names, once those and the shapes fit; the model may be without values, on "meta"."""
    return _fit(weights, module)[0]


def fit_delta(weights: Weights, module: nn.Module) -> tuple[Weights, dict[str, Tensor]]:
    """The delta under the model's names, and what its tensors are added to, once that can be changed.

    This is the model's weight, or of an input layer with more channels than the delta's the part for the latents.
    """
    weights = under_own_names(weights, module)
    _require_mergeable(module, weights)
    return _fit(weights, module)


def _fit(weights: Weights, module: nn.Module) -> tuple[Weights, dict[str, Tensor]]:
    weights = under_own_names(weights, module)
    targets = floating_entries(own_weights(module))
    whole = targets.get(INPUT_WEIGHT)
    if whole is not None and whole.dim() == 4:
        part = whole[:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
        if weights.shapes.get(INPUT_WEIGHT) == tuple(part.shape):
            targets[INPUT_WEIGHT] = part
    own = {name: tuple(weight.shape) for name, weight in targets.items()}
    partial = weights.metadata.get(PARTIAL_KEY) == "true"
    mismatch = describe_mismatch(weights.shapes, own, given="the file", expected="the model", partial=partial)
    if mismatch:
        raise ValueError(
            f"{weights.label} does not fit this {type(module).__name__}: {mismatch}. Pass a delta that was extracted "
            "from the same architecture."
        )
    return weights, {name: targets[name] for name in weights.shapes}


def fit_base(weights: Weights, module: nn.Module) -> Weights:
    """Those of the weights that a model may have been loaded from, under the model's names: of equal shapes."""
    own, weights = own_weights(module), under_own_names(weights, module)
    fitting = {name: name for name, tensor in own.items() if weights.shapes.get(name) == tuple(tensor.shape)}
    if not fitting:
        raise ValueError(f"base={weights.label} holds no weight of this {type(module).__name__}; leave base out.")
    if any(weights.tensor(name).data_ptr() == own[name].data_ptr() for name in fitting if own[name].numel()):
        raise ValueError(
            f"base={weights.label} shares its memory with the model, which merging changes; pass the files, or copies "
            "of the weights."
        )
    return RenamedWeights(weights, fitting)


def _require_mergeable(module: nn.Module, weights: Weights) -> None:
    targets = {name: tensor for name, tensor in own_weights(module).items() if name in weights.shapes}
    attentions = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention))
    fused = [name for name, layer in attentions if "Fused" in type(layer.processor).__name__]
    # Quantized and sharded weights are integers, or tensor subclasses whose arithmetic is their own.
    quantized = [n for n, t in targets.items() if type(t) not in (Tensor, nn.Parameter) or t.dtype not in _INTEGERS]
    offloaded = [name for name, tensor in targets.items() if tensor.is_meta]
    for names, kind, remedy in (
        (fused, "fused projections, which are copies of the weights", "call unet.unfuse_qkv_projections() first"),
        (quantized, "quantized or sharded weights", "merge first, then quantize or shard"),
        (offloaded, "offloaded weights (device 'meta')", "merge before enabling offload"),
    ):
        if names:
            raise ValueError(f"cannot merge {weights.label} into {kind} ({listed(names)}); {remedy}.")


@dataclass
class Applied:
    """How a model's weights can be computed again.

    Attributes:
        base: the weights without any delta, as far as they can be read again.
        dtypes: of weights that were changed: the type at that time, which the model may have been converted from.
        writing: the rows that an unfinished change may have written, and whether they were base plus sum before;
            empty when the weights are what they should be.
    """

    base: Weights | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    writing: dict[Piece, bool] = field(default_factory=dict)


def add_terms(weight: Tensor, terms: Sequence[tuple[Tensor, float]], out: Tensor | None = None) -> Tensor:
    """`weight + sum_i factor_i * tensor_i`, rounded once to the weight's type; in `out` if it is given.

    The sum is formed in the order given, in float32, or in float64 for such weights.
    """
    if not terms:
        return weight if out is None else out.copy_(weight)
    change, factor = terms[0]
    if len(terms) > 1 or factor != 1.0 or change.dtype != weight.dtype:
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Product and sum are rounded one by one: a fused multiply-add is not the same on every device.
        products = (tensor.to(weight.device).to(wide, copy=True).mul_(factor) for tensor, factor in terms)
        change = reduce(Tensor.add_, products)
    # Of two half-precision tensors, too, torch's kernels form the sum in float32.
    total = torch.add(weight, change.to(weight.device), out=out)
    return total.to(weight.dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape, type and device are equal bit for bit; waits for the device."""
    pair = [tensor.view(_INTEGERS[tensor.dtype]) for tensor in (one, other)]
    if one.nbytes % 8 == 0 and all(tensor.is_contiguous() and tensor.data_ptr() % 8 == 0 for tensor in pair):
        pair = [tensor.view(-1).view(torch.int64) for tensor in pair]  # in a quarter of the time
    return torch.equal(*pair)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight, as they are in the model and as the start of a sum, and the terms to add to that.

    `held` is base plus the deltas that are in it, perhaps converted to another type since; None without a base.
    """

    piece: Piece
    live: Tensor
    held: Tensor | None
    exact: bool
    start: Tensor
    terms: list[tuple[Tensor, float]]

    def write(self, value: Tensor, terms: Sequence[tuple[Tensor, float]] = ()) -> None:
        with torch.inference_mode() if self.live.is_inference() else nullcontext():
            add_terms(value, terms, out=self.live)


def _rows(
    state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term] = ()
) -> Iterator[_Rows]:
    for name, target in targets.items():
        old, new = ([(weights.tensor(name), f) for weights, f in factors(terms, name)] for terms in (before, after))
        stored = state.base.tensor(name) if state.base is not None and name in state.base.shapes else None
        for start, stop in row_chunks(target.shape, 1 if target.device.type == "cpu" else GPU_CHUNKS):
            live, held, exact = rows_of(target.detach(), start, stop), None, False
            value = live
            minus, plus = ([(rows_of(tensor, start, stop), f) for tensor, f in terms] for terms in (old, new))
            if stored is not None:  # of more input channels where the target is a part of the weight
                base = rows_of(stored, start, stop)[tuple(map(slice, live.shape))].to(live.device)
                held = add_terms(base.to(state.dtypes.get(name, live.dtype)), minus).to(live.dtype)
                if exact := same_bits(held, live):
                    value = base.to(live.dtype)
            terms = plus if exact else [*plus, *((tensor, -factor) for tensor, factor in minus)]
            yield _Rows((name, start, stop), live, held, exact, value, terms)


def change(state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term]) -> list[str]:
    """Writes all rows, each noted in the state first; returns the names of weights that were not base plus `before`.

    Raises:
        ValueError: a weight would not be finite; what was written until then can be restored.
    """
    inexact: dict[str, None] = {}
    for rows in _rows(state, targets, before, after):
        if not rows.exact and not inexact:  # what is written from here on cannot be read again: try it all first
            for other in _rows(state, targets, before, after):
                if other.piece not in state.writing:
                    _require_finite(add_terms(other.start, other.terms), other.piece[0], after)
        if not rows.exact:
            inexact[rows.piece[0]] = None
        state.writing[rows.piece] = rows.exact
        rows.write(rows.start, rows.terms)
        _require_finite(rows.live, rows.piece[0], after)
    return list(inexact)


def restore(state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term]) -> list[str]:
    """Writes base plus `before` to all rows that were written; returns the names of weights without a base."""
    lost: dict[str, None] = {}
    for rows in _rows(state, {name: targets[name] for name, _, _ in state.writing}, before):
        if state.writing.get(rows.piece) and rows.held is not None:
            rows.write(rows.held)
        elif rows.piece in state.writing:
            lost[rows.piece[0]] = None
    return list(lost)


def _require_finite(weight: Tensor, name: str, after: Sequence[Term]) -> None:
    if not is_finite(weight):
        raise ValueError(
            f"with {listed([term.weights.label for term in after])} added, {name} would not be finite: the delta's "
            "values are not finite, or too large for the weights' type; extract it again, lower the scale, or load a "
            "wider dtype."
        )
