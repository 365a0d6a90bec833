"""Draws how good images are against their NFE, from the figures of `perflow evaluate --demo`.

python -m benchmarks.steps_figure outputs/evaluate/results.json --out docs/steps.png
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from matplotlib.ticker import NullFormatter

PANELS = {"strict %": "images that are strictly right, %", "Frechet": "Frechet distance to renders"}
STYLES = {"teacher, DDIM": ("tab:gray", "o"), "teacher, DPM-Solver++": ("tab:blue", "s"), "student": ("tab:red", "D")}


def main(
    results: Annotated[Path, typer.Argument(exists=True, help="results.json of perflow evaluate --demo.")],
    out: Annotated[Path, typer.Option(help="The figure, a PNG file.")] = Path("docs/steps.png"),
) -> None:
    """Write the figure."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.2), layout="constrained")
    for axis, (measure, label) in zip(axes, PANELS.items(), strict=True):
        for name, points in lines(rows, measure).items():
            color, marker = next(style for start, style in STYLES.items() if name.startswith(start))
            style = "--" if name.endswith("without guidance") else "-"
            nfe, values, errors = zip(*sorted(points), strict=True)
            axis.errorbar(nfe, values, errors, label=name, color=color, marker=marker, linestyle=style, capsize=2)
        axis.set(xscale="log", xlabel="NFE: UNet rows per image (guidance counts double)", ylabel=label)
        axis.set_xticks(ticks := [4, 8, 16, 100], labels=[str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].set(yscale="log")
    axes[1].set_yticks(ticks := [20, 50, 100, 200], labels=[str(tick) for tick in ticks])
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=9)
    figure.savefig(out, dpi=150)


def lines(rows: list[dict[str, Any]], measure: str) -> dict[str, list[tuple[int, float, float]]]:
    """The points (NFE, value, standard error) of each way of drawing, by its name."""
    found = defaultdict(list)
    for row in rows:
        if not row.get("nfe"):  # renders and reconstructions
            continue
        name = row["name"].replace("student, ", "student by ")
        if name.startswith("teacher") and row["guidance_scale"] == 1:
            name += ", without guidance"
        scored = row["scores"].get(measure) or row["distances"].get(measure)
        found[name].append((row["nfe"], scored["mean"], scored.get("error") or 0.0))
    return found


if __name__ == "__main__":
    typer.run(main)
