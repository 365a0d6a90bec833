"""Merging deltas into a model's weights, changing their factors, and taking them out again.

A merged model's weights are W = round(base + sum_i s_i dW_i), with dW = W_student - W_base (arXiv 2405.07510): the sum
is formed in float32 in the order of merging and rounded once to the weight's type. Every change of the sum reads the
base again from the files that the model was loaded from, so its result is exact to the bit. Weights that are not base
plus sum (a LoRA was fused, training) get the difference of the sums added, exact to one rounding.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging
from torch import Tensor, nn

from .apply import (
    LATENT_CHANNELS,
    Applied,
    Term,
    change,
    fit_base,
    fit_delta,
    own_weights,
    require_difference,
    require_finite,
    restore,
    sum_of_terms,
)
from .files import (
    Delta,
    Stamp,
    Weights,
    floating_entries,
    identity_of,
    listed,
    loaded_weights,
    named_as_model,
    open_weights,
    opened,
    read_recipe,
    rows_of,
    stamp_of,
)
from .model_lock import model_lock
from .recipe import DeltaRecipe

logger = logging.get_logger(__name__)

STATE_ATTRIBUTE = "_perflow_merges"
CONFIG_KEY = "_perflow_merges"
"""In the model's configuration. diffusers saves and reads keys with an underscore and gives them to no constructor."""

WITNESSES, WITNESS_VALUES, SAVED_VALUES, RELATED = 8, 1024, 32, 0.5
"""How many weights are noted to recognise a merged model, how many values of each, how many of them are saved, and the
cosine above which values are still those of the model that was noted, perhaps trained further; of other models it is
near 0."""

NO_RECIPE = DeltaRecipe()
"""Of a delta that does not say how to sample."""


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
        reloaded: whether the model was saved with it and loaded again.
    """

    source: str
    digest: str
    scale: float
    scales: tuple[tuple[str, float], ...] = ()
    recipe: DeltaRecipe = NO_RECIPE
    reloaded: bool = False

    def to_config(self) -> dict[str, Any]:
        """For the model's configuration, in JSON's types. Of the path only the name, as the rest is this machine's."""
        source, recipe = Path(self.source).name, self.recipe.to_metadata()
        known = {"source": source, "digest": self.digest, "sampled": True, "scale": self.scale}
        return {**known, "scales": [list(pair) for pair in self.scales], "recipe": recipe}

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> MergeRecord:
        """The inverse of `to_config`, for a model that was loaded.

        Version 0.1.0 wrote a digest of all values, which cannot be compared with today's: such a record is matched by
        the delta's file name and recipe. Under another name the same delta is not recognised, and merging it warns.

        Raises:
            ValueError: the entry lacks something.
        """
        try:
            digest = str(entry["digest"]) if entry.get("sampled") else entry["digest"] and ""
            scales = tuple((str(pattern), float(factor)) for pattern, factor in entry["scales"])
            recipe = DeltaRecipe.from_metadata(entry["recipe"])
            return cls(entry["source"], digest, float(entry["scale"]), scales, recipe, reloaded=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{CONFIG_KEY} in the model's config.json is damaged ({error!r}); restore it, or remove the entry if "
                "no delta is in the weights."
            ) from error


@dataclass
class MergeState(Applied):
    """What is merged into a model, kept on it. The base is that without the deltas of `weights`.

    Attributes:
        records: in the order of merging, which is the order of the sum.
        weights: the deltas by digest, under the model's names.
        seen: by path and variant, the stamp and digest of files that were read, which need not be opened again.
        witness: values of a few weights, "with" the deltas and "without".
        loaded: the witness that the model was saved with; empty where a delta that it was saved with was taken out.
        signature: of the witness's weights when they were last compared.
    """

    records: tuple[MergeRecord, ...] = ()
    weights: dict[str, Weights] = field(default_factory=dict)
    seen: dict[tuple[str, str | None], tuple[Stamp, str]] = field(default_factory=dict)
    witness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loaded: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    signature: tuple[Any, ...] = ()

    def terms(self) -> list[Term]:
        """Those deltas that are not part of the base; reloaded ones are."""
        return [Term(self.weights[r.digest], r.scale, r.scales) for r in self.records if not r.reloaded]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, whose weights and names are the model's own; else the module."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def _locked(module: nn.Module) -> Iterator[tuple[nn.Module, MergeState]]:
    """The module without its compiled wrapper, and its state, while the lock is held."""
    with model_lock(module):
        module = uncompiled(module)
        yield module, _state(module)


