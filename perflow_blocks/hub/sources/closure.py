"""All modules that some names need, by their imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from .imports import Imported, import_statements
from .modules import Module, Origin, origin, read_module, require_carried
from .prune import pruned

EVERYTHING = "*"


def source_closure(wanted: Iterable[tuple[str, str]], carried: frozenset[Origin]) -> dict[str, Module]:
    """The modules of the origins in `carried` that names need, with what these import in turn.

    Modules are carried whole. Only of a script, and of a user's module that imports what no export carries, is it the
    part that is needed.

    Args:
        wanted: modules and names in them.
        carried: whose modules to carry; what others have is imported from where it is installed.

    Raises:
        ValueError: a module without a source file, one that no export carries, or one that cannot do without its
            own place; names it and the remedy.
    """
    needed: dict[str, set[str]] = {}
    found: dict[str, Module] = {}
    queue = list(wanted)
    while queue:
        name, thing = queue.pop()
        if thing in needed.setdefault(name, set()):
            continue
        needed[name].add(thing)
        if name in found and not _is_part(name, found[name]):
            continue
        found[name] = _carried_part(name, needed[name], carried)
        tree = ast.parse(found[name].text)
        _check_place(found[name], tree)
        for _, names in import_statements(found[name], tree, carried):
            queue.extend((imported.module, _thing(imported)) for imported in names)
    return dict(sorted(found.items()))


def _thing(imported: Imported) -> str:
    return EVERYTHING if imported.name is None else imported.name


def _is_part(name: str, module: Module) -> bool:
    """Whether a module was cut down, so that further names may need more of it."""
    return origin(name) == "user" and module.text != read_module(name).text


def _carried_part(name: str, needed: set[str], carried: frozenset[Origin]) -> Module:
    if origin(name) == "package":
        require_carried(name)
        return read_module(name)
    module = read_module(name)
    if EVERYTHING not in needed and (name == "__main__" or not _can_be_whole(module, carried)):
        module = pruned(module, needed)
    for imported in _imported(module, carried):
        if origin(imported.module) == "package":
            require_carried(imported.module)
    return module


def _can_be_whole(module: Module, carried: frozenset[Origin]) -> bool:
    try:
        for imported in _imported(module, carried):
            if origin(imported.module) == "package":
                require_carried(imported.module)
        _check_place(module, ast.parse(module.text))
    except ValueError:
        return False
    return True


def _imported(module: Module, carried: frozenset[Origin]) -> list[Imported]:
    statements = import_statements(module, ast.parse(module.text), carried)
    return [imported for _, names in statements for imported in names]


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
