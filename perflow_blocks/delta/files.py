"""Weights by name, read one tensor at a time: finding and opening files, and translating other programs' names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .recipe import DeltaRecipe

logger = logging.get_logger(__name__)

CHUNK = 1 << 20
"""Values that are worked on at a time: few enough for a processor's cache, enough to keep its cores busy."""

SAMPLE = 32
"""How many values at either end of a tensor identify it."""

_FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}

PREFIXES = ("module.", "_orig_mod.", "unet.", "_fsdp_wrapped_module.")
"""What distributed training, compilation and pipelines put before the names of all weights."""

UNET_PARTS = (
    "conv_in",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)
"""The modules of a `UNet2DConditionModel`, as its weights are named."""

LDM_PREFIX = "model.diffusion_model."
_LDM_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_LORA = re.compile(r"lora|\.alpha$|hada_|lokr_", re.IGNORECASE)

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

Stamp = tuple[tuple[str, int, int], ...]
"""Path, size and time of change (ns) of each file."""


class Weights(ABC):
    """Floating-point tensors by name, one of them in memory at a time. A deep copy is the same object.

    Attributes:
        label: what messages call them, for example a path.
        shapes: of the tensors, by name.
        metadata: text by key, as in a safetensors header.
        sources: the weights that these are derived from.
        place: the file or folder and the variant they were opened by; None for others.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    sources: tuple[Weights, ...] = ()
    place: tuple[str, str | None] | None = None

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor. The caller must not write to it."""

    def sample(self, name: str) -> Tensor:
        """The first and last `SAMPLE` values of a tensor; all values of a small one."""
        flat = self.tensor(name).detach().reshape(-1)
        return flat if len(flat) <= 2 * SAMPLE else torch.cat([flat[:SAMPLE], flat[-SAMPLE:]])

    def require_unchanged(self) -> None:
        """Raises ValueError if a file was written to since it was opened."""
        for source in self.sources:
            source.require_unchanged()

    def stamp(self) -> Stamp | None:
        """Identifies the files behind these weights without reading them; None where there are others than files."""
        stamps = [source.stamp() for source in self.sources]
        return None if not stamps or None in stamps else tuple(entry for stamp in stamps for entry in stamp or ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return self


Delta = str | os.PathLike[str] | Mapping[str, Tensor] | Weights
"""A delta: a file or folder that `open_weights` reads, a mapping as `extract_delta` gives, or what these opened."""


class MappingWeights(Weights):
    """A mapping's own tensors, by reference. A mapping other than a dict is read tensor by tensor."""

    def __init__(self, weights: Mapping[str, Tensor], label: str = "the mapping") -> None:
        self.label = label
        self.metadata: dict[str, str] = {}
        self._tensors = dict(weights) if isinstance(weights, dict) else weights
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items() if t.is_floating_point()}
        if not self.shapes:
            raise ValueError(f"{label} holds no floating-point tensors; pass what extract_delta returned.")

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


class FileWeights(Weights):
    """One safetensors file or the shards of one checkpoint, memory-mapped as long as this object lives.

    The files may be renamed, replaced or deleted meanwhile, but not written to.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        label: str | os.PathLike[str] | None = None,
        variant: str | None = None,
    ) -> None:
        self.label = str(label or paths[0])
        self.place = (os.path.realpath(self.label), variant)
        self._open([str(path) for path in paths])

    def _open(self, paths: Sequence[str]) -> None:
        self._files: dict[str, Any] = {}
        self.shapes, self.metadata = {}, {}
        for path in paths:
            file, shapes, metadata = _map(path)
            twice = [name for name in shapes if name in self.shapes]
            if twice:
                raise ValueError(f"{self.label} holds {listed(twice)} in two shards; download it again.")
            self.shapes |= shapes
            self.metadata |= metadata
            self._files |= dict.fromkeys(shapes, file)
        self._stamp = stamp_of([os.path.realpath(path) for path in paths])
        self._inodes = [_inode(path) for path, _, _ in self._stamp]

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def stamp(self) -> Stamp:
        return self._stamp

    def require_unchanged(self) -> None:
        for (path, *state), inode in zip(self._stamp, self._inodes, strict=True):
            if _inode(path) != inode:
                continue  # replaced or deleted: the mapping keeps the old file's contents
            if stamp_of([path])[0][1:] != tuple(state):
                raise ValueError(f"{self.label} was written to since it was opened; load the model again.")

    def __getstate__(self) -> dict[str, Any]:
        return {"label": self.label, "place": self.place, "stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.label, self.place = state["label"], state["place"]
        self._open([path for path, _, _ in state["stamp"]])
        self._stamp = state["stamp"]  # so that files that changed since are noticed


class RenamedWeights(Weights):
    """Some of the weights under other names, {new: old}."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self.sources, self._names = (weights,), dict(names)
        self.label, self.metadata = weights.label, weights.metadata
        self.shapes = {new: weights.shapes[old] for new, old in names.items()}

    def tensor(self, name: str) -> Tensor:
        return self.sources[0].tensor(self._names[name])

    def sample(self, name: str) -> Tensor:
        return self.sources[0].sample(self._names[name])


