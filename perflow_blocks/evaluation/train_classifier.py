"""Trains the judge of shapes on renders: `python -m perflow_blocks.evaluation.train_classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo.data import render_pictures
from .classifier import WEIGHTS, classifier_accuracy, save_classifier, train_classifier

MIN_ACCURACY = 0.98


def main(
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = WEIGHTS,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1200,
) -> None:
    """Train the shape classifier and keep it if it recognises at least 98 % of held-out renders."""
    classifier = train_classifier(render_pictures(24_000, seed=3), steps=steps)
    accuracy = classifier_accuracy(classifier, render_pictures(4_096, seed=4))
    typer.echo(f"shape classifier: {100 * accuracy:.2f} % of 4096 held-out renders")
    if accuracy < MIN_ACCURACY:
        raise ValueError(f"accuracy {accuracy:.3f} is below {MIN_ACCURACY}; train with more --steps.")
    save_classifier(classifier, out)


if __name__ == "__main__":
    typer.run(main)
