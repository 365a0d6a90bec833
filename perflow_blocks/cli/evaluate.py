"""`perflow evaluate`: how good pictures of the embedded model, edits of others, and pictures of a fine-tune are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    prompts: Annotated[int, typer.Option(help="Number of prompts, at least 2; 512 for figures worth quoting.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Write the tables to this Markdown file too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the two rows of 50 steps.")] = False,
    editing: Annotated[
        bool,
        typer.Option(
            "--editing", help="Measure image-to-image and inpainting instead; --out puts a sheet (.png) beside."
        ),
    ] = False,
    lora_ranks: Annotated[
        str | None,
        typer.Option(help="Compare the delta with LoRAs of these ranks instead, as in 8,32,64."),
    ] = None,
    finetuned: Annotated[
        Path | None,
        typer.Option(help="Measure the delta on the fine-tune in this directory instead; --out as with --editing."),
    ] = None,
) -> None:
    """Measure prompt accuracy and Frechet distance of teacher and PeRFlow, with standard errors and times."""
    from ..atomic_files import require_writable_directory

    if find_spec("torchmetrics") is None:
        raise ValueError('evaluate needs torchmetrics; install it with pip install "perflow-blocks[eval]".')
    given = {"--editing": editing, "--finetuned": finetuned is not None, "--lora-ranks": lora_ranks is not None}
    others = [name for name, asked in given.items() if asked]
    if others and quick:
        raise ValueError(f"--quick leaves out rows that {others[0]} does not have; pass the one or the other.")
    if len(others) > 1:
        raise ValueError(f"{' and '.join(others)} are reports of their own; pass one of them.")
    ranks = None if lora_ranks is None else _whole_numbers(lora_ranks)
    if ranks is not None and find_spec("peft") is None:
        raise ValueError("--lora-ranks needs peft; install it with pip install peft.")
    if out is not None:
        if out.is_dir() or out.suffix == ".png":
            raise ValueError(f"--out {out} is {'a directory' if out.is_dir() else 'a picture'}; name a Markdown file.")
        require_writable_directory(out.parent)
    if ranks is not None:
        _evaluate_lora(prompts, ranks, out)
    elif editing:
        _evaluate_editing(prompts, out)
    elif finetuned is not None:
        _evaluate_finetuned(finetuned, prompts, out)
    else:
        _evaluate_samplers(prompts, out, quick=quick)


def _evaluate_samplers(prompts: int, out: Path | None, *, quick: bool) -> None:
    from ..evaluation.comparison import make_evaluation_set

    data = make_evaluation_set(prompts)
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..demo import teacher_pipeline
    from ..evaluation.classifier import load_classifier
    from ..evaluation.comparison import evaluate_samplers, report
    from ..evaluation.samplers import demo_samplers

    rows = evaluate_samplers(demo_samplers(quick=quick), data, load_classifier(), teacher_pipeline().vae)
    _hand_over(report(rows), out)


def _evaluate_lora(prompts: int, ranks: list[int], out: Path | None) -> None:
    from ..evaluation.comparison import make_evaluation_set

    data = make_evaluation_set(prompts)
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..evaluation.classifier import load_classifier
    from ..evaluation.lora_ranks import evaluate_lora_ranks, ranks_report

    _hand_over(ranks_report(evaluate_lora_ranks(ranks, data, load_classifier())), out)


def _whole_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--lora-ranks {text!r} is no list of whole numbers; write them as in 8,32,64.") from error
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--lora-ranks {text!r} has a rank below 1 or one twice; write different ones, as in 8,32,64."
        )
    return numbers


def _evaluate_editing(prompts: int, out: Path | None) -> None:
    from ..evaluation.editing_set import make_editing_set

    data = make_editing_set(prompts)
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..demo import perflow_pipeline
    from ..evaluation.classifier import load_classifier
    from ..evaluation.editing_report import editing_report, editing_sheet
    from .generate import save_png

    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    _hand_over(editing_report(pipe, data, load_classifier()), out)
    if out is not None:
        save_png(editing_sheet(pipe, data), out.with_suffix(".png"), {})


def _evaluate_finetuned(directory: Path, prompts: int, out: Path | None) -> None:
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..evaluation.classifier import load_classifier
    from ..evaluation.finetuned import finetuned_report, finetuned_sheet, make_finetuned_set, require_finetune
    from .generate import save_png

    require_finetune(directory)
    data = make_finetuned_set(prompts)
    _hand_over(finetuned_report(directory, data, load_classifier()), out)
    if out is not None:
        save_png(finetuned_sheet(directory, data), out.with_suffix(".png"), {})


def _hand_over(text: str, out: Path | None) -> None:
    from ..atomic_files import atomic_path

    typer.echo(text)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(text + "\n")
