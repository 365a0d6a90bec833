"""The package's public names: each resolves, comes from where the table says, and is listed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import perflow_blocks

ROOT = Path(perflow_blocks.__file__).parent.parent


@pytest.mark.parametrize("name", [name for name in perflow_blocks.__all__ if name != "__version__"])
def test_public_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(perflow_blocks, name)
    assert value is getattr(import_module(value.__module__), name)
    assert value.__module__.startswith("perflow_blocks.")
    assert value.__doc__, f"{name} has no docstring"
    assert name in dir(perflow_blocks)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = perflow_blocks.no_such_thing
    assert not hasattr(perflow_blocks, "no_such_thing")


def test_star_import_gives_every_public_name() -> None:
    namespace: dict[str, object] = {}
    exec("from perflow_blocks import *", namespace)
    assert set(perflow_blocks.__all__) <= set(namespace)


def test_version_is_the_one_of_the_distribution() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert perflow_blocks.__version__ == declared[1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, perflow_blocks; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "perflow_blocks" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "numpy", "PIL", "typer", "safetensors"}
    assert not [name for name in loaded if name.startswith("perflow_blocks.")]
