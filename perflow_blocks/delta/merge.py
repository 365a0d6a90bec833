"""Merging deltas into a model, changing their factors and taking them out again, bit for bit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path

from diffusers.utils import logging
from torch import Tensor, nn

from .corrections import Corrections
from .files import Digest, MappingWeights, Weights, digest_of
from .fit import DeltaFit, fit_base, fit_delta, require_difference, require_finite
from .recipe import DeltaRecipe
from .record import MergeRecord, MergeState, merge_state, note_digest, remember, uncompiled
from .rewrite import HalfMergedError, NotFiniteError, Term, rewrite
from .tensors import LATENT_CHANNELS, listed
from .weight_layouts import open_weights

logger = logging.get_logger(__name__)

Delta = str | os.PathLike[str] | Mapping[str, Tensor] | Weights
"""A delta: a file or folder that `open_weights` reads, a mapping as `extract_delta` gives, or what these opened."""


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
    The same delta again changes nothing and logs a warning; with another scale it is rescaled. A merge that is refused
    or interrupted leaves every weight as it was. A delta is known again by its values and their type, whatever file or
    mapping they are in.

    The way back: with `base`, what the model was loaded from, weights that equal it are read again. For others what
    rounding lost is kept, in memory up to 16 MB and beyond that in a temporary file, which takes longer. Files stay
    open, and mappings referred to, until the delta is taken out: they may be renamed, replaced or deleted, though a
    pickled model wants them where they were. Written to, they are no way back any more, which is found out.

    The delta of a UNet with 4 input channels goes into the first 4 of one with more (inpainting UNets have 9) and
    leaves the others alone, bit for bit; a warning says so, as quality at few steps suffers.

    Args:
        module: a UNet, or a module that holds weights under the delta's names.
        delta: a file, a folder, a mapping from `extract_delta`, or what `open_weights` or `open_difference` gave.
        scale: the factor of dW: 1 as it was extracted, 0 for none.
        scales: further factors by pattern of a weight's name, as in {"up_blocks.*": 0.5}; the first that matches
            counts.
        base: the model's weights without any delta, in whatever form and type; not looked at where nothing is to be
            merged, or one is known from a delta before.

    Raises:
        ValueError: a factor or file is unusable, the delta does not fit, or the weights cannot be changed.
    """
    module = uncompiled(module)
    state = _usable(module)
    pairs = _pairs(scale, scales)
    weights = opened(delta)
    known = find_merged(module, weights)
    if known is not None:
        _require_matches(pairs, state.weights.get(known.digest, weights))
        return _merged_already(module, state, known, replace(known, scale=scale, scales=pairs))
    fit = fit_delta(weights, module)
    _require_matches(pairs, fit.weights)
    record = MergeRecord(_source(delta, weights), "", scale, pairs, read_recipe(weights))
    if not scale:
        return record
    require_difference(fit.weights, fit.targets)
    stored = None if base is None else fit_base(opened(base, "base"), module)
    record = _exchange(module, state, (*state.records, record), fit, stored)[-1]
    if stored is not None:
        corrections = merge_state(module).corrections
        kept = [name for name in corrections.names() if not all(p.reread for p in corrections.pieces(name))]
        if kept:
            logger.info(f"{listed(kept)} are not as in {stored.label}: what rounding lost is kept for them.")
    if fit.extra_input_channels:
        logger.warning(_extra_channels_warning(weights.label, module, fit.extra_input_channels))
    logger.info(f"merged {weights.label} into {type(module).__name__} at scale {scale:g}.")
    return record


def _merged_already(module: nn.Module, state: MergeState, known: MergeRecord, wanted: MergeRecord) -> MergeRecord:
    if (known.scale, known.scales) != (wanted.scale, wanted.scales):
        return _rescaled(module, state, known, wanted.scale, wanted.scales)
    logger.warning(f"{known.source} is merged into this {type(module).__name__} already; nothing was changed.")
    return known


def rescale_delta(
    module: nn.Module,
    scale: float,
    delta: Delta | MergeRecord | None = None,
    *,
    scales: Mapping[str, float] | None = None,
) -> MergeRecord:
    """Changes the factors of a merged delta, exactly as if it had been merged with them; nothing is loaded again.

    `delta` says which one where several are merged; scale 0 takes it out.

    Raises:
        ValueError: nothing is merged, `delta` is not, or it is not clear which one is meant.
    """
    module = uncompiled(module)
    state = _usable(module)
    record = _chosen(state, delta, module)
    pairs = _pairs(scale, scales)
    if pairs and record.digest in state.weights:
        _require_matches(pairs, state.weights[record.digest])
    return _rescaled(module, state, record, scale, pairs)


