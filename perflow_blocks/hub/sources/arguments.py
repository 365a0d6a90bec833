"""The constructor arguments of a block, read from the block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

STRUCTURE = frozenset({"sub_blocks", "block_classes", "block_names", "block_trigger_inputs", "default_block_name"})
"""Attributes that say how a block is put together, apart from its settings."""

_ABSENT = object()


class UnreadableArgumentError(ValueError):
    """A constructor argument whose value the block does not tell."""


class Arguments(NamedTuple):
    """The arguments of a call."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


def parameters(block: ModularPipelineBlocks, kind: type) -> Iterator[inspect.Parameter]:
    """What the constructor of `kind`, a class of the block, takes.

    Where it hands on `**kwargs` that the block does not keep, what the constructor of the next class takes, too.
    """
    seen: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        handed_on = False
        for parameter in list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]:
            variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if variable and kept(block, parameter.name) is _ABSENT:
                handed_on = True
            elif parameter.name not in seen:
                seen.add(parameter.name)
                yield parameter
        if not handed_on:
            return


def kept(block: ModularPipelineBlocks, name: str) -> Any:
    """The attribute, or else the private attribute, of this name."""
    for attribute in (name, f"_{name}"):
        value = getattr(block, attribute, _ABSENT)
        if value is not _ABSENT:
            return value
    return _ABSENT


def constructor_values(block: ModularPipelineBlocks, kind: type) -> dict[str, Any]:
    """The values of all constructor parameters of `kind`, a class of the block, by name.

    Raises:
        UnreadableArgumentError: a parameter that the block keeps under no attribute of its name.
    """
    values = {}
    for parameter in parameters(block, kind):
        values[parameter.name] = kept(block, parameter.name)
        if values[parameter.name] is _ABSENT:
            raise UnreadableArgumentError(
                f"its constructor argument {parameter.name!r} is not kept on the block; set self.{parameter.name} in "
                "__init__"
            )
    return values


def arguments(block: ModularPipelineBlocks, usual: ModularPipelineBlocks | None) -> Arguments:
    """The shortest call that gives the block's settings again.

    Args:
        usual: a block made without arguments, if there can be one; what it has, too, is left out.

    Raises:
        UnreadableArgumentError: see `constructor_values`.
    """
    values = constructor_values(block, type(block))
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in parameters(block, type(block)):
        value = values[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(value)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(value)
        elif not (
            _same(value, parameter.default) or (usual is not None and _same(value, kept(usual, parameter.name)))
        ):
            named[parameter.name] = value
    return Arguments(tuple(positional), named)


def settings(block: ModularPipelineBlocks, kind: type) -> dict[str, Any]:
    """What tells two blocks of the class `kind` apart: constructor values and public attributes.

    Private attributes are caches and display options. Of an object that is no argument (a cache, a lock) the type
    alone counts: it is the constructor that makes it.
    """
    attributes = {
        name: value if is_plain(value) else type(value)
        for name, value in vars(block).items()
        if not name.startswith("_") and name not in STRUCTURE
    }
    return attributes | {f"argument {name}": value for name, value in constructor_values(block, kind).items()}


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, texts and containers only, so that == means the same value."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def same_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of settings that differ."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if not _same(one.get(name, _ABSENT), other.get(name, _ABSENT))
    ]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other) or repr(one) == repr(other) == "nan"
    except (TypeError, ValueError, RuntimeError):  # tensors, arrays
        return False
