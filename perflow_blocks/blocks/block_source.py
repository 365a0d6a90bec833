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
from types import MappingProxyType
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
FIND_SIBLINGS = """
# diffusers gives modules the name of their repository. Python does not find them if there is a dot in it.
package = ModuleType(__package__)
package.__path__ = [str(Path(__file__).parent)]
sys.modules.setdefault(__package__, package)

"""
"""Goes before the imports of the files beside `block.py`."""

_ABSENT = object()


def preset_of(blocks: ModularPipelineBlocks) -> str | None:
    """The dotted name of the preset that these blocks are, unchanged; None for other blocks."""
    kind = type(blocks)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if kind.__module__ in PRESET_MODULES and _expression(blocks, "", set(), {}) == f"{name}()" else None


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


def block_files(
    blocks: ModularPipelineBlocks, name: str | None = None, siblings: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """`modular_config.json` and `block.py`, with which diffusers makes these blocks again.

    Args:
        blocks: a preset of this package, or any other blocks.
        name: the class in `block.py`; by default a preset's own, or `SavedBlocks`.
        siblings: modules that lie beside `block.py`, each with the name of its file without the suffix.

    Raises:
        ValueError: a block whose class or arguments no file can name.
    """
    modules = set[str]()
    expression = _expression(blocks, "", modules, siblings)
    preset = preset_of(blocks) if name in (None, type(blocks).__name__) and not siblings else None
    if preset is not None:
        module, _, name = preset.rpartition(".")
        code = f'from {module} import {name}\n\n__all__ = ["{name}"]\n'
    else:
        name = name or SAVED_BLOCKS
        used = sorted({*modules, __name__, ModularPipelineBlocks.__module__})
        imports = [f"import {module}\n" for module in used if module not in siblings]
        if siblings:
            imports += ["import sys\n", "from pathlib import Path\n", "from types import ModuleType\n", FIND_SIBLINGS]
            imports += [f"from .{sibling} import __name__ as _\n" for sibling in sorted(siblings.values())]
            imports += [f"from . import {siblings[module]}\n" for module in used if module in siblings]
        code = (
            f"{''.join(imports)}\n\nclass {name}({ModularPipelineBlocks.__module__}.ModularPipelineBlocks):\n"
            '    """Makes the saved blocks, which are of their own classes."""\n\n'
            f"    def __new__(cls):\n        return {expression}\n"
        )
    is_complete = __name__ in siblings
    needed = {"diffusers": diffusers.__version__}
    if not is_complete:
        needed = {"perflow-blocks": vars(sys.modules[PACKAGE])["__version__"]}
    requirements = {package: f">={'.'.join(version.split('.')[:2])}" for package, version in needed.items()}
    config = {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"ModularPipelineBlocks": f"{CODE.removesuffix('.py')}.{name}"},
        "requirements": requirements | _requirements(blocks),
        **({} if preset is None else {PRESET_KEY: preset}),
    }
    source = "the files beside this one" if is_complete else f"the package {PACKAGE}"
    return {
        ModularPipelineBlocks.config_name: json.dumps(config, indent=2) + "\n",
        CODE: with_own_size(f'"""The blocks of a saved pipeline; needs {source}."""\n\n{code}'),
    }


def _requirements(block: ModularPipelineBlocks) -> dict[str, str]:
    """The packages that the blocks declare to need."""
    found = {} if block.sub_blocks else dict(block._requirements or {})
    for inner in block.sub_blocks.values():
        found |= _requirements(inner)
    return found


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


def _expression(block: ModularPipelineBlocks, place: str, modules: set[str], siblings: Mapping[str, str]) -> str:
    """The code that makes a block again. Notes the modules that it needs."""
    kind = type(block)
    _require_importable(kind, _label(block, place), kind.__module__ in siblings)
    modules.add(kind.__module__)
    values = _arguments(block, place)
    arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
    call = f"{siblings.get(kind.__module__, kind.__module__)}.{kind.__qualname__}({arguments})"
    usual = kind(**values)
    attributes = _changed_attributes(block, usual, place)
    inside, made = (_inside(each, place, modules, siblings) for each in (block, usual))
    if inside == made and not attributes:
        return call
    pairs = ", ".join(f"{name!r}: {code}" for name, code in inside)
    given = "".join(f", {name}={value!r}" for name, value in attributes.items())
    return f"{siblings.get(__name__, __name__)}.arranged({call}, {{{pairs}}}{given})"


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


def _inside(
    block: ModularPipelineBlocks, place: str, modules: set[str], siblings: Mapping[str, str]
) -> list[tuple[str, str]]:
    places = {name: f"{place}.{name}" if place else name for name in block.sub_blocks}
    return [(name, _expression(inner, places[name], modules, siblings)) for name, inner in block.sub_blocks.items()]


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
                f"attribute self.{name} of numbers, texts and lists of these."
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


def _require_importable(kind: type, label: str, is_carried: bool) -> None:
    module = sys.modules.get(kind.__module__)
    try:
        found = attrgetter(kind.__qualname__)(module)
    except AttributeError:  # defined inside a function
        found = None
    is_temporary = not is_carried and kind.__module__.split(".")[0] == DIFFUSERS_DYNAMIC_MODULE_NAME
    if is_temporary or found is not kind or getattr(module, "__spec__", None) is None or kind.__module__ == "__main__":
        raise ValueError(
            f"{label} cannot be saved: no other process can import {kind.__qualname__} from {kind.__module__}; define "
            "it at the top of a .py file and import it from there."
        )


def _label(block: ModularPipelineBlocks, place: str) -> str:
    return f"block {place!r} ({type(block).__name__})" if place else type(block).__name__
