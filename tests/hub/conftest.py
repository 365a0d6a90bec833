"""Exports of tiny pipelines, read back and loaded in a module cache of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from perflow_blocks import load_workflow
from perflow_blocks.testing import load_tiny_ip_adapter, tiny_sdxl_unet
from perflow_blocks.testing.tiny import IMAGE_WIDTH
from tests.conftest import make_pipeline


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