class DifferenceWeights(Weights):
    """`student - base` in float32, formed when it is read: a delta from two checkpoints, without a file of its own."""

    def __init__(self, student: Weights, base: Weights) -> None:
        mismatch = describe_mismatch(student.shapes, base.shapes, given="the student", expected="the base")
        if mismatch:
            raise ValueError(
                f"{student.label} and {base.label} do not match: {mismatch}. Pass two models of the same architecture."
            )
        self.sources = (student, base)
        self.label = f"{student.label} minus {base.label}"
        self.shapes, self.metadata = student.shapes, student.metadata

    def tensor(self, name: str) -> Tensor:
        return subtract(*(source.tensor(name) for source in self.sources))

    def sample(self, name: str) -> Tensor:
        return subtract(*(source.sample(name) for source in self.sources))


def stamp_of(paths: Sequence[str]) -> Stamp:
    """The stamp of files as they are now; they are not opened."""
    states = [(path, os.stat(path)) for path in paths]
    return tuple((path, state.st_size, state.st_mtime_ns) for path, state in states)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _map(path: str) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, str]]:
    if not Path(path).is_file():
        kind = "is a directory, not a file" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{path} {kind}; pass the path of a .safetensors file.")
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        metadata = dict(file.metadata() or {})
    except PermissionError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); download or extract it again."
        ) from error
    kinds = {name: part.get_dtype() for name, part in slices.items()}
    wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _FLOATS]
    if wrong and len(wrong) == len(kinds):
        raise ValueError(f"{path} holds no floating-point weights ({listed(wrong)}); pass a file of weights.")
    return file, {name: shape for name, shape in shapes.items() if kinds[name] in _FLOATS}, metadata


# Opening


def open_weights(path: str | os.PathLike[str], variant: str | None = None, *, allow_pickle: bool = False) -> Weights:
    """The weights at a path: a file, the index of shards, or a folder of either, as diffusers saves models.

    A folder may be the model's own or a pipeline's, whose UNet is then meant; of several variants `variant` chooses
    one. Pickles (.bin, .pt, .ckpt) are read only with `allow_pickle`, memory-mapped and without running their code.

    Raises:
        ValueError: nothing there, several variants and none named, a file that is broken, or a pickle.
    """
    path = Path(path).expanduser()
    found = find_weights(path, variant) if path.is_dir() else path
    if found.suffix == ".json":
        return FileWeights(shards_of(found), path, variant)
    if found.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _pickled(found, allow_pickle)
    return FileWeights([found], path, variant)


def opened(delta: Delta, what: str = "delta") -> Weights:
    """The weights of a delta in any form; messages call it `what`. A mapping's tensors are not copied."""
    if isinstance(delta, Weights):
        return delta
    if not isinstance(delta, (str, os.PathLike, Mapping)):
        raise ValueError(f"{what}={type(delta).__name__} must be a file, a folder or a mapping of names to tensors.")
    return MappingWeights(delta) if isinstance(delta, Mapping) else open_weights(delta)


def loaded_weights(model: Any) -> Weights | None:
    """The safetensors files on this machine that a model was loaded from; None where they are not known.

    Part of a modular pipeline: by its load id. Another diffusers model: by the folder or repository in its
    configuration. Whether the weights are still those of the files is not checked, nor whether a repository's branch
    has moved.
    """
    load_id = getattr(model, "_diffusers_load_id", "null")
    config: Mapping[str, Any] = getattr(model, "config", {})
    place: dict[str, Any] = {"revision": None, "subfolder": None, "variant": None}
    if load_id != "null":
        place |= ComponentSpec.decode_load_id(load_id)
    else:
        name = config.get("_name_or_path") if isinstance(config, Mapping) else None
        if not name:
            return None
        place["pretrained_model_name_or_path"] = name
    source = str(place["pretrained_model_name_or_path"])
    try:
        path = Path(source)
        if not path.exists():
            path = Path(snapshot_download(source, revision=place["revision"], local_files_only=True))
        return open_weights(path if path.is_file() else path / (place["subfolder"] or ""), place["variant"])
    except (ValueError, OSError):
        return None


