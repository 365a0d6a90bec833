"""The curves of a training as pictures. matplotlib's figures are used by themselves: no backend is set for anyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic_files import atomic_path

_SIZE = (7.0, 3.6)  # inches
_DPI = 110

Curve = tuple[Sequence[float], Sequence[float | None]]
"""x and y of a line; None leaves a gap."""


def save_plot(
    path: Path,
    curves: Mapping[str, Curve],
    *,
    label: str,
    logarithmic: bool = False,
    dashed: frozenset[str] = frozenset(),
) -> None:
    """Draws curves over the number of updates, with a legend where there are several, as a PNG file.

    Args:
        path: of the picture.
        curves: by their names.
        label: of the vertical axis.
        logarithmic: for values above 0 over several orders; others are left out.
        dashed: names of curves to compare with.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        values = [float("nan") if value is None or (logarithmic and value <= 0) else value for value in y]
        marker = "o" if len(values) < 12 else None
        style = "--" if name in dashed else "-"
        axes.plot(x, values, style, label=name, marker=marker, markersize=3, linewidth=1.2)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
