"""The strategies by name: one line for each, and the users' own in the same table."""

from __future__ import annotations

from typing import TypeVar

from . import hub_kernels, kernels, packages
from .auto import AutoAttention
from .sage import SageAttention
from .sliced import SlicedAttention
from .strategy import AttentionStrategy

Registered = TypeVar("Registered", bound=AttentionStrategy | type[AttentionStrategy])

_STRATEGIES: dict[str, AttentionStrategy] = {}
"""All that are registered in this process; written by `register_attention_strategy` alone."""


def register_attention_strategy(name: str, strategy: Registered) -> Registered:
    """Makes a strategy known under a name, for attention plans and `AttentionConfig`.

    Args:
        name: a Python identifier, not yet taken.
        strategy: an instance, or a class that is made without arguments. An instance has one name.

    Returns:
        What was passed.

    Raises:
        ValueError: a name that is no identifier or is taken; no strategy; an instance that has another name already.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r} is no Python identifier, so no plan could name it; pass one such as 'mine'.")
    if name in _STRATEGIES:
        raise ValueError(f"name={name!r} is taken by {type(_STRATEGIES[name]).__name__}; pass another one.")
    made = _made(strategy)
    if not isinstance(made, AttentionStrategy):
        raise ValueError(f"strategy={strategy!r} is no AttentionStrategy; pass an instance or a class of one.")
    if type(made).__call__ is AttentionStrategy.__call__:
        raise ValueError(f"strategy={strategy!r} computes nothing; pass one that has a __call__.")
    if any(known is made for known in _STRATEGIES.values()):
        raise ValueError(
            f"strategy={made!r} is registered as {made.name!r}; pass an instance of its own for {name!r}."
        )
    made.name = name
    _STRATEGIES[name] = made
    return strategy


def _made(strategy: object) -> object:
    if not (isinstance(strategy, type) and issubclass(strategy, AttentionStrategy)):
        return strategy
    try:
        return strategy()
    except TypeError as error:
        raise ValueError(f"strategy={strategy!r} needs arguments ({error}); pass an instance.") from error


def get_attention_strategy(name: str) -> AttentionStrategy:
    """The strategy of this name.

    Raises:
        ValueError: there is none; the error lists those there are.
    """
    if name not in _STRATEGIES:
        raise ValueError(
            f"attention strategy {name!r} is unknown; pass one of {', '.join(attention_strategy_names())}, or "
            "register your own with register_attention_strategy."
        )
    return _STRATEGIES[name]


def attention_strategy_names() -> list[str]:
    """The names that are registered, in the order in which they were."""
    return list(_STRATEGIES)


register_attention_strategy("native", kernels.NativeAttention)
register_attention_strategy("native_math", kernels.NativeMathAttention)
register_attention_strategy("native_flash", kernels.NativeFlashAttention)
register_attention_strategy("native_efficient", kernels.NativeEfficientAttention)
register_attention_strategy("native_cudnn", kernels.NativeCudnnAttention)
register_attention_strategy("flex", kernels.FlexAttention)
register_attention_strategy("flash", packages.FlashAttention)
register_attention_strategy("flash_3", packages.Flash3Attention)
register_attention_strategy("xformers", packages.XFormersAttention)
register_attention_strategy("sage", SageAttention)
register_attention_strategy("flash_hub", hub_kernels.FlashHubAttention)
register_attention_strategy("flash_3_hub", hub_kernels.Flash3HubAttention)
register_attention_strategy("flash_4_hub", hub_kernels.Flash4HubAttention)
register_attention_strategy("aiter_fa2_hub", hub_kernels.AiterHubAttention)
register_attention_strategy("sage_hub", hub_kernels.SageHubAttention)
register_attention_strategy("sage_blackwell_hub", hub_kernels.SageBlackwellHubAttention)
register_attention_strategy("sliced", SlicedAttention)
register_attention_strategy(
    "auto",
    AutoAttention(
        [get_attention_strategy("flash_3"), get_attention_strategy("flash")],
        otherwise=get_attention_strategy("native"),
    ),
)