def read_recipe(weights: Weights) -> DeltaRecipe:
    """The sampling settings in a delta's metadata."""
    try:
        return DeltaRecipe.from_metadata(weights.metadata)
    except ValueError as error:
        raise ValueError(f"{weights.label} names unusable settings: {error}") from error


def _pickled(path: Path, allow_pickle: bool) -> Weights:
    if not allow_pickle:
        raise ValueError(f"{path} is a pickle, which can hold code; convert it, or pass allow_pickle=True.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(f"cannot read {path} as weights ({error}); download it again.") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return MappingWeights(tensors, label=str(path))


# Finding variants and shards


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The file of a folder's weights, or the index of their shards; a pipeline's UNet where the folder has none.

    A variant that is the only one need not be named.
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
                safe[found["variant"] or found["indexed"]] = file  # the index before the file, as in diffusers
        if variant in safe:
            return safe[variant]
        if variant is None and len(safe) == 1:
            ((name, file),) = safe.items()
            logger.info(f"the only weights in {place} are the variant {name!r}, which is read.")
            return file
        if safe:
            names = ", ".join("the one without a name" if name is None else repr(name) for name in safe)
            asked = "no variant was named" if variant is None else f"not {variant!r}"
            example = next(iter(safe.values()))
            raise ValueError(
                f"{place} holds the variants {names} and {asked}; name one as the variant, or pass its file, for "
                f"example {example}."
            )
        if pickles:
            raise ValueError(f"{place} holds pickles only ({listed(pickles)}); pass the file.")
    raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; it is a directory: pass a UNet's, or a file.")


def variant_of(name: str | os.PathLike[str]) -> str | None:
    """The variant in the name of a file of weights, of a shard, or of an index; None for those without one."""
    found = _WEIGHTS.fullmatch(Path(name).name)
    if found is None:
        raise ValueError(f"{name} is not named as a model's weights are, for example {SAFETENSORS_WEIGHTS_NAME}.")
    return found["variant"] or found["indexed"]


def is_weights_of(name: str, variant: str | None) -> bool:
    """Whether a file of this name holds safetensors weights of the variant, or a part or the index of such."""
    found = _WEIGHTS.fullmatch(name)
    return found is not None and found["kind"] == "safetensors" and variant_of(name) == variant


def shards_of(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error}); download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ValueError(f"{index} names shards that are not there ({listed(missing)}); download them too.")
    return [index.parent / name for name in names]


# Names of other programs


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's, or of one of its relatives."""
    return any(_LORA.search(name) for name in names)


def named_as_model(weights: Weights, model_names: Iterable[str], config: Mapping[str, Any]) -> Weights:
    """The weights under the names of a diffusers UNet, with that UNet's configuration.

    Prefixes of wrappers are taken away, and original Latent Diffusion names, as single-file checkpoints have, are
    translated by diffusers' own converter; what else such a checkpoint holds (text encoders, VAE) is left out. Other
    names stay, for the caller to refuse.
    """
    names, known, label = list(weights.shapes), set(model_names), weights.label
    if not known.isdisjoint(names):
        return weights
    lora = [name for name in names if _LORA.search(name)]
    if lora:
        raise ValueError(
            f"{label} is a LoRA ({listed(lora, limit=2)}), not a delta of full weights; load it with "
            "load_lora_weights."
        )
    short = {_without_prefixes(name): name for name in names}
    if not known.isdisjoint(short):
        return RenamedWeights(weights, short)
    unet = {
        name if name.startswith(LDM_PREFIX) else LDM_PREFIX + name: original
        for name, original in short.items()
        if name.startswith((LDM_PREFIX, *_LDM_UNET))
    }
    return RenamedWeights(weights, _from_latent_diffusion(unet, config, label)) if unet else weights


