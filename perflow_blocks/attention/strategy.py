"""What an attention strategy is: a kernel with a name, what it can take, and a check that it runs here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .probe import probe

Shape = Sequence[int]
"""(batch, sequence, heads, head_dim)."""


@dataclass(frozen=True, kw_only=True)
class AttentionConstraints:
    """What a kernel can take. The defaults are those of a kernel that takes everything but causal calls.

    Attributes:
        devices: device types such as "cuda"; None for all.
        dtypes: of query, key and value; None for all.
        head_dims: sizes of a head, such as (64, 128) or range(8, 257, 8); None for all.
        mask: whether a mask may be given, additive or boolean.
        causal: whether the call takes `is_causal=True` (a UNet makes no such call).
        min_sequence: the fewest queries and keys.
        key_multiple: the number of keys is a multiple of it.
        compute_capability: the lowest and the highest that a CUDA device may have, each (major, minor); None for no
            bound.
        rocm: True for AMD's devices only, False for NVIDIA's only, None for both (torch calls both "cuda").
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: Sequence[int] | None = None
    mask: bool = True
    causal: bool = False
    min_sequence: int = 1
    key_multiple: int = 1
    compute_capability: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
    rocm: bool | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "dtypes", "head_dims"):
            value = getattr(self, name)
            if value is not None and len(value) == 0:
                raise ValueError(f"{name}={value!r} is wrong because nothing is allowed; pass some, or None for all.")
        for name in ("min_sequence", "key_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; pass 1 for no bound.")

    def against(
        self,
        query_shape: Shape,
        key_shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_mask: bool,
        is_causal: bool,
    ) -> str | None:
        """None where such a call is allowed, else why not: the rest of a sentence that begins with the name."""
        compiling = torch.compiler.is_compiling()  # then numbers may be symbolic, and have no digits
        if self.devices is not None and device.type not in self.devices:
            return f"runs on {_either(self.devices)}, not {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {_either(self.dtypes)}, not {_plain(dtype)}"
        if self.head_dims is not None and not _among(query_shape[3], self.head_dims):
            if compiling:
                return "takes no heads of this size"
            return f"takes heads of {_sizes(self.head_dims)}, not {query_shape[3]}"
        if has_mask and not self.mask:
            return "takes no mask"
        if is_causal and not self.causal:
            return "computes no causal attention"
        if has_mask and is_causal:
            return "takes a mask or is causal, not both"
        if query_shape[1] < self.min_sequence or key_shape[1] < self.min_sequence:
            if compiling:
                return "takes no sequences this short"
            return f"takes {self.min_sequence} queries and keys or more, not {query_shape[1]} and {key_shape[1]}"
        if key_shape[1] % self.key_multiple != 0:
            if compiling:
                return "takes no such number of keys"
            return f"takes multiples of {self.key_multiple} keys, not {key_shape[1]}"
        return None

    def against_device(self, device: torch.device) -> str | None:
        """None where the kernel runs on this device, else what it needs. Asks the driver."""
        if self.devices is not None and device.type not in self.devices:
            return f"runs on {_either(self.devices)}, and the model is on {device.type}"
        lowest, highest = self.compute_capability
        if device.type != "cuda" or (lowest is None and highest is None and self.rocm is None):
            return None
        if not torch.cuda.is_available():
            return "needs a CUDA device, and torch finds none"
        if self.rocm is not None and self.rocm != (torch.version.hip is not None):
            return f"runs on {'AMD' if self.rocm else 'NVIDIA'} devices only"
        capability = torch.cuda.get_device_capability(device)
        if (lowest is not None and capability < lowest) or (highest is not None and capability > highest):
            needed, found = _range(lowest, highest), _range(capability, capability)
            return f"needs compute capability {needed}, and {device} has {found}"
        return None