def unmerge_delta(
    module: nn.Module, delta: Delta | MergeRecord | None = None, *, exact: bool = True
) -> tuple[MergeRecord, ...]:
    """Takes one delta, or all, out of the model and returns their records; the rest stays merged.

    In any order the weights get back every bit that they had before. A model that was saved with a delta and loaded
    again has lost those bits: then `exact=False` subtracts the named delta and rounds once more.

    Raises:
        ValueError: nothing is merged, weights or delta files were changed meanwhile, or the model was loaded with the
            delta in it and `exact` asks for the impossible.
    """
    module = uncompiled(module)
    state = _usable(module)
    if not state.records:
        raise ValueError(f"no delta is merged into this {type(module).__name__}; there is nothing to take out.")
    gone = state.records if delta is None else (_chosen(state, delta, module),)
    reloaded = [record for record in gone if record.reloaded]
    if reloaded and exact:
        raise ValueError(
            f"this {type(module).__name__} was loaded with {listed([r.source for r in reloaded])} in its weights: the "
            "base's last bits are lost; load the base, or pass the delta and exact=False."
        )
    if reloaded:
        _subtract(module, state, reloaded, delta)
    else:
        _exchange(module, state, tuple(record for record in state.records if record not in gone))
    return gone


def read_recipe(weights: Weights) -> DeltaRecipe:
    """The sampling settings in a delta's metadata.

    Raises:
        ValueError: they make no sense.
    """
    try:
        return DeltaRecipe.from_metadata(weights.metadata)
    except ValueError as error:
        raise ValueError(f"{weights.label} names unusable settings: {error}") from error


def find_merged(module: nn.Module, delta: Delta) -> MergeRecord | None:
    """The record of a delta that is merged, from this file or another with the same values; else None.

    Raises:
        ValueError: the delta cannot be read, or does not fit the module.
    """
    state, weights = merge_state(module), opened(delta)
    record = _same(state, weights)
    if record is None and state.records:
        fit = fit_delta(weights, uncompiled(module))
        digest = digest_of(fit.weights, fit.targets)
        record = next((known for known in state.records if known.digest == digest), None)
        if record is not None:
            note_digest(module, state, weights, digest)
    return record


def is_merged(module: nn.Module, delta: Delta, scale: float, scales: Mapping[str, float] | None = None) -> bool:
    """Whether this very file or mapping is merged with these factors, without reading its values."""
    state = merge_state(module)
    record = _same(state, opened(delta)) if state.records else None
    return record is not None and (record.scale, record.scales) == (scale, _pairs(scale, scales))


def _usable(module: nn.Module) -> MergeState:
    state = merge_state(module)
    if state.broken:
        raise ValueError(f"an earlier merge failed and left weights changed ({state.broken}); load the model again.")
    return state


def opened(delta: Delta, what: str = "delta") -> Weights:
    """The weights of a delta, or `what` a message calls them, in any form; a mapping's are not copied."""
    if isinstance(delta, Weights):
        return delta
    if not isinstance(delta, (str, os.PathLike, Mapping)):
        raise ValueError(
            f"{what}={type(delta).__name__} is no {what}; pass a file, a folder or a mapping of names to tensors."
        )
    return MappingWeights(delta) if isinstance(delta, Mapping) else open_weights(delta)


def _source(delta: Delta, weights: Weights) -> str:
    return str(Path(delta).expanduser().resolve()) if isinstance(delta, (str, os.PathLike)) else weights.label


