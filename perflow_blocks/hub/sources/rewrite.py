"""Imports rewritten for modules that lie beside each other in one directory; all else stays byte for byte."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from .imports import Imported, import_statements
from .modules import Module, Origin

_FROM = re.compile(rb"from[\s\\]*[.\w\s\\]+?\bimport\b")


def flattened(module: Module, siblings: Mapping[str, str], carried: frozenset[Origin]) -> str:
    """The text of a module that imports its siblings as `from . sibling import name`.

    Python reads the blank after the dot as nothing. diffusers, which looks for `from .sibling import`, does not see
    such imports: from a repository it fetches what a file names once for each path through the imports, which are
    thousands, and for ever where two modules name each other. So only `block.py` names files for it.

    Args:
        siblings: dotted name of a module -> name of its file without the suffix.
    """
    source = module.text.encode()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    edits = []
    for node, names in import_statements(module, ast.parse(source), carried):
        assert node.end_lineno is not None and node.end_col_offset is not None  # as ast.parse gives them
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        alone = not source[starts[node.lineno - 1] : start].strip()
        edits.append((start, end, _rewritten(source[start:end], node, names, siblings, alone)))
    for start, end, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[end:]
    return source.decode()


def _rewritten(
    statement: bytes, node: ast.stmt, names: list[Imported], siblings: Mapping[str, str], alone: bool
) -> bytes:
    modules = {imported.module for imported in names}
    if isinstance(node, ast.ImportFrom) and len(modules) == 1:
        given = [(alias.name, alias.asname or alias.name) for alias in node.names]
        if given == [(imported.name, imported.alias) for imported in names]:
            start = f"from . {siblings[names[0].module]} import".encode()
            return _FROM.sub(lambda _: start, statement, count=1)
    parts = [_statement(imported, siblings) for imported in names]
    separator = "\n" + " " * node.col_offset if alone else "; "
    return separator.join(parts).encode()


def _statement(imported: Imported, siblings: Mapping[str, str]) -> str:
    sibling = siblings[imported.module]
    if imported.name is None:
        return f"from . import {sibling} as {imported.alias}"
    renamed = f" as {imported.alias}" if imported.alias != imported.name else ""
    return f"from . {sibling} import {imported.name}{renamed}"