@contextmanager
def _changing(module: nn.Module, base: Delta | None) -> Iterator[tuple[nn.Module, MergeState]]:
    """The same, to change the weights, once no thread runs the model."""
    with model_lock(module).changing(), model_lock(module):
        module = uncompiled(module)
        yield module, _state(module, base)


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
    recognised by its values, in whatever file or mapping they are. Threads may share the model. If a merge is refused
    or interrupted, the weights stay as they were, or the next call restores them.

    To undo a merge exactly, the base must be readable: the files that the model was loaded from, which are found for
    models that diffusers loaded, or `base`. It stays open, a mapping by reference, until the delta is taken out. If
    its files are written to meanwhile, undoing raises an error. For weights that differ from the base, or without one,
    a warning says that undoing is exact to one rounding.

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
    pairs = _pairs(scale, scales)
    weights = opened(delta)
    with _changing(module, base) as (module, state):
        known = _find(module, state, weights)
        if known is not None:
            if (known.scale, known.scales) != (scale, pairs):
                return rescale_delta(module, scale, weights, scales=scales, base=base)
            logger.warning(f"{known.source} is merged into this {type(module).__name__} already; nothing was changed.")
            return known
        fitted, targets, extra = fit_delta(weights, module)
        _require_matches(pairs, fitted)
        # Not resolved: in the Hub's cache a link has the file's name, and what it leads to has not.
        source = os.path.abspath(weights.label) if weights.place else weights.label
        record = MergeRecord(source, identity_of(fitted), float(scale), pairs, read_recipe(weights))
        if not scale:
            return record
        require_difference(fitted, targets)
        old = [known.source for known in state.records if not known.digest]
        seen = state.seen | _seen(weights, record.digest)
        state = replace(state, weights={**state.weights, record.digest: fitted}, seen=seen)
        _exchange(module, state, (*state.records, record))
        if old:
            logger.warning(
                f"{listed(old)} was merged by version 0.1.0 and cannot be compared with {source}: if they are the "
                "same delta, it is in the weights twice now, and unmerge_delta takes this one out again."
            )
        if extra:
            logger.warning(
                f"{source} is the delta of a UNet with {LATENT_CHANNELS} input channels, and this "
                f"{type(module).__name__} has {LATENT_CHANNELS + extra}: it is added to the first {LATENT_CHANNELS}, "
                f"the noisy latents, and the other {extra} stay as they are. Quality at few steps suffers, since it "
                "was distilled without them, not for inpainting."
            )
        logger.info(f"merged {weights.label} into {type(module).__name__} at scale {scale:g}.")
        return record


def rescale_delta(
    module: nn.Module,
    scale: float,
    delta: Delta | MergeRecord | None = None,
    *,
    scales: Mapping[str, float] | None = None,
    base: Delta | None = None,
    exact: bool = True,
) -> MergeRecord:
    """Changes the factors of a merged delta, exactly as if it had been merged with them.

    `delta` says which one where several are merged; scale 0 takes it out. `base` as in `merge_delta`. A model that was
    saved with the delta and loaded again needs both; without the base, `exact=False` adds the difference and rounds
    once more.

    Raises:
        ValueError: nothing is merged, `delta` is not, or it is not clear which one is meant.
    """
    pairs = _pairs(scale, scales)
    with _changing(module, base) as (module, state):
        record = _chosen(module, state, delta)
        position = state.records.index(record)
        if record.reloaded:
            state = _adopted(module, state, record, delta, base, exact)
        records = list(state.records)
        records[position] = record = replace(records[position], scale=float(scale), scales=pairs)
        _require_matches(pairs, state.weights[record.digest])
        _exchange(module, state, tuple(entry for entry in records if entry.scale), warn=exact)
        return record


def unmerge_delta(
    module: nn.Module, delta: Delta | MergeRecord | None = None, *, base: Delta | None = None, exact: bool = True
) -> tuple[MergeRecord, ...]:
    """Takes one delta, or all, out of the model and returns their records; the rest stays merged.

    `base` as in `merge_delta`. A model that was saved with a delta and loaded again needs the delta and the base;
    without the base, `exact=False` subtracts the delta and rounds once more.

    Raises:
        ValueError: nothing is merged, delta or base files were written to meanwhile, or the model was loaded with the
            delta in it and there is no base.
    """
    with _changing(module, base) as (module, state):
        if not state.records:
            raise ValueError(f"no delta is merged into this {type(module).__name__}; there is nothing to take out.")
        gone = state.records if delta is None else (_chosen(module, state, delta),)
        left = tuple(record for record in state.records if record not in gone)
        for record in gone:
            if record.reloaded:
                state = _adopted(module, state, record, delta, base, exact)
        _exchange(module, state, left, warn=exact)
        return gone


