"""A workflow repository's files on this machine: a directory as it is, or a snapshot of a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def fetch_workflow(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory; a repository is downloaded whole at one commit, that of the revision, unless it is cached.

    Raises:
        ValueError: there is no such directory, repository or revision, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories, and {source} is a directory; leave it out.")
        return path.absolute()
    name = str(source)
    where = name if revision is None else f"{name} at revision {revision}"
    try:
        return Path(
            snapshot_download(
                name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        )
    except HFValidationError as error:
        raise ValueError(f"{name} is no directory and no repository's id; pass one, owner/name say.") from error
    except GatedRepoError as error:
        raise ValueError(f"{name} is gated; ask for access on its page and pass the token that has it.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is not found: no directory here, and no repository, or a private one; check the name, or pass a "
            "token that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r}; pass a branch, tag or commit that it has.") from error
    except LocalEntryNotFoundError as error:
        reason = "is not in the cache" if local_files_only else "can neither be reached nor found whole in the cache"
        raise ValueError(f"{where} {reason}; load it once with network, or pass the path of a copy.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{where} could not be downloaded ({_line(error)}); try again.") from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
