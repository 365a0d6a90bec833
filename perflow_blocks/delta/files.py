"""Weights by name, read one tensor at a time: finding and opening files, naming and comparing what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .recipe import PREFIX, DeltaRecipe

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""The types that a delta may have and be merged into, as safetensors calls them."""

CHUNK = 1 << 20  # values that are worked on at a time: few enough for a processor's cache, enough for all its cores
SAMPLE = 32  # how many values at either end of a tensor identify it
DIGEST_KEY = "perflow_delta"  # in a LoRA file's metadata: the `identity_of` the delta that it was made from

THETA = f"{PREFIX}theta"  # a tensor of a delta file that is not a weight; read as if the metadata held it

# What distributed training, compilation, pipelines and checkpoints put before the names of all weights.
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|unet\.|_fsdp_wrapped_module\.|model\.diffusion_model\.)+")

_STEM = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
# diffusers 0.42 writes stem.fp16-00001-of-00002.safetensors, earlier releases stem-00001-of-00002.fp16.safetensors.
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_WEIGHTS = re.compile(re.escape(_STEM) + r"(?:\.(.+?))?\.safetensors(?:\.index(?:\.(.+))?\.json)?")

Stamp = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: path; device and inode, which tell a file that was replaced; size and time of change (ns)."""

Shapes = Mapping[str, tuple[int, ...]]


class _File:
    """A memory-mapped safetensors file, which may be replaced or deleted while it is open, but not written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: Any = safe_open(str(path), framework="pt", device="cpu")

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.handle.get_tensor(name)
        return tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _File, (self.path,)


@dataclass(frozen=True, eq=False)
class Weights:
    """Floating-point tensors by name, one of them in memory at a time. A deep copy is the same object."""

    label: str  # names them in messages, for example a path
    shapes: Shapes  # by names without the prefixes of wrappers
    places: Mapping[str, tuple[Callable[[str], Tensor], str]]  # how each is read, and the name that it has there
    metadata: Mapping[str, str] = field(default_factory=dict)  # of their files
    stamp: Stamp = ()  # of their files, if they are files
    base: Weights | None = None  # weights of the same names that are subtracted from these

    def tensor(self, name: str) -> Tensor:
        """One tensor, which the caller must not write to; of a difference in float32 on the first one's device."""
        read, own = self.places[name]
        tensor = read(own).detach()
        if self.base is None:
            return tensor
        # In half precision the small difference would be rounded to the spacing of the large weights.
        return tensor.float() - self.base.tensor(name).to(tensor.device).float()

    def minus(self, base: Weights) -> Weights:
        """The difference, formed when it is read; ValueError unless names and shapes agree."""
        mismatch = describe_mismatch(self.shapes, base.shapes, given="the student", expected="the base")
        if mismatch:
            raise ValueError(f"{self.label} and {base.label} do not match: {mismatch}.")
        return replace(self, label=f"{self.label} minus {base.label}", stamp=self.stamp + base.stamp, base=base)

    def require_unchanged(self) -> None:
        """Raises ValueError if a file was written to since it was opened."""
        for old in self.stamp:
            # A file that was replaced or deleted is still mapped with its old contents.
            new = stamp_of(old[:1])[0] if os.path.exists(old[0]) else old
            if new[:3] == old[:3] and new != old:
                raise ValueError(f"{self.label} was written to since it was opened; load the model again.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return self


Delta = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Weights
"""Weights: a file or folder that `open_weights` reads, a mapping as `extract_delta` gives, a module, or open ones."""


def opened(delta: Delta, what: str = "delta") -> Weights:
    """The weights of a delta in any form; messages call it `what`. Tensors are not copied."""
    if isinstance(delta, Weights):
        return delta
    if isinstance(delta, (str, os.PathLike)):
        return open_weights(delta)
    tensors, label = delta.state_dict() if isinstance(delta, nn.Module) else delta, "the mapping"
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{what}={type(delta).__name__} must be a file, a folder or a mapping of names to tensors.")
    theta = {THETA: json.dumps(tensors[THETA].tolist())} if THETA in tensors else {}
    numbers = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point() and key != THETA}
    own = {PREFIXES.sub("", name): (name, tensor) for name, tensor in numbers.items()}
    if not own:
        raise ValueError(f"{label} holds no floating-point tensors.")
    shapes = {name: tuple(tensor.shape) for name, (_, tensor) in own.items()}
    return Weights(label, shapes, {name: (tensors.__getitem__, key) for name, (key, _) in own.items()}, theta)


