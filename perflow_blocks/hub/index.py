"""The JSON files of a workflow repository that diffusers and Mellon read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from .entries import Entry

MELLON_STAGES = ("text_encoder", "denoise", "decode")
"""The top-level blocks that make one node each in Mellon; blocks without them are one node as a whole."""


def make_index(
    pipeline_class: str, entries: Sequence[Entry], config: Mapping[str, Any], repo_id: str | None = None
) -> dict[str, Any]:
    """What `modular_model_index.json` holds.

    Without `_blocks_class_name`, for which diffusers falls back to its own blocks when the repository's fail to load.
    """
    return {
        "_class_name": pipeline_class,
        "_diffusers_version": diffusers.__version__,
        **{entry.name: entry.to_index(repo_id) for entry in entries},
        **config,
    }


def make_mellon_config(blocks: Any, label: str, repo_id: str | None) -> MellonPipelineConfig:
    """The nodes of the workflow in Mellon: one for each stage, or one for all where blocks have no such stages."""
    if set(MELLON_STAGES) <= set(blocks.sub_blocks):
        return MellonPipelineConfig.from_blocks(blocks, label=label, default_repo=repo_id or "")
    inputs = {param.name: _mellon_input(param) for param in blocks.inputs if param.name and not _has_type(param)}
    outputs = {param.name: _mellon_output(param) for param in blocks.outputs if param.name and not _has_type(param)}
    config = MellonPipelineConfig.from_custom_block(
        blocks,
        node_label=label,
        input_types={name: kind for name, kind in inputs.items() if kind is not None},
        output_types={name: kind for name, kind in outputs.items() if kind is not None},
    )
    config.default_repo = repo_id or ""
    return config


def _has_type(param: InputParam | OutputParam) -> bool:
    return "mellon" in (param.metadata or {})


def _mellon_input(param: InputParam) -> str | None:
    """Mellon's widget for an input, where its type has one; other inputs are sockets."""
    hint = str(param.type_hint)
    if param.type_hint is bool:
        return "checkbox"
    if param.type_hint in (int, float) and param.default is not None:  # a widget would make None a 0
        return "number"
    if "Image" in hint and "image" in str(param.name):
        return "image"
    if param.type_hint is str or hint.startswith("str |"):
        return "textbox"
    return None


def _mellon_output(param: OutputParam) -> str | None:
    return "image" if param.name == "images" else None
