"""The part of a module that some of its names need: for scripts, which do more than define blocks."""

from __future__ import annotations

import ast
import io
import sys
from dataclasses import replace
from enum import Enum
from pathlib import PurePath
from re import Pattern
from types import BuiltinFunctionType, FunctionType

import torch

from .changes import Changes, Defined, Kind, UndecidedError
from .imports import absolute_name, import_statements
from .modules import PACKAGE, Module, origin, require_carried


def pruned(module: Module, names: set[str]) -> Module:
    """A module with only what `names` need: imports, constants, functions and classes, each as it was written.

    Left out is what neither defines nor changes anything that is needed: other functions, their calls, and
    `if __name__ == "__main__":`.

    Raises:
        ValueError: a statement may change what is needed, but cannot be carried, or does not tell; names its line.
    """
    tree = ast.parse(module.text)
    kept = _Part(module, tree).needed(names)
    lines = io.StringIO(module.text).readlines()  # splits where Python does
    chosen: set[int] = set()
    last = 0
    for node in tree.body:
        start, end = _extent(node, lines, last)
        if _is_docstring(tree, node) or _is_future(node) or node in kept:
            chosen.update(range(start, end))
        last = end
    text = "".join(lines[number] for number in sorted(chosen))
    return replace(module, text=text if text.endswith("\n") else text + "\n")


class _Part:
    """The part of a module that is needed, as it grows."""

    def __init__(self, module: Module, tree: ast.Module) -> None:
        self.module = module
        self.waiting = [node for node in tree.body if not _is_main_guard(node)]
        self.by_name: dict[str, list[ast.stmt]] = {}
        for node in tree.body:
            for name in _bound(node):
                self.by_name.setdefault(name, []).append(node)
        self.values = vars(sys.modules.get(module.name, object))
        self.changes = Changes(
            tree, _trusted(module, tree) | {n for n, v in self.values.items() if _is_foreign(v, module)}
        )
        self.kept: set[ast.stmt] = set()
        self.own: dict[str, Kind] = {}

    def needed(self, names: set[str]) -> set[ast.stmt]:
        """The statements that define `names` and what these use, or may change any of it."""
        self._keep_definitions(sorted(names))
        while (found := self._next_change()) is not None:
            before = set(self.kept)
            self.kept.add(found)
            self._keep_definitions(_used(found))
            if not _is_star(found) and not all(_can_be_carried(self.module, node) for node in self.kept - before):
                reason = "may change what the block uses, and needs what no export carries"
                raise self._cannot(found.lineno, reason)
        return self.kept

    def _keep_definitions(self, wanted: list[str]) -> None:
        while wanted:
            name = wanted.pop()
            binding = self.by_name.pop(name, [])
            if any(_is_own(self.module, node) for node in binding):
                self.own[name] = self._kind(name, binding)
            for node in binding:
                if node not in self.kept:
                    self.kept.add(node)
                    wanted.extend(_used(node))

    def _next_change(self) -> ast.stmt | None:
        """A statement that is not kept yet, and may change what is."""
        watched = dict(self.own)
        for node in self.waiting:
            watched |= self.changes.aliases(node, watched)
            if node in self.kept:
                continue
            try:
                if _is_star(node) or self.changes.changes(node, watched):
                    return node
            except UndecidedError as error:
                raise self._cannot(error.line, f"uses {error.code}, which may change anything") from None
        return None

    def _kind(self, name: str, binding: list[ast.stmt]) -> Kind:
        value = self.values.get(name, self)
        if _is_constant(value):
            return "constant"
        defined = all(isinstance(node, Defined | ast.ClassDef) for node in binding)
        return "code" if defined or isinstance(value, type | FunctionType | BuiltinFunctionType) else "data"

    def _cannot(self, line: int, reason: str) -> ValueError:
        return ValueError(
            f"line {line} of {self.module.path.name} {reason}; put the block in a module of its own, and import it."
        )


def _used(node: ast.stmt) -> list[str]:
    return [*(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)), *_names_in_strings(node)]


def _is_own(module: Module, node: ast.stmt) -> bool:
    """Whether a statement binds what is the user's: all but imports of installed modules and this package."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return True
    return any(origin(name) == "user" for name in _imported_modules(module, node))


def _trusted(module: Module, tree: ast.Module) -> set[str]:
    """The names that a module imports from this package and diffusers, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.partition(".")[0] for name in _imported_modules(module, node)]
            if all(name in (PACKAGE, "diffusers") for name in names):
                found |= _bound(node)
    return found


def _imported_modules(module: Module, node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [absolute_name(module, node)]


def _is_foreign(value: object, module: Module) -> bool:
    """Whether a value is a class of another module."""
    return isinstance(value, type) and value.__module__ != module.name


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    plain = (bool, int, float, complex, str, bytes, range, PurePath, Pattern, Enum, torch.dtype, torch.device)
    return value is None or isinstance(value, plain)


def _can_be_carried(module: Module, node: ast.stmt) -> bool:
    """Whether self-contained exports can carry what a statement imports of this package."""
    try:
        for _, names in import_statements(module, node, frozenset({"package"})):
            for imported in names:
                require_carried(imported.module)
    except ValueError:
        return False
    return True


def _is_star(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines."""
    if _is_main_guard(node):
        return set()
    if isinstance(node, Defined | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    inner = (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt | ast.ExceptHandler))
    found = {name for part in inner if isinstance(part, ast.stmt) for name in _bound(part)}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.ExceptHandler):
            found |= {name for statement in part.body for name in _bound(statement)}
    return found


def _names_in_strings(node: ast.stmt) -> list[str]:
    """Names in annotations that are quoted."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            found.append(part.value)
    return found


def _extent(node: ast.stmt, lines: list[str], last: int) -> tuple[int, int]:
    """The lines of a statement, from the comments above it on; `last` is where the one before it ended."""
    decorators = getattr(node, "decorator_list", [])
    start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    first = start
    while first > last and (not lines[first - 1].strip() or lines[first - 1].lstrip().startswith("#")):
        first -= 1
    return first, max(node.end_lineno or node.lineno, start + 1)


def _is_docstring(tree: ast.Module, node: ast.stmt) -> bool:
    return node is tree.body[0] and ast.get_docstring(tree) is not None


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )
