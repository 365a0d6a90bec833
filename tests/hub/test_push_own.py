"""What this package exports of its own blocks may be published: nothing in it is taken for private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perflow_blocks import PeRFlowSDXLAutoBlocks, export_workflow
from perflow_blocks.blocks import workflows
from perflow_blocks.hub.manifest import read_manifest
from perflow_blocks.hub.publishable import private_content, require_publishable

PRESETS = [
    kind for name, kind in vars(workflows).items() if name.startswith("PeRFlowSDXL") and name.endswith("Blocks")
]


def test_the_presets_are_found() -> None:
    assert len(PRESETS) == 6


@pytest.mark.parametrize("kind", [PeRFlowSDXLAutoBlocks, *PRESETS], ids=lambda kind: kind.__name__)
def test_a_self_contained_preset_is_publishable(kind: Any, tmp_path: Path) -> None:
    directory = export_workflow(kind(), tmp_path / "preset", mode="self-contained")
    assert len([name for name in read_manifest(directory).files if name.endswith(".py")]) > 10
    require_publishable(directory)


def test_the_recipes_hold_nothing_private() -> None:
    root = Path(__file__).parent.parent.parent / "workflows"
    files = [*root.rglob("*.py"), *root.rglob("*.md")]
    assert len(files) > 15
    assert {path: found for path in files if (found := list(private_content(path)))} == {}
