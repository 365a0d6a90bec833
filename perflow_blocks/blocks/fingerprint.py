"""Whether a model is still what it was, told from the objects and numbers on the host: no weight is read."""

from __future__ import annotations

import weakref
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

OFFLOAD_MARKS = frozenset({"_hf_hook", "_diffusers_hook"})
"""What accelerate and diffusers leave on a module whose weights they move between devices as it runs."""

PLAIN = frozenset({bool, int, float, str, torch.dtype, torch.device, type(None)})
COLLECTIONS = (dict, list, tuple, set, frozenset)

BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_forward_pre_hooks", "_forward_hooks"}
"""Attributes of every module that its output does not depend on, or that are looked at by themselves."""


def model_state(model: nn.Module | None) -> tuple[Any, ...]:
    """A value that equals an earlier one of the same model as long as no change can be seen.

    Seen are: other modules or parameters; weights written in place, moved to another device or type, or replaced
    through `.data`; hooks; numbers, texts and lists that modules keep as attributes, among them what peft keeps on a
    LoRA layer (active and merged adapters, their scales, whether they are off) and `training`; the configuration.
    Where the weights are moved as the model runs (offloading), their place is left out.

    Not seen is what is written through `.data` or another view that shares no version counter with the parameter, as
    peft does to merge a LoRA. It marks the layer as merged, but that mark is gone once the layer is.

    Modules are held weakly, and no tensor at all, since `torch.utils.swap_tensors` refuses those that are. Makes no
    device wait.

    Args:
        model: the model, or None for a component that is not there.

    Returns:
        Nested tuples to compare with `==`.
    """
    if model is None:
        return ()
    modules = list(model.modules())
    offloaded = any(not OFFLOAD_MARKS.isdisjoint(vars(module)) for module in modules)
    tensors = (
        tensor
        for module in modules
        for group in (module._parameters, module._buffers)
        for tensor in group.values()
        if tensor is not None
    )
    config = vars(model).get("config")
    return (
        tuple(weakref.ref(module) for module in modules),
        tuple(_settings(module) for module in modules),
        tuple(_tensor_state(tensor, offloaded) for tensor in tensors),
        _plain(vars(config)) if isinstance(config, PretrainedConfig) else None,
    )


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    """The same for a tokenizer of transformers: its added tokens, as textual inversion adds them, and its lengths.

    Args:
        tokenizer: the tokenizer, or None for a component that is not there.
    """
    if tokenizer is None:
        return ()
    return (
        tuple(tokenizer.added_tokens_encoder.items()),
        tuple(tokenizer.special_tokens_map.items()),
        tokenizer.model_max_length,
        tokenizer.padding_side,
        tokenizer.truncation_side,
    )


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The attributes of a module by name; an empty collection, as most are, is as good as none."""
    return tuple(
        (name, value if type(value) in PLAIN else _plain(value))
        for name, value in vars(module).items()
        if name not in BOOKKEEPING and not (isinstance(value, COLLECTIONS) and not value)
    )


def _plain(value: Any) -> Any:
    """What compares by content: of a tensor its state, of what is no number, text or collection the type."""
    if type(value) in PLAIN or isinstance(value, Number):
        return value
    if isinstance(value, Tensor):
        return _tensor_state(value, offloaded=False)
    if isinstance(value, dict):
        return tuple((key, _plain(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_plain, value))
    return type(value)


def _tensor_state(tensor: Tensor, offloaded: bool) -> tuple[Any, ...]:
    if tensor.is_meta:  # where accelerate took the weights away it leaves new empty ones each time
        return (tensor.dtype,)
    version = None if tensor.is_inference() else tensor._version  # those count no changes
    state = (id(tensor), version, tensor.dtype)
    if offloaded:
        return state
    has_address = type(tensor) in (Tensor, nn.Parameter)  # quantised ones may have none
    return (*state, tensor.device, tensor.data_ptr() if has_address else None)
