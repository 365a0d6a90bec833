"""SageAttention: scores in 8 bits, from whichever release of the package sageattention is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

import torch
from diffusers.models.attention_dispatch import (
    _REQUIRED_SAGE_VERSION,
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.utils.import_utils import compare_versions
from torch import Tensor

from .kernels import HALF
from .strategy import AttentionConstraints, AttentionStrategy

INSTALL = "pip install 'perflow-blocks[sage]'"

FIRST_RELEASE = AttentionConstraints(
    devices=("cuda",),
    dtypes=HALF,  # it takes float32 too, but with values in float16, and float32 is asked for to have more than that
    head_dims=(64, 96, 128),
    mask=False,
    key_multiple=64,
    compute_capability=((8, 0), None),
)
"""Of sageattention 1.0.6. Its kernel reads keys in blocks of 64 and lets the softmax count what is missing in the last
block as keys of score 0: for 77 random keys the result is 29 percent too small. Triton asks for compute capability
8.0."""

SECOND_RELEASE = AttentionConstraints(
    devices=("cuda",),
    dtypes=HALF,
    head_dims=range(8, 129, 8),
    mask=False,
    compute_capability=((8, 0), None),
    rocm=False,
)
"""Of sageattention 2.1.1 and newer, which pads heads to 64 or 128."""


class SageAttention(AttentionStrategy):
    """SageAttention: scores in 8 bits (arXiv 2410.02367).

    With sageattention 2.1.1 or newer through diffusers' dispatcher. PyPI has 1.0.6, which is called here, and whose
    limits hold until `require` has found another release.
    """

    constraints = FIRST_RELEASE
    exact = False

    def __init__(self) -> None:
        self._dispatched = False

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        self._dispatched = self._find_release(device)
        self.constraints = SECOND_RELEASE if self._dispatched else FIRST_RELEASE
        super().require(device, dtype, head_dim)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """As with every strategy.

        Raises:
            ValueError: a call that it does not take. The kernel would ignore a mask and count keys that do not exist.
        """
        reason = self.supports(query.shape, key.shape, query.dtype, query.device, mask)
        if reason is not None:
            raise ValueError(f"{reason}; use the strategy 'native' for such a call.")
        if self._dispatched:
            return dispatch_attention_fn(query, key, value, backend=AttentionBackendName.SAGE)
        # The package subtracts their mean from the keys in place, and triton launches on the current device.
        with torch.cuda.device_of(query):
            return _package().sageattn(query, key.clone(), value, tensor_layout="NHD")

    def _find_release(self, device: torch.device) -> bool:
        """Whether diffusers' dispatcher can call the release that is installed.

        Raises:
            ImportError: none is installed, or one that cannot be used.
        """
        needs = f"attention strategy {self.name!r} needs sageattention >= 1.0.6"
        try:
            installed = importlib.metadata.version("sageattention")
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"{needs}, which is missing{self.besides(device)}; {INSTALL}.") from error
        if compare_versions("sageattention", ">=", _REQUIRED_SAGE_VERSION):
            try:
                _check_attention_backend_requirements(AttentionBackendName.SAGE)
            except RuntimeError as error:
                raise ImportError(
                    f"{needs}, and diffusers could not import the installed {installed}; build it again for this "
                    f"version of torch, or {INSTALL}."
                ) from error
            return True
        if compare_versions("sageattention", "<", "1.0.6") or compare_versions("sageattention", ">=", "2"):
            raise ImportError(
                f"{needs} that is 1.0.x, or {_REQUIRED_SAGE_VERSION} or newer; {installed} is installed, so "
                "pip install sageattention==1.0.6."
            )
        try:
            _package()
        except Exception as error:  # triton raises more than ImportError where it finds no driver
            raise ImportError(
                f"{needs}, and the installed {installed} cannot be imported: {error}; it needs triton and a GPU, "
                "so install triton or choose another strategy such as 'native'."
            ) from error
        return False


def _package() -> ModuleType:
    """sageattention, which needs triton and a GPU that triton knows to be imported: so not before it is asked for."""
    return importlib.import_module("sageattention")
