"""Which files of a folder are a model's weights: variants and shards, as diffusers names them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, logging

from .tensors import listed

logger = logging.get_logger(__name__)

_STEM = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
_SHARD = r"(?P<{}>-\d{{5}}-of-\d{{5}})?"
# diffusers 0.42 writes stem.fp16-00001-of-00002.safetensors, earlier releases stem-00001-of-00002.fp16.safetensors.
_WEIGHTS = re.compile(
    re.escape(_STEM)
    + _SHARD.format("early")
    + r"(?:\.(?P<variant>.+?))?"
    + _SHARD.format("late")
    + r"\.(?P<kind>safetensors|bin)(?P<index>\.index(?:\.(?P<indexed>.+))?\.json)?"
)


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The file of a folder's weights, or the index of their shards; a pipeline's UNet where the folder has none.

    Where one variant is all there is, it need not be named.

    Raises:
        ValueError: no weights, no such variant, several and none named, or pickles only.
    """
    for place in (folder, folder / "unet"):
        safe: dict[str | None, Path] = {}
        pickles: list[str] = []
        for file in sorted(place.glob(f"{_STEM}*"), key=lambda file: (file.suffix == ".json", file.name)):
            found = _WEIGHTS.fullmatch(file.name)
            if found is None or found["early"] or found["late"]:
                continue
            if found["kind"] == "bin":
                pickles.append(file.name)
            else:
                safe[found["variant"] or found["indexed"]] = file  # of two ways to store one, the index, as diffusers
        if variant in safe:
            return safe[variant]
        if variant is None and len(safe) == 1:
            ((name, file),) = safe.items()
            logger.info(f"{place} holds no weights but the variant {name!r}, which is taken.")
            return file
        if safe:
            raise ValueError(_which(place, safe, variant))
        if pickles:
            raise ValueError(f"{place} holds pickles only ({listed(pickles)}); pass the file.")
    raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; it is a directory: pass a UNet's, or a file.")


def variant_of(name: str | os.PathLike[str]) -> str | None:
    """The variant in the name of a file of weights, of a shard, or of an index; None for those without one.

    Raises:
        ValueError: it is no name of a diffusers model's weights.
    """
    found = _WEIGHTS.fullmatch(Path(name).name)
    if found is None:
        raise ValueError(f"{name} is no file of a model's weights; pass {SAFETENSORS_WEIGHTS_NAME}, say.")
    return found["variant"] or found["indexed"]


def is_weights_of(name: str, variant: str | None) -> bool:
    """Whether a file of this name holds safetensors weights of the variant, or a part or the index of such."""
    found = _WEIGHTS.fullmatch(name)
    return found is not None and found["kind"] == "safetensors" and variant_of(name) == variant


def shards_of(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        ValueError: it is no index, or a shard is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error}); download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ValueError(f"{index} names shards that are not there ({listed(missing)}); download them too.")
    return [index.parent / name for name in names]


def _which(place: Path, files: dict[str | None, Path], variant: str | None) -> str:
    names = ", ".join("the one without a name" if name is None else repr(name) for name in files)
    asked = "no variant was named" if variant is None else f"not {variant!r}"
    file = next(iter(files.values()))
    return f"{place} holds the variants {names} and {asked}; name one as the variant, or pass its file, say {file}."
