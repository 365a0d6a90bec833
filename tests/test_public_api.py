"""The package's public names: each resolves, comes from where the table says, and is listed."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path

import pytest

import perflow_blocks
from tests.conftest import python

ROOT = Path(perflow_blocks.__file__).parent.parent


def test_public_names_are_the_documented_objects_of_their_modules() -> None:
    namespace: dict[str, object] = {}
    exec("from perflow_blocks import *", namespace)
    for name in set(perflow_blocks.__all__) - {"__version__"}:
        value = getattr(perflow_blocks, name)
        assert value is namespace[name] is getattr(import_module(value.__module__), name)
        assert value.__module__.startswith("perflow_blocks.")
        assert value.__doc__, f"{name} has no docstring"
        assert name in dir(perflow_blocks)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = perflow_blocks.no_such_thing


def test_version_is_the_one_of_the_distribution() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None and perflow_blocks.__version__ == declared[1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, perflow_blocks; print(*sorted(sys.modules))"
    loaded = set(python("-c", code, environment=dict(os.environ), cwd=ROOT).split())
    assert "perflow_blocks" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "PIL", "typer", "safetensors"}
    assert not [name for name in loaded if name.startswith("perflow_blocks.")]
