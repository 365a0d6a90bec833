"""Merging deltas into a model's weights, changing their factors, and taking them out again.

A merged model's weights are W = round(base + sum_i s_i dW_i): the sum is formed in float32 in the order of merging and
rounded once to the weight's type (dW = W_student - W_base, arXiv 2405.07510). What changes the sum reads the base again
from the files that the model was loaded from, so every result is exact to the bit. Weights that are not base plus sum
(a LoRA was fused, training) get the difference of the sums added, exact to one rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import reduce
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging
from torch import Tensor, nn

from .files import (
    Delta,
    RenamedWeights,
    Stamp,
    Weights,
    describe_mismatch,
    floating_entries,
    identity_of,
    is_finite,
    listed,
    loaded_weights,
    named_as_model,
    opened,
    read_recipe,
    row_chunks,
    rows_of,
    stamp_of,
)
from .recipe import ARCHITECTURE_KEY, DeltaRecipe

logger = logging.get_logger(__name__)

INPUT_WEIGHT = "conv_in.weight"
"""The one UNet weight, (output channels, input channels, k, k), whose shape depends on what the UNet is fed."""

LATENT_CHANNELS = 4
"""Input channels of a UNet that is fed noisy latents only. A UNet that is fed more takes the noisy latents first: for
inpainting 9 channels, the last 5 being the mask and the latents of the masked image."""

BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."
"""What peft puts into the name of a weight that it has wrapped."""

PARTIAL_KEY = "perflow.partial"
"""In a file's metadata, with the value "true": the model may have weights that the file does not name."""

STATE_ATTRIBUTE, LOCK_ATTRIBUTE = "_perflow_merges", "_perflow_merge_lock"
CONFIG_KEY = "_perflow_merges"
"""In the model's configuration. diffusers saves and reads keys with an underscore and gives them to no constructor."""

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that a delta can be merged into."""

WITNESSES, WITNESS_VALUES, RELATED = 8, 32, 0.5
"""How many weights are noted to recognise a merged model, how many values of each, and the cosine above which values
are still those of the model that was noted, perhaps trained further; of other models it is near 0."""

GPU_CHUNKS = 8
"""How many chunks at a time on a GPU, where every one costs some waiting."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Part = tuple[Tensor, float]


@dataclass(frozen=True)
class MergeRecord:
    """A delta that is merged into a model.

    Attributes:
        source: where it was read from: the path, absolute unless the model was saved since.
        digest: its `identity_of`; this, not the path, tells deltas apart. Empty for a model that version 0.1.0 saved.
        scale: the factor of dW in the weights.
        scales: further factors, (pattern, factor) for names of weights; the first pattern that matches counts.
        recipe: the sampling settings that came with it.
        reloaded: whether the model was saved with it and loaded again.
    """

    source: str
    digest: str
    scale: float
    scales: tuple[tuple[str, float], ...] = ()
    recipe: DeltaRecipe = field(default_factory=DeltaRecipe)
    reloaded: bool = False

    def to_config(self) -> dict[str, Any]:
        """For the model's configuration, in JSON's types. Of the path only the name, as the rest is this machine's."""
        return {
            "source": Path(self.source).name,
            "digest": self.digest,
            "sampled": True,
            "scale": self.scale,
            "scales": [list(pair) for pair in self.scales],
            "recipe": self.recipe.to_metadata(),
        }

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> MergeRecord:
        """The inverse of `to_config`, for a model that was loaded.

        Version 0.1.0 wrote a digest of all values, which cannot be compared with today's: such a record is matched by
        the name of the delta's file. Under another name the same delta is not recognised, and merging it warns.

        Raises:
            ValueError: the entry lacks something.
        """
        try:
            scales = tuple((str(pattern), float(factor)) for pattern, factor in entry["scales"])
            recipe = DeltaRecipe.from_metadata(entry["recipe"])
            digest = str(entry["digest"]) if entry.get("sampled") else entry["digest"] and ""
            return cls(entry["source"], digest, float(entry["scale"]), scales, recipe, reloaded=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{CONFIG_KEY} in the model's config.json is damaged ({error!r}); restore it, or remove the entry if "
                "no delta is in the weights."
            ) from error


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


