"""Where a delta goes in a model, and changing the weights there: base plus the sum of the deltas, rounded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
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
from .recipe import ARCHITECTURE_KEY

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

Part = tuple[Tensor, float]


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


def fit_delta(weights: Weights, module: nn.Module) -> tuple[Weights, dict[str, Tensor], int]:
    """Where a delta can be added. Looks at names, shapes and types, not at values.

    Returns:
        The delta under the model's names; by these, what each tensor is added to: the model's weight, or the part of
        it that has the tensor's shape (tied weights are there once); how many input channels the delta leaves alone.
    """
    weights = named_as_model(weights, own_weights(module), getattr(module, "config", {}))
    own = own_weights(module, set(weights.shapes))
    _require_mergeable(module, weights.label, {name: own[name] for name in weights.shapes if name in own})
    targets = floating_entries(own)
    extra = _require_shapes(weights, module, targets)
    if extra:
        targets[INPUT_WEIGHT] = targets[INPUT_WEIGHT][:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
    once = {id(targets[name]): name for name in reversed(list(weights.shapes))}
    return weights, {name: targets[name] for name in weights.shapes if once[id(targets[name])] == name}, extra


def fit_base(weights: Weights, module: nn.Module) -> Weights:
    """Those of the weights that a model may have been loaded from, under the model's names: of equal shapes."""
    own = own_weights(module)
    weights = named_as_model(weights, own, getattr(module, "config", {}))
    fitting = {name: name for name, tensor in own.items() if weights.shapes.get(name) == tuple(tensor.shape)}
    if not fitting:
        raise ValueError(f"base={weights.label} holds no weight of this {type(module).__name__}; leave base out.")
    places = {name: weights.tensor(name).untyped_storage().data_ptr() for name in fitting if own[name].numel()}
    shared = [name for name, place in places.items() if place == own[name].untyped_storage().data_ptr()]
    if shared:
        raise ValueError(
            f"base={weights.label} shares its memory with the model ({listed(shared)}), which merging changes; pass "
            "the files, or copies of the weights."
        )
    return RenamedWeights(weights, fitting)


def require_architecture(weights: Weights, module: nn.Module) -> Weights:
    """The delta under the model's names, once those and the shapes fit; the model may be without values, on "meta"."""
    weights = named_as_model(weights, own_weights(module), getattr(module, "config", {}))
    _require_shapes(weights, module, floating_entries(own_weights(module, set(weights.shapes))))
    return weights


