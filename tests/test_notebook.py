"""The notebook for SDXL cannot run in tests; its cells compile, and what they import of this package exists."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from itertools import pairwise
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "docs" / "perflow_sdxl.ipynb"


def test_each_cell_is_explained_compiles_and_imports_what_exists() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for above, cell in pairwise(cells):
        if cell["cell_type"] != "code":
            continue
        assert above["cell_type"] == "markdown" and (cell["outputs"], cell["execution_count"]) == ([], None)
        code = "".join(line for line in cell["source"] if line[0] not in "%!")
        for node in ast.walk(compile(code, cell["id"], "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("perflow_blocks"):
                assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)