def merge_records(module: nn.Module) -> tuple[MergeRecord, ...]:
    """What is merged into the model, in the order of merging; also into one that was saved and loaded again.

    An interrupted merge is undone first, and records are dropped if other weights were loaded since. Costs
    microseconds otherwise.
    """
    with _locked(module) as (_, state):
        return state.records


def merge_record(module: nn.Module) -> MergeRecord | None:
    """The delta that says how to sample, else the first one; None where nothing is merged."""
    return recipe_record(merge_records(module))


def recipe_record(records: Sequence[MergeRecord]) -> MergeRecord | None:
    """Of several deltas the one that says how to sample, else the first one; None for none."""
    return next((record for record in records if record.recipe != NO_RECIPE), records[0] if records else None)


def saved_records(config: Mapping[str, Any]) -> tuple[MergeRecord, ...]:
    """What the configuration of a saved model says is merged into it; its weights are not looked at."""
    saved = config.get(CONFIG_KEY)
    return tuple(MergeRecord.from_config(entry) for entry in saved.get("deltas", ())) if saved else ()


def find_merged(module: nn.Module, delta: Delta, variant: str | None = None) -> MergeRecord | None:
    """The record of a delta that is merged, from this file or another with the same values; else None.

    A file, or a folder and its variant, that was read before and has not changed since is not opened.
    """
    with _locked(module) as (module, state):
        if not state.records:
            return None
        if isinstance(delta, (str, os.PathLike)):
            stamp, digest = state.seen.get((os.path.realpath(Path(delta).expanduser()), variant), ((), ""))
            with suppress(OSError):  # a file that is gone, which opening it names
                if stamp and stamp_of([path for path, _, _ in stamp]) == stamp:
                    return next((record for record in state.records if record.digest == digest), None)
            delta = open_weights(delta, variant)
        return _find(module, state, opened(delta))


def require_factor(name: str, value: object) -> None:
    """Raises ValueError unless a factor of a delta is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number; 1.0 is the delta as it was extracted.")


def _pairs(scale: float, scales: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(f"scales={scales!r} must be factors by pattern, as in {{'up_blocks.*': 0.5}}.")
    for name, factor in {"scale": scale, **(scales or {})}.items():
        require_factor(name, factor)
    return tuple((scales or {}).items())


def _require_matches(pairs: Sequence[tuple[str, float]], weights: Weights) -> None:
    idle = [pattern for pattern, _ in pairs if not any(fnmatchcase(name, pattern) for name in weights.shapes)]
    if idle:
        example = next(iter(weights.shapes))
        raise ValueError(f"scales names {listed(idle)}, which match no weight of {weights.label}, such as {example}.")


def _seen(weights: Weights, digest: str) -> dict[tuple[str, str | None], tuple[Stamp, str]]:
    stamp = weights.stamp
    return {weights.place: (stamp, digest)} if weights.place and stamp else {}


def _find(module: nn.Module, state: MergeState, weights: Weights) -> MergeRecord | None:
    if not state.records:
        return None
    digest = identity_of(named_as_model(weights, own_weights(module), getattr(module, "config", {})))
    for record in state.records:
        if not record.digest and record.source == Path(weights.label).name and record.recipe == read_recipe(weights):
            old, record = record, replace(record, digest=digest)  # saved by version 0.1.0
            state.records = tuple(record if entry is old else entry for entry in state.records)
        if record.digest == digest:
            state.seen |= _seen(weights, digest)
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


def _adopted(
    module: nn.Module,
    state: MergeState,
    record: MergeRecord,
    delta: Delta | MergeRecord | None,
    base: Delta | None,
    exact: bool = True,
) -> MergeState:
    """The state with a reloaded delta as one of its own, whose values are known."""
    if delta is None or isinstance(delta, MergeRecord) or (exact and base is None):
        raise ValueError(
            f"this {type(module).__name__} was loaded with {record.source} in its weights at scale {record.scale:g}: "
            "pass the delta (a file or mapping) and base=, the base's files; unmerge_delta with exact=False wants the "
            "delta alone; or load the base."
        )
    weights, _, _ = fit_delta(opened(delta), module)
    own = replace(record, digest=identity_of(weights), reloaded=False)
    records = tuple(own if entry is record else entry for entry in state.records)
    # Without a base of the user's: the files that the model was loaded from hold the delta too.
    known = None if base is None else state.base
    return replace(state, records=records, weights={**state.weights, own.digest: weights}, base=known, loaded={})


def _state(module: nn.Module, base: Delta | None = None) -> MergeState:
    """The model's state, with `base` if one is given, once the weights are what it says. The lock is held."""
    state: MergeState | None = vars(module).get(STATE_ATTRIBUTE)
    if state is None:
        state = _loaded_state(module)
    if base is not None:
        state.base = fit_base(opened(base, "base"), module)
    if state.writing:
        _repair(module, state, base_given=base is not None)
    if state.records and _signature(module, state.witness) != state.signature:
        if not _holds(module, state.witness):
            # Other weights were loaded: those that the model was saved with still have the deltas that it had then.
            left = tuple(r for r in state.records if r.reloaded and _holds(module, state.loaded))
            gone = [record.source for record in state.records if record not in left]
            logger.warning(
                f"{listed(gone)} is not in the weights of this {type(module).__name__} any more: other weights were "
                "loaded since it was merged."
            )
            state = MergeState(base=state.base, records=left, loaded=state.loaded)
            _remember(module, state)
        state.signature = _signature(module, state.witness)
    return state


