"""What a training's update takes at any size, found by running it on tensors without data.

The trainer's own student runs forward and backward on PyTorch's fake tensors: they have shapes, types and storages,
every operator runs, and nothing is allocated. What is live is added up storage by storage.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from perflow_blocks.training.config import ModelConfig, OptimizerConfig
from perflow_blocks.training.student import build_student
from perflow_blocks.training.teacher import SDXL as SDXL_FAMILY
from perflow_blocks.training.teacher import TeacherSource

from .models import MAX_TOKENS, Size, build_components, build_unet

NORMS = (functional.group_norm, functional.layer_norm)


class Ledger(TorchDispatchMode):
    """Adds up operations, and the storages that operators make, each once, until they are released.

    Torch's own counter of operations is not run, only its formulas: its hooks keep what checkpointing releases.

    Args:
        given: tensors that live already and do not count.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.flop = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flop += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            size = storage.nbytes()
            self._seen.add(storage._cdata)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, storage._cdata, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class CudaRules(TorchFunctionMode):
    """What CUDA does otherwise than the CPU whose tensors stand in for its own, as far as SDXL's UNet meets it.

    Autocast computes norms in float32 there (docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to
    float32"), and attention is a fused kernel, which keeps queries, keys, values, the result and a logarithm a row.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func in NORMS and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    assert attn_mask is None, "the fused kernel that is reckoned with takes no mask"
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False)[0]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes and operations of a forward and backward pass.

    Attributes:
        weights: bytes of all weights.
        trained: bytes of the trainable ones, which are float32; as many as their gradients'.
        optimizer: bytes of the optimizer's state, by its name.
        kept: bytes of what the forward pass leaves for the backward pass.
        peak: the most that lives at once beside the weights, gradients included.
        flop: operations of products, convolutions and attention; what is computed again counts again.
    """

    weights: int
    trained: int
    optimizer: Mapping[str, int]
    kept: int
    peak: int
    flop: int


@dataclass(frozen=True)
class _Weightless(TeacherSource):
    """A teacher of SDXL's family whose weights have shapes only."""

    size: Size

    def load_unet(self, dtype: torch.dtype = torch.float32) -> Any:
        return build_unet(self.size, "meta", dtype)


def student_footprint(size: Size, kind: Literal["full", "lora"], checkpointing: bool, rank: int) -> Footprint:
    """The trainer's student in bfloat16 autocast with one row, forward and back, as on CUDA."""
    model = ModelConfig(teacher="none", student=kind, lora_rank=rank)
    source = _Weightless("none", "none", model, SDXL_FAMILY, {}, {}, {}, size=size)
    optimizer = OptimizerConfig(gradient_checkpointing=checkpointing)
    student = build_student(source, model, optimizer, torch.bfloat16)
    if checkpointing:
        checkpoint_by_cuda_rules(student)
    with FakeTensorMode():
        without_data(student)
        return footprint(student, unet_inputs(size, rows=1), torch.bfloat16)


def footprint(unet: Any, inputs: Mapping[str, Any], autocast: torch.dtype | None) -> Footprint:
    """Of a UNet without data and a squared error, by CUDA's rules; where fake tensors are made.

    Args:
        unet: whose trainable weights are float32.
        inputs: of its call.
        autocast: its type, None for no autocast.
    """
    weights = list(unet.parameters())
    with Ledger(*weights) as ledger:
        with CudaRules(), torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = unet(**inputs)[0]
        loss = output.float().square().mean()
        del output
        kept = ledger.live
        torch.autograd.backward(loss)
    trained = [weight for weight in weights if weight.requires_grad]
    return Footprint(
        weights=_bytes(weights),
        trained=_bytes(trained),
        optimizer={"adamw": _adamw_bytes(trained), "adamw8bit": _adamw8bit_bytes(trained)},
        kept=kept,
        peak=ledger.peak,
        flop=ledger.flop,
    )


def call_footprint(model: nn.Module, call: Callable[[], Any]) -> Footprint:
    """Of a call without gradients; where fake tensors are made."""
    weights = list(model.parameters())
    with torch.no_grad(), Ledger(*weights) as ledger, CudaRules():
        call()
    return Footprint(weights=_bytes(weights), trained=0, optimizer={}, kept=0, peak=ledger.peak, flop=ledger.flop)


def teacher_footprint(size: Size, rows: int) -> Footprint:
    """A call of the teacher's UNet in bfloat16."""
    unet = build_unet(size, "meta", torch.bfloat16)
    with FakeTensorMode():
        without_data(unet)
        inputs = unet_inputs(size, rows, torch.bfloat16)
        return call_footprint(unet, lambda: unet(**inputs))


def encoder_footprints(size: Size) -> tuple[Footprint, int]:
    """Encoding an image by the VAE in float32, as SDXL's wants it; and bytes of the text encoders in bfloat16."""
    parts = build_components(size, "meta", torch.bfloat16)
    text = sum(_bytes(parts[name].parameters()) for name in ("text_encoder", "text_encoder_2"))
    vae = parts["vae"].float()
    with FakeTensorMode():
        without_data(vae)
        pixels = torch.empty(1, 3, size.pixels, size.pixels)
        return call_footprint(vae, lambda: vae.encode(pixels)), text


def unet_inputs(size: Size, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "sample": torch.randn(rows, 4, size.latents, size.latents, dtype=dtype),
        "timestep": torch.full((rows,), 500.0),
        "encoder_hidden_states": torch.randn(rows, MAX_TOKENS, sum(size.text), dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, size.text[1], dtype=dtype),
            "time_ids": torch.ones(rows, 6, dtype=dtype),
        },
        "return_dict": False,
    }


def without_data(model: nn.Module) -> None:
    """Puts fake weights in the place of those on "meta"; to be called where fake tensors are made."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=weight.requires_grad))


def checkpoint_by_cuda_rules(unet: Any) -> None:
    """Checkpoints as diffusers does, but by CUDA's rules, which would not hold where blocks are computed again."""

    def ruled(module: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with CudaRules():
                return module(*args)

        return call

    unet.enable_gradient_checkpointing(lambda module, *args: checkpoint(ruled(module), *args, use_reentrant=False))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _adamw_bytes(weights: Iterable[Tensor]) -> int:
    """Two float32 averages a weight; torch leaves the counters on the host."""
    return sum(8 * weight.numel() for weight in weights)


def _adamw8bit_bytes(weights: Iterable[Tensor]) -> int:
    """bitsandbytes' averages: a byte each and a float32 scale for 256 of them, float32 in tensors below 4096."""
    return sum(
        8 * count if count < 4096 else 2 * count + 8 * math.ceil(count / 256)
        for count in (weight.numel() for weight in weights)
    )
