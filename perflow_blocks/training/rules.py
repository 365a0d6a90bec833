"""Rules that settings obey, each answered by a sentence for a value that breaks it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

_Number = float | int


class ConfigError(ValueError):
    """All that is wrong with a configuration.

    Attributes:
        problems: one sentence for each mistake, at least one.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(complaint(self.problems))


def complaint(problems: tuple[str, ...]) -> str:
    """The mistake itself, or a list of them with a line each."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} settings are wrong:", *(f"- {problem}" for problem in problems)])


def problems_of(error: ValueError) -> tuple[str, ...]:
    """The sentences of an error: those of a `ConfigError`, or the message of any other."""
    return error.problems if isinstance(error, ConfigError) else (str(error),)


def at_least(least: int, **values: int | None) -> Iterator[str]:
    """Whole numbers from `least` on; None means that nothing is set."""
    for name, value in values.items():
        if value is not None and value < least:
            yield f"{name}={value} is below {least}; pass at least {least}."


def positive(**values: _Number) -> Iterator[str]:
    """Finite numbers above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            yield f"{name}={value} is no finite number above 0; pass one."


def not_negative(**values: _Number) -> Iterator[str]:
    """Finite numbers from 0 on."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            yield f"{name}={value} is no finite number of at least 0; pass one."


def share(**values: _Number) -> Iterator[str]:
    """Numbers in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            yield f"{name}={value} is no share; pass a number from 0 to 1."


def share_below_one(**values: _Number) -> Iterator[str]:
    """Numbers in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            yield f"{name}={value} leaves [0, 1); pass a number from 0 to below 1."
