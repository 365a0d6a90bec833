"""All modules that some modules need, by their imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from .imports import import_statements
from .modules import Module, Origin, origin, read_module, require_carried


def source_closure(wanted: Iterable[str], carried: frozenset[Origin]) -> dict[str, Module]:
    """Modules with those of the origins in `carried` that they import, and what these import in turn, each whole.

    Args:
        wanted: names of modules.
        carried: whose modules to carry; what others have is imported from where it is installed.

    Raises:
        ValueError: a script, a module without a source file, one that no export carries, or one that cannot do
            without its own place; names it and the remedy.
    """
    found: dict[str, Module] = {}
    queue = list(wanted)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        if origin(name) == "package":
            require_carried(name)
        found[name] = read_module(name)
        tree = ast.parse(found[name].text)
        _check_place(found[name], tree)
        for _, names in import_statements(found[name], tree, carried):
            queue.extend(imported.module for imported in names)
    return dict(sorted(found.items()))


def _check_place(module: Module, tree: ast.AST) -> None:
    """Refuses what works only where the module lies: files beside it, and modules named in texts.

    Raises:
        ValueError: names the module and line.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("__file__", "__path__"):
            raise ValueError(
                f"line {node.lineno} of {module.path.name} uses {node.id}, and files beside a module are not carried; "
                "fetch them from where they are published, or write their content into the code."
            )
        if isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str) and (name.startswith(".") or origin(name) != "installed"):
                raise ValueError(
                    f"line {node.lineno} of {module.path.name} imports {name!r} by its name as a text, which is "
                    "another one in an export; write an import statement."
                )


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))
