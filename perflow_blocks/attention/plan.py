"""An attention plan: which strategy each attention module is asked to use, by what it sees and by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from .registry import get_attention_strategy

AttentionKind = Literal["self", "cross"]
"""What a module sees: the picture itself, or the prompt."""

KINDS: tuple[str, ...] = get_args(AttentionKind)
COMPONENTS = ("unet", "controlnet")
"""The components of a pipeline whose attention a plan is about."""

PlanLike = str | Mapping[str, str] | Sequence[str]
"""A strategy's name, for all modules; or kinds and patterns with a name each, as a mapping or "key=name" strings."""

_EXAMPLE = '{"self": "sliced", "unet.mid_block.*": "native"}'


@dataclass(frozen=True, kw_only=True)
class AttentionPlace:
    """Where an attention module stands.

    Attributes:
        component: the pipeline's name for the component, such as "unet".
        model: the same, with the number of the model where the component is several: "controlnet.nets.0".
        name: the module's name in the model, such as "mid_block.attentions.0.transformer_blocks.0.attn1".
        kind: what it sees.
    """

    component: str
    model: str
    name: str
    kind: AttentionKind

    @property
    def full_name(self) -> str:
        return f"{self.model}.{self.name}"

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means this module, with or without the component in front; `*` stands for dots too."""
        names = {self.name, self.full_name, f"{self.component}.{self.name}"}
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Kinds and patterns with the strategy asked for. Kinds say the default, patterns overrule them, the last wins.

    Attributes:
        kinds: (kind, strategy's name) each.
        patterns: (pattern of module names, strategy's name) each.
    """

    kinds: tuple[tuple[str, str], ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()

    def strategy_for(self, place: AttentionPlace) -> str | None:
        """The name of the strategy that is asked for; None where the plan says nothing of such a module."""
        for pattern, name in reversed(self.patterns):
            if place.matches(pattern):
                return name
        return dict(self.kinds).get(place.kind)

    def as_list(self) -> list[str]:
        """The plan as "key=name" strings: the form that an index holds, since JSON need not keep a mapping's order."""
        return [f"{key}={name}" for key, name in (*self.kinds, *self.patterns)]

    def require_places(self, places: Iterable[AttentionPlace], components: Iterable[str]) -> None:
        """Refuses a pattern that means no module.

        Args:
            places: all attention modules at hand.
            components: those of `COMPONENTS` at hand; what a pattern says of another one cannot be checked now.
        """
        places = list(places)
        absent = tuple(name for name in COMPONENTS if name not in set(components))
        for pattern, _ in self.patterns:
            if not pattern.startswith(absent) and not any(place.matches(pattern) for place in places):
                raise ValueError(
                    f"attention plan: {pattern!r} is wrong because no attention module has such a name; pass 'self', "
                    f"'cross' or a pattern such as {_examples(places)}."
                )


def parse_plan(plan: PlanLike | None) -> AttentionPlan | None:
    """The plan that is meant; None where nothing is asked for.

    Example:
        >>> parse_plan({"self": "sliced", "mid_block.*": "native"}).as_list()
        ['self=sliced', 'mid_block.*=native']
        >>> parse_plan("sliced").as_list()
        ['self=sliced', 'cross=sliced']

    Raises:
        ValueError: another type; a key that is neither a kind nor a pattern of module names; an unknown strategy.
    """
    entries = _entries(plan)
    for key, name in entries:
        if key not in KINDS and not any(character in key for character in ".*?["):
            raise ValueError(
                f"attention plan: the key {key!r} is wrong because it is neither a kind of attention nor a pattern of "
                f"module names; pass {' or '.join(map(repr, KINDS))}, or a pattern such as 'mid_block.*'."
            )
        get_attention_strategy(name)
    kinds = {key: name for key, name in entries if key in KINDS}  # of two of a kind, the last
    patterns = tuple((key, name) for key, name in entries if key not in KINDS)
    return AttentionPlan(kinds=tuple(kinds.items()), patterns=patterns) if entries else None


def _entries(plan: PlanLike | None) -> list[tuple[str, str]]:
    if plan is None:
        return []
    if isinstance(plan, str):
        if "=" in plan:
            raise ValueError(
                f"attention plan: {plan!r} is wrong because a string names one strategy for all; pass [{plan!r}]."
            )
        return [(kind, plan) for kind in KINDS]
    if isinstance(plan, Mapping):
        entries: list[Any] = list(plan.items())
    elif isinstance(plan, Sequence) and all(isinstance(entry, str) and "=" in entry for entry in plan):
        entries = [tuple(part.strip() for part in entry.rsplit("=", 1)) for entry in plan]
    else:
        raise ValueError(
            f"attention plan: {plan!r} is wrong because it is neither a strategy's name, nor a mapping of kinds and "
            f'patterns to names, nor a list of "key=name" strings; pass one such as {_EXAMPLE}.'
        )
    for entry in entries:
        if not all(isinstance(part, str) and part for part in entry):
            raise ValueError(
                f"attention plan: the entry {entry!r} is wrong because key and strategy are names; "
                f"pass a plan such as {_EXAMPLE}."
            )
    return entries


def _examples(places: Sequence[AttentionPlace]) -> str:
    """Two modules' names, of different kinds where there are."""
    chosen = {place.kind: place.full_name for place in reversed(places)}
    return " or ".join(map(repr, chosen.values())) or "'mid_block.*'"
