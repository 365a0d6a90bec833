"""The files of a workflow: `block.py`, and the modules that it needs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

from .block_code import block_code
from .block_file import block_file, defined_in
from .closure import source_closure
from .modules import Origin, origin
from .requirements import requirements_of
from .rewrite import flattened
from .siblings import header, require_readable, sibling_names

Mode = Literal["self-contained", "thin"]


@dataclass(frozen=True, kw_only=True)
class WorkflowSources:
    """What makes a directory loadable with `ModularPipeline.from_pretrained`, besides its JSON files.

    Attributes:
        files: name of each file -> its text. `block.py` is always among them and has the class; names of others are
            unique to their content, since diffusers keeps the files of all local directories in one folder.
        requirements: what must be installed: distribution -> version specifier.
    """

    files: Mapping[str, str]
    requirements: Mapping[str, str]


def workflow_sources(
    blocks: ModularPipelineBlocks, class_name: str, mode: Mode = "self-contained", *, description: str | None = None
) -> WorkflowSources:
    """The source files with which diffusers makes these blocks again; the same for the same blocks, in any process.

    Args:
        blocks: a preset, or blocks that were assembled, inserted or written by a user. Their settings must be
            constructor arguments that a block keeps under their names.
        class_name: the name of the class in `block.py`.
        mode: "thin" imports this package; "self-contained" carries the modules of it that are needed. Modules of the
            user are carried in both.
        description: what the blocks say of themselves; by default what they say now.

    Raises:
        ValueError: a block cannot be made again; names it, the reason and the remedy.
    """
    if not isinstance(blocks, ModularPipelineBlocks):
        given = blocks.__name__ if isinstance(blocks, type) else type(blocks).__name__
        raise ValueError(f"{given} is no block that was made; pass blocks such as PeRFlowSDXLAutoBlocks().")
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is unknown; pass one of {', '.join(map(repr, get_args(Mode)))}.")
    carried: frozenset[Origin] = frozenset({"user"}) if mode == "thin" else frozenset({"user", "package"})
    code = block_code(blocks, class_name, description)
    wanted = sorted({defined_in(thing)[0] for thing in code.used.values()})
    modules = source_closure([name for name in wanted if origin(name) in carried], carried)
    siblings = sibling_names(modules)
    files = {"block.py": block_file(code, siblings)}
    for name, module in modules.items():
        files[f"{siblings[name]}.py"] = header(module) + flattened(module, siblings, carried)
    for name, text in files.items():
        compile(text, name, "exec")
        require_readable(name, text, siblings.values())
    return WorkflowSources(files=files, requirements=requirements_of(blocks, modules, mode))
