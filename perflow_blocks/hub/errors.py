"""The Hub's answers in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The base of all errors of the HTTP library, whose name differs between versions of huggingface_hub.
NetworkError = HfHubHTTPError.__bases__[0]


@contextmanager
def explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence with a remedy, raised from it.

    Raises:
        ValueError: what another request would avoid: a missing repository or revision, a token that may not do this.
        ConnectionError: the network or the Hub failed; the same request may succeed later.
    """
    try:
        yield
    except (NetworkError, ConnectionError, PermissionError, RuntimeError, JSONDecodeError) as error:
        # Uploads run in threads, whose errors arrive as the causes of others.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if (explanation := _explanation(cause, repo_id, endpoint)) is None:
            raise
        raise explanation from error


def _explanation(error: BaseException, repo_id: str, endpoint: str) -> Exception | None:
    match error:
        case GatedRepoError():
            return ValueError(f"{repo_id} is gated; ask for access at {endpoint}/{repo_id}, and pass your token.")
        case RepositoryNotFoundError():
            return ValueError(f"{repo_id} does not exist, or the token may not see it; check the name and the token.")
        case RevisionNotFoundError():
            return ValueError(f"{repo_id} has no such revision; name a branch, a tag or a commit that it has.")
        case BadRequestError():
            return ValueError(f"the Hub refuses this for {repo_id} ({_said(error)}); mend what it names.")
        case HfHubHTTPError():
            return _by_status(error, repo_id)
        case PermissionError(filename=None):  # of hf-xet's; one of the local disk names a file
            return ValueError(f"the token may not write to {repo_id} ({error}); pass one that may.")
        case NetworkError() | ConnectionError() | JSONDecodeError():
            reason = str(error) or type(error).__name__
            return ConnectionError(f"the connection to {endpoint} failed ({reason}); {_AGAIN}")
    return None


_AGAIN = "try again, files that are uploaded already are not sent again."


def _by_status(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    match status:
        case 401:
            return ValueError("the Hub does not accept the token; run `hf auth login`, or pass another token.")
        case 403:
            return ValueError(f"the token may not do this with {repo_id} ({_said(error)}); pass one that may write.")
        case 409 | 412:
            return ValueError(f"{repo_id} was changed by someone else meanwhile ({_said(error)}); push again.")
    return ConnectionError(f"the Hub failed with status {status} for {repo_id} ({_said(error)}); {_AGAIN}")


def _said(error: HfHubHTTPError) -> str:
    return " ".join((error.server_message or str(error)).split()).rstrip(".")