@dataclass
class MergeState:
    """What is merged into a model, kept on it.

    Attributes:
        records: in the order of merging, which is the order of the sum.
        weights: the deltas by digest, under the model's names.
        seen: by place, the stamp and digest of files that were read, which need not be opened again.
        base: the weights without any delta of `weights`, as far as they can be read again.
        types: of each weight that was changed: the type at the merge, and those it was converted to later.
        writing: (name, first row, last row + 1, whether base plus sum) of all rows that an unfinished change may have
            written; empty when the weights are what the records say.
        witness: values of a few weights, "with" the deltas and "without".
        watched: the modules that own these weights, and the names there.
        signature: of the watched tensors when the witness was last compared.
    """

    records: tuple[MergeRecord, ...] = ()
    weights: dict[str, Weights] = field(default_factory=dict)
    seen: dict[Any, tuple[Stamp, str]] = field(default_factory=dict)
    base: Weights | None = None
    types: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    writing: list[tuple[str, int, int, bool]] = field(default_factory=list)
    witness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    watched: list[tuple[nn.Module, str]] = field(default_factory=list)
    signature: tuple[Any, ...] = ()

    def terms(self) -> list[Term]:
        """Those deltas that are not part of the base; reloaded ones are."""
        return [Term(self.weights[r.digest], r.scale, r.scales) for r in self.records if not r.reloaded]


class MergeLock:
    """A reentrant lock whose copy, also a pickled one, is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[MergeLock], tuple[()]]:
        return MergeLock, ()


def merge_lock(module: nn.Module) -> MergeLock:
    """The lock that is held around every merge into this model; hold it to ask and merge in one step."""
    return vars(uncompiled(module)).setdefault(LOCK_ATTRIBUTE, MergeLock())


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, whose weights and names are the model's own; else the module."""
    return getattr(module, "_orig_mod", module)


# Merging


def merge_delta(
    module: nn.Module,
    delta: Delta,
    scale: float = 1.0,
    *,
    scales: Mapping[str, float] | None = None,
    base: Delta | None = None,
) -> MergeRecord:
    """Adds `scale * dW` to a model's weights in place: summed in float32, rounded once to each weight's type.

    Several deltas may be merged one after another; the weights are always the base plus the sum of all, rounded once.
    Merging the same delta again changes nothing and logs a warning; with another scale it is rescaled. A delta is
    recognised by its values, in whatever file or mapping they are. Threads may share the model. A merge that is refused
    or interrupted leaves the weights as they were, or the next call puts them right.

    To undo a merge exactly, the base must be readable: the files that the model was loaded from, which are found for
    models that diffusers loaded, or `base`. It stays open, a mapping by reference, until the delta is taken out; if its
    files are written to meanwhile, changing the merge raises an error. For weights that differ from the base, or
    without one, a warning says that undoing is exact to one rounding.

    The delta of a UNet with 4 input channels goes into the first 4 of one with more (inpainting UNets have 9) and
    leaves the others as they are; a warning says so, as quality at few steps suffers.

    Args:
        module: a UNet, or a module that holds weights under the delta's names.
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        scale: the factor of dW: 1 as it was extracted, 0 for none.
        scales: further factors by pattern of a weight's name, as in {"up_blocks.*": 0.5}; the first that matches
            counts.
        base: the model's weights without any delta: files, a folder, or a mapping, in any type.

    Raises:
        ValueError: a factor or file is unusable, the delta does not fit, the weights cannot be changed, or an
            interrupted merge left weights that only the base can restore.
    """
    module = uncompiled(module)
    with merge_lock(module):
        pairs = _pairs(scale, scales)
        weights = opened(delta)
        state = _state(module, base)
        known = _find(module, state, weights)
        if known is not None:
            _require_matches(pairs, state.weights.get(known.digest, weights))
            if (known.scale, known.scales) != (scale, pairs):
                return _rescaled(module, state, known, scale, pairs, delta, base)
            logger.warning(f"{known.source} is merged into this {type(module).__name__} already; nothing was changed.")
            return known
        fit = fit_delta(weights, module)
        _require_matches(pairs, fit.weights)
        source = str(Path(delta).expanduser().resolve()) if isinstance(delta, (str, os.PathLike)) else weights.label
        record = MergeRecord(source, identity_of(fit.weights), float(scale), pairs, read_recipe(weights))
        if not scale:
            return record
        require_difference(fit.weights, fit.targets)
        old = [known.source for known in state.records if not known.digest]
        state = replace(
            state, weights={**state.weights, record.digest: fit.weights}, seen=_seen(state, weights, record.digest)
        )
        _exchange(module, state, (*state.records, record))
        if old:
            logger.warning(
                f"{listed(old)} was merged by version 0.1.0, which cannot be compared with {source}: if it is the same "
                "delta, it is in the weights twice now; then call unmerge_delta with this one."
            )
        if fit.extra_input_channels:
            logger.warning(_extra_channels_warning(weights.label, module, fit.extra_input_channels))
        logger.info(f"merged {weights.label} into {type(module).__name__} at scale {scale:g}.")
        return record


