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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import reduce
from numbers import Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging
from torch import Tensor, nn

from . import apply, files
from .apply import INPUT_WEIGHT, NO_RECIPE, MergeState, factors
from .apply import MergeRecord as MergeRecord
from .files import Delta, listed, opened
from .model_lock import model_lock, uncompiled

logger = logging.get_logger(__name__)

STATE_ATTRIBUTE = CONFIG_KEY = "_perflow_merges"
"""diffusers saves and reads configuration keys with an underscore and gives them to no constructor."""

WITNESSES, WITNESS_VALUES, RELATED = 16, 32, 0.5
"""How many weights are noted to recognise a merged model, how many values of each, and the cosine above which values
are still those of the model that was noted, perhaps trained further; of other models it is near 0."""


@contextmanager
def _opened(module: Any, base: Delta | None = None, write: bool = True) -> Iterator[tuple[nn.Module, MergeState]]:
    """A module, or a pipeline's UNet, without its compiled wrapper, and its state; to write once no thread runs it."""
    module = module if isinstance(module, nn.Module) else getattr(module, "unet", None)
    if module is None:
        raise ValueError("the pipeline has no UNet; load its components first, or pass a UNet.")
    lock = model_lock(module)
    with lock.changing() if write else nullcontext(), lock:
        module = uncompiled(module)
        yield module, _state(module, base)


def merge_delta(
    module: Any,
    delta: Delta,
    scale: float = 1.0,
    *,
    scales: Mapping[str, float] | None = None,
    base: Delta | None = None,
    replaced: Sequence[MergeRecord] = (),
) -> MergeRecord:
    """Adds `scale * dW` to a model's weights in place: summed in float32, rounded once to each weight's type.

    Of several deltas the weights are the base plus the sum, rounded once. The same delta, which is recognised by its
    values, is not merged twice but rescaled. Threads may share the model. If a merge is refused or interrupted, the
    weights stay as they were, or the next call restores them.

    To undo a merge exactly, the base must be readable: the files that the model was loaded from, which are found for
    models that diffusers loaded, or `base`. It stays open, a mapping by reference, until the delta is taken out. If
    its files are written to meanwhile, undoing raises an error. For weights that differ from the base, or without one,
    a warning says that undoing is exact to one rounding.

    The delta of a UNet with 4 input channels goes into the first 4 of one with more (inpainting UNets have 9). Quality
    at few steps suffers, since it was distilled without the others.

    Args:
        module: a pipeline of this package or of diffusers, whose UNet is meant, a UNet, or another module with weights
            of the delta's names. The scheduler stays as it is: blocks of this package follow the delta's recipe; for
            others, `PeRFlowScheduler.from_scheduler(pipe.scheduler, **record.recipe.scheduler_settings())`.
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        scale: the factor of dW: 1 as it was extracted, 0 for none.
        scales: further factors by pattern of a weight's name, as in {"up_blocks.*": 0.5}; the first match counts.
        base: the model's weights without any delta: files, a folder, or a mapping, in any type.
        replaced: of what `merge_records` gave, the deltas that are taken out in the same change.

    Raises:
        ValueError: a factor or file is unusable, the delta does not fit, the weights cannot be changed, or an
            interrupted merge left weights that only the base can restore.
    """
    pairs, weights = _pairs(scale, scales), opened(delta)
    with _opened(module, base) as (module, state):
        known = _find(state, weights)
        if known is not None:
            if (known.scale, known.scales) != (scale, pairs):
                return rescale_delta(module, scale, weights, scales=scales, base=base)
            logger.warning(f"{known.source} is merged into this {type(module).__name__} already; nothing was changed.")
            return known
        # Not resolved: in the Hub's cache a link has the file's name, and what it leads to has not.
        source = os.path.abspath(weights.label) if os.path.exists(weights.label) else weights.label
        digest, recipe = files.identity_of(weights), files.read_recipe(weights)
        record = MergeRecord(source, digest, float(scale), pairs, recipe, weights=weights)
        _exchange(module, state, (*(old for old in state.records if old not in replaced), record), base)
        return record


