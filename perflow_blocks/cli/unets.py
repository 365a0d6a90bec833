"""UNets in directories for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..delta.files import read_json

CONFIG = "config.json"


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
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's configuration; empty where none can be read."""
    try:
        return read_json(folder / CONFIG)
    except ValueError:
        return {}


def is_unet(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == UNet2DConditionModel.__name__
