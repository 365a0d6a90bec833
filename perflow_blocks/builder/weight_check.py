"""Whether a component can be loaded, as far as files tell without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.utils
import transformers.utils
from diffusers import ConfigMixin
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils.hub_utils import _add_variant
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHT_FILES = (
    diffusers.utils.SAFETENSORS_WEIGHTS_NAME,
    diffusers.utils.SAFE_WEIGHTS_INDEX_NAME,
    diffusers.utils.WEIGHTS_NAME,
    diffusers.utils.WEIGHTS_INDEX_NAME,
    transformers.utils.SAFE_WEIGHTS_NAME,
    transformers.utils.SAFE_WEIGHTS_INDEX_NAME,
    transformers.utils.WEIGHTS_NAME,
    transformers.utils.WEIGHTS_INDEX_NAME,
)
"""What diffusers and transformers look for, without a variant."""


def require_loadable(spec: ComponentSpec) -> None:
    """Looks at a local component's files; those of a repository of the Hub are not looked at.

    Raises:
        ValueError: the directory, the configuration or the weights (of this variant) are missing, or a file of
            weights is broken.
    """
    location = str(spec.pretrained_model_name_or_path)
    root = Path(location).expanduser()
    if not root.exists():
        if root.is_absolute() or location.startswith((".", "~")) or location.count("/") != 1:
            raise ValueError(
                f"{spec.name}: {location} does not exist; pass a directory, or a repository such as owner/name."
            )
        return
    if root.is_file():
        require_readable(root)
        if is_model(spec.type_hint):
            raise ValueError(
                f"{spec.name}: {location} is a file, which does not say how the model is built; pass a directory with "
                f"its config.json, or {spec.type_hint.__name__}.from_single_file(file, config=...)."
            )
        return
    folder = root / (spec.subfolder or "")
    if not folder.is_dir():
        raise ValueError(f"{spec.name}: there is no directory {folder}; pass a complete model, or with_component.")
    if is_model(spec.type_hint):
        if not (folder / "config.json").is_file():
            raise ValueError(f"{spec.name}: {folder} holds no config.json; pass a complete model, or with_component.")
        for file in _weight_files(folder, spec):
            require_readable(file)
    elif isinstance(spec.type_hint, type) and not any(folder.iterdir()):
        raise ValueError(f"{spec.name}: {folder} is empty; pass a complete model, or with_component.")


def require_readable(file: Path) -> None:
    """
    Raises:
        ValueError: a safetensors file that is not whole.
    """
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no complete safetensors file ({error}); download it again.") from error


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def component_config(spec: ComponentSpec) -> dict[str, Any]:
    """The configuration of a diffusers model, which is fetched if it is in a repository of the Hub.

    Raises:
        OSError, ValueError: it cannot be had.
    """
    keys = {name: getattr(spec, name) for name in ("subfolder", "revision")}
    loader: Any = spec.type_hint if _is_diffusers(spec.type_hint) else diffusers.ModelMixin
    return loader.load_config(spec.pretrained_model_name_or_path, **keys)


def _weight_files(folder: Path, spec: ComponentSpec) -> list[Path]:
    wanted = [_add_variant(name, spec.variant) for name in WEIGHT_FILES]
    found = [folder / name for name in wanted if (folder / name).is_file()]
    if not found:
        present = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        variant = "" if spec.variant is None else f" of the variant {spec.variant!r}"
        raise ValueError(
            f"{spec.name}: {folder} holds no weights{variant}, only {', '.join(present) or 'none at all'}; "
            "name another variant, or pass a complete model."
        )
    shards = sorted(folder.glob("*-of-*.safetensors")) if found[0].suffix == ".json" else []
    return [*(file for file in found[:1] if file.suffix != ".json"), *shards]


def _is_diffusers(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, ConfigMixin)