def named_alike(one: Weights, other: Weights, config: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """Two UNets' weights under the same names, diffusers' where they differ; `config` as in `named_as_model`."""
    if one.shapes.keys() == other.shapes.keys():
        return one, other
    known = unet_names((*one.shapes, *other.shapes))
    return named_as_model(one, known, config), named_as_model(other, known, config)


def _from_latent_diffusion(unet: dict[str, str], config: Mapping[str, Any], label: str) -> dict[str, str]:
    if "block_out_channels" not in config or "layers_per_block" not in config:
        raise ValueError(
            f"{label} has original Latent Diffusion names, which only the UNet's configuration can translate; pass "
            "config= with the UNet's configuration (on the command line --config with its folder)."
        )
    # The converter counts the blocks, which a partial delta may leave out: give it a name in every block.
    count = len(config["block_out_channels"]) * (config["layers_per_block"] + 1)
    numbers = {"input_blocks": count, "middle_block": 3, "output_blocks": count}
    every = {f"{LDM_PREFIX}{kind}.{i}.9.none": "" for kind, number in numbers.items() for i in range(number)}
    remedy = "pass a delta that was extracted from the same architecture."
    try:
        # The converter moves values from name to name: given the old names for values it returns the translation.
        translated = convert_ldm_unet_checkpoint({**every, **unet}, dict(config))
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{label} has Latent Diffusion names that are not this UNet's ({error} is missing); {remedy}"
        ) from error
    originals = set(unet.values())
    lost = sorted(originals - set(translated.values()))
    if lost:
        raise ValueError(
            f"{label}: {len(lost)} Latent Diffusion names have no place in this UNet ({listed(lost)}); {remedy}"
        )
    return {new: old for new, old in translated.items() if old in originals}


def unet_names(names: Iterable[str]) -> set[str]:
    """Those names that a diffusers UNet may have, without prefixes."""
    return {short for name in names if (short := _without_prefixes(name)).split(".")[0] in UNET_PARTS}


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


# Tensors by name


def identity_of(weights: Weights) -> str:
    """64 hexadecimal digits that tell deltas apart: SHA-256 of names, shapes, types and a sample of the values.

    The same values in another file or mapping have the same identity. It protects from mistakes, not from forgery.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.shapes):
        sample = weights.sample(name).cpu()
        digest.update(f"{name} {list(weights.shapes[name])} {sample.dtype}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def row_chunks(shape: Sequence[int], multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows, the first dimension, of about `multiple * CHUNK` values; without dimensions there is one row."""
    if 0 in shape:
        return []
    if not shape:
        return [(0, 1)]
    step = multiple * max(1, CHUNK // torch.Size(shape[1:]).numel())
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A view of some rows; a tensor without dimensions is one row."""
    return tensor[start:stop] if tensor.dim() else tensor.view(1)


def subtract(student: Tensor, base: Tensor) -> Tensor:
    """`student - base` in float32, a new tensor of their common shape on the student's device.

    Half precision would round the small difference to the spacing of the large weights.
    """
    return student.detach().float() - base.detach().to(student.device).float()


def floating_entries(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point parameters and buffers by state-dict key. Nothing is copied."""
    state = weights.state_dict(keep_vars=True) if isinstance(weights, nn.Module) else weights
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def describe_mismatch(
    given_shapes: Mapping[str, tuple[int, ...]],
    expected_shapes: Mapping[str, tuple[int, ...]],
    *,
    given: str,
    expected: str,
    partial: bool = False,
) -> str:
    """In which keys and shapes `given` differs from `expected`, as one line; empty where it does not.

    With `partial` given may leave keys out.
    """
    missing = [] if partial else [name for name in expected_shapes if name not in given_shapes]
    unexpected = [name for name in given_shapes if name not in expected_shapes]
    misshapen = [
        f"{name} is {list(shape)} instead of {list(expected_shapes[name])}"
        for name, shape in given_shapes.items()
        if name in expected_shapes and shape != expected_shapes[name]
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing from {given} ({listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected, not in {expected} ({listed(unexpected)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({listed(misshapen, separator='; ')})")
    return "; ".join(parts)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; waits for the device."""
    if not tensor.numel():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.half()  # torch cannot tell of 8-bit floats
    low, high = torch.aminmax(wide.detach())  # passes NaN on; a tenth of isfinite's time
    return bool(torch.isfinite(low) & torch.isfinite(high))


def listed(names: Sequence[str], *, limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    rest = len(names) - limit
    return separator.join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