def architecture_of(module: nn.Module) -> str:
    """Identifies the names and shapes of a model's weights, whatever number of channels it is fed: 64 hex digits."""
    shapes = sorted((n, list(t.shape)) for n, t in floating_entries(own_weights(module)).items() if n != INPUT_WEIGHT)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def own_weights(module: nn.Module, named: Container[str] = ()) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, whose own a delta does not speak of.

    What is `named` counts as the model's own, whatever it is called.
    """
    state = module.state_dict(keep_vars=True)
    return {
        name.replace(WRAPPED, "."): tensor
        for name, tensor in state.items()
        if name in named or not any(part in f".{name}" for part in BESIDE)
    }


def _require_mergeable(module: nn.Module, label: str, targets: Mapping[str, Tensor]) -> None:
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
            raise ValueError(f"cannot merge {label} into {kind} ({listed(names)}); {remedy}.")


def _require_shapes(delta: Weights, module: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The input channels that the model has more than the delta, once nothing else differs."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    remedy = "Pass a delta that was extracted from the same architecture."
    given, own = delta.shapes.get(INPUT_WEIGHT, ()), shapes.get(INPUT_WEIGHT, ())
    extra = 0
    if len(given) == len(own) == 4 and (given[0], *given[2:]) == (own[0], *own[2:]):
        extra = own[1] - given[1] if min(given[1], own[1]) == LATENT_CHANNELS else 0
    if extra > 0:
        shapes[INPUT_WEIGHT] = given
    elif extra < 0:
        remedy = (
            f"The delta is of a UNet with {given[1]} input channels, as for inpainting, and this one has "
            f"{LATENT_CHANNELS}: pass a delta of a UNet with {LATENT_CHANNELS}, or load the UNet it is for."
        )
    partial = delta.metadata.get(PARTIAL_KEY) == "true"
    mismatch = describe_mismatch(delta.shapes, shapes, given="the file", expected="the model", partial=partial)
    if not mismatch and delta.metadata.get(ARCHITECTURE_KEY) not in (None, architecture_of(module)):
        mismatch = "the names it does hold fit, but the model it was extracted from had others"
    if mismatch:
        raise ValueError(f"{delta.label} does not fit this {type(module).__name__}: {mismatch}. {remedy}")
    return extra


def require_difference(delta: Weights, targets: Mapping[str, Tensor]) -> None:
    """Raises ValueError for whole weights, as of a merged model: 8 matrices of theirs all resemble the model's own.

    Fine-tunes of one base have a cosine above 0.99, differences one near 0.
    """
    matrices = [name for name, shape in delta.shapes.items() if name in targets and len(shape) > 1 and shape[0] > 1]
    for name in matrices[:: max(1, len(matrices) // 8)]:
        rows = min(8, delta.shapes[name][0])
        own, given = (rows_of(t, 0, rows).detach().reshape(-1) for t in (targets[name], delta.tensor(name)))
        if not torch.cosine_similarity(own.double().cpu(), given.double().cpu(), dim=0) > 0.9:
            return
    if matrices:
        raise ValueError(
            f"{delta.label} holds whole weights, not their difference from a base (they resemble this model's); pass "
            "open_difference(it, base)."
        )


@dataclass
class Applied:
    """How a model's weights can be computed again.

    Attributes:
        base: the weights without any delta, as far as they can be read again.
        dtypes: of weights that were changed: the type at that time, which the model may have been converted from.
        writing: (name, first row, last row + 1, whether base plus sum) of all rows that an unfinished change may have
            written; empty when the weights are what they should be.
    """

    base: Weights | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    writing: list[tuple[str, int, int, bool]] = field(default_factory=list)


def sum_of_terms(terms: Sequence[Part], weight: Tensor) -> Tensor:
    """sum_i factor_i * tensor_i of at least one term, to be added to `weight`, whose shape they have; read only.

    In the order given, in float32, or in float64 for such weights. A single tensor of the weight's own type with the
    factor 1 is its own sum.
    """
    first, factor = terms[0]
    if len(terms) == 1 and factor == 1.0 and first.dtype == weight.dtype:
        return first.to(weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Product and sum are rounded one by one: a fused multiply-add is not the same on every device.
    products = (tensor.to(weight.device).to(wide, copy=True).mul_(factor) for tensor, factor in terms)
    return reduce(Tensor.add_, products)


def add(weight: Tensor, change: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight + change`, summed in the wider type and rounded once to the weight's; in `out` if it is given."""
    if change.dtype == weight.dtype:
        # torch's kernels form sums of half-precision numbers in float32 too: the same bits in one pass.
        return torch.add(weight, change, out=out)
    total = weight.to(change.dtype).add_(change)
    return total.to(weight.dtype) if out is None else out.copy_(total)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape, type and device are equal bit for bit; waits for the device."""
    pair = [tensor.view(_INTEGERS[tensor.dtype]) for tensor in (one, other)]
    if one.nbytes % 8 == 0 and all(tensor.is_contiguous() and tensor.data_ptr() % 8 == 0 for tensor in pair):
        pair = [tensor.view(-1).view(torch.int64) for tensor in pair]  # in a quarter of the time
    return torch.equal(*pair)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight.

    Attributes:
        piece: name, first row, last row + 1.
        live: the rows in the model.
        base: without any delta, as stored; None where it cannot be read.
        dtype: the type that the weight had when it was last changed.
        before, after: what the deltas have for them, with the factors.
    """

    piece: tuple[str, int, int]
    live: Tensor
    base: Tensor | None
    dtype: torch.dtype
    before: list[Part]
    after: list[Part]

    def held(self) -> Tensor | None:
        """What the live rows are if they are base plus `before`, perhaps converted to another type since."""
        if self.base is None:
            return None
        base = self.base.to(self.dtype)
        return (add(base, sum_of_terms(self.before, base)) if self.before else base).to(self.live.dtype)

    def planned(self) -> tuple[bool, Tensor, Tensor | None]:
        """Whether the live rows are base plus `before`; what they become: the first tensor plus the second."""
        held = self.held()
        change = sum_of_terms(self.after, self.live) if self.after else None
        if held is not None and self.base is not None and same_bits(held, self.live):
            return True, self.base.to(self.live.dtype), change
        if self.before:
            before = sum_of_terms(self.before, self.live).to(torch.promote_types(self.live.dtype, torch.float32))
            change = -before if change is None else change.to(before.dtype) - before
        return False, self.live, change

    def write(self, value: Tensor, change: Tensor | None = None) -> None:
        with torch.inference_mode() if self.live.is_inference() else nullcontext():
            self.live.copy_(value) if change is None else add(value, change, out=self.live)


