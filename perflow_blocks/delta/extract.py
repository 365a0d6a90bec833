"""Delta files: dW as safetensors under the model's state-dict keys, with the sampling recipe in the metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import atomic_path
from .files import DifferenceWeights, Weights
from .fit import PARTIAL_KEY, architecture_of, fit_delta, require_difference, require_finite
from .merge import Delta, opened, read_recipe
from .recipe import ARCHITECTURE_KEY, DeltaRecipe
from .summary import hold_differences
from .tensors import is_finite, listed
from .weight_layouts import named_alike, open_weights


def save_delta(
    delta: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    recipe: DeltaRecipe | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    partial: bool = False,
    base: nn.Module | None = None,
) -> None:
    """Writes a delta file; it appears complete or not at all.

    `partial` says that weights the delta does not name are meant to stay as they are; otherwise a merge takes their
    absence for an error. From `base`, the model the delta was taken from, the file gets the architecture that it fits,
    which is checked when it is merged, also for a partial one.

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
    if base is not None:
        metadata[ARCHITECTURE_KEY] = architecture_of(base)
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
    return read_recipe(open_weights(path))


def verify_delta(delta: Delta, module: nn.Module) -> None:
    """Checks that a delta can be merged into the module: names, shapes and every value. Changes nothing.

    The delta of a UNet with 4 input channels fits one with more, as for inpainting.

    Raises:
        ValueError: one line that says what does not fit, naming up to five tensors of each kind.
    """
    weights = opened(delta)
    read_recipe(weights)
    fit = fit_delta(weights, getattr(module, "_orig_mod", module))
    require_difference(fit.weights, fit.targets)
    require_finite(fit.weights, fit.targets, 1.0)


def open_difference(
    student: str | os.PathLike[str] | Weights,
    base: str | os.PathLike[str] | Weights,
    config: Mapping[str, Any] | None = None,
) -> Weights:
    """The delta `student - base` of two checkpoints, for a student that was published merged.

    It is formed tensor by tensor as it is read; both checkpoints stay memory-mapped. They may be named differently:
    for an original Latent Diffusion one `config` is the configuration of the UNet.

    Raises:
        ValueError: a checkpoint cannot be read or is a delta itself, or the two are no pair.
    """
    first, second = (part if isinstance(part, Weights) else open_weights(part) for part in (student, base))
    first, second = named_alike(first, second, config or {})
    difference = DifferenceWeights(first, second)
    for name, weights in (("student", first), ("base", second)):
        if hold_differences(weights.shapes, weights.tensor):
            raise ValueError(
                f"the {name} {weights.label} holds differences, as a delta does, and no whole weights; pass a model's."
            )
    return difference
