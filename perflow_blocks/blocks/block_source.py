"""How a pipeline's directory names its blocks and components: what is written into it, and what is read from it.

A preset of this package comes back by its name, other blocks by code: `block.py` imports each block's class from where
it is defined and puts the arrangement together again. What is read is checked first: it may come from a stranger.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
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

from ..core.noise_schedule import make_alphas_cumprod
from ..delta.files import leads_out, read_json, shard_names
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS

BLOCKS_CONFIG, INDEX, CLASSIC_INDEX = "modular_config.json", "modular_model_index.json", "model_index.json"
LOCATION = "pretrained_model_name_or_path"
PRESET_KEY = "perflow_preset"
"""In `modular_config.json`: the preset that `PeRFlowModularPipeline.from_pretrained` makes without remote code."""

PACKAGE = __name__.split(".")[0]
_HOMES = ("blocks.auto_blocks", "blocks.sd", "blocks.unconditional", "blocks.workflows", "demo.blocks")
PRESET_MODULES = tuple(f"{PACKAGE}.{name}" for name in _HOMES)
SDXL_PRESET = f"{PACKAGE}.blocks.auto_blocks.PeRFlowSDXLAutoBlocks"
SD_PRESET = f"{PACKAGE}.blocks.sd.PeRFlowSDAutoBlocks"
UNCONDITIONAL_PRESET = f"{PACKAGE}.blocks.unconditional.PeRFlowUnconditionalBlocks"
CODE, SAVED_BLOCKS = "block.py", "SavedBlocks"
FIND_SIBLINGS = """
# diffusers gives modules the name of their repository. Python does not find them if there is a dot in it.
package = ModuleType(__package__)
package.__path__ = [str(Path(__file__).parent)]
sys.modules.setdefault(__package__, package)

"""
"""Goes before the imports of the files beside `block.py`."""

_CLASS = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
_MAY_BE_ABSOLUTE = (LOCATION, "delta")

# Reading


def require_sound(directory: Path, *, portable: bool = False, index: Mapping[str, Any] | None = None) -> None:
    """Checks that index, shards' indices and the scheduler's configuration can be used and stay in the directory.

    Args:
        directory: of a pipeline or a workflow. It needs no index.
        portable: whether an index may not name places of this machine either, as `save_pretrained` does.
        index: what to check in place of the directory's.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    file = next((directory / name for name in (INDEX, CLASSIC_INDEX) if (directory / name).is_file()), None)
    if index is None:
        index = {} if file is None else read_json(file)
    folders = {""}
    for name, key, path in _index_paths(index):
        if not isinstance(path, str) or leads_out(path):
            if portable or key not in _MAY_BE_ABSOLUTE or not os.path.isabs(str(path)):
                raise ValueError(f"{file} names {path!r} as the {key} of {name}; it must be a path in the repository.")
        elif key == "subfolder":
            folders.add(path)
    for folder in folders:
        for shards in (directory / folder).glob("*.index*.json"):
            shard_names(shards)
    scheduler = directory / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        config = read_json(scheduler)
        if config.keys().isdisjoint(NOISE_SCHEDULE_KEYS):
            raise ValueError(f"{scheduler} is not a scheduler's: it has none of {', '.join(NOISE_SCHEDULE_KEYS)}.")
        make_alphas_cumprod(num_train_timesteps=config.get("num_train_timesteps", 1000))  # before it fills the memory


def _index_paths(index: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every path that an index names, after the component's name and what the path is for."""
    for name, value in index.items():
        if is_entry(value):
            for key in (LOCATION, "repo", "subfolder", "variant", "revision"):
                if value[2].get(key) is not None:
                    yield name, key, value[2][key]
        elif isinstance(value, list) and len(value) == 2:  # of a classic pipeline, in a folder of its own
            yield name, "subfolder", name
        elif name == "delta" and value is not None:
            yield "the pipeline", name, value


def is_entry(value: Any) -> bool:
    """Whether a value of a modular index is a component's: its library, its class, and where it is loaded from."""
    return isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)


def workflow_config(directory: Path) -> tuple[dict[str, Any], str, str]:
    """The `modular_config.json` of a workflow, and the file and the class that it names.

    Raises:
        ValueError: it is missing or broken, or the file is missing.
    """
    if not (directory / BLOCKS_CONFIG).is_file():
        raise ValueError(
            f"{directory} is not a workflow: it has no {BLOCKS_CONFIG}; export_workflow writes workflows."
        )
    config = read_json(directory / BLOCKS_CONFIG)
    file, kind = _class_reference(config)
    if not (directory / file).is_file():
        raise ValueError(f"{directory} has no {file}, which its {BLOCKS_CONFIG} names; export the workflow again.")
    return config, file, kind