def rescale_delta(
    module: nn.Module,
    scale: float,
    delta: Delta | MergeRecord | None = None,
    *,
    scales: Mapping[str, float] | None = None,
    base: Delta | None = None,
) -> MergeRecord:
    """Changes the factors of a merged delta, exactly as if it had been merged with them.

    `delta` says which one where several are merged; scale 0 takes it out. `base` as in `merge_delta`. A model that was
    saved with the delta and loaded again needs both.

    Raises:
        ValueError: nothing is merged, `delta` is not, or it is not clear which one is meant.
    """
    module = uncompiled(module)
    with merge_lock(module):
        pairs = _pairs(scale, scales)
        state = _state(module, base)
        record = _chosen(module, state, delta)
        if record.digest in state.weights:
            _require_matches(pairs, state.weights[record.digest])
        return _rescaled(module, state, record, scale, pairs, delta, base)


def unmerge_delta(
    module: nn.Module,
    delta: Delta | MergeRecord | None = None,
    *,
    base: Delta | None = None,
    exact: bool = True,
) -> tuple[MergeRecord, ...]:
    """Takes one delta, or all, out of the model and returns their records; the rest stays merged.

    `base` as in `merge_delta`. A model that was saved with a delta and loaded again needs the delta and the base;
    without the base, `exact=False` subtracts the delta and rounds once more.

    Raises:
        ValueError: nothing is merged, delta or base files were written to meanwhile, or the model was loaded with the
            delta in it and there is no base.
    """
    module = uncompiled(module)
    with merge_lock(module):
        state = _state(module, base)
        if not state.records:
            raise ValueError(f"no delta is merged into this {type(module).__name__}; there is nothing to take out.")
        gone = state.records if delta is None else (_chosen(module, state, delta),)
        reloaded = [record for record in gone if record.reloaded]
        if reloaded and exact and base is None:
            raise ValueError(
                f"this {type(module).__name__} was loaded with {listed([r.source for r in reloaded])} in its weights: "
                "pass the delta and base=, the base's files, or the delta and exact=False; or load the base."
            )
        left = tuple(record for record in state.records if record not in gone)
        for record in reloaded:
            state = _adopted(module, state, record, delta, base)
        _exchange(module, state, left, warn=exact)
        return gone


def merge_records(module: nn.Module) -> tuple[MergeRecord, ...]:
    """What is merged into the model, in the order of merging; also into one that was saved and loaded again.

    An interrupted merge is put right first, and records are dropped if other weights were loaded since. Costs
    microseconds otherwise.
    """
    with merge_lock(module):
        return _state(uncompiled(module)).records


def merge_record(module: nn.Module) -> MergeRecord | None:
    """The delta that says how to sample, else the first one; None where nothing is merged."""
    records = merge_records(module)
    return next((record for record in records if record.recipe != DeltaRecipe()), records[0] if records else None)


def saved_records(config: Mapping[str, Any]) -> tuple[MergeRecord, ...]:
    """What the configuration of a saved model says is merged into it; its weights are not looked at."""
    saved = config.get(CONFIG_KEY)
    return tuple(MergeRecord.from_config(entry) for entry in saved.get("deltas", ())) if saved else ()


def find_merged(module: nn.Module, delta: Delta) -> MergeRecord | None:
    """The record of a delta that is merged, from this file or another with the same values; else None.

    Raises:
        ValueError: the delta cannot be read, or has names that cannot be translated.
    """
    with merge_lock(module):
        return _find(uncompiled(module), _state(uncompiled(module)), opened(delta))


