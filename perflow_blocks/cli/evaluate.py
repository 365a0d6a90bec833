"""`perflow evaluate`: how good the embedded model's pictures are, beside the teacher's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    prompts: Annotated[int, typer.Option(help="Number of prompts, at least 2; 512 for figures worth quoting.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Write the tables to this Markdown file too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the two rows of 50 steps.")] = False,
) -> None:
    """Measure prompt accuracy and Frechet distance of teacher and PeRFlow, with standard errors and times."""
    from ..components.files import atomic_path, require_writable_directory

    if find_spec("torchmetrics") is None:
        raise ValueError('evaluate needs torchmetrics; install it with pip install "perflow-blocks[eval]".')
    from ..evaluation.comparison import make_evaluation_set

    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a directory; name a Markdown file.")
        require_writable_directory(out.parent)
    data = make_evaluation_set(prompts)
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..demo import teacher_pipeline
    from ..evaluation.classifier import load_classifier
    from ..evaluation.comparison import evaluate_samplers, report
    from ..evaluation.samplers import demo_samplers

    rows = evaluate_samplers(demo_samplers(quick=quick), data, load_classifier(), teacher_pipeline().vae)
    text = report(rows)
    typer.echo(text)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text + "\n")
