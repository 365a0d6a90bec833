"""Where a delta goes in a model, and changing the weights there: base plus the sum of the deltas, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

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
from .recipe import DeltaRecipe

INPUT_WEIGHT = "conv_in.weight"  # the one UNet weight whose shape depends on what the UNet is fed
LATENT_CHANNELS = 4  # of its input; an inpainting UNet has 9: then come the mask and the masked image's latents
BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."  # what peft puts into the name of a weight that it has wrapped
PARTIAL_KEY = "perflow.partial"  # in a file's metadata: "true" if the model may have weights that the file lacks
CONFIG_KEY = "_perflow_merges"
"""In the model's configuration. diffusers saves and reads keys with an underscore and gives them to no constructor."""

NO_RECIPE = DeltaRecipe()  # of a delta that does not say how to sample
_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""The types of weights that a delta can be merged into, and integers of their size."""

GPU_CHUNKS = 8  # how many chunks at a time on a GPU, where every one costs some waiting
Piece = tuple[str, int, int]  # rows of a weight: its name, the first row, the last row + 1


@dataclass(frozen=True)
class MergeRecord:
    """A delta that is merged into a model.

    Attributes:
        source: where it was read from: the path, absolute unless the model was saved since.
        digest: its `identity_of`; this, not the path, tells deltas apart. Empty for a model that version 0.1.0 saved,
            until the delta is seen again.
        scale: the factor of dW in the weights.
        scales: further factors, (pattern, factor) for names of weights; the first pattern that matches counts.
        recipe: the sampling settings that came with it.
        reloaded: whether the model was saved with it and loaded again, so that it is part of the base.
        weights: the delta under the model's names, as it was read last; None until it is seen again.
    """

    source: str
    digest: str
    scale: float
    scales: tuple[tuple[str, float], ...] = ()
    recipe: DeltaRecipe = NO_RECIPE
    reloaded: bool = False
    weights: Weights | None = field(default=None, compare=False, repr=False)

    def factor(self, name: str) -> float:
        """Of one weight; 0 where the delta does not hold it."""
        if self.weights is None or name not in self.weights.shapes:
            return 0.0
        return self.scale * next((factor for pattern, factor in self.scales if fnmatchcase(name, pattern)), 1.0)

    def to_config(self) -> dict[str, Any]:
        """For the model's configuration, in JSON's types. Of the path only the name, as the rest is this machine's."""
        source, recipe = Path(self.source).name, self.recipe.to_metadata()
        known = {"source": source, "digest": self.digest, "sampled": True, "scale": self.scale}
        return {**known, "scales": [list(pair) for pair in self.scales], "recipe": recipe}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> MergeRecord:
        """The inverse of `to_config`, for a model that was loaded.

        Version 0.1.0 wrote a digest of all values, which cannot be compared with today's: such a record is matched by
        the delta's file name and recipe.
        """
        digest = str(entry["digest"]) if entry.get("sampled") else ""
        scales = tuple((str(pattern), float(factor)) for pattern, factor in entry["scales"])
        recipe = DeltaRecipe.from_metadata(entry["recipe"])
        return cls(entry["source"], digest, float(entry["scale"]), scales, recipe, reloaded=True)


def factors(records: Sequence[MergeRecord], name: str) -> list[tuple[Weights, float]]:
    """The deltas that change a weight beside its base, and by what factor."""
    return [(r.weights, factor) for r in records if r.weights and not r.reloaded and (factor := r.factor(name))]


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, and without those of the adapters."""
    state = module.state_dict(keep_vars=True)
    return {n.replace(WRAPPED, "."): t for n, t in state.items() if not any(part in f".{n}" for part in BESIDE)}


def under_own_names(weights: Weights, module: nn.Module) -> Weights:
    """The weights under the model's names, as far as they are in another layout of them."""
    return named_as_model(weights, own_weights(module), getattr(module, "config", {}))


def require_architecture(weights: Weights, module: nn.Module) -> Weights:
    """The delta under the model's names, once those and the shapes fit; the model may be without values, on "meta"."""
    return fit_delta(weights, module)[0]


def fit_delta(weights: Weights, module: nn.Module) -> tuple[Weights, dict[str, Tensor]]:
    """The delta under the model's names, and what its tensors are added to, once names and shapes fit.

    This is the model's weight, or of an input layer with more channels than the delta's the part for the latents.
    """
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


