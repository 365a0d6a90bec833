"""Whether a delta fits a model, found out before a weight changes: names, shapes, types and, if asked, every value.

A delta fits a model of its own architecture. One difference is allowed: a UNet that is fed more than noisy latents,
for inpainting say, takes the delta of a UNet that is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .files import RenamedWeights, Weights, row_chunks, rows_of
from .recipe import ARCHITECTURE_KEY
from .reversible import REVERSIBLE_TYPES, add, sum_of_terms
from .tensors import (
    INPUT_WEIGHT,
    LATENT_CHANNELS,
    describe_mismatch,
    extra_input_channels,
    floating_entries,
    is_finite,
    listed,
)
from .weight_layouts import named_as_model

BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."
"""What peft puts into the name of a weight that it has wrapped."""

SAMPLES, WHOLE_WEIGHTS = 8, 0.9
"""How many tensors are compared with the model's, and the cosine above which all of them are weights themselves.
Fine-tunes of one base are above 0.99 of each other, differences near 0."""

PARTIAL_KEY = "perflow.partial"
"""In a file's metadata, with the value "true": the model may have weights that the file does not name."""


@dataclass(frozen=True)
class DeltaFit:
    """Where a delta goes.

    Attributes:
        weights: the delta under the model's names.
        targets: by those names, what each tensor is added to: the model's weight, or that part of it which has the
            tensor's shape. Writing to them changes the model. Tied weights are there once.
        extra_input_channels: how many input channels of the model the delta leaves alone; 0 or more.
    """

    weights: Weights
    targets: dict[str, Tensor]
    extra_input_channels: int


def fit_delta(weights: Weights, module: nn.Module) -> DeltaFit:
    """Where the delta can be added. Looks at names, shapes and types, not at values.

    Raises:
        ValueError: one line: a name or shape that does not fit, another architecture, or a model whose weights cannot
            be changed.
    """
    own = own_weights(module)
    weights = named_as_model(weights, own, getattr(module, "config", {}))
    targets = _mergeable_weights(module, weights.label, set(weights.shapes))
    extra = _require_shapes(weights, module, targets)
    if extra:
        targets[INPUT_WEIGHT] = targets[INPUT_WEIGHT][:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
    seen: set[int] = set()
    once = {}
    for name in weights.shapes:
        if id(targets[name]) not in seen:  # tied weights stand under several names but are one tensor
            seen.add(id(targets[name]))
            once[name] = targets[name]
    return DeltaFit(weights, once, extra)


def fit_base(weights: Weights, module: nn.Module) -> Weights:
    """Those of the weights that a model may have been loaded from, under the model's names: of equal shapes.

    Raises:
        ValueError: one line: there are none, or they are in the model's own memory, which a merge changes.
    """
    own = own_weights(module)
    weights = named_as_model(weights, own, getattr(module, "config", {}))
    fitting = {name: name for name, tensor in own.items() if weights.shapes.get(name) == tuple(tensor.shape)}
    if not fitting:
        raise ValueError(f"base={weights.label} holds no weight of this {type(module).__name__}; leave base out.")
    places = {name: weights.tensor(name).untyped_storage().data_ptr() for name in fitting if own[name].numel()}
    shared = [name for name, place in places.items() if place == own[name].untyped_storage().data_ptr()]
    if shared:
        raise ValueError(
            f"base={weights.label} shares its memory with the model ({listed(shared)}), which merging changes; pass "
            "the files, or copies of the weights."
        )
    return RenamedWeights(weights, fitting)


def require_architecture(weights: Weights, module: nn.Module) -> Weights:
    """The delta under the model's names, once those and the shapes fit; the model may be without values, on "meta".

    Raises:
        ValueError: one line: a name or shape that does not fit, or another architecture.
    """
    weights = named_as_model(weights, own_weights(module), getattr(module, "config", {}))
    _require_shapes(weights, module, floating_entries(own_weights(module, set(weights.shapes))))
    return weights


def architecture_of(module: nn.Module) -> str:
    """Identifies the names and shapes of a model's weights, whatever number of channels it is fed: 64 hex digits."""
    shapes = sorted((n, list(t.shape)) for n, t in floating_entries(own_weights(module)).items() if n != INPUT_WEIGHT)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _mergeable_weights(module: nn.Module, label: str, named: set[str]) -> dict[str, Tensor]:
    attentions = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention))
    fused = [name for name, layer in attentions if "Fused" in type(layer.processor).__name__]
    if fused:
        raise ValueError(
            f"cannot merge {label} into fused projections ({listed(fused)}), which are copies of the weights; call "
            "unet.unfuse_qkv_projections(), and merge before fusing projections."
        )
    own = own_weights(module, named)
    weights = floating_entries(own)
    # Quantized and sharded weights are integers, or tensor subclasses whose arithmetic is their own.
    quantized = [
        name
        for name, tensor in own.items()
        if name in named
        and (name not in weights or type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in REVERSIBLE_TYPES)
    ]
    if quantized:
        raise ValueError(
            f"cannot merge {label} into quantized or sharded weights ({listed(quantized)}); "
            "merge first, then quantize or shard."
        )
    offloaded = [name for name, tensor in weights.items() if name in named and tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"cannot merge {label} into weights that are offloaded (device 'meta': {listed(offloaded)}); "
            "merge before enabling offload."
        )
    return weights