def _loaded_state(module: nn.Module) -> MergeState:
    """What the configuration of a model that was saved says; it may have got that without the weights."""
    config: Mapping[str, Any] = module.config if isinstance(module, ConfigMixin) else {}
    records = saved_records(config)
    witness = config[CONFIG_KEY].get("witness", {}) if records else {}
    if not records or not _holds(module, witness):
        return MergeState()
    signature = _signature(module, witness)
    state = MergeState(records=records, witness=witness, loaded=witness, signature=signature)
    setattr(module, STATE_ATTRIBUTE, state)
    return state


def _remember(module: nn.Module, state: MergeState) -> None:
    """Puts the state on the module, without what its records do not need, and these in the module's configuration.

    In this order: where it is interrupted the module still has a state that names rows to restore.
    """
    terms = state.terms()
    state.witness = state.loaded if state.loaded and not terms else _witness(module, terms)
    state.loaded = state.loaded if terms else state.witness
    state.signature = _signature(module, state.witness)
    digests = {record.digest for record in state.records}
    state.weights = {digest: weights for digest, weights in state.weights.items() if digest in digests}
    state.seen = {place: known for place, known in state.seen.items() if known[1] in digests}
    if isinstance(module, ConfigMixin):
        # In place, past the freezing: a new FrozenDict would lose what diffusers set as attributes of this one, such
        # as the kind of projection when an IP-Adapter was loaded.
        OrderedDict.pop(module._internal_dict, CONFIG_KEY, None)
        if state.records:
            witness = {n: {k: values[:SAVED_VALUES] for k, values in w.items()} for n, w in state.witness.items()}
            saved = {"deltas": [record.to_config() for record in state.records], "witness": witness}
            OrderedDict.__setitem__(module._internal_dict, CONFIG_KEY, saved)
    state.writing = []
    if state.records:
        setattr(module, STATE_ATTRIBUTE, state)
    else:  # no trace
        vars(module).pop(STATE_ATTRIBUTE, None)