def open_weights(path: str | os.PathLike[str], variant: str | None = None) -> Weights:
    """The weights at a path: a file, the index of shards, or a folder of either, as diffusers saves models.

    A folder may be the model's own or a pipeline's, whose UNet is then meant; of several variants `variant` chooses
    one.

    Raises:
        ValueError: nothing there, several variants and none named, a file that is broken or no safetensors file, or a
            checkpoint in original names.
    """
    paths, label = weight_files(path, variant), str(Path(path).expanduser())
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[Callable[[str], Tensor], str]] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            file = _File(path)
            for key in file.handle.keys():
                part, name = file.handle.get_slice(key), PREFIXES.sub("", key)
                if key == THETA:
                    metadata[THETA] = json.dumps(file.tensor(key).tolist())
                elif "F" in part.get_dtype():
                    shapes[name], places[name] = tuple(part.get_shape()), (file.tensor, key)
            metadata |= file.handle.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error}); download or extract it again."
            ) from error
    if not shapes:
        raise ValueError(f"{label} holds no floating-point tensors; pass a file of weights.")
    if any(name.startswith("input_blocks.") for name in shapes):
        raise ValueError(
            f"{label} has the original names of a single file; load it with UNet2DConditionModel.from_single_file, "
            "save that with save_pretrained, and pass the folder."
        )
    return Weights(label, shapes, places, metadata, stamp_of(paths))


def stamp_of(paths: Sequence[str | Path]) -> Stamp:
    """The stamp of files as they are now; they are not opened."""
    states = [(os.path.realpath(path), os.stat(path)) for path in paths]
    return tuple((path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states)


def weight_files(path: str | os.PathLike[str], variant: str | None = None) -> list[Path]:
    """The files of the weights at a path, which `open_weights` describes; none is opened but an index of shards.

    Raises:
        ValueError: nothing there, or several variants and none named.
    """
    path = Path(path).expanduser()
    found = find_weights(path, variant) if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"{path} does not exist; pass the path of a .safetensors file.")
    if found.suffix != ".json":
        return [found]
    names = shard_names(found)
    missing = [name for name in names if not (found.parent / name).is_file()]
    if missing or not names:
        raise ValueError(f"{found} names shards that are not there ({listed(missing)}); download them too.")
    return [found.parent / name for name in names]


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The file of a folder's weights, or the index of their shards; a pipeline's UNet where the folder has none.

    A single variant need not be named.
    """
    for place in (folder, folder / "unet"):
        names = sorted(file.name for file in place.glob(f"{_STEM}*") if not _SHARD.search(file.name))
        names.sort(key=lambda name: name.endswith(".json"))  # an index replaces a file, as in diffusers
        variants = {own: place / name for name, own in variants_of(names).items()}
        if variant in variants or (variant is None and len(variants) == 1):
            return variants.get(variant) or next(iter(variants.values()))
        if variants:
            held = ", ".join("the one without a name" if own is None else repr(own) for own in variants)
            asked = "no variant was named" if variant is None else f"not {variant!r}"
            raise ValueError(
                f"{place} holds the variants {held} and {asked}; name one as the variant, or pass its file, for "
                f"example {next(iter(variants.values()))}."
            )
    raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; it is a directory: pass a UNet's, or a file.")


def variants_of(names: Iterable[str]) -> dict[str, str | None]:
    """The variants (None for none) of those names that are of a model's safetensors files, shards or indices."""
    found = {name: _WEIGHTS.fullmatch(_SHARD.sub("", name)) for name in names}
    return {name: match[1] or match[2] for name, match in found.items() if match}


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names; ValueError for one outside the index's folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is not an index of shards: it needs a weight_map; download it again.")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if leads_out(name)]:
        raise ValueError(f"{index} names files outside its folder ({listed(outside)}); do not use these weights.")
    return names


