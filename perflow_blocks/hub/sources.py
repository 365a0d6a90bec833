"""The modules that a repository carries: the user's own, and in self-contained exports those of this package.

Each is copied whole. They lie beside `block.py`, as diffusers loads neither folders nor packages, so their imports of
each other are written anew.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .. import __version__
from ..blocks.block_source import PACKAGE

LAYERS = ("atomic_files.py", "core", "schedulers", "delta", "attention", "blocks")
"""What self-contained exports carry of this package: all that blocks need."""
INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Names of the folders of installed packages, which nobody carries."""


def carried_modules(blocks: ModularPipelineBlocks, with_package: bool) -> tuple[dict[str, str], dict[str, str]]:
    """The modules that lie beside `block.py`: the name of each file, without its suffix, and the files' texts.

    diffusers keeps the files of all local directories in one folder, and a process imports a name once. So the names
    hold a hash of all the texts: another version has other names.
    """
    modules = _modules_of_the_user(blocks)
    root = Path(sys.modules[PACKAGE].__file__ or "").parent
    for path in [root / LAYERS[0], *(file for layer in LAYERS[1:] for file in (root / layer).rglob("*.py"))]:
        if with_package:
            parts = path.relative_to(root.parent).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    texts = {name: path.read_text(encoding="utf-8-sig") for name, path in sorted(modules.items())}
    tag = hashlib.sha256(repr((__version__, texts)).encode()).hexdigest()[:8]
    siblings = {name: f"perflow_{tag}_{re.sub(r'[^0-9A-Za-z]', '_', name)}" for name in texts}
    files = {}
    for name, text in texts.items():
        package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
        header = f"# The module {name}, exported by {PACKAGE} {__version__} whole, with imports written anew.\n"
        files[f"{siblings[name]}.py"] = header + _flattened(text, package, siblings, name)
    return siblings, files


def _modules_of_the_user(blocks: ModularPipelineBlocks) -> dict[str, Path]:
    """The user's modules that define blocks, and those of the user's that these import in turn."""
    found: dict[str, Path] = {}
    names = sorted(set(_block_modules(blocks)))
    while names:
        name = names.pop()
        path = _source_of_the_user(name)
        if path is None or name in found:
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8-sig"))):
            names += [module for module, _, _ in _imported(node, package)]
    return found


def _block_modules(block: ModularPipelineBlocks) -> Iterator[str]:
    yield type(block).__module__
    for inner in block.sub_blocks.values():
        yield from _block_modules(inner)


def _source_of_the_user(name: str) -> Path | None:
    """The file of a module that the user wrote, not one of this package, of Python or of an installed package."""
    top = name.partition(".")[0]
    if top in ("", "__main__", PACKAGE) or top in sys.stdlib_module_names:
        return None
    path = _source(top) and _source(name)
    return path if path is not None and path.suffix == ".py" and not INSTALLED & set(path.resolve().parts) else None


def _source(name: str) -> Path | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        file = spec.origin if spec is not None and spec.has_location else None
    return None if file is None else Path(file)


def _imported(node: ast.AST, package: str) -> Iterator[tuple[str, str | None, str]]:
    """What an import statement brings: a module, a name in it, or None for the module itself, and its name here."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, None, alias.asname or alias.name
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")[: 1 - node.level or None] if node.level else []
        base = ".".join([*parts, *([node.module] if node.module else [])])
        for alias in node.names:
            here = alias.asname or alias.name
            if base == PACKAGE:  # which hands on the names of its modules
                yield getattr(getattr(sys.modules[PACKAGE], alias.name, None), "__module__", base), alias.name, here
            elif (base.startswith(PACKAGE) or _source_of_the_user(base)) and _source(f"{base}.{alias.name}"):
                yield f"{base}.{alias.name}", None, here
            else:
                yield base, alias.name, here


def _flattened(text: str, package: str, siblings: Mapping[str, str], module: str) -> str:
    """The text with imports of the files beside it.

    There is a blank after the dot of these imports. Python does not mind it, and diffusers does not see them: from a
    repository it would fetch each file once for every path through the imports. `block.py` names all files for it.
    """
    source = text.encode()
    starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        statement = _statement(node, package, siblings, module)
        if statement is not None:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            source = source[:start] + statement.encode() + source[end:]
    return source.decode()


def _statement(
    node: ast.Import | ast.ImportFrom, package: str, siblings: Mapping[str, str], module: str
) -> str | None:
    """An import statement for a file beside the others; None for one that stays as it is."""
    found = list(_imported(node, package))
    missing = [source for source, _, _ in found if source.split(".")[0] == PACKAGE and source not in siblings]
    if missing and f"{PACKAGE}.blocks" in siblings:
        raise ValueError(
            f"line {node.lineno} of {module} imports {missing[0]}, and self-contained exports carry of {PACKAGE} only "
            f'{", ".join(LAYERS)}; move what needs it into another module, or pass mode="thin".'
        )
    if siblings.keys().isdisjoint(source for source, _, _ in found):
        return None
    statements: dict[str, list[str]] = {}
    for source, name, here in found:
        renamed = f" as {here}" if here != name else ""
        if source in siblings and name is not None:
            statements.setdefault(f"from . {siblings[source]} import", []).append(f"{name}{renamed}")
        elif source in siblings and "." not in here:
            statements.setdefault("from . import", []).append(f"{siblings[source]} as {here}")
        elif name is not None:
            statements.setdefault(f"from {source} import", []).append(f"{name}{renamed}")
        else:
            raise ValueError(
                f"line {node.lineno} of {module} imports {source} in a form that does not work for modules that lie "
                "side by side; import each module in a statement of its own, as `from package import module`."
            )
    return "; ".join(f"{head} {', '.join(names)}" for head, names in statements.items())