def _class_reference(config: Mapping[str, Any]) -> tuple[str, str]:
    """The file and the class of the blocks that a `modular_config.json` names."""
    entry = config.get("auto_map")
    named = entry.get("ModularPipelineBlocks") if isinstance(entry, dict) else entry
    match = _CLASS.fullmatch(named) if isinstance(named, str) else None
    if match is None:
        raise ValueError(
            f'{BLOCKS_CONFIG} must name the blocks as "auto_map": {{"ModularPipelineBlocks": "block.MyBlocks"}}, '
            f"not {named!r}; export the workflow again."
        )
    return f"{match[1]}.py", match[2]


def load_blocks(place: str, trust_remote_code: bool | None, **hub: Any) -> ModularPipelineBlocks:
    """The blocks of a directory or repository; those of `preset_for` where it is a model without blocks.

    Raises:
        ValueError: it has code of its own and `trust_remote_code` is not set, or its `modular_config.json` is broken.
    """
    config = _blocks_config(place, **hub)
    if config is None:
        return preset_for(place, **hub)
    if config.get(PRESET_KEY) is not None:
        return make_preset(config[PRESET_KEY])
    file, _ = _class_reference(config)
    if not trust_remote_code:
        raise ValueError(
            f"{place} has blocks of its own; read its {file}, then pass trust_remote_code=True, which perflow "
            "generate and export take."
        )
    try:
        return ModularPipelineBlocks.from_pretrained(place, trust_remote_code=True, **hub)
    except ImportError as error:
        reason = " ".join(str(error).partition(". Run")[0].split())  # diffusers' advice is to install any such name
        raise ValueError(
            f"the code of {place} cannot run ({reason}); start where the modules lie that its {file} imports, or load "
            "what export_workflow made of it, which has copies of them."
        ) from error


def has_own_blocks(place: str, **hub: Any) -> bool:
    """Whether a directory or repository has blocks of its own, not a preset's, which only its code can make."""
    config = _blocks_config(place, **hub)
    return config is not None and config.get(PRESET_KEY) is None


def _blocks_config(place: str, **hub: Any) -> dict[str, Any] | None:
    """The `modular_config.json` of a directory or repository; None of a model without blocks."""
    local = Path(place, hub.get("subfolder") or "", BLOCKS_CONFIG)
    try:
        return read_json(local) if local.is_file() else ModularPipelineBlocks.load_config(place, **hub)
    except OSError as error:
        if isinstance(error.__context__, EntryNotFoundError) or error.__context__ is None:
            return None
        raise


def preset_for(place: str, **hub: Any) -> ModularPipelineBlocks:
    """The preset of a model's family by its index: unconditional; SD 1.5 and 2.1, with one tokenizer; else SDXL."""
    modular, classic = diffusers.ModularPipeline._load_pipeline_config(place, **hub)
    index = modular or classic or {}
    if "UNet2DModel" in (index.get("unet") or ()):
        return make_preset(UNCONDITIONAL_PRESET)
    has_one = "tokenizer" in index and "tokenizer_2" not in index
    return make_preset(SD_PRESET if has_one else SDXL_PRESET)


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


# Writing


def block_files(blocks: ModularPipelineBlocks, siblings: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """`modular_config.json` and `block.py`, with which diffusers makes these blocks again.

    Args:
        blocks: a preset of this package, or any other blocks.
        siblings: modules that lie beside `block.py`, each with the name of its file without the suffix.

    Raises:
        ValueError: a block whose class or arguments no file can name.
    """
    writer = _Writer(siblings)
    expression, kind = writer.expression(blocks), type(blocks)
    module = writer.module(kind)
    is_preset = kind.__module__ in PRESET_MODULES and expression == f"{module}.{kind.__qualname__}()"
    is_complete = __name__ in siblings
    package, version = "perflow-blocks", vars(sys.modules[PACKAGE])["__version__"]
    if is_complete:
        package, version = "diffusers", diffusers.__version__
    name = kind.__name__ if is_preset else SAVED_BLOCKS
    code = f'from {module} import {name}\n\n__all__ = ["{name}"]\n'
    if not is_preset:
        code = (
            f"{writer.imports()}\n\nclass {name}({ModularPipelineBlocks.__module__}.ModularPipelineBlocks):\n"
            '    """Makes the saved blocks, which are of their own classes."""\n\n'
            f"    def __new__(cls):\n        return {expression}\n"
        )
    config = {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"ModularPipelineBlocks": f"{CODE.removesuffix('.py')}.{name}"},
        "requirements": {package: f">={'.'.join(version.split('.')[:2])}"},
        **({PRESET_KEY: f"{kind.__module__}.{name}"} if is_preset else {}),
    }
    source = "the files beside this one" if is_complete else f"the package {PACKAGE}"
    return {
        BLOCKS_CONFIG: json.dumps(config, indent=2) + "\n",
        CODE: _with_own_size(f'"""The blocks of a saved pipeline; needs {source}."""\n\n{code}'),
    }