def require_mergeable(module: nn.Module, weights: Weights) -> None:
    """Raises ValueError where values that the delta names are kept in another way than as plain floating point."""
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
class MergeState:
    """What is merged into a model, kept on it.

    Attributes:
        records: in the order of merging, which is the order of the sum.
        base: the weights without these deltas, but with the reloaded ones, as far as they can be read again.
        dtypes: of weights that were changed: the type at that time, which the model may have been converted from.
        after: what an unfinished change was to make of the records.
        writing: the rows that it may have written, and whether they were base plus sum before; empty when the weights
            are what they should be.
        witness: values of a few weights, "with" the deltas and "without".
        signature: of the witness's weights when they were last compared; None if they were not.
    """

    records: tuple[MergeRecord, ...] = ()
    base: Weights | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    after: tuple[MergeRecord, ...] = ()
    writing: dict[Piece, bool] = field(default_factory=dict)
    witness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    signature: tuple[Any, ...] | None = None

    def put(self, old: MergeRecord, new: MergeRecord) -> MergeRecord:
        """Puts a record in the place of another one; returns the new."""
        self.records = tuple(new if record is old else record for record in self.records)
        return new


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


class _Rows(NamedTuple):
    """Some rows of a weight, and what a change makes of them: start + sum of the terms."""

    piece: Piece
    live: Tensor  # in the model
    held: Tensor | None  # what they should be: base plus records, perhaps converted since; None without a base
    exact: bool  # whether they are
    start: Tensor
    terms: list[tuple[Tensor, float]]


def _rows(state: MergeState, targets: Mapping[str, Tensor], after: Sequence[MergeRecord] = ()) -> Iterator[_Rows]:
    for name, target in targets.items():
        old, new = ([(w.tensor(name), f) for w, f in factors(records, name)] for records in (state.records, after))
        stored = state.base.tensor(name) if state.base is not None and name in state.base.shapes else None
        for start, stop in row_chunks(target.shape, 1 if target.device.type == "cpu" else GPU_CHUNKS):
            live = value = rows_of(target.detach(), start, stop)
            minus, plus = ([(rows_of(tensor, start, stop), f) for tensor, f in terms] for terms in (old, new))
            held, exact = None, False
            if stored is not None:  # of more input channels where the target is a part of the weight
                base = rows_of(stored, start, stop)[tuple(map(slice, live.shape))].to(live.device)
                held = add_terms(base.to(state.dtypes.get(name, live.dtype)), minus).to(live.dtype)
                if exact := same_bits(held, live):
                    value = base.to(live.dtype)
            terms = plus if exact else [*plus, *((tensor, -factor) for tensor, factor in minus)]
            yield _Rows((name, start, stop), live, held, exact, value, terms)


def change(state: MergeState, targets: Mapping[str, Tensor]) -> list[str]:
    """Writes base plus the state's `after` to all rows, each noted in the state first.

    Returns the names of weights that were not base plus the state's records; they get the difference added.

    Raises:
        ValueError: a weight would not be finite; what was written until then can be restored.
    """
    inexact: dict[str, None] = {}
    for rows in _rows(state, targets, state.after):
        if not rows.exact and not inexact:  # what is written from here on cannot be read again: try it all first
            for other in _rows(state, targets, state.after):
                if other.piece not in state.writing:
                    _require_finite(add_terms(other.start, other.terms), other.piece[0], state.after)
        if not rows.exact:
            inexact[rows.piece[0]] = None
        state.writing[rows.piece] = rows.exact
        add_terms(rows.start, rows.terms, out=rows.live)
        _require_finite(rows.live, rows.piece[0], state.after)
    return list(inexact)


def restore(state: MergeState, targets: Mapping[str, Tensor]) -> list[str]:
    """Writes base plus the state's records to all rows that were written; returns the weights without a base."""
    lost: dict[str, None] = {}
    for rows in _rows(state, {name: targets[name] for name, _, _ in state.writing}):
        if state.writing.get(rows.piece) and rows.held is not None:
            rows.live.copy_(rows.held)
        elif rows.piece in state.writing:
            lost[rows.piece[0]] = None
    return list(lost)


def _require_finite(weight: Tensor, name: str, after: Sequence[MergeRecord]) -> None:
    if not is_finite(weight):
        raise ValueError(
            f"with {listed([record.source for record in after])} added, {name} would not be finite: the delta's "
            "values are not finite, or too large for the weights' type; extract it again, lower the scale, or load a "
            "wider dtype."
        )
