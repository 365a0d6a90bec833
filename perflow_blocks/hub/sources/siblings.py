"""The files beside `block.py`: their names, their first lines, and what diffusers reads in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping

from ... import __version__
from .modules import PACKAGE, Module, origin

LICENCE = "Apache-2.0"
"""Of this package's own modules."""

RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)
"""What diffusers takes for the import of a sibling, in texts and docstrings too."""


def sibling_names(modules: Mapping[str, Module]) -> dict[str, str]:
    """The file of each module, without the suffix: `perflow_`, digits that all texts decide, the module's name."""
    tag = content_tag(modules)
    names: dict[str, str] = {}
    for name in sorted(modules):
        wanted = f"perflow_{tag}_{_flat_name(name)}"
        free, number = wanted, 2
        while free in names.values():
            free, number = f"{wanted}_{number}", number + 1
        names[name] = free
    return names


def content_tag(modules: Mapping[str, Module]) -> str:
    """Eight hexadecimal digits of a hash over the texts and the version of this package."""
    digest = hashlib.sha256(__version__.encode())
    for name, module in sorted(modules.items()):
        for part in (name, module.text):
            digest.update(len(part.encode()).to_bytes(8, "big") + part.encode())
    return digest.hexdigest()[:8]


def _flat_name(name: str) -> str:
    if origin(name) == "package":
        parts = name.split(".")[1:]
    else:
        parts = ["user", *name.split(".")]
    return re.sub(r"[^0-9A-Za-z_]", "_", "_".join(parts))


def header(module: Module) -> str:
    """The first line of a sibling: where it is from."""
    if origin(module.name) == "package":
        return f"# {module.name} of {PACKAGE} {__version__}, as it is but for its imports. Licence: {LICENCE}.\n"
    return f"# The user's module {module.name}, as it is but for its imports. Exported with {PACKAGE} {__version__}.\n"


def require_readable(name: str, text: str, siblings: Collection[str]) -> None:
    """Refuses a text in which diffusers would see an import of a file that is not there.

    Raises:
        ValueError: names the file and the import.
    """
    for found in RELATIVE_IMPORT.finditer(text):
        sibling = found[1] or found[2]
        if sibling not in siblings:
            raise ValueError(
                f"{name} holds the line {found[0].strip()!r}, which diffusers takes for an import of a file "
                f"{sibling}.py, in a docstring too; write it in another form."
            )
