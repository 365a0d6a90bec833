"""Exports of tiny pipelines, read back and loaded in a module cache of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from perflow_blocks import load_workflow
from perflow_blocks.demo import weights_directory
from perflow_blocks.hub.sources import WorkflowSources
from perflow_blocks.testing import load_tiny_ip_adapter, tiny_sdxl_components, tiny_sdxl_unet
from perflow_blocks.testing.tiny import IMAGE_WIDTH
from tests.conftest import make_pipeline, python


def use_own_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has diffusers copy the code of repositories to a folder of the test's, which other processes do not write to."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    folder.mkdir()  # Python remembers of a place in sys.path that it is none
    monkeypatch.syspath_prepend(folder)


def index_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "modular_model_index.json").read_text())


def tiny_pipeline(blocks: Any = None, **components: Any) -> Any:
    """A tiny pipeline that is not bound to a place: its components are objects."""
    return make_pipeline(blocks, **components)


def referring_pipeline(blocks: Any, index: dict[str, Any], folder: Path) -> Any:
    """A pipeline of an index, with nothing loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return blocks.init_pipeline(str(folder))


def hub_entry(kind: str, location: str, library: str = "diffusers", **details: Any) -> list[Any]:
    source = {"type_hint": [library, kind], "pretrained_model_name_or_path": location, **details}
    return [library, kind, {"subfolder": "", "variant": None, "revision": None, **source}]


def loaded(directory: Path, **options: Any) -> Any:
    pipe = load_workflow(directory, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_of(directory: Path) -> str:
    """All text in a directory, and the names of its files."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    texts = [path.read_text() for path in files if path.suffix in {".json", ".md", ".py", ".txt"}]
    return "\n".join([*(str(path.relative_to(directory)) for path in files), *texts])


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


def save_ip_adapter(path: Path, unet: Any = None) -> None:
    """Lays out IP-Adapter and image encoder for a UNet, `tiny_sdxl_unet` unless given, as "h94/IP-Adapter" does."""
    # Of the size that diffusers brings pictures to where nothing says otherwise.
    size = {"image_size": 224, "patch_size": 56, "hidden_size": 16, "intermediate_size": 32}
    config = CLIPVisionConfig(**size, projection_dim=IMAGE_WIDTH, num_hidden_layers=1, num_attention_heads=2)
    folder = path / "sdxl_models"
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder / "image_encoder")
    save_file(_ip_adapter_tensors(unet or tiny_sdxl_unet()), folder / "ip-adapter_sdxl.safetensors")


def _ip_adapter_tensors(unet: Any) -> dict[str, Tensor]:
    """What `load_tiny_ip_adapter` loads, as a file holds it."""
    loaded: list[Any] = []
    pipe = SimpleNamespace(
        unet=unet, null_component_names=[], load_ip_adapter=lambda weights, **_: loaded.extend(weights)
    )
    load_tiny_ip_adapter(pipe)
    (parts,) = loaded
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
