"""How the blocks of a saved pipeline come back: a preset of this package by its name, others by code.

The code of `block.py` imports each block's class from where it is defined and puts the arrangement together again.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import zlib
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import diffusers
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InsertableDict
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME
from huggingface_hub.errors import EntryNotFoundError

from ..delta.files import read_json
from .repository import BLOCKS_CONFIG, class_reference

PRESET_KEY = "perflow_preset"
"""In `modular_config.json`: the preset that `PeRFlowModularPipeline.from_pretrained` makes without remote code."""

PACKAGE = __name__.split(".")[0]
PRESET_MODULES = tuple(f"{PACKAGE}.{name}" for name in ("blocks.auto_blocks", "blocks.workflows", "demo.blocks"))
DEFAULT_PRESET = f"{PACKAGE}.blocks.auto_blocks.PeRFlowSDXLAutoBlocks"
STRUCTURE = frozenset({"sub_blocks", "block_classes"})
CODE, SAVED_BLOCKS = "block.py", "SavedBlocks"
_ABSENT = object()


def preset_of(blocks: ModularPipelineBlocks) -> str | None:
    """The dotted name of the preset that these blocks are, unchanged; None for other blocks."""
    kind = type(blocks)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if kind.__module__ in PRESET_MODULES and _expression(blocks, "", set()) == f"{name}()" else None


def make_preset(name: str) -> ModularPipelineBlocks:
    """The preset of a dotted name. A name of anything else is refused before anything is imported.

    Raises:
        ValueError: no preset of this package.
    """
    module, _, kind = str(name).rpartition(".")
    found: Any = getattr(import_module(module), kind, None) if module in PRESET_MODULES else None
    if getattr(found, "__module__", None) != module or not issubclass(found, ModularPipelineBlocks):
        raise ValueError(
            f"{PRESET_KEY}={name!r} in modular_config.json must be a preset of {', '.join(PRESET_MODULES)}; install "
            f"the version of {PACKAGE} that saved it, or pass blocks to the class."
        )
    return found()


def load_blocks(place: str, trust_remote_code: bool | None, **hub: Any) -> ModularPipelineBlocks:
    """The blocks of a directory or repository; `PeRFlowSDXLAutoBlocks` where it is a model without blocks.

    Raises:
        ValueError: it has code of its own and `trust_remote_code` is not set, or its `modular_config.json` is broken.
    """
    local = Path(place, hub.get("subfolder") or "", BLOCKS_CONFIG)
    try:
        config = read_json(local) if local.is_file() else ModularPipelineBlocks.load_config(place, **hub)
    except OSError as error:
        if isinstance(error.__context__, EntryNotFoundError) or error.__context__ is None:
            return make_preset(DEFAULT_PRESET)
        raise
    if config.get(PRESET_KEY) is not None:
        return make_preset(config[PRESET_KEY])
    class_reference(config)
    return ModularPipelineBlocks.from_pretrained(place, trust_remote_code=bool(trust_remote_code), **hub)


def block_files(blocks: ModularPipelineBlocks) -> dict[str, str]:
    """`modular_config.json` and `block.py`, with which diffusers makes these blocks again.

    Raises:
        ValueError: a block whose class or arguments no file can name.
    """
    preset, modules = preset_of(blocks), set[str]()
    if preset is not None:
        module, _, name = preset.rpartition(".")
        code = f"from {module} import {name}\n"
    else:
        name = SAVED_BLOCKS
        made = _expression(blocks, "", modules)
        imports = "".join(
            f"import {module}\n" for module in sorted({*modules, __name__, ModularPipelineBlocks.__module__})
        )
        code = (
            f"{imports}\n\nclass {name}({ModularPipelineBlocks.__module__}.ModularPipelineBlocks):\n"
            '    """Makes the saved blocks, which are of their own classes."""\n\n'
            f"    def __new__(cls):\n        return {made}\n"
        )
    version = vars(sys.modules[PACKAGE])["__version__"]
    config = blocks_config(name, {"perflow-blocks": f">={'.'.join(version.split('.')[:2])}"}, preset)
    docstring = f'"""The blocks of a saved pipeline; needs the package {PACKAGE}."""\n\n'
    return {
        ModularPipelineBlocks.config_name: json.dumps(config, indent=2) + "\n",
        CODE: with_own_size(docstring + code),
    }


def blocks_config(class_name: str, requirements: Mapping[str, str], preset: str | None) -> dict[str, Any]:
    """What `modular_config.json` holds: the class to run, the packages that it needs, and the preset that it is."""
    return {
        "_class_name": class_name,
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"ModularPipelineBlocks": f"{CODE.removesuffix('.py')}.{class_name}"},
        "requirements": dict(requirements),
        **({} if preset is None else {PRESET_KEY: preset}),
    }


def with_own_size(text: str) -> str:
    """Code followed by a line whose length depends on the content.

    diffusers copies the `block.py` of every local directory to one place, and Python takes what it compiled before for
    the file's if that is of the same size and second.
    """
    return (
        f"{text}\n# Python tells a file from an earlier one by second and size. So this file has its own size:\n"
        f"# {'-' * (1 + zlib.crc32(text.encode()) % 113)}\n"
    )


def arranged(block: Any, inside: Mapping[str, ModularPipelineBlocks], **attributes: Any) -> Any:
    """A block with other blocks inside; the `block.py` of a saved pipeline calls it."""
    block.sub_blocks = InsertableDict(inside)
    vars(block).update(attributes)
    return block


def _expression(block: ModularPipelineBlocks, place: str, modules: set[str]) -> str:
    """The code that makes a block again. Notes the modules that it needs."""
    kind = type(block)
    _require_importable(kind, _label(block, place))
    modules.add(kind.__module__)
    values = _arguments(block, place)
    call = f"{kind.__module__}.{kind.__qualname__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    usual = kind(**values)
    attributes = _changed_attributes(block, usual, place)
    inside, made = _inside(block, place, modules), _inside(usual, place, modules)
    if inside == made and not attributes:
        return call
    pairs = ", ".join(f"{name!r}: {code}" for name, code in inside)
    given = "".join(f", {name}={value!r}" for name, value in attributes.items())
    return f"{__name__}.arranged({call}, {{{pairs}}}{given})"


def _changed_attributes(block: ModularPipelineBlocks, usual: ModularPipelineBlocks, place: str) -> dict[str, Any]:
    """The public attributes that were set after the block was made. An object that the constructor makes is none."""
    changed: dict[str, Any] = {}
    for name, value in vars(block).items():
        made = vars(usual).get(name, _ABSENT)
        if name.startswith("_") or name in STRUCTURE or (type(value) is type(made) and not _is_plain(value)):
            continue
        if not _is_plain(value):
            raise ValueError(
                f"{_label(block, place)} cannot be saved: its attribute {name!r} was set to {value!r}, which no file "
                "can hold; take it back, or make it part of the class."
            )
        if made is _ABSENT or value != made:
            changed[name] = value
    return changed


def _inside(block: ModularPipelineBlocks, place: str, modules: set[str]) -> list[tuple[str, str]]:
    places = {name: f"{place}.{name}" if place else name for name in block.sub_blocks}
    return [(name, _expression(inner, places[name], modules)) for name, inner in block.sub_blocks.items()]


def _arguments(block: ModularPipelineBlocks, place: str) -> dict[str, Any]:
    """The constructor arguments that differ from their defaults, read from attributes of their names."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(block)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(block, name, _ABSENT)
        if value is _ABSENT or not (value is parameter.default or _is_plain(value)):
            state = "is not kept on the block" if value is _ABSENT else f"is {value!r}, which no file can hold"
            raise ValueError(
                f"{_label(block, place)} cannot be saved: its constructor argument {name!r} {state}; keep it as an "
                f"attribute self.{name} of numbers, texts and lists of these, or use export_workflow."
            )
        if value is not parameter.default and value != parameter.default:
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    """Whether Python's literals give the value again."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, TypeError, SyntaxError):
        return False


def _require_importable(kind: type, label: str) -> None:
    module = sys.modules.get(kind.__module__)
    try:
        found = attrgetter(kind.__qualname__)(module)
    except AttributeError:  # defined inside a function
        found = None
    run_only = kind.__module__.split(".")[0] in ("__main__", DIFFUSERS_DYNAMIC_MODULE_NAME)
    if run_only or found is not kind or getattr(module, "__spec__", None) is None:
        raise ValueError(
            f"{label} cannot be saved: no other process can import {kind.__qualname__} from {kind.__module__}; define "
            "it at the top of a .py file and import it from there, or use export_workflow."
        )


def _label(block: ModularPipelineBlocks, place: str) -> str:
    return f"block {place!r} ({type(block).__name__})" if place else type(block).__name__