class AttentionStrategy:
    """An attention kernel that modules of a UNet or a ControlNet can be told to use.

    One of your own needs no more than the call; `supports` and `require` follow from `constraints`:

        class Mine(AttentionStrategy):
            constraints = AttentionConstraints(dtypes=(torch.float16,), mask=False)

            def __call__(self, query, key, value, mask=None):
                return my_kernel(query, key, value)

        register_attention_strategy("mine", Mine)

    Attributes:
        name: under which it is registered; set by `register_attention_strategy`.
        constraints: the calls it can take.
        exact: whether it agrees with `native` up to floating-point rounding; False for quantised kernels.
        compilable: whether `torch.compile(fullgraph=True)` can trace it. False where that was not shown.
        cuda_graphs: whether it may be captured in a CUDA graph. False where that was not shown.
    """

    name: str = ""
    constraints: AttentionConstraints = AttentionConstraints()
    exact: bool = True
    compilable: bool = False
    cuda_graphs: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(head_dim) + mask) v; the inputs stay as they are.

        Args:
            query: (batch, queries, heads, head_dim).
            key, value: (batch, keys, heads, head_dim).
            mask: broadcastable to (batch, heads, queries, keys); added to the scores, or boolean with True where a
                query sees a key.

        Returns:
            (batch, queries, heads, head_dim), in the type of the query.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__; write one that computes attention.")

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Checks that the strategy runs here at all, with a small call where `dtype` and `head_dim` are if possible.

        A type or a head size that it does not take is no error: calls with those are for `native`.

        Raises:
            ImportError: a package is missing or too old.
            ValueError: it does not run on this device, or a small call fails or gives a wrong result.
        """
        self.require_device(device)
        probe(self, device, dtype, head_dim)

    def require_device(self, device: torch.device) -> None:
        """The part of `require` that is about the device.

        Raises:
            ValueError: the strategy does not run on it.
        """
        reason = self.constraints.against_device(device)
        if reason is not None:
            raise ValueError(
                f"attention strategy {self.name!r} {reason}; move the model, or choose another one such as 'native'."
            )

    def besides(self, device: torch.device) -> str:
        """What is to be added to the error about a missing package, where that alone would not help."""
        reason = self.constraints.against_device(device)
        return "" if reason is None else f" (and it {reason})"

    def supports(
        self,
        query_shape: Shape,
        key_shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> str | None:
        """None where the strategy takes such a call, else the reason, such as "sage takes no mask".

        Plain Python on what is known without the device, so it costs little and can be traced. Shapes are (batch,
        sequence, heads, head_dim). Reasons have no numbers while torch.compile traces them.
        """
        reason = self.constraints.against(
            query_shape, key_shape, dtype, device, has_mask=mask is not None, is_causal=is_causal
        )
        return None if reason is None else f"{self.name} {reason}"

    def choice(
        self,
        query_shape: Shape,
        key_shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        mask: Tensor | None = None,
    ) -> str:
        """The name of the strategy that computes such a call: its own, where it does not choose among others."""
        return self.name


def _among(size: int, sizes: Sequence[int]) -> bool:
    """`size in sizes`, in a form that can be traced where the size is symbolic."""
    if isinstance(sizes, range):
        return size >= sizes.start and size < sizes.stop and (size - sizes.start) % sizes.step == 0
    return any(size == allowed for allowed in sizes)


def _range(lowest: tuple[int, int] | None, highest: tuple[int, int] | None) -> str:
    low, high = (".".join(map(str, bound)) if bound else None for bound in (lowest, highest))
    if low == high:
        return str(low)
    return f"{low} or more" if high is None else f"{high} or less" if low is None else f"{low} to {high}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _either(options: Sequence[object]) -> str:
    names = [_plain(option) if isinstance(option, torch.dtype) else str(option) for option in options]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _sizes(head_dims: Sequence[int]) -> str:
    if not isinstance(head_dims, range):
        return _either(head_dims)
    step = f" in steps of {head_dims.step}" if head_dims.step > 1 else ""
    return f"{head_dims[0]} to {head_dims[-1]}{step}"
