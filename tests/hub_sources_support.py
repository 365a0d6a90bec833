"""Workflow sources written to directories, and loaded where this package cannot be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from perflow_blocks.demo import weights_directory
from perflow_blocks.hub.sources import WorkflowSources
from perflow_blocks.testing import tiny_sdxl_components

from .process_support import python

PROLOGUE = """
import json, sys
sys.path.insert(0, sys.argv[1])
try:
    import perflow_blocks
except ImportError:
    pass
else:
    raise SystemExit("perflow_blocks can be imported")

def tree(block):
    assembled = bool(block.sub_blocks)
    return [
        None if assembled else type(block).__name__,
        list(getattr(block, "block_trigger_inputs", ())) if assembled else [],
        getattr(block, "default_block_name", None) if assembled else None,
        {name: tree(inner) for name, inner in block.sub_blocks.items()},
    ]
"""


def block_tree(block: ModularPipelineBlocks) -> Any:
    """Names, order, triggers, defaults, and the names of the classes that do the work, as JSON gives them back."""
    assembled = bool(block.sub_blocks)
    return [
        None if assembled else type(block).__name__,
        list(getattr(block, "block_trigger_inputs", ())) if assembled else [],
        getattr(block, "default_block_name", None) if assembled else None,
        {name: block_tree(inner) for name, inner in block.sub_blocks.items()},
    ]


def write_repository(sources: WorkflowSources, directory: Path, class_name: str) -> Path:
    """The files of a workflow and the JSON file that names its class."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sources.files.items():
        (directory / name).write_text(text, encoding="utf-8")
    config = {
        "_class_name": class_name,
        "_diffusers_version": "0.42.1",
        "auto_map": {"ModularPipelineBlocks": f"block.{class_name}"},
        "requirements": dict(sources.requirements),
    }
    (directory / "modular_config.json").write_text(json.dumps(config))
    return directory


def save_tiny_weights(directory: Path) -> None:
    """Tiny components, and an index whose entries mean folders of the directory itself."""
    for name, component in tiny_sdxl_components().items():
        component.save_pretrained(directory / name)
    index = json.loads((weights_directory() / "modular_model_index.json").read_text())
    index.pop("delta", None)
    (directory / "modular_model_index.json").write_text(json.dumps(index))


def copy_weights(source: Path, directory: Path) -> None:
    shutil.copytree(source, directory, dirs_exist_ok=True)


def load_as_package(sources: WorkflowSources, directory: Path, class_name: str) -> Any:
    """A block of the generated class, whose directory is imported here as a package."""
    write_repository(sources, directory, class_name)
    (directory / "__init__.py").touch()
    import_from(directory / "__init__.py", directory.name, [str(directory)])
    module = importlib.import_module(f"{directory.name}.block")
    return getattr(module, class_name)()


def import_from(path: Path, name: str, search: list[str] | None = None) -> ModuleType:
    """A module imported from a file, under a name."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_without_the_package(script: str, home: Path, *arguments: str) -> Any:
    """What a script prints as JSON after REPORT, run where installed packages but not this one are importable.

    The script is started without `site`, so that no editable install is seen, in another directory, with caches of
    its own. It finds `ModularPipeline` repositories only.
    """
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled is kept, as with users
    command = ("-S", "-c", PROLOGUE + script, sysconfig.get_paths()["purelib"], *arguments)
    return json.loads(python(*command, environment=environment, cwd=home).split("REPORT")[1])