def leads_out(path: str) -> bool:
    """Whether a path is absolute or goes up from the folder that it is relative to, on any operating system."""
    parsed = PureWindowsPath(path)  # which takes both / and \ for separators
    return bool(parsed.anchor) or ".." in parsed.parts


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; ValueError for a file that cannot be read or holds anything else."""
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); download or write it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}; download or write it again.")
    return values


def loaded_weights(model: Any) -> Weights | None:
    """The safetensors files on this machine that a model was loaded from, if they are known; not that it is unchanged.

    They are found by the load id that modular pipelines set, else by the model's configuration.
    """
    load_id = getattr(model, "_diffusers_load_id", "null")
    place: Mapping[str, Any] = {} if load_id == "null" else ComponentSpec.decode_load_id(load_id)
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    source = place.get("pretrained_model_name_or_path") if place else named
    try:
        path = Path(source or "")
        if source and not path.exists():
            path = Path(snapshot_download(source, revision=place.get("revision"), local_files_only=True))
        return open_weights(path / (place.get("subfolder") or ""), place.get("variant")) if source else None
    except (ValueError, OSError):
        return None


def read_recipe(delta: Delta) -> DeltaRecipe:
    """The sampling settings that a delta names, else None; ValueError for files or settings that cannot be used."""
    weights = opened(delta)
    try:
        return DeltaRecipe.from_metadata(weights.metadata)
    except ValueError as error:
        raise ValueError(f"{weights.label} names unusable settings: {error}") from error


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's or those of a similar adapter (LoHa, LoKr)."""
    return any(re.search(r"lora|\.alpha$|hada_|lokr_", name, re.IGNORECASE) for name in names)


def require_no_lora(weights: Weights) -> None:
    """Raises ValueError for a LoRA, which is easily taken for a delta."""
    if is_lora(weights.shapes):
        raise ValueError(f"{weights.label} is a LoRA and not a delta of full weights; load it with load_lora_weights.")


def identity_of(weights: Weights) -> str:
    """64 hexadecimal digits that tell deltas apart: SHA-256 of names, shapes, types and a sample of the values.

    The same values in another file or mapping have the same identity. It protects from mistakes, not from forgery.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.shapes):
        flat = weights.tensor(name).reshape(-1)
        sample = flat.cpu() if len(flat) <= 2 * SAMPLE else torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).cpu()
        digest.update(f"{name} {list(weights.shapes[name])} {sample.dtype}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def holds_differences(weights: Weights) -> bool | None:
    """Whether these are differences of weights, not whole ones; None where no normalization layer tells.

    The scales of normalization layers are near 0 in differences, and about 1 in models.
    """
    names = [name for name in weights.shapes if "norm" in name and name.endswith(".weight")]
    return sum(float(weights.tensor(name).double().mean()) for name in names) < 0.1 * len(names) if names else None


def require_differences(weights: Weights) -> None:
    """Raises ValueError for a model's whole weights."""
    if holds_differences(weights) is False:
        raise ValueError(
            f"{weights.label} holds a model's whole weights, not their difference from a base; pass a delta, as "
            "extract_delta, open_difference or perflow extract makes."
        )


def row_chunks(shape: Sequence[int], multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows, the first dimension, of about `multiple * CHUNK` values; without dimensions there is one row."""
    rows = shape[0] if shape else 1
    step = multiple * max(1, CHUNK // max(1, torch.Size(shape[1:]).numel()))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A view of some rows; a tensor without dimensions is one row."""
    return tensor[start:stop] if tensor.dim() else tensor.view(1)


def describe_mismatch(
    given_shapes: Shapes, own_shapes: Shapes, *, given: str, expected: str, partial: bool = False
) -> str:
    """How `given` differs from `expected` in keys and shapes, "" if it does not; `partial` may leave keys out."""
    pairs = {name: (list(shape), list(own_shapes.get(name, shape))) for name, shape in given_shapes.items()}
    kinds = {
        f"missing from {given}": [] if partial else [name for name in own_shapes if name not in given_shapes],
        f"unexpected, not in {expected}": [name for name in given_shapes if name not in own_shapes],
        "of another shape": [f"{name} is {a} instead of {b}" for name, (a, b) in pairs.items() if a != b],
    }
    return "; ".join(f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; waits for the device."""
    # aminmax passes NaN on, and takes a tenth of isfinite's time.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
