"""Attention strategies: the kernels by name, what each takes, and the check that it runs here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

Registered = TypeVar("Registered")

EXACT_TOLERANCE, QUANTISED_TOLERANCE = 0.05, 0.2
"""The largest relative error (Euclidean norm) of a kernel's first small call: finds wrong results, not rounding."""


class AttentionStrategy:
    """An attention kernel that the attention modules of a UNet or a ControlNet can be told to use.

    Either a `kernel`, which is a function with the arguments of `__call__`, and the attributes below as keyword
    arguments; or a subclass that has them as class attributes and defines `__call__`. A copied or unpickled strategy
    is the one that is registered under its name.

    Attributes:
        name: set by `register_attention_strategy`.
        devices: device types such as "cuda"; None for all.
        dtypes: of query, key and value; None for all.
        head_dims: sizes of a head, such as (64, 128) or range(8, 257, 8); None for all.
        key_multiple: the number of keys must be a multiple of it.
        mask: whether it takes a mask.
        exact: whether it agrees with `native` up to rounding; False for quantised kernels.
        compilable: whether `torch.compile(fullgraph=True)` can trace it.
        load: called before the first use, to import or download what the kernel needs. May raise.
        candidates: names of strategies to use instead: the first that runs and takes the model's type and head size.
    """

    name: str = ""
    devices: Sequence[str] | None = None
    dtypes: Sequence[torch.dtype] | None = None
    head_dims: Sequence[int] | None = None
    key_multiple: int = 1
    mask: bool = True
    exact: bool = True
    compilable: bool = False
    load: Callable[[], object] | None = None
    candidates: Sequence[str] = ()
    kernel: Callable[..., Tensor] | None = None

    def __init__(self, kernel: Callable[..., Tensor] | None = None, **fields: Any) -> None:
        if unknown := [field for field in fields if not hasattr(AttentionStrategy, field)]:
            raise ValueError(f"an AttentionStrategy has no attribute {unknown[0]!r}; see help(AttentionStrategy).")
        vars(self).update(fields, kernel=kernel)

    def __reduce__(self) -> tuple[Any, ...]:
        return get_attention_strategy, (self.name,)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(head_dim) + mask) v, of the query's shape and type. The inputs must not be changed.

        Args:
            query: (batch, queries, heads, head_dim).
            key, value: (batch, keys, heads, head_dim).
            mask: (batch or 1, heads or 1, queries or 1, keys), added to the scores.
        """
        if self.kernel is None:
            raise NotImplementedError(f"{type(self).__name__} defines no __call__")
        return self.kernel(query, key, value, mask)

    def refuses(self, query: Tensor, key: Tensor, mask: Tensor | None) -> str | None:
        """Why the strategy does not take this call, such as "takes no mask"; None if it does.

        Runs at every call and may be traced: it must not read values from the device.
        """
        if self.devices is not None and query.device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not {query.device.type}"
        if self.dtypes is not None and query.dtype not in self.dtypes:
            return f"takes {' or '.join(map(str, self.dtypes))}, not {query.dtype}".replace("torch.", "")
        if self.head_dims is not None and query.shape[3] not in self.head_dims:
            return f"takes head sizes in {self.head_dims}"
        if mask is not None and not self.mask:
            return "takes no mask"
        if self.key_multiple > 1 and key.shape[1] % self.key_multiple != 0:
            return f"takes multiples of {self.key_multiple} keys"
        return None

    def resolve(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionStrategy:
        """What modules call for this strategy: itself, or the first of its candidates that runs."""
        for name in self.candidates:
            other = get_attention_strategy(name)
            if dtype in (other.dtypes or [dtype]) and head_dim in (other.head_dims or [head_dim]):
                try:
                    return other.resolve(device, dtype, head_dim)
                except (ImportError, ValueError):
                    continue
        self.require(device, dtype, head_dim)
        return self

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Checks that the strategy runs here at all: device, packages, and a small call compared with float32.

        Tries another type or head size if it does not take these: calls with them go to `native`.

        Raises:
            ImportError: a package is missing or too old.
            ValueError: it does not run on this device, or a small call fails or gives a wrong result.
        """
        if self.devices is not None and device.type not in self.devices:
            runs_on = f"{self.name!r} runs on {' or '.join(self.devices)}, and the model is on {device.type}"
            raise ValueError(f"attention strategy {runs_on}; move the model, or choose another such as 'native'.")
        try:
            if self.load is not None:
                self.load()
            self._probe(device, dtype, head_dim)
        except ImportError as error:
            raise ImportError(f"attention strategy {self.name!r}: {error}") from error
        except Exception as error:  # kernels, drivers and the Hub raise errors of every kind
            raise ValueError(
                f"attention strategy {self.name!r} does not run on {device}: {error}; try another, such as 'native'."
            ) from error

    @torch.no_grad()
    def _probe(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        if self.dtypes is not None and dtype not in self.dtypes:
            dtype = self.dtypes[0]
        if self.head_dims is not None and head_dim not in self.head_dims:
            head_dim = self.head_dims[0]
        generator = torch.Generator().manual_seed(0)
        # 77 is a prompt's length, and no multiple of a kernel's block.
        for keys in {-(-128 // self.key_multiple) * self.key_multiple, 77}:
            shapes = [(2, length, 3, head_dim) for length in (128, keys, keys)]
            inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
            if self.refuses(inputs[0], inputs[1], None) is not None:
                continue
            query, key, value = (tensor.float().transpose(1, 2) for tensor in inputs)
            expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            error = float((self(*inputs).float() - expected).norm() / expected.norm())
            if not error <= (EXACT_TOLERANCE if self.exact else QUANTISED_TOLERANCE):  # nan included
                raise ValueError(f"its result for {keys} keys is not attention (relative error {error:.2g})")


_STRATEGIES: dict[str, AttentionStrategy] = {}
"""All that are registered in this process; written by `register_attention_strategy` alone."""


def register_attention_strategy(name: str, strategy: Registered, **fields: Any) -> Registered:
    """Makes an attention kernel known under a name, for attention plans. Returns `strategy`.

    Example:
        >>> def my_function(query, key, value, mask=None): ...  # tensors (batch, sequence, heads, head_dim)
        >>> register_attention_strategy("mine", my_function, dtypes=(torch.float16,), mask=False)

    Args:
        name: a Python identifier that is not taken.
        strategy: a function; or a subclass of `AttentionStrategy`; or an instance, which can have one name only.
        **fields: attributes of `AttentionStrategy`, for a function or a class.

    Raises:
        ValueError: the name is taken or not an identifier, or the strategy has another type or name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r} must be a Python identifier, such as 'mine'.")
    if name in _STRATEGIES:
        raise ValueError(f"name={name!r} is taken by another attention strategy; choose another name.")
    made: Any = strategy
    if isinstance(strategy, type):
        made = strategy(**fields)
    elif callable(strategy) and not isinstance(strategy, AttentionStrategy):
        made = AttentionStrategy(strategy, **fields)
    if not isinstance(made, AttentionStrategy) or made in _STRATEGIES.values():
        raise ValueError(f"strategy={strategy!r} must be a function or an AttentionStrategy without a name so far.")
    made.name = name
    _STRATEGIES[name] = made
    return strategy


def get_attention_strategy(name: str) -> AttentionStrategy:
    """The strategy of this name. An unknown name is a ValueError that lists the known ones."""
    if name not in _STRATEGIES:
        known = ", ".join(_STRATEGIES)
        raise ValueError(f"attention strategy {name!r} is unknown; choose one of {known}, or register your own.")
    return _STRATEGIES[name]


def attention_strategy_names() -> list[str]:
    """The registered names, in the order of their registration."""
    return list(_STRATEGIES)


def _load_backend(backend: AttentionBackendName, extra: str | None) -> None:
    """Checks that the package is there, and downloads a kernel of the Hub, so that the first call need not."""
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        remedy = "" if extra is None else f" (pip install 'perflow-blocks[{extra}]')"
        raise ImportError(f"{error}{remedy}") from error
    attention_dispatch._maybe_download_kernel_for_backend(backend)


def sliced_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, slice_size: int = 512
) -> Tensor:
    """`native` for `slice_size` queries at a time; exact.

    It saves memory where torch has no fused kernel: in float32 the scores of SDXL's largest self-attention (4096
    queries and keys, 10 heads, batch 2) take 1.25 GiB, those of 512 queries 160 MiB. Elsewhere it only costs time.
    """
    result = torch.empty_like(query)
    for start in range(0, query.shape[1], slice_size):
        rows = slice(start, start + slice_size)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        result[:, rows] = dispatch_attention_fn(query[:, rows], key, value, part, backend=AttentionBackendName.NATIVE)
    return result


def _sage_1(query: Tensor, key: Tensor, value: Tensor, mask: None = None) -> Tensor:
    # Imported by its name, since the import needs triton and a GPU, and loaders of exported code look for imports.
    sageattn = import_module("sageattention").sageattn
    # The package subtracts their mean from the keys in place, and triton launches on the current device.
    with torch.cuda.device_of(query):
        return sageattn(query, key.clone(), value, tensor_layout="NHD")


def _load_sage_1() -> None:
    try:
        release = version("sageattention")
    except PackageNotFoundError:
        release = "none"
    if not release.startswith("1.0.6"):
        raise ImportError(
            "it needs sageattention 1.0.6 (pip install 'perflow-blocks[sage]'), or 2.1.1 and newer that diffusers can "
            f"import; installed: {release}"
        )


def _register(backend: AttentionBackendName, *, extra: str | None = None, **fields: Any) -> None:
    """A kernel of diffusers' dispatcher by its name there; `extra` is this package's extra with what it needs."""
    load = partial(_load_backend, backend, extra)
    kernel = partial(dispatch_attention_fn, backend=backend)
    register_attention_strategy(backend.value.lstrip("_"), kernel, load=load, **fields)


def _register_sage() -> None:
    """SageAttention, scores in 8 bits (arXiv 2410.02367).

    Release 2.1.1 and newer through the dispatcher. PyPI has 1.0.6, which is called here. Its kernel counts the keys
    that are missing in the last block of 64 as keys of score 0, so it takes multiples of 64 only.
    """
    fields: dict[str, Any] = {"devices": ("cuda",), "dtypes": _HALF, "mask": False, "exact": False}
    if attention_dispatch._CAN_USE_SAGE_ATTN:
        _register(AttentionBackendName.SAGE, head_dims=range(8, 129, 8), **fields)
    else:
        fields |= {"load": _load_sage_1, "head_dims": (64, 96, 128), "key_multiple": 64}
        register_attention_strategy("sage", _sage_1, **fields)


_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (torch.float32, *_HALF)
_GPU: dict[str, Any] = {"devices": ("cuda",), "dtypes": _HALF, "head_dims": range(8, 257, 8), "mask": False}
_SMALL_HEADS: dict[str, Any] = {**_GPU, "head_dims": range(8, 129, 8)}

_register(AttentionBackendName.NATIVE, compilable=True)
_register(AttentionBackendName._NATIVE_MATH, compilable=True)
_register(AttentionBackendName._NATIVE_FLASH, **_GPU | {"devices": None}, compilable=True)
_register(AttentionBackendName._NATIVE_EFFICIENT, devices=("cuda",), head_dims=range(8, 1025, 8), compilable=True)
_register(AttentionBackendName._NATIVE_CUDNN, **_SMALL_HEADS | {"mask": True}, compilable=True)
_register(AttentionBackendName.FLEX, dtypes=_FLOAT, compilable=True)
_register(AttentionBackendName.FLASH, extra="flash", **_GPU)
_register(AttentionBackendName._FLASH_3, compilable=True, **_GPU)
# xformers takes only masks that are aligned in memory, which those of a prompt's 77 keys are not.
_register(AttentionBackendName.XFORMERS, extra="xformers", **_GPU | {"dtypes": _FLOAT})
_register_sage()
_register(AttentionBackendName.FLASH_HUB, **_GPU)
_register(AttentionBackendName._FLASH_3_HUB, **_GPU)
_register(AttentionBackendName.FLASH_4_HUB, **_SMALL_HEADS)
_register(AttentionBackendName.AITER_FA2_HUB, **_GPU | {"dtypes": (torch.bfloat16,)})
_register(AttentionBackendName.SAGE_HUB, exact=False, **_SMALL_HEADS)
_register(AttentionBackendName.SAGE_BLACKWELL_HUB, exact=False, **_GPU | {"head_dims": (64, 128)})
register_attention_strategy("sliced", sliced_attention, compilable=True)
_AUTO = ("flash_3", "flash", "native")  # exact, and none that downloads
register_attention_strategy("auto", get_attention_strategy("native").__call__, candidates=_AUTO, compilable=True)
