"""The `perflow` command: one line per subcommand."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .compare import compare
from .demo import demo
from .distill import distill
from .evaluate import evaluate
from .export import export
from .extract import extract
from .generate import generate
from .inspect import inspect
from .merge import merge, unmerge
from .push import push
from .to_lora import to_lora

app = typer.Typer(add_completion=False, help="Few-step pictures from PeRFlow diffusion models.")
app.command()(generate)
app.command()(compare)
app.command()(evaluate)
app.command()(demo)
app.command()(extract)
app.command()(merge)
app.command()(unmerge)
app.command()(to_lora)
app.command()(inspect)
app.command()(export)
app.command()(push)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(distill)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        typer.echo(f"perflow_blocks {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
