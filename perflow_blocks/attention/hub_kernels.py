"""Kernels that the package kernels downloads from the Hub; here when a strategy is required, never in a first call."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import (
    _HUB_KERNELS_REGISTRY,
    AttentionBackendName,
    _maybe_download_kernel_for_backend,
)

from .kernels import HALF, DispatchedAttention
from .packages import FLASH_2, FLASH_3
from .strategy import AttentionConstraints


class HubAttention(DispatchedAttention):
    """A kernel from the Hub. diffusers asks whether its publisher is trusted, and keeps it once it is there."""

    needs = "kernels >= 0.12"
    install = "pip install 'kernels>=0.12'"

    def load(self) -> None:
        """Downloads the kernel unless it is there.

        Raises:
            ValueError: it cannot be downloaded, or there is none for this device and version of torch.
        """
        try:
            _maybe_download_kernel_for_backend(self.backend)
        except Exception as error:  # whatever the network, the Hub and the kernel's own code raise
            repository = _HUB_KERNELS_REGISTRY[self.backend].repo_id
            raise ValueError(
                f"attention strategy {self.name!r} cannot load its kernel {repository} from the Hub: {error}; check "
                "the connection, or choose another strategy such as 'native'."
            ) from error


class FlashHubAttention(HubAttention):
    """FlashAttention-2."""

    backend = AttentionBackendName.FLASH_HUB
    constraints = FLASH_2


class Flash3HubAttention(HubAttention):
    """FlashAttention-3, for Hopper."""

    backend = AttentionBackendName._FLASH_3_HUB
    constraints = FLASH_3


class Flash4HubAttention(HubAttention):
    """FlashAttention-4, for Hopper and Blackwell."""

    backend = AttentionBackendName.FLASH_4_HUB
    constraints = AttentionConstraints(
        devices=("cuda",),
        dtypes=HALF,
        head_dims=range(8, 129, 8),
        mask=False,
        compute_capability=((9, 0), None),
        rocm=False,
    )
    needs = "kernels >= 0.12.3"
    install = "pip install 'kernels>=0.12.3'"


class AiterHubAttention(HubAttention):
    """FlashAttention-2 of AMD's aiter, which has kernels for bfloat16 alone."""

    backend = AttentionBackendName.AITER_FA2_HUB
    constraints = AttentionConstraints(
        devices=("cuda",), dtypes=(torch.bfloat16,), head_dims=range(8, 257, 8), mask=False, rocm=True
    )


class SageHubAttention(HubAttention):
    """SageAttention 2: scores in 8 bits."""

    backend = AttentionBackendName.SAGE_HUB
    constraints = AttentionConstraints(
        devices=("cuda",),
        dtypes=HALF,
        head_dims=range(8, 129, 8),
        mask=False,
        compute_capability=((8, 0), None),
        rocm=False,
    )
    exact = False


class SageBlackwellHubAttention(HubAttention):
    """SageAttention 3: 4 bits, for Blackwell."""

    backend = AttentionBackendName.SAGE_BLACKWELL_HUB
    constraints = AttentionConstraints(
        devices=("cuda",),
        dtypes=HALF,
        head_dims=(64, 128),
        mask=False,
        compute_capability=((10, 0), None),
        rocm=False,
    )
    exact = False
