"""What is merged into a model: on the model while it lives, and in its configuration, so that saving keeps it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from .corrections import Corrections
from .files import Weights, rows_of
from .fit import own_weights
from .recipe import DeltaRecipe
from .reversible import sum_of_terms
from .rewrite import Term
from .tensors import floating_entries

STATE_ATTRIBUTE = "_perflow_merges"
CONFIG_KEY = "_perflow_merges"
"""In the model's configuration. diffusers saves and reads keys with an underscore and gives them to no constructor."""

WITNESSES, WITNESS_VALUES = 8, 32
"""How many weights are noted in the configuration, and how many values of each."""

RELATED = 0.5
"""Cosine above which values are those of the model that was saved, trained further perhaps; of other models near 0."""


@dataclass(frozen=True)
class MergeRecord:
    """A delta that is merged into a model.

    Attributes:
        source: where it was read from: the path, absolute unless the model was saved since.
        digest: identifies its values, 64 hexadecimal digits; this, not the path, tells deltas apart.
        scale: the factor that dW is in the weights with.
        scales: further factors, (pattern, factor) for names of weights; the first pattern that matches counts.
        recipe: the sampling settings that came with it.
        reloaded: whether the model was saved with it and loaded again, so that it cannot be taken out bit for bit.
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
            "scale": self.scale,
            "scales": [list(pair) for pair in self.scales],
            "recipe": self.recipe.to_metadata(),
        }

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> MergeRecord:
        """The inverse of `to_config`, for a model that was loaded.

        Raises:
            ValueError: the entry lacks something.
        """
        try:
            scales = tuple((str(pattern), float(factor)) for pattern, factor in entry["scales"])
            recipe = DeltaRecipe.from_metadata(entry["recipe"])
            return cls(entry["source"], entry["digest"], float(entry["scale"]), scales, recipe, reloaded=True)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{CONFIG_KEY} in the model's config.json is damaged ({error!r}); restore it, or remove the entry if "
                "no delta is in the weights."
            ) from error


@dataclass
class MergeState:
    """What it takes to change or take out what is merged.

    Attributes:
        records: in the order of merging, which is the order of the sum.
        weights: the deltas by digest, under the model's names.
        stamps: the digests of files that were read, which spare reading them again while nothing changed.
        corrections: the way back: what rounding lost, and where the base is that needs none.
        broken: why the weights are no longer what the records say; empty while they are.
    """

    records: tuple[MergeRecord, ...] = ()
    weights: dict[str, Weights] = field(default_factory=dict)
    stamps: dict[tuple[Any, ...], str] = field(default_factory=dict)
    corrections: Corrections = field(default_factory=Corrections)
    broken: str = ""


def merge_records(module: nn.Module) -> tuple[MergeRecord, ...]:
    """What is merged into the model, in the order of merging; also into one that was saved and loaded again."""
    return merge_state(module).records


def saved_records(config: Mapping[str, Any]) -> tuple[MergeRecord, ...]:
    """What the configuration of a saved model says is merged into it; its weights are not looked at."""
    saved = config.get(CONFIG_KEY)
    return tuple(MergeRecord.from_config(entry) for entry in saved.get("deltas", ())) if saved else ()


def merge_record(module: nn.Module) -> MergeRecord | None:
    """The delta that says how to sample, else the first one; None where nothing is merged."""
    records = merge_records(module)
    return next((record for record in records if record.recipe != DeltaRecipe()), records[0] if records else None)


def note_digest(module: nn.Module, state: MergeState, weights: Weights, digest: str) -> None:
    """Remembers what a file holds as long as it is not written to."""
    stamp = weights.stamp()
    if stamp is not None and state.records:
        state.stamps[stamp] = digest
        setattr(uncompiled(module), STATE_ATTRIBUTE, state)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, whose weights and names are the model's own; else the module."""
    return getattr(module, "_orig_mod", module)


def merge_state(module: nn.Module) -> MergeState:
    """The module's own state, or what its configuration says, or an empty one."""
    module = uncompiled(module)
    state = vars(module).get(STATE_ATTRIBUTE)
    if state is not None:
        return state
    config = module.config if isinstance(module, ConfigMixin) else {}
    saved = config.get(CONFIG_KEY)
    return MergeState(saved_records(config) if saved and _holds(module, saved.get("witness", {})) else ())


def remember(module: nn.Module, state: MergeState) -> None:
    """Puts the state on the module and its records in its configuration; an empty one leaves no trace."""
    module = uncompiled(module)
    if isinstance(module, ConfigMixin):
        # In place, past the freezing: a new FrozenDict would lose what diffusers set as attributes of this one, such
        # as the kind of projection when an IP-Adapter was loaded.
        OrderedDict.pop(module._internal_dict, CONFIG_KEY, None)
        if state.records:
            deltas = [record.to_config() for record in state.records]
            saved = {"deltas": deltas, "witness": _witness(module, state)}
            OrderedDict.__setitem__(module._internal_dict, CONFIG_KEY, saved)
    if state.records or state.broken:
        setattr(module, STATE_ATTRIBUTE, state)
    elif STATE_ATTRIBUTE in vars(module):
        delattr(module, STATE_ATTRIBUTE)


def _witness(module: nn.Module, state: MergeState) -> dict[str, dict[str, list[float]]]:
    """Some values of weights as they now are, "with" the deltas, and where it is known as they would be "without".

    A model may have got the configuration but not the weights, by `from_config`.
    """
    weights = {name: w for name, w in floating_entries(own_weights(module)).items() if w.dim() > 1}
    terms = [Term(state.weights[r.digest], r.scale, r.scales) for r in state.records if r.digest in state.weights]
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
