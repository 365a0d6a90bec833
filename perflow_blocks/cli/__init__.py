"""The command line, one file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `perflow` command on `arguments`, by default those of the process, and exits.

    Status 0 when all went well, 130 after an interrupt, 2 for a mistake in the request: then stderr says what to do,
    in one line, or one for each mistake where all are looked for. A defect of the program keeps its traceback.
    """
    import typer.main

    from .app import app

    # Not standalone, so that mistakes arrive here as exceptions instead of being drawn over several lines.
    command = typer.main.get_command(app)
    try:
        status = command.main(arguments, prog_name="perflow", standalone_mode=False)
    except Exception as error:
        message = _request_error(error)
        if message is None:
            raise
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
