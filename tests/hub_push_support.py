"""A small workflow repository to push, and what tests of pushing share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from perflow_blocks.hub.manifest import write_manifest
from perflow_blocks.hub.publish import PushReport, push_workflow

from .hub_server import LoopbackHub

REPO = "someone/workflow"
CONTENT = {
    "README.md": b"---\nlicense: mit\n---\n# Workflow\n",
    "block.py": b"from .perflow_part import Blocks\n",
    "perflow_part.py": b"class Blocks: ...\n",
    "modular_config.json": b'{"auto_map": {"ModularPipelineBlocks": "block.Blocks"}}\n',
    "modular_model_index.json": b'{"unet": ["diffusers", "UNet", {"pretrained_model_name_or_path": null}]}\n',
    "unet/first.safetensors": b"\2\0\0\0\0\0\0\0{}" + bytes(range(256)) * 40,
    "unet/second.safetensors": b"\2\0\0\0\0\0\0\0{}" + bytes(range(255)) * 80,
}


def write_workflow(directory: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    write_manifest(directory, blocks="block.Blocks", mode="self-contained")
    return directory


def files_of(directory: Path | str) -> dict[str, bytes]:
    """All files of a directory, but for what the Hub adds."""
    paths = (path for path in Path(directory).rglob("*") if path.is_file() and path.name != ".gitattributes")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def push(hub: LoopbackHub, directory: Path, **options: Any) -> PushReport:
    return push_workflow(directory, REPO, **{"endpoint": hub.endpoint, "token": hub.token, **options})


def download(hub: LoopbackHub, cache: Path, revision: str | None = None) -> str:
    return snapshot_download(
        REPO, revision=revision, cache_dir=cache, endpoint=hub.endpoint, token=hub.token, max_workers=1
    )


def changes(report: PushReport) -> dict[str, str]:
    return {file.path: file.change for file in report.changes}