def is_merged(module: nn.Module, path: str | os.PathLike[str], scale: float, variant: str | None = None) -> bool:
    """Whether this file or folder is known to be merged at this scale, without opening it."""
    with merge_lock(module):
        state = _state(uncompiled(module))
    stamp, digest = state.seen.get((os.path.realpath(path), variant), ((), None))
    try:
        unchanged = stamp_of([file for file, _, _ in stamp]) == stamp
    except OSError:
        return False
    return unchanged and any((r.digest, r.scale, r.scales) == (digest, scale, ()) for r in state.records)


def _pairs(scale: float, scales: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(f"scales={scales!r} must be factors by pattern, as in {{'up_blocks.*': 0.5}}.")
    for name, factor in {"scale": scale, **(scales or {})}.items():
        if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
            raise ValueError(f"{name}={factor!r} must be a finite number, 1.0 for the delta as it was extracted.")
    return tuple((scales or {}).items())


def _require_matches(pairs: Sequence[tuple[str, float]], weights: Weights) -> None:
    idle = [pattern for pattern, _ in pairs if not any(fnmatchcase(name, pattern) for name in weights.shapes)]
    if idle:
        example = next(iter(weights.shapes))
        raise ValueError(f"scales names {listed(idle)}, which match no weight of {weights.label}, such as {example}.")


def _seen(state: MergeState, weights: Weights, digest: str) -> dict[Any, tuple[Stamp, str]]:
    stamp = weights.stamp()
    return state.seen if stamp is None else {**state.seen, weights.place or stamp: (stamp, digest)}


def _find(module: nn.Module, state: MergeState, weights: Weights) -> MergeRecord | None:
    if not state.records:
        return None
    stamp = weights.stamp()
    digest = next((digest for known, digest in state.seen.values() if known == stamp), None)
    if digest is None:
        digest = identity_of(named_as_model(weights, own_weights(module), getattr(module, "config", {})))
    name = Path(weights.label).name
    for record in state.records:
        if record.digest == digest or (not record.digest and record.source == name):
            state.seen = _seen(state, weights, record.digest)
            return record
    return None


def _chosen(module: nn.Module, state: MergeState, delta: Delta | MergeRecord | None) -> MergeRecord:
    names = listed([record.source for record in state.records]) or "none"
    if delta is None:
        if len(state.records) != 1:
            raise ValueError(f"{len(state.records)} deltas are merged ({names}); name the one that is meant.")
        return state.records[0]
    if isinstance(delta, MergeRecord):
        found = next((record for record in state.records if record.digest == delta.digest), None)
    else:
        found = _find(module, state, opened(delta))
    if found is None:
        raise ValueError(f"that delta is not merged into this {type(module).__name__}; merged are: {names}.")
    return found


def _rescaled(
    module: nn.Module,
    state: MergeState,
    record: MergeRecord,
    scale: float,
    pairs: tuple[tuple[str, float], ...],
    delta: Delta | MergeRecord | None,
    base: Delta | None,
) -> MergeRecord:
    if record.reloaded and base is None:
        raise ValueError(
            f"this {type(module).__name__} was loaded with {record.source} in its weights at scale {record.scale:g}, "
            f"which cannot become {scale:g}; pass base=, the base's files, load the base, or take the delta out with "
            "unmerge_delta(..., exact=False) first."
        )
    position = state.records.index(record)
    if record.reloaded:
        state = _adopted(module, state, record, delta, base)
    changed = replace(state.records[position], scale=float(scale), scales=pairs)
    records = [*state.records[:position], changed, *state.records[position + 1 :]]
    _exchange(module, state, tuple(entry for entry in records if entry.scale))
    return changed


def _adopted(
    module: nn.Module,
    state: MergeState,
    record: MergeRecord,
    delta: Delta | MergeRecord | None,
    base: Delta | None,
) -> MergeState:
    """The state with a reloaded delta as one of its own, whose values are known."""
    if delta is None or isinstance(delta, MergeRecord):
        raise ValueError(
            f"{record.source} was in the weights when they were loaded: base= or exact=False wants the delta itself, "
            "as a file or mapping."
        )
    weights = fit_delta(opened(delta), module).weights
    own = replace(record, digest=identity_of(weights), reloaded=False)
    records = tuple(own if entry is record else entry for entry in state.records)
    # Without a base of the user's: the files that the model was loaded from hold the delta too.
    known = None if base is None else state.base
    return replace(state, records=records, weights={**state.weights, own.digest: weights}, base=known)


def _extra_channels_warning(source: str, module: nn.Module, extra: int) -> str:
    return (
        f"{source} is the delta of a UNet with {LATENT_CHANNELS} input channels, and this {type(module).__name__} has "
        f"{LATENT_CHANNELS + extra}: it is added to the first {LATENT_CHANNELS}, the noisy latents, and the other "
        f"{extra} stay as they are. Quality at few steps suffers, since it was distilled without them, not for "
        "inpainting."
    )


# What is merged, kept on the model and in its configuration


def _state(module: nn.Module, base: Delta | None = None) -> MergeState:
    """The model's state, with `base` if one is given, once the weights are what it says. The lock is held."""
    state: MergeState | None = vars(module).get(STATE_ATTRIBUTE)
    if state is None:
        state = _loaded_state(module)
    if base is not None:
        state.base = fit_base(opened(base, "base"), module)
    if state.writing:
        _put_right(module, state, base_given=base is not None)
    if state.watched and _signature(state.watched) != state.signature:
        if not _holds(module, state.witness):
            gone = [record for record in state.records if not record.reloaded] or list(state.records)
            logger.warning(
                f"{listed([record.source for record in gone])} is not in the weights of this {type(module).__name__} "
                "any more: other weights were loaded since it was merged."
            )
            state = MergeState(tuple(record for record in state.records if record not in gone))
            _remember(module, state)
        state.signature = _signature(state.watched)
    return state


def _loaded_state(module: nn.Module) -> MergeState:
    """What the configuration of a model that was saved says; it may have got that without the weights."""
    config: Mapping[str, Any] = module.config if isinstance(module, ConfigMixin) else {}
    records = saved_records(config)
    witness = config[CONFIG_KEY].get("witness", {}) if records else {}
    if not records or not _holds(module, witness):
        return MergeState()
    state = MergeState(records, witness=witness)
    _watch(module, state)
    setattr(module, STATE_ATTRIBUTE, state)
    return state


def _remember(module: nn.Module, state: MergeState) -> None:
    """Puts the state on the module and its records in its configuration; an empty one leaves no trace."""
    if state.records:
        state.witness = _witness(module, state)
        _watch(module, state)
        setattr(module, STATE_ATTRIBUTE, state)
    else:
        vars(module).pop(STATE_ATTRIBUTE, None)
    if isinstance(module, ConfigMixin):
        # In place, past the freezing: a new FrozenDict would lose what diffusers set as attributes of this one, such
        # as the kind of projection when an IP-Adapter was loaded.
        OrderedDict.pop(module._internal_dict, CONFIG_KEY, None)
        if state.records:
            saved = {"deltas": [record.to_config() for record in state.records], "witness": state.witness}
            OrderedDict.__setitem__(module._internal_dict, CONFIG_KEY, saved)


def _witness(module: nn.Module, state: MergeState) -> dict[str, dict[str, list[float]]]:
    """Some values of weights as they now are, "with" the deltas, and where it is known as they would be "without"."""
    weights = {name: w for name, w in floating_entries(own_weights(module)).items() if w.dim() > 1}
    terms = state.terms()
    changed = [name for name in weights if any(term.factor(name) for term in terms)] or list(weights)
    found = {}
    for name in changed[:: max(1, len(changed) // WITNESSES)][:WITNESSES]:
        values = _values(weights[name])
        found[name] = {"with": values.tolist()}
        parts = [(_values(term.weights.tensor(name)), factor) for term in terms if (factor := term.factor(name))]
        if parts and all(part.shape == values.shape for part, _ in parts):
            found[name]["without"] = (values - sum_of_terms(parts, values)).tolist()
    return found


def _values(weight: Tensor) -> Tensor:
    return rows_of(weight.detach(), 0, 1).flatten()[:WITNESS_VALUES].float().cpu()


def _holds(module: nn.Module, witness: Mapping[str, Mapping[str, list[float]]]) -> bool:
    """Whether the weights are nearer to those with the deltas than to those without; where it cannot be told, yes.

    Training further, another type or a fused LoRA change weights too, and a delta stays in them.
    """
    weights = floating_entries(own_weights(module))
    known = {name: weights[name] for name in witness if name in weights and not weights[name].is_meta}
    if not known:
        return True
    found = torch.cat([_values(weight) for weight in known.values()])
    merged = torch.tensor([value for name in known for value in witness[name]["with"]])
    base = torch.tensor([value for name in known for value in witness[name].get("without", ())])
    if found.shape != merged.shape or torch.cosine_similarity(found, merged, dim=0) < RELATED:
        return False
    if base.shape != found.shape:
        return True
    return bool(torch.linalg.vector_norm(found - merged) <= torch.linalg.vector_norm(found - base))


def _watch(module: nn.Module, state: MergeState) -> None:
    own = own_weights(module)
    wanted = {id(own[name]) for name in state.witness if name in own}
    state.watched = [
        (owner, name)
        for owner in module.modules()
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if id(tensor) in wanted
    ]
    state.signature = _signature(state.watched)


def _signature(watched: Iterable[tuple[nn.Module, str]]) -> tuple[Any, ...]:
    """Identity and version of tensors: differs once one was replaced or written to. Nothing is read of a device."""
    tensors = [owner._parameters.get(name, owner._buffers.get(name)) for owner, name in watched]
    return tuple((id(t), None if t is None or t.is_inference() else t._version) for t in tensors)


# Whether a delta fits


@dataclass(frozen=True)
class DeltaFit:
    """Where a delta goes.

    Attributes:
        weights: the delta under the model's names.
        targets: by those names, what each tensor is added to: the model's weight, or that part of it which has the
            tensor's shape. Writing to them changes the model. Tied weights are there once.
        extra_input_channels: how many input channels of the model the delta leaves alone; 0 or more.
    """

    weights: Weights
    targets: dict[str, Tensor]
    extra_input_channels: int


def fit_delta(weights: Weights, module: nn.Module) -> DeltaFit:
    """Where the delta can be added. Looks at names, shapes and types, not at values.

    Raises:
        ValueError: one line: a name or shape that does not fit, another architecture, or a model whose weights cannot
            be changed.
    """
    weights = named_as_model(weights, own_weights(module), getattr(module, "config", {}))
    targets = _mergeable_weights(module, weights.label, set(weights.shapes))
    extra = _require_shapes(weights, module, targets)
    if extra:
        targets[INPUT_WEIGHT] = targets[INPUT_WEIGHT][:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
    once = {id(targets[name]): name for name in reversed(weights.shapes)}  # tied weights are one tensor
    names = set(once.values())
    return DeltaFit(weights, {name: targets[name] for name in weights.shapes if name in names}, extra)


def fit_base(weights: Weights, module: nn.Module) -> Weights:
    """Those of the weights that a model may have been loaded from, under the model's names: of equal shapes.

    Raises:
        ValueError: one line: there are none, or they are in the model's own memory, which a merge changes.
    """
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
    """The delta under the model's names, once those and the shapes fit; the model may be without values, on "meta".

    Raises:
        ValueError: one line: a name or shape that does not fit, or another architecture.
    """
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


def _mergeable_weights(module: nn.Module, label: str, named: set[str]) -> dict[str, Tensor]:
    attentions = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention))
    fused = [name for name, layer in attentions if "Fused" in type(layer.processor).__name__]
    if fused:
        raise ValueError(
            f"cannot merge {label} into fused projections ({listed(fused)}), which are copies of the weights; call "
            "unet.unfuse_qkv_projections(), and merge before fusing projections."
        )
    own = own_weights(module, named)
    weights = floating_entries(own)
    # Quantized and sharded weights are integers, or tensor subclasses whose arithmetic is their own.
    quantized = [
        name
        for name, tensor in own.items()
        if name in named
        and (name not in weights or type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in TYPES)
    ]
    if quantized:
        raise ValueError(
            f"cannot merge {label} into quantized or sharded weights ({listed(quantized)}); "
            "merge first, then quantize or shard."
        )
    offloaded = [name for name, tensor in weights.items() if name in named and tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"cannot merge {label} into weights that are offloaded (device 'meta': {listed(offloaded)}); "
            "merge before enabling offload."
        )
    return weights


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
    looked_at = matrices[:: max(1, len(matrices) // 8)]
    for name in looked_at:
        rows = min(8, delta.shapes[name][0])
        own, given = (rows_of(t, 0, rows).detach().reshape(-1) for t in (targets[name], delta.tensor(name)))
        if not torch.cosine_similarity(own.double().cpu(), given.double().cpu(), dim=0) > 0.9:
            return
    if looked_at:
        raise ValueError(
            f"{delta.label} holds whole weights, not their difference from a base (they resemble this model's); pass "
            "open_difference(it, base)."
        )


# Changing the weights


def sum_of_terms(terms: Sequence[Part], weight: Tensor) -> Tensor:
    """sum_i factor_i * tensor_i, in the order given, to be added to `weight`, whose shape they have; to be read only.

    `terms` holds at least one. The sum is in float32, or in float64 for such weights, but for a single tensor of the
    weight's own type with the factor 1, which is its own sum.
    """
    first, factor = terms[0]
    if len(terms) == 1 and factor == 1.0 and first.dtype == weight.dtype:
        return first.to(weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Product and sum are rounded one by one: a fused multiply-add is not the same on every device.
    products = (tensor.to(weight.device, wide, copy=True).mul_(factor) for tensor, factor in terms)
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
    pair = [tensor.view(_INTEGERS[tensor.element_size()]) for tensor in (one, other)]
    if one.nbytes % 8 == 0 and all(tensor.is_contiguous() and tensor.data_ptr() % 8 == 0 for tensor in pair):
        pair = [tensor.view(-1).view(torch.int64) for tensor in pair]  # in a quarter of the time
    return torch.equal(*pair)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight, and what is known of them.

    Attributes:
        piece: name, first row, last row + 1.
        live: the rows in the model.
        base: without any delta, in the type that the weight had when it was last changed; None where it cannot be read.
        before, after: what the deltas have for them, with the factors.
    """

    piece: tuple[str, int, int]
    live: Tensor
    base: Tensor | None
    before: list[Part]
    after: list[Part]

    def held(self) -> Tensor | None:
        """What the live rows are if they are base plus `before`, perhaps converted to another type since."""
        if self.base is None:
            return None
        held = add(self.base, sum_of_terms(self.before, self.base)) if self.before else self.base
        return held.to(self.live.dtype)

    def planned(self) -> tuple[bool, Tensor, Tensor | None]:
        """Whether the live rows are base plus `before`; what they become: the first tensor plus the second."""
        held = self.held()
        exact = held is not None and same_bits(held, self.live)
        after = sum_of_terms(self.after, self.live) if self.after else None
        if exact and self.before and self.base is not None:
            return exact, self.base.to(self.live.dtype), after
        if not self.before:
            return exact, self.live, after
        before = sum_of_terms(self.before, self.live).to(torch.promote_types(self.live.dtype, torch.float32))
        return exact, self.live, -before if after is None else after.to(before.dtype) - before

    def write(self, value: Tensor, change: Tensor | None = None) -> None:
        with torch.inference_mode() if self.live.is_inference() else nullcontext():
            self.live.copy_(value) if change is None else add(value, change, out=self.live)


def _rows(
    state: MergeState, name: str, target: Tensor, before: Sequence[Term], after: Sequence[Term] = ()
) -> Iterator[_Rows]:
    target = target.detach()
    read = {id(t.weights): t.weights.tensor(name) for t in (*before, *after) if t.factor(name)}
    parts = [[(read[id(t.weights)], factor) for t in ts if (factor := t.factor(name))] for ts in (before, after)]
    stored = state.base.tensor(name) if state.base is not None and name in state.base.shapes else None
    for start, stop in row_chunks(target.shape, 1 if target.device.type == "cpu" else GPU_CHUNKS):
        live, base = rows_of(target, start, stop), None
        if stored is not None:
            base = rows_of(stored, start, stop)[tuple(map(slice, live.shape))].to(live.device)
            for dtype in state.types.get(name, (live.dtype,)):
                base = base.to(dtype)
        chunks = [[(rows_of(tensor, start, stop), factor) for tensor, factor in part] for part in parts]
        yield _Rows((name, start, stop), live, base, *chunks)


class _NotFiniteError(ArithmeticError):
    pass


@torch.no_grad()
def _exchange(module: nn.Module, state: MergeState, records: tuple[MergeRecord, ...], warn: bool = True) -> None:
    """Makes `records` what is merged; `state` has the weights of all of them. The lock is held."""
    new = replace(state, records=records, writing=[])
    before, after = state.terms(), new.terms()
    targets = {
        name: target
        for name, target in _targets(module, state.weights).items()
        if _factors(name, before) != _factors(name, after)
    }
    if state.base is None and not before:
        state.base = _found_base(module)
    if state.base is not None:
        state.base.require_unchanged()
    setattr(module, STATE_ATTRIBUTE, state)
    try:
        inexact = _change(state, targets, before, after)
        new.base = None if len(inexact) == len(targets) and not before else state.base
        new.types = {**state.types, **{name: _types(state, name, target.dtype) for name, target in targets.items()}}
        new.weights = {r.digest: state.weights[r.digest] for r in records if not r.reloaded}
        new.seen = {key: value for key, value in state.seen.items() if value[1] in {r.digest for r in records}}
        _remember(module, new)
    except BaseException as error:
        if vars(module).get(STATE_ATTRIBUTE) is state and not _restore(state, targets):
            state.writing = []
            if not state.records:
                del vars(module)[STATE_ATTRIBUTE]
        if isinstance(error, _NotFiniteError):
            require_finite(state, targets, before, after)
        raise
    if inexact and warn:
        logger.warning(_inexact_warning(inexact, state.base, first=not before))


def _change(
    state: MergeState, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term]
) -> list[str]:
    """Writes all rows, each noted in the state first; returns the names of weights that were not base plus `before`.

    Raises:
        _NotFiniteError: a weight would not be finite; it and others are written.
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
                raise _NotFiniteError(name)
    return inexact


@torch.no_grad()
def _restore(state: MergeState, targets: Mapping[str, Tensor]) -> list[str]:
    """Writes base plus records to all rows that were written; returns the names of weights without a base for that."""
    lost: list[str] = []
    for name in dict.fromkeys(name for name, *_ in state.writing):
        for rows in _rows(state, name, targets[name], state.terms()):
            held = rows.held() if (*rows.piece, True) in state.writing else None
            if held is not None:
                rows.write(held)
            elif (*rows.piece, False) in state.writing:
                lost += [name] if name not in lost else []
    return lost


def require_finite(
    state: MergeState, targets: Mapping[str, Tensor], before: Sequence[Term], after: Sequence[Term]
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


def _targets(module: nn.Module, weights: Mapping[str, Weights]) -> dict[str, Tensor]:
    """By name, what the deltas go into."""
    targets: dict[str, Tensor] = {}
    for digest, delta in weights.items():
        delta.require_unchanged()
        if identity_of(delta) != digest:
            raise ValueError(f"{delta.label} was changed since it was merged; load the model again.")
        for name, target in fit_delta(delta, module).targets.items():
            if targets.setdefault(name, target).shape != target.shape:
                raise ValueError(f"{name} of {delta.label} and of another delta differ in shape; take one out.")
    return targets


def _factors(name: str, terms: Sequence[Term]) -> list[tuple[int, float]]:
    return [(id(term.weights), factor) for term in terms if (factor := term.factor(name))]


def _types(state: MergeState, name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    known = state.types.get(name, ())
    return known if known[-1:] == (dtype,) else (*known, dtype)


def _found_base(module: nn.Module) -> Weights | None:
    weights = loaded_weights(module)
    try:
        return None if weights is None else fit_base(weights, module)
    except ValueError:
        return None  # files of another model: this one only has their configuration


def _put_right(module: nn.Module, state: MergeState, base_given: bool) -> None:
    """Restores the weights that an interrupted change left; with a base that the user gave, all of them."""
    if base_given:
        state.writing = [(*piece, True) for *piece, _ in state.writing]
    lost = _restore(state, _targets(module, state.weights))
    if lost:
        raise ValueError(
            f"changing the deltas of this {type(module).__name__} was interrupted and left weights half merged "
            f"({listed(lost)}); load the model again, or pass base=, the files that it was loaded from."
        )
    state.writing = []


def _inexact_warning(names: Sequence[str], base: Weights | None, first: bool) -> str:
    found = f"{len(names)} weights ({listed(names)})"
    if first:
        reason = "there is no base to read" if base is None else f"they differ from {base.label}"
        return (
            f"taking the delta out will be exact to one rounding for {found}: {reason}. Pass base=, the files that the "
            "model was loaded from, to have it exact to the bit."
        )
    return (
        f"{found} are not base plus deltas, because they were changed (a fused LoRA, training) or have no base: the "
        "difference of the deltas was added to them, exact to one rounding."
    )
