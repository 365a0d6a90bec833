"""Where a delta goes in a model, and changing the weights there: base plus the sum of the deltas, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from . import files
from .files import DTYPES, Weights, listed, rows_of
from .recipe import DeltaRecipe

INPUT_WEIGHT, LATENT_CHANNELS = "conv_in.weight", 4
"""Inpainting UNets have 9 input channels: after the latents the mask and the masked image's latents."""

BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."  # what peft puts into the name of a weight that it has wrapped
PARTIAL_KEY = "perflow.partial"  # in a file's metadata: "true" if the model may have weights that the file lacks
NO_RECIPE = DeltaRecipe()  # of a delta that does not say how to sample
QUANTIZED_REMEDY = (
    "merge before quantizing (PeRFlowPipelineBuilder.with_quantization) or sharding, or load the delta as a LoRA: "
    "delta_to_lora(..., keep_embeddings=False) or perflow to-lora --no-keep-embeddings, then pipe.load_lora_weights"
)
GPU_CHUNKS = 8  # how many chunks at a time on a GPU, where every one costs some waiting

Terms = list[tuple[Tensor, float]]
Piece = tuple[str, int, int]  # rows of a weight: its name, the first row, the last row + 1


@dataclass(frozen=True)
class MergeRecord:
    """A delta that is merged into a model.

    Attributes:
        source: where it was read from: the path, absolute unless the model was saved since.
        digest: its `identity_of`; this, not the path, tells deltas apart.
        scale: the factor of dW in the weights.
        scales: further factors, (pattern, factor) for names of weights; the first pattern that matches counts.
        recipe: the sampling settings that came with it.
        reloaded: whether the model was saved with it and loaded again, so that it is part of the base.
        weights: the delta, as it was read last; None until it is seen again.
    """

    source: str
    digest: str
    scale: float
    scales: tuple[tuple[str, float], ...] = ()
    recipe: DeltaRecipe = NO_RECIPE
    reloaded: bool = False
    weights: Weights | None = field(default=None, compare=False, repr=False)

    def factor(self, name: str) -> float:
        """Of one weight beside its base; 0 where the delta does not hold it, or is part of the base."""
        if self.reloaded or self.weights is None or name not in self.weights.shapes:
            return 0.0
        return self.scale * next((factor for pattern, factor in self.scales if fnmatchcase(name, pattern)), 1.0)

    def to_config(self) -> dict[str, Any]:
        """For the model's configuration, in JSON's types. Of the path only the name, as the rest is this machine's."""
        known = {"source": Path(self.source).name, "digest": self.digest, "scale": self.scale}
        return {**known, "scales": [list(pair) for pair in self.scales], "recipe": self.recipe.to_metadata()}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> MergeRecord:
        """The inverse of `to_config`, for a model that was loaded."""
        scales = tuple((str(pattern), float(factor)) for pattern, factor in entry["scales"])
        recipe = DeltaRecipe.from_metadata(entry["recipe"])
        return cls(entry["source"], entry["digest"], float(entry["scale"]), scales, recipe, reloaded=True)


@dataclass
class MergeState:
    """What is merged into a model, kept on it."""

    records: tuple[MergeRecord, ...] = ()  # in the order of merging, which is the order of the sum
    base: Weights | None = None  # without these deltas, but with the reloaded ones, as far as it can be read again
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of changed weights, which may be converted since
    after: tuple[MergeRecord, ...] = ()  # what an unfinished change was to make of the records
    writing: dict[Piece, bool] = field(default_factory=dict)  # rows that it may have written; were they base plus sum?
    witness: dict[str, list[list[float]]] = field(default_factory=dict)  # values of some weights, now and without
    signature: list[Any] | None = None  # of the witness's weights when they were last compared


