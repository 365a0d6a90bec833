"""Where modules come from: this package, what is installed, or the user."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKAGE = __name__.split(".")[0]
CARRIED_PARTS = ("atomic_files", "core", "schedulers", "delta", "attention", "blocks")
"""The parts of this package that an export carries; what lies above them builds and measures pipelines."""
INSTALLED_PARTS = frozenset({"site-packages", "dist-packages"})
"""What the directories of installed packages are called: dist-packages are those of Debian."""

Origin = Literal["package", "user", "installed"]


@dataclass(frozen=True)
class Module:
    """The source of a module.

    Attributes:
        name: dotted.
        text: the source.
        path: its file.
        package: what its relative imports start from; empty for a module at the top.
    """

    name: str
    text: str
    path: Path
    package: str


def origin(name: str) -> Origin:
    """Who a module belongs to. What cannot be found counts as installed: it may be, where the export is loaded."""
    top = name.partition(".")[0]
    if top == PACKAGE:
        return "package"
    if top == "__main__":
        return "user"
    if top in sys.stdlib_module_names:
        return "installed"
    path = module_path(name) or module_path(top)
    return "user" if path is not None and not _is_installed(path) else "installed"


def is_module(name: str) -> bool:
    """Whether a dotted name is one of a module or package that can be found."""
    return module_path(name) is not None


def module_path(name: str) -> Path | None:
    """The file of a module, or the directory of a package without `__init__.py`; None if there is neither."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded:
        return Path(loaded)
    parent = name.rpartition(".")[0]
    if parent and not _is_package(parent):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None
    if spec is None:
        return None
    if spec.origin is not None and spec.origin not in ("built-in", "frozen"):
        return Path(spec.origin)
    return Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else None


def _is_package(name: str) -> bool:
    path = module_path(name)
    return path is not None and (path.name == "__init__.py" or path.is_dir())


def _is_installed(path: Path) -> bool:
    """Whether an installer put the file there; editable installs lie where their user works on them."""
    return bool(INSTALLED_PARTS & set(path.resolve().parts))


def read_module(name: str) -> Module:
    """The source of a module of this package or the user.

    Raises:
        ValueError: it is the script or notebook that runs, or lies in no file of Python source in UTF-8.
    """
    path = module_path(name)
    if name == "__main__" or path is None or path.suffix != ".py" or not path.is_file():
        reason = "is the script or notebook that runs" if name == "__main__" else "has no source file"
        raise ValueError(
            f"the module {name} {reason}; write your blocks into a .py file of their own and import them from there."
        )
    try:
        return Module(name, path.read_text(encoding="utf-8").removeprefix("\ufeff"), path, _package_of(name, path))
    except UnicodeDecodeError:
        raise ValueError(f"the module {name} is not in UTF-8; save {path.name} in UTF-8.") from None


def public_names() -> dict[str, str]:
    """The names that this package hands on at its top -> the module of each, from the package on."""
    return vars(sys.modules[PACKAGE])["_PUBLIC"]


def _package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def require_carried(name: str) -> None:
    """Refuses the parts of this package that no self-contained export carries.

    Raises:
        ValueError: the module is one of these.
    """
    part = name.split(".")[1] if "." in name else ""
    if part not in CARRIED_PARTS:
        raise ValueError(
            f"{name} is not part of self-contained exports, which carry {', '.join(CARRIED_PARTS)}; move what needs "
            'it into a module of its own, or export with mode="thin".'
        )
