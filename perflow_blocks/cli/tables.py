"""Tables of text."""

from __future__ import annotations


def aligned(rows: list[list[str]]) -> list[str]:
    """A line for each row: the first column at the left, the others, which hold numbers, at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
