"""What attention modules were asked to run, and what they ran: counted per module, shown as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.utils import logging

from .plan import AttentionPlace

logger = logging.get_logger(__name__)

LONGEST_LIST = 12
"""A table of more modules shows one line for all that are alike."""


@dataclass(kw_only=True)
class AttentionRecord:
    """The counters of one attention module, which its processor writes.

    Attributes:
        place: where the module stands; None for a module that no plan was ever applied to.
        asked: the strategy that the plan asks for; None where it says nothing of this module.
        kept: why the module keeps the processor that it has; None where there is no such reason.
        calls: by the name of the strategy that ran, the number of calls; without those inside compiled code.
        fallbacks: by the reason that `native` ran instead, the number of calls; 0 for one that was compiled.
        traced: the strategies in what `torch.compile` made of the module.
        told: (strategy, reason) of the warnings given so far, shared by all modules of an `AttentionConfig`.
    """

    place: AttentionPlace | None = None
    asked: str | None = None
    kept: str | None = None
    calls: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    traced: set[str] = field(default_factory=set)
    told: set[tuple[str, str]] = field(default_factory=set)

    def count(self, asked: str, ran: str, reason: str | None) -> None:
        """Notes one call."""
        self.calls[ran] = self.calls.get(ran, 0) + 1
        if reason is not None:
            self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1
            self._warn(asked, reason)

    @torch.compiler.assume_constant_result  # runs when the call is traced, and leaves nothing in the graph
    def trace(self, asked: str, ran: str, reason: str | None) -> None:
        """Notes that `torch.compile` traces a call; what it makes of it runs without coming here."""
        self.traced.add(ran)
        if reason is not None:
            self.fallbacks.setdefault(reason, 0)
            self._warn(asked, reason)

    def reset(self) -> None:
        """Counts from zero. What was traced stays, since it is not traced again."""
        self.calls.clear()
        self.fallbacks.clear()

    def _warn(self, asked: str, reason: str) -> None:
        if (asked, reason) not in self.told:
            self.told.add((asked, reason))
            where = "an attention module" if self.place is None else self.place.full_name
            logger.warning("%s runs native attention in place of %s: %s.", where, asked, reason)


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One attention module of a report.

    Attributes:
        module: its name, with the model's in front.
        kind: "self" or "cross".
        asked: the strategy that the plan asks for; None where it says nothing of the module.
        calls: (strategy that ran, calls) each.
        in_compiled: whether the module is part of what `torch.compile` compiled, where calls are not counted.
        traced: the strategies that were compiled with this module. Modules that are alike may share a graph, which is
            then traced with one of them.
        fallbacks: (reason that `native` ran in place of the strategy, calls) each.
        kept: why the module keeps the processor that it has; None where there is no such reason.
    """

    module: str
    kind: str
    asked: str | None
    calls: tuple[tuple[str, int], ...] = ()
    in_compiled: bool = False
    traced: tuple[str, ...] = ()
    fallbacks: tuple[tuple[str, int], ...] = ()
    kept: str | None = None

    def cells(self) -> tuple[str, ...]:
        """What the table shows after the module's name."""
        ran = [f"{name} {count}" for name, count in self.calls] + [f"{name} (compiled)" for name in self.traced]
        if self.in_compiled and not self.traced:
            ran.append("not counted (compiled)")
        notes = [f"{reason} ({count} native)" if count else reason for reason, count in self.fallbacks]
        if self.kept is not None:
            notes.insert(0, f"kept: {self.kept}")
        return (self.kind, self.asked or "-", ", ".join(ran) or "-", "; ".join(notes))


@dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """What each attention module was asked to run and ran; `str()` of it is a table.

    Attributes:
        rows: one for each module, in the models' order.
    """

    rows: tuple[AttentionRow, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return "No attention module was looked at yet; run the pipeline, or call attach()."
        lines: list[tuple[str, ...]] = [("module", "kind", "asked for", "ran", "why")]
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            alone = () if len(self.rows) > LONGEST_LIST else (row.module,)
            groups.setdefault((row.module.split(".")[0], *row.cells(), *alone), []).append(row.module)
        lines += [(_together(modules), *key[1:5]) for key, modules in groups.items()]
        return _table(lines)


def make_report(records: Iterable[tuple[AttentionRecord, bool]]) -> AttentionReport:
    """The records as they are now, each with whether its module is part of what was compiled."""
    return AttentionReport(
        rows=tuple(
            AttentionRow(
                module=record.place.full_name,
                kind=record.place.kind,
                asked=record.asked,
                calls=tuple(record.calls.items()),
                in_compiled=in_compiled,
                traced=tuple(sorted(record.traced)),
                fallbacks=tuple(record.fallbacks.items()),
                kept=record.kept,
            )
            for record, in_compiled in records
            if record.place is not None
        )
    )


def _together(modules: Sequence[str]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} like it"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
