"""UNets in directories for the command line; what needs no model is told without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONFIG, CLASS = "config.json", "UNet2DConditionModel"


def find_unet(path: Path) -> Path | None:
    """The folder of a UNet at a path, which may be a pipeline's; None where there is none."""
    return next((folder for folder in (path, path / "unet") if is_unet(folder)), None)


def require_unet(path: Path) -> Path:
    """The folder of a UNet at a path; ValueError where there is none."""
    folder = find_unet(path)
    if folder is None:
        raise ValueError(f"model {path} holds no UNet; pass the directory of a saved UNet, or of a pipeline with one.")
    return folder


def find_config(*models: Path) -> UNet2DConditionModel | None:
    """The UNet, without values, of the first of the models that has a configuration."""
    folder = next((found for model in models if (found := find_unet(model))), None)
    return None if folder is None else empty_unet(folder)


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a folder's configuration, without values."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's configuration; empty where none can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def is_unet(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == CLASS