def rescale_delta(
    module: Any,
    scale: float,
    delta: Delta | MergeRecord | None = None,
    *,
    scales: Mapping[str, float] | None = None,
    base: Delta | None = None,
    exact: bool = True,
) -> MergeRecord:
    """Changes the factors of a merged delta, exactly as if it had been merged with them; scale 0 takes it out.

    `delta` says which one where several are merged. `base` is as in `merge_delta`. A model that was saved with the
    delta and loaded again needs both; without the base, `exact=False` adds the difference, with one more rounding.

    Raises:
        ValueError: nothing is merged, `delta` is not, or it is not clear which one is meant.
    """
    pairs = _pairs(scale, scales)
    with _opened(module, base) as (module, state):
        record = _chosen(module, state, delta)
        new = replace(record, scale=float(scale), scales=pairs, reloaded=False)
        _exchange(module, state, tuple(new if old is record else old for old in state.records), base, exact)
        return new


def unmerge_delta(
    module: Any, delta: Delta | MergeRecord | None = None, *, base: Delta | None = None, exact: bool = True
) -> tuple[MergeRecord, ...]:
    """Takes one delta, or all, out of the model and returns their records; the rest stays merged.

    `base` and `exact` as in `rescale_delta`.

    Raises:
        ValueError: nothing is merged, delta or base files were written to meanwhile, or the model was loaded with the
            delta in it and there is no base.
    """
    with _opened(module, base) as (module, state):
        if not state.records:
            raise ValueError(f"no delta is merged into this {type(module).__name__}; there is nothing to take out.")
        gone = state.records if delta is None else (_chosen(module, state, delta),)
        _exchange(module, state, tuple(record for record in state.records if record not in gone), base, exact)
        return gone


def merge_records(module: Any) -> tuple[MergeRecord, ...]:
    """What is merged into the model, in the order of merging; also into one that was saved and loaded again.

    An interrupted merge is undone first, and records are dropped if other weights were loaded since. Costs
    microseconds otherwise.
    """
    with _opened(module, write=False) as (_, state):
        return state.records


def merge_record(module: Any) -> MergeRecord | None:
    """The delta that says how to sample, else the first one; None where nothing is merged."""
    return recipe_record(merge_records(module))


def recipe_record(records: Sequence[MergeRecord]) -> MergeRecord | None:
    """Of several deltas the one that says how to sample, else the first one; None for none."""
    return next((record for record in records if record.recipe != NO_RECIPE), records[0] if records else None)


def saved_records(config: Mapping[str, Any]) -> tuple[MergeRecord, ...]:
    """What the configuration of a saved model says is merged into it; its weights are not looked at."""
    return tuple(MergeRecord.from_config(entry) for entry in (config.get(CONFIG_KEY) or {}).get("deltas", ()))


def find_merged(module: nn.Module, delta: Delta, variant: str | None = None) -> MergeRecord | None:
    """The record of a delta that is merged, from this file or another with the same values; else None.

    A file, or a folder and its variant, that was read before and has not changed since is not opened.
    """
    with _opened(module, write=False) as (module, state):
        if not state.records:
            return None
        if isinstance(delta, (str, os.PathLike)):
            stamp = files.stamp_of(files.weight_files(delta, variant))
            for record in state.records:
                if record.weights is not None and record.weights.stamp == stamp:
                    return record
            delta = files.open_weights(delta, variant)
        return _find(state, delta)


