"""`perflow distill`: an accelerator from a teacher, as a configuration file says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from . import options


def distill(
    context: typer.Context,
    config: Annotated[Path, options.file("Settings: a .toml, .yaml or .json file.")],
) -> None:
    """Distil a PeRFlow student of a teacher. Every setting can be given as --section.field VALUE as well.

    For several processes: accelerate launch -m perflow_blocks.cli distill --config FILE
    """
    overrides = parse_overrides(context.args)
    if missing := [name for name in ("pydantic", "datasets") if find_spec(name) is None]:
        raise ValueError(f"distill needs {' and '.join(missing)}; install with pip install 'perflow-blocks[train]'.")
    from ..training.config import load_config
    from .pipeline import quiet_libraries

    settings = load_config(config, overrides)
    quiet_libraries()  # before the imports below, which have notices
    from accelerate import PartialState

    from ..training.checkpoints import RESULTS
    from ..training.distillation import distill as run
    from ..training.loop import Observer, Progress, Session

    class Lines(Observer):
        """A line for each reading, by the main process."""

        def started(self, session: Session, step: int) -> None:
            if PartialState().is_main_process:
                typer.echo(session.data.describe())
                if step:
                    typer.echo(f"going on after step {step}")

        def read(self, progress: Progress) -> None:
            if PartialState().is_main_process:
                typer.echo(progress.describe())

    # That a prompt is cut to 77 tokens would be told for each one of them.
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
    directory = run(settings, [Lines()])
    if PartialState().is_main_process:
        for path in (directory / name for name in RESULTS):
            if path.exists():
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
            raise ValueError(
                f"{argument} is not a setting; write --section.field VALUE, such as --optimizer.max_steps 9."
            )
        if not equals:
            if not left:
                raise ValueError(f"{argument} has no value; write {argument} VALUE.")
            value = left.pop(0)
        found[name] = value
    return found