def _with_own_size(text: str) -> str:
    """Code followed by a line whose length depends on the content.

    diffusers copies the `block.py` of every local directory to one place, and Python takes what it compiled before for
    the file's if that is of the same size and second.
    """
    return (
        f"{text}\n# Python tells a file from an earlier one by second and size. So this file has its own size:\n"
        f"# {'-' * (1 + zlib.crc32(text.encode()) % 113)}\n"
    )


def arranged(block: Any, inside: Mapping[str, ModularPipelineBlocks]) -> Any:
    """A block with other blocks inside; the `block.py` of a saved pipeline calls it."""
    block.sub_blocks = InsertableDict(inside)
    return block


class _Writer:
    """Writes the code that makes blocks again, and notes the modules that it needs.

    Args:
        siblings: modules that lie beside the code, each with the name of its file without the suffix.
    """

    def __init__(self, siblings: Mapping[str, str]) -> None:
        self.siblings = siblings
        self.modules = {__name__, ModularPipelineBlocks.__module__}

    def imports(self) -> str:
        used, siblings = sorted(self.modules), self.siblings
        lines = [f"import {module}\n" for module in used if module not in siblings]
        if siblings:
            lines += ["import sys\n", "from pathlib import Path\n", "from types import ModuleType\n", FIND_SIBLINGS]
            lines += [f"from .{sibling} import __name__ as _\n" for sibling in sorted(siblings.values())]
            lines += [f"from . import {siblings[module]}\n" for module in used if module in siblings]
        return "".join(lines)

    def expression(self, block: ModularPipelineBlocks, place: str = "") -> str:
        kind = type(block)
        label = f"block {place!r} ({kind.__name__})" if place else kind.__name__
        _require_importable(kind, label, kind.__module__ in self.siblings)
        module = self.module(kind)
        self.modules.add(module)
        values = _arguments(block, label)
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        call = f"{self.siblings.get(module, module)}.{kind.__qualname__}({arguments})"
        usual = kind(**values)
        inside = self._inside(block, place)
        if inside == self._inside(usual, place):
            return call
        pairs = ", ".join(f"{name!r}: {code}" for name, code in inside)
        return f"{self.siblings.get(__name__, __name__)}.arranged({call}, {{{pairs}}})"

    def module(self, kind: type) -> str:
        """Where the code takes a class from: for a public name this package, since its modules may move."""
        is_public = getattr(sys.modules[PACKAGE], kind.__qualname__, None) is kind
        return PACKAGE if is_public and __name__ not in self.siblings else kind.__module__

    def _inside(self, block: ModularPipelineBlocks, place: str) -> list[tuple[str, str]]:
        blocks = block.sub_blocks.items()
        return [(name, self.expression(inner, f"{place}.{name}" if place else name)) for name, inner in blocks]


def _arguments(block: ModularPipelineBlocks, label: str) -> dict[str, Any]:
    """The constructor arguments that differ from their defaults, read from attributes of their names."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(block)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(block, name) or not _is_plain(value := getattr(block, name), parameter.default):
            raise ValueError(
                f"{label} cannot be saved: its constructor argument {name!r} is not kept on the block as a number, "
                f"text or list of these, which a file can hold; keep it as self.{name}."
            )
        if value is not parameter.default and value != parameter.default:
            found[name] = value
    return found


def _is_plain(value: Any, default: Any) -> bool:
    """Whether the value is the default, or Python's literals give it again."""
    try:
        return value is default or ast.literal_eval(repr(value)) == value
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
