"""What must be installed where an export is loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ... import __version__
from .imports import external_imports
from .modules import Module

DISTRIBUTION = "perflow-blocks"
STABLE_DIFFUSION = ("torch", "transformers", "accelerate", "tokenizers")
"""What pipelines of diffusers need besides what its metadata demand without extras."""


def requirements_of(blocks: ModularPipelineBlocks, modules: Mapping[str, Module], mode: str) -> dict[str, str]:
    """Distributions and version specifiers: diffusers or this package, and what users' modules import beyond these.

    Versions are at least those installed, in their first two numbers. What the blocks declare goes before.
    """
    found = {"diffusers": _at_least(version("diffusers"))} if mode == "self-contained" else {}
    if mode == "thin":
        found[DISTRIBUTION] = _at_least(__version__)
    provided = {*_needed_by_diffusers(), canonicalize_name(DISTRIBUTION)}
    owners = packages_distributions()
    for module in modules.values():
        for package in sorted(external_imports(module, ast.parse(module.text))):
            for distribution in owners.get(package, [])[:1]:
                if canonicalize_name(distribution) not in provided:
                    found[distribution] = _at_least(version(distribution))
    for declared in _declared(blocks):
        found.update(declared)
    return dict(sorted(found.items()))


def _at_least(installed: str) -> str:
    major, minor, *_ = [*Version(installed).release, 0]
    return f">={major}.{minor}"


def _needed_by_diffusers() -> Iterator[str]:
    yield "diffusers"
    yield from STABLE_DIFFUSION
    try:
        demanded = requires("diffusers") or []
    except PackageNotFoundError:  # run from a checkout
        return
    for text in demanded:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def _declared(block: ModularPipelineBlocks) -> Iterator[dict[str, Any]]:
    """What blocks without blocks inside declare as `_requirements`."""
    if block.sub_blocks:
        for inner in block.sub_blocks.values():
            yield from _declared(inner)
    elif block._requirements:
        yield block._requirements
