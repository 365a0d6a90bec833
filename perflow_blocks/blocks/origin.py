"""Where a pipeline's parts were loaded from, for what diffusers does not keep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME
from huggingface_hub import snapshot_download

from ..delta.files import Weights
from ..delta.weight_layouts import open_weights

SOURCE_ATTRIBUTE = "_perflow_source"
"""On a scheduler that the window set-up made: the ComponentSpec of the one that it was made from."""


def remember_source(made: Any, pipe: Any) -> None:
    """Notes on a scheduler, which is about to replace the pipeline's, where the pipeline's came from."""
    setattr(made, SOURCE_ATTRIBUTE, scheduler_source(pipe))


def scheduler_source(pipe: Any) -> ComponentSpec | None:
    """Where the scheduler was loaded from, or will be, before the window set-up converted it; None for nowhere."""
    current = pipe.scheduler
    converted = current is not None and SOURCE_ATTRIBUTE in vars(current)
    spec = vars(current)[SOURCE_ATTRIBUTE] if converted else pipe.get_component_spec("scheduler")
    return spec if spec is not None and spec.pretrained_model_name_or_path else None


def loaded_commit(pipe: Any, repository: str) -> str | None:
    """The commit of a repository of the Hub that the pipeline's blocks came from; None where that cannot be told.

    diffusers loads a repository's code as modules that have the commit in their names, and keeps the revision nowhere
    else. Where the repository's code only imports its blocks from a package, the process's modules are looked through.

    Raises:
        ValueError: they come from several commits, and the blocks' own module does not say which one counts.
    """
    prefix = f"{DIFFUSERS_DYNAMIC_MODULE_NAME}.local.{'--'.join(repository.split('/'))}."
    own = type(pipe._blocks).__module__
    modules = [own] if own.startswith(prefix) else [name for name in sys.modules if name.startswith(prefix)]
    commits = sorted({name.removeprefix(prefix).split(".")[0] for name in modules})
    if len(commits) > 1:
        raise ValueError(
            f"{repository} was loaded at {len(commits)} commits ({', '.join(commit[:8] for commit in commits)}), so "
            "that its delta's is not known; load it with load_workflow, or pass delta= with a local path."
        )
    return commits[0] if commits else None


def loaded_weights(component: Any) -> Weights | None:
    """The files that a modular pipeline's part was loaded from, if they are safetensors on this machine; else None.

    Whether the weights are still those is not looked at, nor whether a branch of a repository has moved since.
    """
    load_id = getattr(component, "_diffusers_load_id", "null")
    if load_id == "null":
        return None
    place = ComponentSpec.decode_load_id(load_id)
    source = str(place["pretrained_model_name_or_path"])
    try:
        path = Path(source)
        if not path.exists():
            path = Path(snapshot_download(source, revision=place["revision"], local_files_only=True))
        return open_weights(path if path.is_file() else path / (place["subfolder"] or ""), place["variant"])
    except (ValueError, OSError):
        return None