def _rows(
    state: Applied, name: str, target: Tensor, before: Sequence[Term], after: Sequence[Term] = ()
) -> Iterator[_Rows]:
    target = target.detach()
    read = {id(term.weights): term.weights.tensor(name) for term in (*before, *after) if term.factor(name)}
    stored = state.base.tensor(name) if state.base is not None and name in state.base.shapes else None
    for start, stop in row_chunks(target.shape, 1 if target.device.type == "cpu" else GPU_CHUNKS):
        live, base = rows_of(target, start, stop), None
        if stored is not None:  # of more input channels where the target is a part of the weight
            base = rows_of(stored, start, stop)[tuple(map(slice, live.shape))].to(live.device)
        parts = (
            [(rows_of(read[id(t.weights)], start, stop), factor) for t in terms if (factor := t.factor(name))]
            for terms in (before, after)
        )
        yield _Rows((name, start, stop), live, base, state.dtypes.get(name, live.dtype), *parts)


def change(state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term]) -> list[str]:
    """Writes all rows, each noted in the state first; returns the names of weights that were not base plus `before`.

    Raises:
        FloatingPointError: a weight is not finite; it and others are written, and can be restored.
    """
    inexact: list[str] = []
    for name, target in targets.items():
        for rows in _rows(state, name, target, before, after):
            exact, value, change = rows.planned()
            if not exact and name not in inexact:
                if not inexact:  # what is written from here on cannot be read again
                    require_finite(state, targets, before, after)
                inexact.append(name)
            state.writing.append((*rows.piece, exact))
            rows.write(value, change)
            if not is_finite(rows.live):
                raise FloatingPointError(name)
    return inexact


@torch.no_grad()
def restore(state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term]) -> list[str]:
    """Writes base plus `before` to all rows that were written; returns the names of weights without a base."""
    written = {(name, start, stop): exact for name, start, stop, exact in state.writing}
    lost: list[str] = []
    for name in dict.fromkeys(name for name, _, _ in written):
        for rows in _rows(state, name, targets[name], before):
            held = rows.held() if written.get(rows.piece) else None
            if held is not None:
                rows.write(held)
            elif rows.piece in written and name not in lost:
                lost.append(name)
    return lost


def require_finite(
    state: Applied, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term]
) -> None:
    """Raises ValueError that names the weights which would not be finite, of the rows that are not written yet."""
    written = {entry[:3] for entry in state.writing}
    bad = []
    for name, target in targets.items():
        for rows in _rows(state, name, target, before, after):
            _, value, change = rows.planned()
            if rows.piece not in written and not is_finite(value if change is None else add(value, change)):
                bad.append(name)
                break
    if bad:
        labels = listed([term.weights.label for term in after])
        raise ValueError(
            f"with {labels} added, {len(bad)} weights would not be finite ({listed(bad)}): the delta's values are not "
            "finite, or too large for the weights' type; extract it again, lower the scale, or load a wider dtype."
        )
