"""Values as the Python expressions that give them again."""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

Refer = Callable[[Any], str]
"""Gives the name under which generated code has a class, function or module; raises ValueError if it cannot."""


class NotLiteralError(ValueError):
    """A value that no expression gives again; the message says which, and why."""


def literal(value: Any, refer: Refer) -> str:
    """The expression for a value: numbers, texts, containers, enums, types and devices of torch, frozen dataclasses,
    and classes and functions that can be imported.

    Raises:
        NotLiteralError: the value, or one inside it, is of another kind.
        ValueError: `refer` has no name for a class or function.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, str, bytes):
        return _quoted(value) if isinstance(value, str) else repr(value)
    if type(value) in (list, tuple, set, frozenset, dict):
        return _container(value, refer)
    if isinstance(value, torch.dtype):
        return f"{refer(torch)}.{str(value).removeprefix('torch.')}"
    if isinstance(value, torch.device):
        return f"{refer(torch)}.device({_quoted(str(value))})"
    if isinstance(value, enum.Enum) and type(value).__members__.get(value.name) is value:
        return f"{refer(type(value))}.{value.name}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return refer(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.init]
        parts = [f"{field.name}={literal(getattr(value, field.name), refer)}" for field in fields]
        return f"{refer(type(value))}({', '.join(parts)})"
    raise NotLiteralError(f"{_short(value)} is no value that can be written down")


def _container(value: Any, refer: Refer) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key, refer)}: {literal(entry, refer)}" for key, entry in value.items()) + "}"
    parts = [literal(entry, refer) for entry in value]
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    if isinstance(value, tuple):
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    inner = ", ".join(sorted(parts))  # sets have no order of their own
    if isinstance(value, frozenset):
        return f"frozenset({{{inner}}})" if parts else "frozenset()"
    return f"{{{inner}}}" if parts else "set()"


def _quoted(text: str) -> str:
    """In double quotes, as a formatter would have it, where that needs no more escapes."""
    plain = repr(text)
    return plain if plain.startswith('"') or '"' in text else f'"{plain[1:-1]}"'


def _short(value: Any) -> str:
    text = f"a {type(value).__module__}.{type(value).__qualname__}"
    return text.replace("a builtins.", "a ")


def importable(thing: Any) -> Any:
    """The module of a class or function, if it is found there under its name.

    Raises:
        NotLiteralError: lambdas, local classes and functions, and what was since redefined or lives in no file.
    """
    name, module = getattr(thing, "__qualname__", ""), sys.modules.get(getattr(thing, "__module__", None) or "")
    if "<lambda>" in name:
        raise NotLiteralError("a lambda has no name to import it by; write a function at the top of a module")
    if "<locals>" in name:
        raise NotLiteralError(f"{name} is defined inside a function; define it at the top of a module")
    if module is None:
        raise NotLiteralError(f"{name} comes from no module that is loaded; define it at the top of a module")
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not thing:
        raise NotLiteralError(
            f"{name} is not what the module {module.__name__} has under that name; define it there once, and make "
            "the blocks anew"
        )
    return module
