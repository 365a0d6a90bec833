"""Names of a repository in what an export writes."""

from __future__ import annotations

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

CARD = "README.md"

OWNER = "your-name"
"""Whom a card names where the repository is not known yet; `hub/push.py` replaces it."""


def require_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it can be the id of a user's repository, "owner/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({error}); pass owner/name.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; pass owner/name.")
