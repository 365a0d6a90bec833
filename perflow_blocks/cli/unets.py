"""UNets in directories for the command line: finding, checking, loading and saving them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..atomic_files import atomic_directory, require_writable_directory
from ..delta.apply import require_architecture
from ..delta.files import find_weights, listed, open_weights, read_json, variants_of

CONFIG = "config.json"


def find_unet(path: Path) -> Path | None:
    """The folder of a UNet at a path, which may be a pipeline's; None where there is none."""
    return next((folder for folder in (path, path / "unet") if _is_unet(folder)), None)


def require_unet(path: Path) -> Path:
    """The folder of a UNet at a path; ValueError where there is none."""
    folder = find_unet(path.expanduser())
    if folder is None:
        state = "holds no UNet" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise ValueError(f"model {path} {state}; pass the directory of a saved UNet, or of a pipeline with one.")
    return folder


def find_config(*models: Path) -> UNet2DConditionModel | None:
    """The UNet, without values, of the first of the models that has a configuration."""
    folder = next((found for model in models if (found := find_unet(model.expanduser()))), None)
    return None if folder is None else empty_unet(folder)


def stored_variant(folder: Path, variant: str | None) -> str | None:
    """The variant of a UNet folder's weights: the one that is named, or the only one there is."""
    name = find_weights(folder, variant).name
    return variants_of([name])[name]


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a folder's configuration, without values; ValueError where it makes none."""
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{folder / CONFIG} describes no usable UNet ({error}); pass another model.") from error


def load_unet(folder: Path, variant: str | None, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """The UNet on the CPU, in the type it is stored in unless another is named."""
    from .pipeline import quiet_libraries

    quiet_libraries()
    if dtype is None:
        weights = open_weights(folder, variant)
        dtype = weights.tensor(next(iter(weights.shapes))).dtype
    return UNet2DConditionModel.from_pretrained(
        folder, variant=variant, dtype=dtype, use_safetensors=True, local_files_only=True
    )


def require_own_weights(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """The folder's UNet without values, once its files are known to hold all of it: diffusers fills gaps at random."""
    unet = empty_unet(folder)
    require_architecture(open_weights(folder, variant), unet)
    return unet


def save_unet(unet: UNet2DConditionModel, out: Path, variant: str | None) -> None:
    """Writes a UNet folder whole or not at all, its weights in files of the variant."""
    with atomic_directory(out) as temporary:
        unet.save_pretrained(temporary, variant=variant)


def require_free_directory(out: Path, force: bool, variant: str | None) -> str | None:
    """The variant to save a UNet in: that of the model's weights where those replace files of it, else none.

    Raises:
        ValueError: nothing can be written there; something stands there and `force` is not given; or it is no UNet
            folder, or holds files that would not be replaced, which are never deleted.
    """
    kept = None
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ValueError(f"--out {out} exists; name another directory, or pass --force to replace it.")
        if not _is_unet(out):
            raise ValueError(
                f"--out {out} is no folder of a UNet alone, so --force leaves it; name another directory."
            )
        variants = variants_of(entry.name for entry in out.iterdir() if entry.is_file())
        kept = variant if variant in variants.values() else None
        replaced = {CONFIG, *(name for name, own in variants.items() if own == kept)}
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in replaced)
        if others:
            raise ValueError(
                f"--out {out} holds {listed(others)} too, which --force does not delete; name another directory, or "
                "move them elsewhere."
            )
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a directory.")
    require_writable_directory(out.absolute().parent)
    return kept


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's configuration; empty where none can be read."""
    try:
        return read_json(folder / CONFIG)
    except ValueError:
        return {}


def _is_unet(folder: Path) -> bool:
    return read_config(folder).get("_class_name") == UNet2DConditionModel.__name__
