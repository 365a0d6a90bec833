"""`perflow push`: a workflow repository, onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def push(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What perflow export wrote.")],
    repo: Annotated[str, typer.Argument(help="Where to, as owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Let only its owners see a new repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, or a pull request such as refs/pr/1.")] = None,
    token: Annotated[str | None, typer.Option(help="Access token. By default the one of `hf auth login`.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
) -> None:
    """Publish DIRECTORY as the repository REPO on the Hub; refuses private files and tokens in it."""
    from huggingface_hub import get_token

    if not dry_run and not (token or get_token()):
        raise ValueError("no token for the Hub was found; run `hf auth login`, or pass --token.")
    from ..hub.push import push_workflow

    report = push_workflow(
        directory,
        repo,
        private=True if private else None,
        create_pr=create_pr,
        revision=revision,
        token=token,
        commit_message=message,
        dry_run=dry_run,
    )
    typer.echo(options.table(("file", "bytes"), *((path, f"{size:,}") for path, size in report.files.items())))
    outcome = f"commit {report.commit}" if report.commit else "nothing was uploaded (--dry-run)"
    typer.echo(f"\n{len(report.files)} files, {sum(report.files.values()):,} bytes; {outcome}\n{report.url}")
