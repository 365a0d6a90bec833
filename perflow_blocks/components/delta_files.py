"""Delta files: dW as safetensors under the model's state-dict keys, with the sampling recipe in the metadata.

A file is streamed into the model tensor by tensor, so merging needs one more tensor of memory, never a second model.
It is checked wholly before the first weight changes, and a record on the model says what is merged.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.delta import LATENT_CHANNELS, add_scaled_, is_finite, listed
from .delta_fit import PARTIAL_KEY, fit_delta
from .delta_recipe import DeltaRecipe
from .files import atomic_path

logger = logging.get_logger(__name__)

RECORD_ATTRIBUTE = "_perflow_merge_record"


@dataclass(frozen=True)
class MergeRecord:
    """What is merged into a model.

    Attributes:
        source: absolute path of the delta file.
        sha256: of its bytes, hexadecimal; this, not the path, identifies the delta.
        scale: the factor dW is in the weights with.
        recipe: the sampling settings the file names.
        complete: False while weights are being changed, so that an interrupted merge is found out.
        stamp: size and modification time of the file, which spare reading it again when nothing changed.
    """

    source: str
    sha256: str
    scale: float
    recipe: DeltaRecipe
    complete: bool = True
    stamp: tuple[int, int] = (0, 0)


def merge_record(module: nn.Module) -> MergeRecord | None:
    """What `merge_delta_file` put into the module; None when nothing."""
    return vars(_uncompiled(module)).get(RECORD_ATTRIBUTE)


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, whose weights and keys are the model's own; else the module."""
    return getattr(module, "_orig_mod", module)


def save_delta(
    delta: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    recipe: DeltaRecipe | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    partial: bool = False,
) -> None:
    """Writes a delta file; it appears complete or not at all.

    `partial` says that weights the delta does not name are meant to stay as they are; otherwise a merge takes their
    absence for an error.

    Raises:
        ValueError: nothing to save, values that are not finite (in `dtype`), or a path that cannot be written.
    """
    if not delta:
        raise ValueError("the delta holds no tensors; pass what extract_delta returned.")
    tensors = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in delta.items()}
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise ValueError(
            f"{len(bad)} delta tensors are not finite as {dtype} ({listed(bad)}); "
            "check the student, or pass dtype=torch.float32."
        )
    metadata = {"format": "pt", **(recipe or DeltaRecipe()).to_metadata()}
    if partial:
        metadata[PARTIAL_KEY] = "true"
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot write {path}: {error}; check the disk's free space and permissions.") from error


def read_delta_recipe(path: str | os.PathLike[str]) -> DeltaRecipe:
    """The sampling settings a delta file names; fields it does not name are None.

    Raises:
        ValueError: the file cannot be read, or its settings make no sense.
    """
    with _open_delta(path) as file:
        return _recipe(file, path)


def verify_delta(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Checks that a delta file can be merged into the module: keys, shapes and every value. Changes nothing.

    The delta of a UNet with 4 input channels fits one with more, as for inpainting.

    Raises:
        ValueError: one line that says what does not fit, naming up to five tensors of each kind.
    """
    with _open_delta(path) as file:
        _recipe(file, path)
        fit_delta(file, path, _uncompiled(module), change=1.0)


def merge_delta_file(module: nn.Module, path: str | os.PathLike[str], scale: float = 1.0) -> MergeRecord:
    """Adds `scale * dW` to the module's weights in place, in float32 and rounded once to each weight's type.

    Calling again with the same file and scale does nothing; with another scale it adds the difference (one more
    rounding in half precision), so that scale 0 takes it out and another file may follow. A merge that is refused
    leaves the module as it was.

    The delta of a UNet with 4 input channels goes into the first 4 of one with more (inpainting UNets have 9) and
    leaves the others alone, bit for bit; a warning says so, as quality at few steps suffers.

    Raises:
        ValueError: the file or scale is unusable, does not fit the module, or another file is merged already.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not finite; pass a number, 1.0 for the delta as it was extracted.")
    module = _uncompiled(module)
    done = merge_record(module)
    stamp = _stamp(path)
    source = str(Path(path).resolve())
    if done is not None and not done.complete:
        raise ValueError(
            f"an earlier merge of {done.source} was interrupted and left some weights changed; load the model again."
        )
    if done is not None and (done.source, done.stamp, done.scale) == (source, stamp, scale):
        return done
    digest = _sha256(path)
    if done is not None and done.scale and done.sha256 != digest:
        raise ValueError(
            f"{done.source} is already merged into this {type(module).__name__}, at scale {done.scale:g}; "
            f"load the model again, or merge that file at scale 0, before merging {path}."
        )
    with _open_delta(path) as file:
        record = MergeRecord(source, digest, scale, _recipe(file, path), stamp=stamp)
        change = scale - (done.scale if done else 0.0)
        if change:
            fit = fit_delta(file, path, module, change)
            if fit.extra_input_channels and not (done and done.scale):
                logger.warning(_extra_channels_warning(source, module, fit.extra_input_channels))
            _remember(module, replace(record, complete=False))
            _add(file, fit.weights, change)
        _remember(module, record)
    logger.info(f"merged {source} into {type(module).__name__} at scale {scale:g}.")
    return record


def _remember(module: nn.Module, record: MergeRecord) -> None:
    setattr(module, RECORD_ATTRIBUTE, record)


def _extra_channels_warning(source: str, module: nn.Module, extra: int) -> str:
    return (
        f"{source} is the delta of a UNet with {LATENT_CHANNELS} input channels, and this {type(module).__name__} has "
        f"{LATENT_CHANNELS + extra}: it is added to the first {LATENT_CHANNELS}, the noisy latents, and the other "
        f"{extra} stay as they are. Quality at few steps suffers, since it was distilled without them, not for "
        "inpainting."
    )


def _add(file: Any, weights: Mapping[str, Tensor], change: float) -> None:
    changed: set[int] = set()
    for name, weight in weights.items():
        if id(weight) not in changed:  # tied weights stand under several keys but are one tensor
            add_scaled_(weight, file.get_tensor(name), change)
            changed.add(id(weight))


def _recipe(file: Any, path: str | os.PathLike[str]) -> DeltaRecipe:
    try:
        return DeltaRecipe.from_metadata(file.metadata() or {})
    except ValueError as error:
        raise ValueError(f"{path} names unusable settings: {error}") from error


@contextmanager
def _open_delta(path: str | os.PathLike[str]) -> Iterator[Any]:
    _stamp(path)
    try:
        file = safe_open(os.fspath(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); download or extract it again.") from error
    with file as opened:
        yield opened


def _stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    if not Path(path).is_file():
        kind = "is a directory, not a file" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"delta {path} {kind}; pass the path of a .safetensors file.")
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions.") from error
    return digest.hexdigest()
