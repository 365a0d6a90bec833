"""The `perflow` command: one line per subcommand here, one file each beside it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
from .page import page
from .push import push
from .to_lora import to_lora

ARGUMENTS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "overwrite": "force"}
"""Python arguments whose options have other names."""

app = typer.Typer(help="Few-step images from PeRFlow diffusion models.")
for command in (generate, compare, evaluate, demo, extract, merge, unmerge, to_lora, inspect, export, push):
    app.command()(command)
app.command("app")(page)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `perflow` command on `arguments`, by default those of the process, and exits.

    Status 0 when all went well, 130 after an interrupt, 2 for a mistake in the request: then stderr says what to do,
    in one line, or one for each mistake where all are looked for. A defect of the program keeps its traceback.
    """
    import typer.main

    # Not standalone, so that mistakes arrive here as exceptions instead of being drawn over several lines.
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else arguments
    given = [re.sub(r"^(--[a-z-]+=)?~/", lambda found: f"{found[1] or ''}{Path.home()}/", one) for one in given]
    try:
        status = command.main(given, prog_name="perflow", standalone_mode=False)
    except Exception as error:
        message = _request_error(error)
        if message is None:
            raise
        commands = getattr(command, "commands", {})
        message = _in_options(message, next((commands[one].params for one in given if one in commands), ()))
        print(f"Error: {message}", file=sys.stderr)
        status = 2
    raise SystemExit(status or 0)


def _request_error(error: Exception) -> str | None:
    """What to say of an error that a different request would avoid, mostly one line; None for any other."""
    # The parser's own errors have a base class that moved between typer's versions; they all can format themselves.
    if format_message := getattr(error, "format_message", None):
        return f"{' '.join(format_message().split()).rstrip('.')}; see perflow --help."
    if getattr(error, "problems", None):
        return str(error)
    from safetensors import SafetensorError  # as when the disk is full

    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _in_options(message: str, parameters: Iterable[Any]) -> str:
    """The message with options of the command in place of the Python arguments that they are for."""
    options = {one.name: max(one.opts, key=len) for one in parameters if one.opts[0].startswith("-")}
    names = options | {argument: options[own] for argument, own in ARGUMENTS.items() if own in options}
    found = re.compile(rf"\b({'|'.join(names) or '$'})=(True\b)?(torch\.)?(?=(\w|['\"-])?)")
    return found.sub(lambda one: names[one[1]] + (" " if one[4] and not one[2] else ""), message)