def _pairs(scale: float, scales: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    if scales is not None and not isinstance(scales, Mapping):
        raise ValueError(f"scales={scales!r} is no mapping; pass factors by pattern, as in {{'up_blocks.*': 0.5}}.")
    for name, factor in {"scale": scale, **(scales or {})}.items():
        if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
            raise ValueError(
                f"{name}={factor!r} is no finite number; pass a number, 1.0 for the delta as it was extracted."
            )
    return tuple((scales or {}).items())


def _require_matches(pairs: Sequence[tuple[str, float]], weights: Weights) -> None:
    idle = [pattern for pattern, _ in pairs if not any(fnmatchcase(name, pattern) for name in weights.shapes)]
    if idle:
        example = next(iter(weights.shapes))
        raise ValueError(f"scales names {listed(idle)}, which match no weight of {weights.label}, such as {example}.")


def _same(state: MergeState, weights: Weights) -> MergeRecord | None:
    """The record of these weights where that is clear without reading them."""
    stamp = weights.stamp()
    digests = {digest for digest, known in state.weights.items() if known is weights}
    if stamp in state.stamps:
        digests.add(state.stamps[stamp])
    return next((record for record in state.records if record.digest in digests), None)


def _chosen(state: MergeState, delta: Delta | MergeRecord | None, module: nn.Module) -> MergeRecord:
    names = listed([record.source for record in state.records]) or "none"
    if delta is None:
        if len(state.records) != 1:
            raise ValueError(f"{len(state.records)} deltas are merged ({names}); name the one that is meant.")
        return state.records[0]
    if isinstance(delta, MergeRecord):
        found = [record for record in state.records if record.digest == delta.digest]
    else:
        same = find_merged(module, delta)
        found = [] if same is None else [same]
    if not found:
        raise ValueError(f"that delta is not merged into this {type(module).__name__}; merged are: {names}.")
    return found[0]


def _rescaled(
    module: nn.Module, state: MergeState, record: MergeRecord, scale: float, pairs: tuple[tuple[str, float], ...]
) -> MergeRecord:
    if record.reloaded:
        raise ValueError(
            f"this {type(module).__name__} was loaded with {record.source} in its weights at scale {record.scale:g}, "
            f"which cannot become {scale:g}; load the base, or take it out with unmerge_delta(..., exact=False) first."
        )
    changed = replace(record, scale=scale, scales=pairs)
    records = [changed if entry is record else entry for entry in state.records]
    _exchange(module, state, tuple(entry for entry in records if entry.scale))
    return changed


def _exchange(
    module: nn.Module,
    state: MergeState,
    records: tuple[MergeRecord, ...],
    new: DeltaFit | None = None,
    base: Weights | None = None,
) -> tuple[MergeRecord, ...]:
    """Makes `records` what is merged, and returns them.

    `new` is what the last of them fits, if it was not merged before; `base` as in `rewrite`.
    """
    weights = {**state.weights, **({records[-1].digest: new.weights} if new else {})}
    before, after = _terms(state.records, weights), _terms(records, weights)
    targets: dict[str, Tensor] = {}
    for term in {id(term.weights): term for term in (*before, *after)}.values():
        term.weights.require_unchanged()
        fit = new if new and term.weights is new.weights else fit_delta(term.weights, module)
        for name, target in fit.targets.items():
            if targets.setdefault(name, target).shape != target.shape:
                raise ValueError(f"{name} of {fit.weights.label} and of another delta differ in shape; take one out.")
    if state.corrections.base is not None:
        state.corrections.base.require_unchanged()
    digest = Digest() if new and not records[-1].digest else None
    done = records

    def commit(corrections: Corrections) -> None:
        nonlocal done
        if new is not None and digest is not None:
            for name in new.targets:
                if name not in digest:  # a factor of 0
                    digest.update(name, new.weights.tensor(name))
            done = (*records[:-1], replace(records[-1], digest=digest.hexdigest()))
            weights[done[-1].digest] = new.weights
        kept = {record.digest: weights[record.digest] for record in done if record.digest in weights}
        stamps = {stamp: found for stamp, found in state.stamps.items() if found in {r.digest for r in done}}
        if new is not None and (stamp := new.weights.stamp()) is not None:
            stamps[stamp] = done[-1].digest
        remember(module, MergeState(done, kept, stamps, corrections))

    try:
        rewrite(targets, before, after, state.corrections, commit, digest, base)
    except NotFiniteError as error:
        if new is not None:
            require_finite(new.weights, new.targets, records[-1].scale)
        raise ValueError(f"{error} would not be finite in its type; lower the scale or load a wider dtype.") from error
    except HalfMergedError as error:
        state.broken = str(error)
        remember(module, state)
        raise ValueError(f"the weights could not be put back ({error}); load the model again.") from error
    return done


def _subtract(
    module: nn.Module, state: MergeState, reloaded: list[MergeRecord], delta: Delta | MergeRecord | None
) -> None:
    """Takes a delta out that the weights were loaded with, but for a rounding."""
    if delta is None or isinstance(delta, MergeRecord) or not all(r.reloaded for r in state.records):
        raise ValueError("exact=False wants the delta, as a file or mapping, and no other one merged since loading.")
    fit = fit_delta(opened(delta), module)
    terms = [Term(fit.weights, -record.scale, record.scales) for record in reloaded]
    left = tuple(record for record in state.records if record not in reloaded)
    rewrite(fit.targets, [], terms, Corrections(), lambda _: remember(module, MergeState(left)))


def _terms(records: Sequence[MergeRecord], weights: Mapping[str, Weights]) -> list[Term]:
    return [Term(weights[r.digest], r.scale, r.scales) for r in records if not r.reloaded]


def _extra_channels_warning(source: str, module: nn.Module, extra: int) -> str:
    return (
        f"{source} is the delta of a UNet with {LATENT_CHANNELS} input channels, and this {type(module).__name__} has "
        f"{LATENT_CHANNELS + extra}: it is added to the first {LATENT_CHANNELS}, the noisy latents, and the other "
        f"{extra} stay as they are. Quality at few steps suffers, since it was distilled without them, not for "
        "inpainting."
    )
