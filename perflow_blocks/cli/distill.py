"""`perflow distill`: an accelerator from a teacher, as a configuration file says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..training.loop import Observer


def distill(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="Settings: a .toml, .yaml or .json file.")],
) -> None:
    """Distil a PeRFlow student of a teacher. Every setting can be given as --section.field VALUE as well.

    For several processes: accelerate launch -m perflow_blocks.cli distill --config FILE
    """
    overrides = parse_overrides(context.args)
    if missing := [name for name in ("pydantic", "datasets") if find_spec(name) is None]:
        raise ValueError(f"distill needs {' and '.join(missing)}; install with pip install 'perflow-blocks[train]'.")
    from .pipeline import quiet_libraries

    quiet_libraries()
    from ..training.config import load_config
    from ..training.distillation import distill as run
    from ..training.families import SD, SDXL

    for family in (SD, SDXL):
        logging.getLogger(family.pipeline.__module__).addFilter(FirstOfItsKind())
    settings = load_config(config, overrides)
    done = run(settings, [_observer()])
    result, outputs = done.result, done.outputs
    if outputs is None:
        return
    loras = (outputs.lora, outputs.lora_kohya, outputs.lora_residual)
    for path in (result.student, result.delta, result.scheduler, *loras, outputs.workflow, done.report):
        if path is not None:
            typer.echo(path)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The texts by "section.field" of `--section.field VALUE` and `--section.field=VALUE`.

    Raises:
        ValueError: an argument that is neither, or a setting without a value.
    """
    found: dict[str, str] = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in name:
            raise ValueError(f"{argument} is no setting; write --section.field VALUE, --optimizer.max_steps 100 say.")
        if not equals:
            if not left:
                raise ValueError(f"{argument} has no value; write {argument} VALUE.")
            value = left.pop(0)
        found[name] = value
    return found


class FirstOfItsKind(logging.Filter):
    """Lets the first message of each kind through: that prompts are cut is told for every single one of them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.msg)[:60]
        new = kind not in self._seen
        self._seen.add(kind)
        return new


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _observer() -> Observer:
    from ..training.loop import Observer
    from ..training.progress import Progress
    from ..training.session import Session

    class Lines(Observer):
        """A line for each reading, by the main process."""

        def started(self, session: Session, step: int) -> None:
            if _is_main_process():
                typer.echo(session.data.describe())
                if step:
                    typer.echo(f"going on after step {step}")

        def read(self, progress: Progress) -> None:
            if _is_main_process():
                typer.echo(progress.describe())

    return Lines()