def own_weights(module: nn.Module, named: Container[str] = ()) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, whose own a delta does not speak of.

    What is `named` counts as the model's own, whatever it is called.
    """
    state = module.state_dict(keep_vars=True)
    return {
        name.replace(WRAPPED, "."): tensor
        for name, tensor in state.items()
        if name in named or not any(part in f".{name}" for part in BESIDE)
    }


def _require_shapes(delta: Weights, module: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The input channels that the model has more than the delta, once nothing else differs."""
    weight_shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    extra = extra_input_channels(delta.shapes, weight_shapes)
    remedy = "Pass a delta that was extracted from the same architecture."
    if extra > 0:
        weight_shapes[INPUT_WEIGHT] = delta.shapes[INPUT_WEIGHT]
    elif extra < 0:
        remedy = (
            f"The delta is of a UNet with {delta.shapes[INPUT_WEIGHT][1]} input channels, as for inpainting, and this "
            f"one has {LATENT_CHANNELS}: pass a delta of a UNet with {LATENT_CHANNELS}, or load the UNet it is for."
        )
    mismatch = describe_mismatch(
        delta.shapes,
        weight_shapes,
        given="the file",
        expected="the model",
        partial=delta.metadata.get(PARTIAL_KEY) == "true",
    )
    if not mismatch and delta.metadata.get(ARCHITECTURE_KEY) not in (None, architecture_of(module)):
        mismatch = "the names it does hold fit, but the model it was extracted from had others"
    if mismatch:
        raise ValueError(f"{delta.label} does not fit this {type(module).__name__}: {mismatch}. {remedy}")
    return extra


def require_difference(delta: Weights, targets: Mapping[str, Tensor]) -> None:
    """Raises for whole weights, as of a merged model: a few large tensors of theirs all resemble the model's own."""
    matrices = [name for name, shape in delta.shapes.items() if name in targets and len(shape) > 1 and shape[0] > 1]
    looked_at = matrices[:: max(1, len(matrices) // SAMPLES)]
    if not looked_at:
        return
    for name in looked_at:
        rows = min(8, delta.shapes[name][0])
        own, given = (rows_of(t, 0, rows).detach().reshape(-1) for t in (targets[name], delta.tensor(name)))
        similarity = torch.cosine_similarity(own.double().cpu(), given.double().cpu(), dim=0)
        if not similarity > WHOLE_WEIGHTS:
            return
    raise ValueError(
        f"{delta.label} holds whole weights, not their difference from a base (they point the way of this model's); "
        "pass open_difference(it, base)."
    )


def require_finite(delta: Weights, targets: Mapping[str, Tensor], scale: float) -> None:
    """Raises the ValueError that names all tensors which are not finite, or would not be with `scale` times added."""
    not_finite: list[str] = []
    too_large: list[str] = []
    for name, weight in targets.items():
        tensor = delta.tensor(name)
        for start, stop in row_chunks(delta.shapes[name]):
            rows, own = rows_of(tensor, start, stop), rows_of(weight.detach(), start, stop)
            change = sum_of_terms([(rows, scale)], own)
            if not is_finite(rows.float()):
                not_finite.append(name)
                break
            if not is_finite(add(own, change)):
                too_large.append(name)
                break
    if not_finite:
        raise ValueError(
            f"{delta.label} holds values that are not finite in {len(not_finite)} tensors ({listed(not_finite)}); "
            "download or extract it again."
        )
    if too_large:
        raise ValueError(
            f"with {delta.label} added, {len(too_large)} weights would not be finite in their type "
            f"({listed(too_large)}); lower the scale or load the model in a wider dtype."
        )
