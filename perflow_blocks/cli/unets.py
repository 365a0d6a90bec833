"""UNets in directories for the command line: finding, checking, loading and saving them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..components.delta_fit import require_architecture
from ..components.files import atomic_directory
from ..components.weight_layouts import open_weights

CONFIG = "config.json"


def find_unet(path: Path) -> Path | None:
    """The folder of a UNet at a path, which may be a pipeline's; None where there is none."""
    return next((folder for folder in (path, path / "unet") if _is_unet(folder)), None)


def require_unet(path: Path) -> Path:
    """
    Raises:
        ValueError: there is no UNet in a directory of this name.
    """
    folder = find_unet(path.expanduser())
    if folder is None:
        state = "holds no UNet" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise ValueError(f"model {path} {state}; pass the directory of a saved UNet, or of a pipeline with one.")
    return folder


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a folder's configuration, without values.

    Raises:
        ValueError: the configuration makes no UNet.
    """
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{folder / CONFIG} describes no usable UNet ({error}); pass another model.") from error


def load_unet(folder: Path, variant: str | None, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """The UNet on the CPU, in the type it is stored in unless another is named.

    Raises:
        ValueError: the weights cannot be read, or are not those of the configuration.
    """
    from .pipeline import quiet_libraries

    quiet_libraries()
    if dtype is None:
        weights = open_weights(folder, variant)
        dtype = weights.tensor(next(iter(weights.shapes))).dtype
    try:
        return UNet2DConditionModel.from_pretrained(
            folder, variant=variant, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except OSError as error:
        raise ValueError(f"cannot load {folder} ({error}); pass the directory of a saved UNet.") from error


def require_own_weights(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """The folder's UNet without values, once its files are known to hold all of it: diffusers fills gaps at random.

    Raises:
        ValueError: the weights cannot be read, or are not those of the configuration.
    """
    unet = empty_unet(folder)
    require_architecture(open_weights(folder, variant), unet)
    return unet


def save_unet(unet: UNet2DConditionModel, out: Path) -> None:
    """Writes a UNet folder whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    with atomic_directory(out) as temporary:
        try:
            unet.save_pretrained(temporary)
        except OSError as error:
            raise ValueError(f"cannot write {out}: {error}; check the disk's free space and permissions.") from error


def require_free_directory(out: Path, force: bool) -> None:
    """
    Raises:
        ValueError: nothing can be written there; something stands there and `force` is not given, or it is no UNet
            folder, which is never replaced.
    """
    from ..components.files import require_writable_directory

    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ValueError(f"--out {out} exists; name another directory, or pass --force to replace it.")
        if not _is_unet(out) or any(entry.is_dir() for entry in out.iterdir()):
            raise ValueError(
                f"--out {out} is no folder of a UNet alone, so --force leaves it; name another directory."
            )
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a directory.")
    require_writable_directory(out.absolute().parent)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's configuration; empty where none can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_unet(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == UNet2DConditionModel.__name__
