"""Whether a delta file fits a model, found out before a weight changes: keys, shapes, types and every value.

A delta fits a model of its own architecture. One difference is allowed: a UNet that is fed more than noisy latents,
for inpainting say, takes the delta of a UNet that is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..core.delta import (
    INPUT_WEIGHT,
    LATENT_CHANNELS,
    describe_mismatch,
    extra_input_channels,
    floating_entries,
    is_finite,
    listed,
    scaled_sum,
)

BESIDE = (".processor.", ".encoder_hid_proj.", ".to_qkv.", ".to_kv.", ".lora_")
"""Parts of the names of weights that stand beside a model's own: of IP-Adapters, fused projections, LoRA."""

WRAPPED = ".base_layer."
"""What peft puts into the name of a weight that it has wrapped."""

PARTIAL_KEY = "perflow.partial"
"""In a file's metadata, with the value "true": the model may have weights that the file does not name."""


@dataclass(frozen=True)
class DeltaFit:
    """Where a delta goes.

    Attributes:
        weights: by the file's keys, what each of its tensors is added to: the model's weight, or that part of it
            which has the tensor's shape. Writing to them changes the model.
        extra_input_channels: how many input channels of the model the delta leaves alone; 0 or more.
    """

    weights: dict[str, Tensor]
    extra_input_channels: int


def fit_delta(file: Any, path: str | os.PathLike[str], module: nn.Module, change: float) -> DeltaFit:
    """Where `change` times the delta can be added. Reads the file tensor by tensor and changes nothing.

    `file` is the opened safetensors file at `path`.

    Raises:
        ValueError: one line: a key or shape that does not fit, weights that cannot be changed, or values that are not
            finite in the file or would not be in the model.
    """
    weights = _mergeable_weights(module, path, set(file.keys()))
    extra = _require_shapes(file, path, module, weights)
    if extra:
        weights[INPUT_WEIGHT] = weights[INPUT_WEIGHT][:, :LATENT_CHANNELS]  # a view: no copy, and writable in place
    targets = {name: weights[name] for name in file.keys()}
    _require_finite(file, path, targets, change)
    return DeltaFit(targets, extra)


def _mergeable_weights(module: nn.Module, path: str | os.PathLike[str], named: set[str]) -> dict[str, Tensor]:
    attentions = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Attention))
    fused = [name for name, layer in attentions if "Fused" in type(layer.processor).__name__]
    if fused:
        raise ValueError(
            f"cannot merge {path} into fused projections ({listed(fused)}), which are copies of the weights; call "
            "unet.unfuse_qkv_projections(), and merge before fusing projections."
        )
    own = _own_weights(module, named)
    weights = floating_entries(own)
    # Quantized and sharded weights are integers, or tensor subclasses whose arithmetic is their own.
    quantized = [
        name
        for name, tensor in own.items()
        if name in named and (name not in weights or type(tensor) not in (Tensor, nn.Parameter))
    ]
    if quantized:
        raise ValueError(
            f"cannot merge {path} into quantized or sharded weights ({listed(quantized)}); "
            "merge first, then quantize or shard."
        )
    offloaded = [name for name, tensor in weights.items() if name in named and tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"cannot merge {path} into weights that are offloaded (device 'meta': {listed(offloaded)}); "
            "merge before enabling offload."
        )
    return weights


def _own_weights(module: nn.Module, named: set[str]) -> dict[str, Tensor]:
    """The model's weights by the names that they have without adapters, whose own a delta does not speak of."""
    state = module.state_dict(keep_vars=True)
    return {
        name.replace(WRAPPED, "."): tensor
        for name, tensor in state.items()
        if name in named or not any(part in f".{name}" for part in BESIDE)
    }


def _require_shapes(file: Any, path: str | os.PathLike[str], module: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The input channels that the model has more than the file, once nothing else differs."""
    delta_shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    weight_shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    extra = extra_input_channels(delta_shapes, weight_shapes)
    remedy = "Pass a delta that was extracted from the same architecture."
    if extra > 0:
        weight_shapes[INPUT_WEIGHT] = delta_shapes[INPUT_WEIGHT]
    elif extra < 0:
        remedy = (
            f"The delta is of a UNet with {delta_shapes[INPUT_WEIGHT][1]} input channels, as for inpainting, and this "
            f"one has {LATENT_CHANNELS}: pass a delta of a UNet with {LATENT_CHANNELS}, or load the UNet it is for."
        )
    mismatch = describe_mismatch(
        delta_shapes,
        weight_shapes,
        given="the file",
        expected="the model",
        partial=(file.metadata() or {}).get(PARTIAL_KEY) == "true",
    )
    if mismatch:
        raise ValueError(f"{path} does not fit this {type(module).__name__}: {mismatch}. {remedy}")
    return extra


def _require_finite(file: Any, path: str | os.PathLike[str], targets: Mapping[str, Tensor], change: float) -> None:
    not_finite: list[str] = []
    too_large: list[str] = []
    for name, weight in targets.items():
        delta = file.get_tensor(name)
        if not is_finite(scaled_sum(weight, delta, change).to(weight.dtype)):
            (too_large if is_finite(delta) else not_finite).append(name)
    if not_finite:
        raise ValueError(
            f"{path} holds values that are not finite in {len(not_finite)} tensors ({listed(not_finite)}); "
            "download or extract it again."
        )
    if too_large:
        raise ValueError(
            f"with {path} added, {len(too_large)} weights would not be finite in their type ({listed(too_large)}); "
            "lower the scale or load the model in a wider dtype."
        )