def _witness(module: nn.Module, terms: Sequence[Term]) -> dict[str, dict[str, list[float]]]:
    """Some values of weights as they now are, "with" the deltas, and where it is known as they would be "without"."""
    weights = {name: w for name, w in floating_entries(own_weights(module)).items() if w.dim() > 1}
    whole = [n for n, w in weights.items() if all(term.weights.shapes.get(n, w.shape) == w.shape for term in terms)]
    changed = [name for name in whole if _factors(name, terms)] or whole
    found = {}
    for name in changed[:: max(1, len(changed) // WITNESSES)][:WITNESSES]:
        values = _values(weights[name])
        found[name] = {"with": values.tolist()}
        parts = [(_values(term.weights.tensor(name)), factor) for term in terms if (factor := term.factor(name))]
        if parts:
            found[name]["without"] = (values - sum_of_terms(parts, values)).tolist()
    return found


def _values(weight: Tensor, count: int = WITNESS_VALUES) -> Tensor:
    rows = math.ceil(count / max(1, weight.shape[1:].numel()))
    return rows_of(weight.detach(), 0, rows).flatten()[:count].float().cpu()


def _holds(module: nn.Module, witness: Mapping[str, Mapping[str, list[float]]]) -> bool:
    """Whether the weights are nearer to those with the deltas than to those without; where it cannot be told, yes.

    Training further, another type or a fused LoRA change weights too, and a delta stays in them.
    """
    own = floating_entries(own_weights(module))
    plain = (Tensor, nn.Parameter)  # not quantized
    known = [name for name in witness if name in own and type(own[name]) in plain and not own[name].is_meta]
    if not known:
        return True
    found = torch.cat([_values(own[name], len(witness[name]["with"])) for name in known])
    merged, base = (
        torch.tensor([value for name in known for value in witness[name].get(kind, ())])
        for kind in ("with", "without")
    )
    if found.shape != merged.shape or torch.cosine_similarity(found, merged, dim=0) < RELATED:
        return False
    return base.shape != found.shape or bool(torch.dist(found, merged) <= torch.dist(found, base))


def _signature(module: nn.Module, names: Iterable[str]) -> tuple[Any, ...]:
    """Identity and version of weights: differs once one was replaced or written to. Nothing is read of a device."""
    found: list[tuple[int, int | None]] = []
    for name in names:
        weight: Any = module
        for part in name.split("."):
            weight = getattr(weight, part, None)  # which peft's layers pass on from the layer that they wrap
        known = isinstance(weight, Tensor) and not weight.is_inference()
        found.append((id(weight), weight._version if known else None))
    return tuple(found)


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
        with suppress(ValueError):  # files of another model: this one only has their configuration
            state.base = fit_base(found, module) if (found := loaded_weights(module)) else None
    if state.base is not None:
        state.base.require_unchanged()
    try:
        setattr(module, STATE_ATTRIBUTE, state)
        inexact = change(state, targets, before, after)
        another = not before and bool(targets) and len(inexact) == len(targets)  # the files are another model's
        new.base = None if another else state.base
        new.dtypes = {**state.dtypes, **{name: target.dtype for name, target in targets.items()}}
        _remember(module, new)
    except BaseException as error:
        if vars(module).get(STATE_ATTRIBUTE) is state:
            with suppress(ValueError):  # what cannot be restored, which the next call names
                _repair(module, state)
        if isinstance(error, FloatingPointError):
            require_finite(state, targets, before, after)
        raise
    if inexact and warn:
        known = state.base
        reason = f"differ from {known.label} plus what is merged" if known else "have no base that can be read"
        logger.warning(
            f"{len(inexact)} weights ({listed(inexact)}) {reason}: taking deltas out of them is exact to one "
            "rounding. For exact results pass base=, the files that the model was loaded from, to the first "
            "merge_delta, and merge before training or fusing a LoRA."
        )


def _factors(name: str, terms: Sequence[Term]) -> list[tuple[int, float]]:
    return [(id(term.weights), factor) for term in terms if (factor := term.factor(name))]


def _targets(module: nn.Module, weights: Mapping[str, Weights]) -> dict[str, Tensor]:
    """By name, what the deltas go into."""
    targets: dict[str, Tensor] = {}
    for digest, delta in weights.items():
        delta.require_unchanged()
        if identity_of(delta) != digest:
            raise ValueError(f"{delta.label} was changed since it was merged; load the model again.")
        for name, target in fit_delta(delta, module)[1].items():
            if targets.setdefault(name, target).shape != target.shape:
                raise ValueError(f"{name} of {delta.label} and of another delta differ in shape; take one out.")
    return targets


def _repair(module: nn.Module, state: MergeState, base_given: bool = False) -> None:
    """Restores the weights that an interrupted change wrote; with a base that the user gave, all of them."""
    if base_given:
        state.writing = [(name, start, stop, True) for name, start, stop, _ in state.writing]
    lost = restore(state, _targets(module, state.weights), state.terms())
    if lost:
        raise ValueError(
            f"changing the deltas of this {type(module).__name__} was interrupted and left weights half merged "
            f"({listed(lost)}); load the model again, or pass base=, the files that it was loaded from."
        )
    _remember(module, state)
