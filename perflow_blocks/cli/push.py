"""`perflow push`: a workflow repository, onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(help="The workflow repository, as perflow export wrote it.")],
    repo: Annotated[str, typer.Argument(help="Where to, as owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Let only its owners see a new repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, or a pull request such as refs/pr/1.")] = None,
    token: Annotated[str | None, typer.Option(help="Access token. By default the one of `hf auth login`.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
) -> None:
    """Publish DIRECTORY as the repository REPO on the Hub; refuses private files and tokens in it."""
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
    typer.echo(f"{'file':<50} {'bytes':>15}")
    for path, size in report.files.items():
        typer.echo(f"{path:<50} {size:>15,}")
    outcome = f"commit {report.commit}" if report.commit else "nothing was uploaded (--dry-run)"
    typer.echo(f"\n{len(report.files)} files, {sum(report.files.values()):,} bytes; {outcome}\n{report.url}")
