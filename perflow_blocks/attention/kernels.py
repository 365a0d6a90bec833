"""torch's own kernels through diffusers' dispatcher: one class each, called by name and never made a default."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import Tensor

from .probe import probe
from .strategy import AttentionConstraints, AttentionStrategy

HALF = (torch.float16, torch.bfloat16)
FLOAT = (torch.float32, *HALF)


class DispatchedAttention(AttentionStrategy):
    """A kernel of diffusers' dispatcher.

    Attributes:
        backend: the dispatcher's name for it.
        needs: the package that it comes from.
        install: how to get that.
    """

    backend: AttentionBackendName
    needs: str = "torch"
    install: str = "pip install -U torch"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        # Not every kernel notices: flex drops `is_causal`, xformers adds a boolean mask to the scores.
        if mask is not None and not self.constraints.mask:
            raise ValueError(f"{self.name} takes no mask; use the strategy 'native' for such a call.")
        if is_causal and not self.constraints.causal:
            raise ValueError(f"{self.name} computes no causal attention; use the strategy 'native' for such a call.")
        mask = with_four_dimensions(mask)
        return dispatch_attention_fn(query, key, value, attn_mask=mask, is_causal=is_causal, backend=self.backend)

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        try:
            _check_attention_backend_requirements(self.backend)
        except RuntimeError as error:
            raise ImportError(
                f"attention strategy {self.name!r} needs {self.needs}, which is missing, too old or cannot be "
                f"imported{self.besides(device)}; {self.install}."
            ) from error
        self.require_device(device)
        self.load()
        probe(self, device, dtype, head_dim)

    def load(self) -> None:
        """Fetches what the first call needs, so that the first call need not."""


def with_four_dimensions(mask: Tensor | None) -> Tensor | None:
    """The mask as (batch, heads, queries, keys), each of which may be 1.

    The dispatcher reads the first of two dimensions as the batch, not as the queries.
    """
    return mask if mask is None or mask.ndim >= 4 else mask[(None,) * (4 - mask.ndim)]


class NativeAttention(DispatchedAttention):
    """torch's scaled_dot_product_attention, which chooses among its own kernels. Takes every call."""

    backend = AttentionBackendName.NATIVE
    constraints = AttentionConstraints(causal=True)
    compilable = True
    cuda_graphs = True


class NativeMathAttention(DispatchedAttention):
    """The same without a fused kernel: holds all scores in memory, the yardstick for the others."""

    backend = AttentionBackendName._NATIVE_MATH
    constraints = AttentionConstraints(causal=True)
    compilable = True
    cuda_graphs = True


class NativeFlashAttention(DispatchedAttention):
    """FlashAttention-2 as torch has it."""

    backend = AttentionBackendName._NATIVE_FLASH
    constraints = AttentionConstraints(
        devices=("cuda", "cpu"),
        dtypes=HALF,
        head_dims=range(1, 257),
        mask=False,
        causal=True,
        compute_capability=((8, 0), None),
    )
    compilable = True
    cuda_graphs = True


class NativeEfficientAttention(DispatchedAttention):
    """torch's memory-efficient kernel, for older devices, float32 and masks."""

    backend = AttentionBackendName._NATIVE_EFFICIENT
    constraints = AttentionConstraints(
        devices=("cuda",),
        dtypes=FLOAT,
        head_dims=range(8, 1025, 8),  # its alignment for half precision; torch sets no limit
        causal=True,
        compute_capability=((5, 0), None),
    )
    compilable = True
    cuda_graphs = True


class NativeCudnnAttention(DispatchedAttention):
    """cuDNN's kernel as torch calls it. The limits are those of torch's `check_cudnn_tensor_shapes`."""

    backend = AttentionBackendName._NATIVE_CUDNN
    constraints = AttentionConstraints(
        devices=("cuda",),
        dtypes=HALF,
        head_dims=range(8, 129, 8),  # up to 256 on some devices only
        min_sequence=2,
        compute_capability=((8, 0), None),
        rocm=False,
    )
    compilable = True
    cuda_graphs = True


class FlexAttention(DispatchedAttention):
    """torch's flex_attention. Fast inside a compiled UNet alone: without it holds all scores in memory."""

    backend = AttentionBackendName.FLEX
    # Not causal: the dispatcher does not hand `is_causal` on where there is no mask.
    constraints = AttentionConstraints(devices=("cuda", "cpu"), dtypes=FLOAT)
    compilable = True

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            # As a boolean, the dispatcher would decide by the first head which blocks are skipped for all.
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        return super().__call__(query, key, value, mask, is_causal=is_causal)