def require_factor(name: str, value: object) -> None:
    """Raises ValueError unless a factor of a delta is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number; 1.0 is the delta as it was extracted.")


def _pairs(scale: float, scales: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    for name, factor in {"scale": scale, **(scales or {})}.items():
        require_factor(name, factor)
    return tuple((pattern, float(factor)) for pattern, factor in (scales or {}).items())


def _find(state: MergeState, delta: Delta | MergeRecord) -> MergeRecord | None:
    """The record of a delta, with its weights as they are now."""
    if not state.records:
        return None
    if isinstance(delta, MergeRecord):
        digest = delta.digest
    else:
        weights = opened(delta)
        digest, recipe = files.identity_of(weights), files.read_recipe(weights)
        new: Any = {
            "weights": weights,
            **({} if recipe == NO_RECIPE else {"recipe": recipe}),
        }  # theirs may have changed
        state.records = tuple(replace(old, **new) if old.digest == digest else old for old in state.records)
    return next((record for record in state.records if record.digest == digest), None)


def _chosen(module: nn.Module, state: MergeState, delta: Delta | MergeRecord | None) -> MergeRecord:
    only = state.records[0] if len(state.records) == 1 else None
    found = only if delta is None else _find(state, delta)
    if found is None:
        merged = listed([record.source for record in state.records]) or "none"
        problem = "name the delta that is meant" if delta is None else "that delta is not merged"
        raise ValueError(f"{problem}; into this {type(module).__name__} are merged: {merged}.")
    return found


@torch.no_grad()
def _exchange(
    module: nn.Module,
    state: MergeState,
    records: tuple[MergeRecord, ...],
    base: Delta | None = None,
    exact: bool = True,
) -> None:
    """Makes `records`, without those of scale 0, what is merged. The lock is held."""
    records = tuple(record for record in records if record.scale)
    state = replace(state, after=records)  # until something is written, the model keeps the one it has
    for record in [record for record in state.records if record.reloaded and record not in records]:
        if record.weights is None or (exact and base is None):
            raise ValueError(
                f"this {type(module).__name__} was loaded with {record.source} in its weights at scale "
                f"{record.scale:g}: load the base, or take it out with perflow unmerge, or pass the delta (a file or "
                "mapping) and base=, the base's files; with exact=False the delta alone is enough."
            )
        state.records = tuple(replace(old, reloaded=False) if old is record else old for old in state.records)
        state.base = state.base if base is not None else None  # the files that it was loaded from hold the delta too
    for record in records:
        for pattern, _ in record.scales:
            if record.weights and not any(fnmatchcase(name, pattern) for name in record.weights.shapes):
                raise ValueError(f"scales names {pattern}, which matches no weight of {record.source}.")
    targets = {
        name: target
        for name, target in _targets(module, state).items()
        if factors(state.records, name) != factors(records, name)
    }
    if state.base is None and all(record.reloaded for record in state.records):
        with suppress(ValueError):  # files of another model: this one only has their configuration
            state.base = apply.fit_base(found, module) if (found := files.loaded_weights(module)) else None
    if state.base is not None:
        state.base.require_unchanged()
    setattr(module, STATE_ATTRIBUTE, state)
    try:
        inexact = apply.change(state, targets)
        dtypes = {**state.dtypes, **{name: target.dtype for name, target in targets.items()}}
        _remember(module, replace(state, records=records, dtypes=dtypes))
    except BaseException:
        with suppress(ValueError):  # what cannot be restored, which the next call names
            _repair(module, state)
        raise
    if inexact and exact:
        reason = f"differ from {state.base.label} plus what is merged" if state.base else "have no base"
        logger.warning(
            f"{len(inexact)} weights ({listed(inexact)}) {reason}: taking deltas out of them is exact to one "
            "rounding. For exact results pass base=, the files that the model was loaded from, and merge before "
            "training or fusing a LoRA."
        )


def _targets(module: nn.Module, state: MergeState) -> dict[str, Tensor]:
    """By name, what the deltas go into, once these are known to be what they were."""
    targets: dict[str, Tensor] = {}
    records = [record for record in (*state.records, *state.after) if not record.reloaded]
    for digest, delta in {record.digest: record.weights for record in records if record.weights}.items():
        delta.require_unchanged()
        if files.identity_of(delta) != digest:
            raise ValueError(f"{delta.label} was changed since it was merged; load the model again.")
        apply.require_mergeable(module, delta)
        targets = {**apply.require_architecture(delta, module), **targets}
        files.require_differences(delta)
    return targets


def _repair(module: nn.Module, state: MergeState) -> None:
    """Restores the weights that an unfinished change wrote, or says which cannot be."""
    setattr(module, STATE_ATTRIBUTE, state)
    if lost := apply.restore(state, _targets(module, state)):
        raise ValueError(
            f"changing the deltas of this {type(module).__name__} was interrupted and left weights half merged "
            f"({listed(lost)}); load the model again, or pass base=, the files that it was loaded from."
        )
    _remember(module, state)


def _state(module: nn.Module, base: Delta | None = None) -> MergeState:
    """The model's state, with `base` if one is given, once the weights are what it says. The lock is held."""
    state: MergeState | None = vars(module).get(STATE_ATTRIBUTE)
    if state is None:
        config: Mapping[str, Any] = module.config if isinstance(module, ConfigMixin) else {}
        records = saved_records(config)
        state = MergeState(records, witness=config[CONFIG_KEY].get("values", {}) if records else {})
    if base is not None:
        state.base = apply.fit_base(opened(base, "base"), module)
        state.writing = dict.fromkeys(state.writing, True)  # which can restore all rows
    if state.writing:
        _repair(module, state)
        state = vars(module).get(STATE_ATTRIBUTE, MergeState(base=state.base))
    if state.records and (signature := _signature(module, state.witness)) != state.signature:
        if _holds(module, state.witness):
            state.signature = signature
            setattr(module, STATE_ATTRIBUTE, state)
        else:  # other weights were loaded since, or the configuration alone
            names, model = listed([record.source for record in state.records]), type(module).__name__
            logger.warning(f"{names} is not in the weights of this {model}, though its record says so: others are.")
            state = MergeState(base=state.base)
            _remember(module, state)
    return state


