"""`perflow push`: a workflow repository, onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..hub.publish import PushReport


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
    """Publish DIRECTORY as the repository REPO on the Hub, in one commit; refuses tokens and users' paths in it."""
    from ..hub.publish import push_workflow

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
    typer.echo("\n".join(_lines(report)))


def _lines(report: PushReport) -> list[str]:
    from .tables import aligned

    rows = [["file", "bytes", ""], *([file.path, f"{file.size:,}", file.change] for file in report.files)]
    if report.up_to_date:
        outcome = f"{report.repo_id} is up to date"
    else:
        sizes = f"{report.uploaded_bytes:,} of {report.total_bytes:,} bytes are new or changed"
        outcome = (
            f"{sizes}; nothing was uploaded (--dry-run)" if report.dry_run else f"{sizes}; commit {report.commit}"
        )
    if not report.compared:
        outcome += "; the Hub could not be reached, so that every file counts as new"
    return [*aligned(rows), "", outcome, report.url]
