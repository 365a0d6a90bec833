"""The architecture, read from the sources: imports only go down.

A file may import from lower layers of the table below and from its own package. The packages of the top layer stand in
the order training, evaluation, batches, app, demo, cli; `SIBLINGS` lists what a package may use beside it, `NAMED`
single files that may use one module. What a self-contained export carries (layers 0 to 4) uses few packages of others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "perflow_blocks"
LAYERS = {
    "atomic_files": 0,
    "core": 0,
    "schedulers": 1,
    "delta": 2,
    "attention": 3,
    "blocks": 4,
    "builder": 5,
    "hub": 5,
    "testing": 5,
    "training": 6,
    "evaluation": 6,
    "batches": 6,
    "app": 6,
    "demo": 6,
    "cli": 6,
    "__init__": 7,
}
SIBLINGS = {
    "demo": {"training", "evaluation"},
    "batches": {"evaluation"},
    "app": {"evaluation", "batches"},
    "cli": {"demo", "training", "evaluation", "batches", "app"},
}
NAMED = {
    ("training/data.py", "demo.images"),
    ("training/distillation.py", "demo.judge"),
    ("training/validation.py", "evaluation.sheet"),
}
"""Files that use one module of a package above theirs: rendered images as a data set, weights as a teacher, sheets of
images, and the quality of a finished student."""
EXPORTED = {"torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL"}
"""Third-party packages that layers 1 to 4 may use; the core has torch alone, atomic_files.py none."""


def imported_modules(path: Path, package: Path) -> Iterator[str]:
    """The absolute names of all that a file imports, at any depth; `from . import x` names x too."""
    inside = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            # `from package import name` may mean a module: count both readings.
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def part_of(parts: tuple[str, ...]) -> str:
    """The top-level part of the package a path or dotted name belongs to: "core", "cli", ... or "__init__"."""
    return parts[0].removesuffix(".py") if parts else "__init__"


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        where = str(path.relative_to(package))
        part = part_of(path.relative_to(package).parts)
        if part not in LAYERS:
            found.append(f"{where}: no layer is assigned to {part!r}")
            continue
        named = {f"{package.name}.{module}" for file, module in NAMED if file == path.relative_to(package).as_posix()}
        for name in imported_modules(path, package):
            if any(name == module or name.startswith(f"{module}.") for module in named):
                continue
            complaint = _complaint(part, name, package.name)
            if complaint:
                found.append(f"{where}: {complaint}")
    return found


def _complaint(part: str, name: str, package: str) -> str | None:
    top, *rest = name.split(".")
    if name == f"{package}.__version__":  # a string, in a module that imports nothing
        return None
    if top != package:
        allowed = {"atomic_files": set(), "core": {"torch"}}.get(part, EXPORTED)
        if LAYERS[part] < 5 and top not in allowed and top not in sys.stdlib_module_names:
            return f"layer {LAYERS[part]} imports the third-party package {top!r}"
        return None
    target = part_of(tuple(rest))
    if target not in LAYERS:
        return f"imports {name}: no layer is assigned to it (import from the module that defines a name)"
    if target == part or target in SIBLINGS.get(part, ()) or LAYERS[target] < LAYERS[part]:
        return None
    return f"{part} (layer {LAYERS[part]}) imports {name} (layer {LAYERS[target]})"


def test_imports_only_go_down() -> None:
    assert violations(PACKAGE) == []


def test_every_directory_has_a_layer_and_is_read() -> None:
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} <= set(LAYERS)
    assert len(list(PACKAGE.rglob("*.py"))) > 5


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/a.py", "import diffusers"),
        ("atomic_files.py", "import torch"),
        ("core/a.py", "def f():\n    from ..blocks import denoise"),
        ("core/a.py", "from .. import schedulers"),
        ("schedulers/a.py", "from perflow_blocks.blocks.specs import X"),
        ("schedulers/a.py", "import perflow_blocks.cli"),
        ("delta/a.py", "from perflow_blocks import builder"),
        ("delta/sub/a.py", "from ...attention.config import X"),
        ("blocks/a.py", "from ..hub import X"),
        ("blocks/a.py", "import typer"),
        ("builder.py", "from .hub import X"),
        ("builder.py", "from .training.losses import X"),
        ("training/a.py", "from ..cli import X"),
        ("training/a.py", "from ..demo import X"),
        ("training/a.py", "from ..demo.images import X"),
        ("training/data.py", "from ..demo.models import X"),
        ("blocks/a.py", "from perflow_blocks import PeRFlowScheduler"),
        ("elsewhere/a.py", "import torch"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "perflow_blocks" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path / "perflow_blocks")
    assert len(found) == 1
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/a.py", "import math\nimport torch.nn.functional as F\nfrom .windows import TimeWindows"),
        ("core/a.py", "from . import windows\nfrom collections.abc import Mapping"),
        ("delta/sub/a.py", "from ..files import X\nfrom ...schedulers.scheduling_perflow import Y"),
        ("blocks/a.py", "from diffusers import X\nfrom perflow_blocks.core import windows"),
        ("hub.py", "from .blocks.saving import X"),
        ("cli/a.py", "import typer\nfrom ..demo import X\nfrom ..training import Y\nfrom ..core.windows import Z"),
        ("demo/train.py", "from ..training.losses import X"),
        ("training/data.py", "from ..demo.images import X"),
        ("__init__.py", "from .cli import main"),
    ],
)
def test_what_goes_down_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "perflow_blocks" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "perflow_blocks") == []