def _remember(module: nn.Module, state: MergeState) -> None:
    """Puts a finished state on the module, and its records in the module's configuration.

    In this order: where it is interrupted the module still has a state that names rows to restore.
    """
    witness = _witness(module, state)
    state = replace(state, after=(), writing={}, witness=witness, signature=_signature(module, witness))
    if isinstance(module, ConfigMixin):
        # In place, past the freezing: a new FrozenDict would lose what diffusers set as attributes of this one, such
        # as the kind of projection when an IP-Adapter was loaded.
        OrderedDict.pop(module._internal_dict, CONFIG_KEY, None)
        if state.records:
            saved = {"deltas": [record.to_config() for record in state.records], "values": witness}
            OrderedDict.__setitem__(module._internal_dict, CONFIG_KEY, saved)
    if state.records:
        setattr(module, STATE_ATTRIBUTE, state)
    else:  # no trace
        vars(module).pop(STATE_ATTRIBUTE, None)


def _weight(module: Any, name: str) -> Any:
    """A weight by its own name, also of a layer that peft has wrapped; None where the model has none."""
    return reduce(lambda part, name: getattr(part, name, None), name.split("."), module)


def _signature(module: nn.Module, names: Iterable[str]) -> list[Any]:
    """Identity and version of weights: differs once one was replaced or written to. Nothing is read of a device."""
    weights = [_weight(module, name) for name in names]
    return [(id(w), w._version if isinstance(w, Tensor) and not w.is_inference() else None) for w in weights]


def _values(weight: Any) -> Tensor:
    """Values on the diagonal of a matrix or kernel, which a LoRA does not change alike; none if it is not readable."""
    if not apply.is_plain(weight) or weight.is_meta:  # quantized, offloaded
        return torch.empty(0)
    return weight.detach().diagonal().flatten()[:WITNESS_VALUES].float().cpu()


def _witness(module: nn.Module, state: MergeState) -> dict[str, list[list[float]]]:
    """By name of a weight, some of its values as they now are with the deltas, and as they would be without."""
    if any(record.reloaded for record in state.records):  # what is known of the base is what was saved
        return {n: [_values(_weight(module, n)).tolist() or old, base] for n, (old, base) in state.witness.items()}
    held = {n: shape for record in state.records if record.weights for n, shape in record.weights.shapes.items()}
    # The input layer may change in part.
    names = [n for n, shape in held.items() if len(shape) > 1 and n != INPUT_WEIGHT and factors(state.records, n)]
    witness = {}
    for name in names[:: max(1, len(names) // WITNESSES)][:WITNESSES]:
        if len(values := _values(_weight(module, name))):
            minus = [(_values(delta.tensor(name)), -factor) for delta, factor in factors(state.records, name)]
            witness[name] = [values.tolist(), apply.add_terms(values, minus).tolist()]
    return witness


def _holds(module: nn.Module, witness: Mapping[str, list[list[float]]]) -> bool:
    """Whether the weights are nearer to those with the deltas than to those without; where it cannot be told, yes.

    Training further, another type or a fused LoRA change weights too, and a delta stays in them.
    """
    found = {name: values for name in witness if len(values := _values(_weight(module, name)))}
    if not found:
        return True
    now = torch.cat(list(found.values()))
    merged, base = (torch.tensor([value for name in found for value in witness[name][k]]) for k in (0, 1))
    related = now.shape == merged.shape and torch.cosine_similarity(now, merged, dim=0) > RELATED
    return bool(related and torch.dist(now, merged) <= torch.dist(now, base))
