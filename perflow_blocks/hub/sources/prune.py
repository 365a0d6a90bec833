"""The part of a module that some of its names need: for scripts, which do more than define blocks."""

from __future__ import annotations

import ast
import io
from dataclasses import replace

from .modules import Module


def pruned(module: Module, names: set[str]) -> Module:
    """A module with only what `names` need: imports, constants, functions and classes, each as it was written.

    Left out is what neither defines nor changes anything that is needed: other functions, calls of functions, and
    `if __name__ == "__main__":`.
    """
    tree = ast.parse(module.text)
    kept = _needed(tree, names)
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


def _needed(tree: ast.Module, names: set[str]) -> set[ast.stmt]:
    by_name: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for name in _bound(node):
            by_name.setdefault(name, []).append(node)
    waiting = [node for node in tree.body if not _is_main_guard(node)]
    kept: set[ast.stmt] = set()
    own: set[str] = set()
    wanted = sorted(names)
    while wanted:
        name = wanted.pop()
        if any(not isinstance(node, ast.Import | ast.ImportFrom) for node in by_name.get(name, [])):
            own.add(name)
        found = by_name.pop(name, [])
        found += [node for node in waiting if _is_star(node) or _changed(node) & own]
        for node in found:
            if node not in kept:
                kept.add(node)
                wanted.extend(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))
                wanted.extend(_names_in_strings(node))
    return kept


def _changed(node: ast.stmt) -> set[str]:
    """The names of what a statement changes without binding it anew: `table[key] = value`, `table.update(values)`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    found = set()
    for part in ast.walk(node):
        inner: ast.AST | None = None
        if isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.ctx, ast.Store | ast.Del):
            inner = part
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            inner = part.func
        while isinstance(inner, ast.Attribute | ast.Subscript):
            inner = inner.value
        if isinstance(inner, ast.Name):
            found.add(inner.id)
    return found


def _is_star(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines."""
    if _is_main_guard(node):
        return set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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
