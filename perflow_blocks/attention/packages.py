"""Kernels of installed packages, through diffusers' dispatcher."""

from __future__ import annotations

from diffusers.models.attention_dispatch import AttentionBackendName

from .kernels import FLOAT, HALF, DispatchedAttention
from .strategy import AttentionConstraints

FLASH_2 = AttentionConstraints(
    devices=("cuda",), dtypes=HALF, head_dims=range(1, 257), mask=False, compute_capability=((8, 0), None)
)
FLASH_3 = AttentionConstraints(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 257, 8),
    mask=False,
    compute_capability=((9, 0), (9, 0)),
    rocm=False,
)


class FlashAttention(DispatchedAttention):
    """FlashAttention-2 of the package flash-attn."""

    backend = AttentionBackendName.FLASH
    constraints = FLASH_2
    needs = "flash-attn >= 2.6.3"
    install = "pip install 'perflow-blocks[flash]'"


class Flash3Attention(DispatchedAttention):
    """FlashAttention-3 for Hopper, as built from the flash-attention repository. The dispatcher makes it traceable."""

    backend = AttentionBackendName._FLASH_3
    constraints = FLASH_3
    needs = "the package flash_attn_interface (FlashAttention-3)"
    install = "build it from the folder hopper of the flash-attention repository, or choose 'flash_3_hub'"
    compilable = True


class XFormersAttention(DispatchedAttention):
    """memory_efficient_attention of xformers."""

    backend = AttentionBackendName.XFORMERS
    # No mask: xformers wants one that is aligned in memory, and the dispatcher hands 77 keys on as they come, and a
    # boolean as ones and zeros to be added.
    constraints = AttentionConstraints(devices=("cuda",), dtypes=FLOAT, head_dims=range(8, 257, 8), mask=False)
    needs = "xformers >= 0.0.29"
    install = "pip install 'perflow-blocks[xformers]'"