def factors(records: Sequence[MergeRecord], name: str) -> list[tuple[Weights, float]]:
    """The deltas that change a weight beside its base, and by what factor."""
    return [(record.weights, factor) for record in records if record.weights and (factor := record.factor(name))]


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, and without those of the adapters."""
    state = module.state_dict(keep_vars=True)
    own = {name.replace(WRAPPED, "."): name for name in state if not any(part in f".{name}" for part in BESIDE)}
    return {files.PREFIXES.sub("", name): state[key] for name, key in own.items()}


def require_architecture(weights: Weights, module: nn.Module) -> dict[str, Tensor]:
    """What the tensors of a delta are added to, once names and shapes fit; the model may be on "meta".

    This is the model's weight, or of an input layer with more channels than the delta's the part for the latents.
    """
    files.require_no_lora(weights)
    targets = {name: tensor for name, tensor in own_weights(module).items() if tensor.is_floating_point()}
    if INPUT_WEIGHT in targets and weights.shapes.get(INPUT_WEIGHT, ())[1:2] == (LATENT_CHANNELS,):
        targets[INPUT_WEIGHT] = targets[INPUT_WEIGHT][:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
    own = {name: tuple(weight.shape) for name, weight in targets.items()}
    partial = weights.metadata.get(PARTIAL_KEY) == "true"
    mismatch = files.describe_mismatch(weights.shapes, own, given="the file", expected="the model", partial=partial)
    if mismatch:
        raise ValueError(
            f"{weights.label} does not fit this {type(module).__name__}: {mismatch}. Pass a delta that was extracted "
            "from the same architecture."
        )
    return {name: targets[name] for name in weights.shapes}


def fit_base(weights: Weights, module: nn.Module) -> Weights:
    """Those of the weights that a model may have been loaded from: of equal shapes."""
    own = own_weights(module)
    shapes = {name: shape for name, shape in weights.shapes.items() if name in own and shape == own[name].shape}
    if not shapes:
        raise ValueError(f"base={weights.label} holds no weight of this {type(module).__name__}; leave base out.")
    return replace(weights, shapes=shapes)


def is_plain(weight: Any) -> bool:
    """Whether this is a weight of plain floating-point numbers.

    Quantized and sharded weights are integers, or tensor subclasses whose arithmetic is their own.
    """
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in DTYPES


def require_mergeable(module: nn.Module, weights: Weights) -> None:
    """Raises ValueError where values that the delta names are kept in another way than as plain floating point."""
    targets = {name: tensor for name, tensor in own_weights(module).items() if name in weights.shapes}
    attentions = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention))
    fused = [name for name, layer in attentions if "Fused" in type(layer.processor).__name__]
    quantized = [name for name, tensor in targets.items() if not is_plain(tensor)]
    offloaded = [name for name, tensor in targets.items() if tensor.is_meta]
    for names, kind, remedy in (
        (fused, "fused projections, which are copies of the weights", "call unet.unfuse_qkv_projections() first"),
        (quantized, "quantized or sharded weights", QUANTIZED_REMEDY),
        (offloaded, "offloaded weights (device 'meta')", "merge before enabling offload"),
    ):
        if names:
            raise ValueError(f"cannot merge {weights.label} into {kind} ({listed(names)}); {remedy}.")


def add_terms(weight: Tensor, terms: Terms, out: Tensor | None = None) -> Tensor:
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
    return torch.add(weight, change.to(weight.device), out=out).to(weight.dtype)


def _rows(state: MergeState, targets: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor, Tensor, Terms]]:
    """Rows of the weights: piece, live values, and a start and terms whose sum the state's `after` makes of them.

    The start is the base's rows where the live ones are the base plus the state's records, perhaps converted since;
    elsewhere it is the live ones.
    """
    for name, target in targets.items():
        sums = (factors(state.records, name), factors(state.after, name))
        old, new = ([(weights.tensor(name), factor) for weights, factor in terms] for terms in sums)
        stored = state.base.tensor(name) if state.base is not None and name in state.base.shapes else None
        for start, stop in files.row_chunks(target.shape, 1 if target.device.type == "cpu" else GPU_CHUNKS):
            piece, live = (name, start, stop), rows_of(target.detach(), start, stop)
            minus, plus = ([(rows_of(tensor, start, stop), f) for tensor, f in terms] for terms in (old, new))
            if stored is not None:  # of more input channels where the target is a part of the weight
                base = rows_of(stored, start, stop)[tuple(map(slice, live.shape))].to(live.device)
                exact = state.writing.get(piece)
                if exact is None:
                    held = add_terms(base.to(state.dtypes.get(name, live.dtype)), minus).to(live.dtype)
                    # A tenth of torch.equal's time in half precision. NaN equals nothing.
                    exact = not live.numel() or not torch.stack(torch.aminmax(held - live)).any()
                if exact:
                    yield piece, live, base.to(live.dtype), plus
                    continue
            yield piece, live, live, [*plus, *((tensor, -factor) for tensor, factor in minus)]


def change(state: MergeState, targets: Mapping[str, Tensor]) -> list[str]:
    """Writes base plus the state's `after` to all rows, each noted in the state first.

    Returns the names of weights that were not base plus the state's records; they get the difference added.

    Raises:
        ValueError: a weight would not be finite; what was written until then can be restored.
    """
    inexact: dict[str, None] = {}
    for piece, live, start, terms in _rows(state, targets):
        if start is live:
            if not inexact:  # what is written from here on cannot be read again: try it all first
                for other, _, first, summands in _rows(state, targets):
                    if other not in state.writing:
                        _require_finite(add_terms(first, summands), other[0], state.after)
            inexact[piece[0]] = None
        state.writing[piece] = start is not live
        add_terms(start, terms, out=live)
        _require_finite(live, piece[0], state.after)
    return list(inexact)


def restore(state: MergeState, targets: Mapping[str, Tensor]) -> list[str]:
    """Writes base plus the state's records to all rows that were written; returns the weights without a base."""
    lost: dict[str, None] = {}
    written = {name: targets[name] for name, _, _ in state.writing}
    for piece, live, start, terms in _rows(replace(state, after=state.records), written):
        if piece in state.writing and start is not live:
            add_terms(start, terms, out=live)
        elif piece in state.writing:
            lost[piece[0]] = None
    return list(lost)


def _require_finite(weight: Tensor, name: str, after: Sequence[MergeRecord]) -> None:
    if not files.is_finite(weight):
        raise ValueError(
            f"with {listed([record.source for record in after])} added, {name} would not be finite: the delta's "
            "values are not finite, or too large for the weights' type; extract it again, lower the scale, or load a "
            "wider dtype."
        )
