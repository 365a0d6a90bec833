"""The imports of a module, each traced to the module that defines the name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from .modules import PACKAGE, Module, is_module, module_path, origin, public_names, read_module


@dataclass(frozen=True)
class Imported:
    """One name that an import statement brings.

    Attributes:
        module: the module that defines it.
        name: what it is called there; None where it is the module itself, "*" for everything.
        alias: what it is called here.
    """

    module: str
    name: str | None
    alias: str


def import_statements(
    module: Module, tree: ast.AST, carried: frozenset[str]
) -> Iterator[tuple[ast.stmt, list[Imported]]]:
    """The import statements of a module, at any depth, that bring something of the origins in `carried`.

    Raises:
        ValueError: an import that a flat directory of files cannot express; names module, line and remedy.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found = _from_import(module, node, carried)
        elif isinstance(node, ast.Import):
            found = _plain_import(module, node, carried)
        else:
            continue
        if found:
            yield node, found


def external_imports(module: Module, tree: ast.Module) -> set[str]:
    """The installed packages that a module cannot do without: those imported at its top, outside `try` and `if`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found if origin(name) == "installed"}


def absolute_name(module: Module, node: ast.ImportFrom) -> str:
    """What a `from` import imports from, as a dotted name; empty for a relative one outside a package."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".") if module.package else []
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _from_import(module: Module, node: ast.ImportFrom, carried: frozenset[str]) -> list[Imported]:
    source = absolute_name(module, node)
    if not source or origin(source) not in carried:
        return []
    found = []
    for alias in node.names:
        where, name = trace(source, alias.name)
        if name == "*" and _is_init(where):
            raise _cannot(module, node, f"from {source} import * brings names of several modules; name what is needed")
        found.append(Imported(where, name, alias.asname or alias.name))
    return found


def _plain_import(module: Module, node: ast.Import, carried: frozenset[str]) -> list[Imported]:
    names = [alias for alias in node.names if origin(alias.name) in carried]
    if not names:
        return []
    for alias in node.names:
        if origin(alias.name) not in carried:
            raise _cannot(module, node, "import each module in a statement of its own")
        if _is_init(alias.name) or ("." in alias.name and alias.asname is None):
            raise _cannot(module, node, f"write `from {alias.name} import ...` in place of `import {alias.name}`")
    return [Imported(alias.name, None, alias.asname or alias.name) for alias in names]


def trace(source: str, name: str) -> tuple[str, str | None]:
    """The module that defines what `from source import name` brings, and its name there; None for a module itself.

    Packages that only hand names on are looked through, so that they need not be carried.
    """
    if not _is_init(source):
        return source, name
    if source == PACKAGE:
        defined = public_names().get(name)
        if defined is not None:
            return f"{PACKAGE}.{defined}", name
    handed_on = _handed_on(source).get(name)
    if handed_on is not None:
        return trace(*handed_on)
    if is_module(f"{source}.{name}"):
        return f"{source}.{name}", None
    return source, name


def _handed_on(package: str) -> dict[str, tuple[str, str]]:
    """Names that the top level of an `__init__.py` imports from elsewhere -> where from, and the name there."""
    path = module_path(package)
    if path is None or path.is_dir():
        return {}
    module = read_module(package)
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(module.text).body:
        if isinstance(node, ast.ImportFrom):
            source = absolute_name(module, node)
            if source and source != package and origin(source) != "installed":
                found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return found


def _is_init(name: str) -> bool:
    path = module_path(name)
    return path is not None and (path.name == "__init__.py" or path.is_dir())


def _cannot(module: Module, node: ast.stmt, remedy: str) -> ValueError:
    return ValueError(
        f"line {node.lineno} of {module.path.name} is an import that cannot be carried into one directory; {remedy}."
    )
