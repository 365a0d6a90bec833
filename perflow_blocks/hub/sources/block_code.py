"""The classes that, made without arguments, give a tree of blocks again."""

from __future__ import annotations

import keyword
from dataclasses import dataclass, field
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)

from .arguments import Arguments, UnreadableArgumentError, arguments
from .literals import NotLiteralError, importable, literal
from .tree import describe_tree, differences, label, triggers

ASSEMBLED = (ConditionalPipelineBlocks, SequentialPipelineBlocks, LoopSequentialPipelineBlocks)
LINE_LENGTH = 119
RESERVED = frozenset({"sys", "import_module", "Path", "ModuleType", "TYPE_CHECKING", "package", "_"})
"""Names that `block.py` uses itself."""


@dataclass
class BlockCode:
    """Generated classes, and what they use.

    Attributes:
        used: name in the code -> the class, function or module that it stands for.
        classes: the source of each class, those inside first.
    """

    class_name: str
    used: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def refer(self, thing: Any) -> str:
        """The name of a class, function or module in the code."""
        if isinstance(thing, type) and thing.__module__ == "builtins":
            return thing.__name__
        outer, inner = thing, ""
        if hasattr(thing, "__qualname__"):
            module = importable(thing)
            first, _, inner = thing.__qualname__.partition(".")
            outer = getattr(module, first)
        for name, known in self.used.items():
            if known is outer:
                return f"{name}.{inner}" if inner else name
        name = self._free(outer.__name__)
        self.used[name] = outer
        return f"{name}.{inner}" if inner else name

    def _free(self, wanted: str) -> str:
        name = wanted if wanted not in self.taken else f"Given{wanted}"
        number = 2
        while name in self.taken:
            name, number = f"{wanted}{number}", number + 1
        self.taken.add(name)
        return name

    def new_class(self, place: str) -> str:
        """A name for a generated class: that of the whole, followed by the place in the tree."""
        if not place:
            return self.class_name
        words = "".join(part[:1].upper() + part[1:] for part in place.replace(".", "_").split("_"))
        return self._free("".join(c for c in f"{self.class_name}{words}" if c.isidentifier() or c.isdigit()))


def block_code(blocks: ModularPipelineBlocks, class_name: str, description: str | None = None) -> BlockCode:
    """The code of a class `class_name` that, made without arguments, has the tree of `blocks`.

    Args:
        description: what the class says of itself; by default what its base class says.

    Raises:
        ValueError: the name cannot be one of a class, or a block cannot be written down; names block, reason, remedy.
    """
    taken = keyword.iskeyword(class_name) or class_name in RESERVED
    if taken or not class_name.isidentifier() or not class_name.isascii():
        raise ValueError(f"class_name={class_name!r} is no name of a class; pass one such as 'MyWorkflow'.")
    expected = describe_tree(blocks)
    code = BlockCode(class_name, taken={class_name, *RESERVED})
    expression = _expression(code, blocks, "")
    if expression != class_name:
        if expression == f"Given{class_name}" and code.used[expression] is type(blocks) and description is None:
            # The class has the name already, so it is handed on as it is.
            code = BlockCode(class_name, taken=set(RESERVED))
            code.refer(type(blocks))
        else:
            _add_whole(code, blocks, expression)
    if description is not None:
        code.classes[-1] += _described(description)
    made, generated = run_code(code)
    for place, difference in differences(expected, describe_tree(made, generated)):
        inner: Any = blocks
        for name in _path(blocks, place):
            inner = inner.sub_blocks[name]
        raise ValueError(f"{label(inner, place)} cannot be exported: {difference}.")
    return code


def run_code(code: BlockCode) -> tuple[ModularPipelineBlocks, frozenset[type]]:
    """A block made by the code, here and now, and the classes that the code defines."""
    namespace: dict[str, Any] = {"__name__": "perflow_blocks.generated", **code.used}
    exec(compile("\n\n".join(code.classes), "<generated blocks>", "exec"), namespace)
    names = _names_of_classes(code)
    return namespace[code.class_name](), frozenset(namespace[name] for name in names)


def _names_of_classes(code: BlockCode) -> list[str]:
    return [source.split("(", 1)[0].removeprefix("class ") for source in code.classes]


def _path(blocks: Any, place: str) -> list[str]:
    """The names on the way to a place; names may hold dots themselves."""
    for name, inner in blocks.sub_blocks.items():
        if place == name:
            return [name]
        if place.startswith(f"{name}."):
            return [name, *_path(inner, place.removeprefix(f"{name}."))]
    return []


def _expression(code: BlockCode, block: ModularPipelineBlocks, place: str) -> str:
    """What stands for a block in `block_classes`: a class, or a call of one."""
    cls = type(block)
    try:
        refer = code.refer(cls)
        usual = _without_arguments(cls)
        given = arguments(block, usual)
        made = usual if usual is not None and given == Arguments((), {}) else _made_with(cls, given)
        if made is not None and _same_tree(block, made, place):
            return refer if made is usual else _call(code, refer, given)
        if isinstance(block, ASSEMBLED) and made is not None and given == Arguments((), {}):
            return _assembled(code, block, refer, place)
        if made is not None:
            for where, difference in differences(describe_tree(block, place=place), describe_tree(made), place):
                raise NotLiteralError(difference if where == place else f"of block {where!r}, {difference}")
    except (NotLiteralError, UnreadableArgumentError) as error:
        raise ValueError(f"{label(block, place)} cannot be exported: {error}.") from None
    raise ValueError(
        f"{label(block, place)} cannot be exported: its class cannot be made with the arguments that the block keeps; "
        "keep them as they were given, as attributes of their names."
    )


def _without_arguments(cls: type) -> Any:
    try:
        return cls()
    except Exception:  # whatever a constructor raises for arguments that are missing
        return None


def _made_with(cls: type, given: Arguments) -> Any:
    try:
        return cls(*given.positional, **given.named)
    except Exception:  # the values may be kept in another form than they were given in
        return None


def _same_tree(block: ModularPipelineBlocks, made: ModularPipelineBlocks, place: str) -> bool:
    return not any(differences(describe_tree(block, place=place), describe_tree(made), place))


def _call(code: BlockCode, refer: str, given: Arguments) -> str:
    parts = [literal(value, code.refer) for value in given.positional]
    parts += [f"{name}={literal(value, code.refer)}" for name, value in given.named.items()]
    return f"{refer}({', '.join(parts)})"


def _assembled(code: BlockCode, block: Any, base: str, place: str) -> str:
    """Adds a class whose lists name what the block holds, and gives its name."""
    inside = [
        _expression(code, inner, f"{place}.{name}" if place else name) for name, inner in block.sub_blocks.items()
    ]
    lines = [_list("block_classes", inside), _list("block_names", [literal(n, code.refer) for n in block.sub_blocks])]
    if isinstance(block, ConditionalPipelineBlocks):
        lines.append(_list("block_trigger_inputs", [literal(name, code.refer) for name in triggers(block, place)]))
        if not isinstance(block, AutoPipelineBlocks) and block.default_block_name != type(block).default_block_name:
            lines.append(f"    default_block_name = {literal(block.default_block_name, code.refer)}\n")
    name = code.new_class(place)
    docstring = f'    """{_summary(block, place)}"""\n\n'
    code.classes.append(f"class {name}({base}):\n{docstring}{''.join(lines)}")
    return name


def _summary(block: Any, place: str) -> str:
    """The docstring of a generated class."""
    where = f" at `{place}`" if place else ""
    if type(block) in (AutoPipelineBlocks, *ASSEMBLED):
        return f"The blocks{where}." if place else "The blocks of this workflow."
    summary = (
        f"{type(block).__name__} with other blocks,{where}." if place else f"{type(block).__name__} with other blocks."
    )
    return summary if len(summary) + 10 <= LINE_LENGTH else f"{type(block).__name__} with other blocks."


def _add_whole(code: BlockCode, blocks: Any, expression: str) -> None:
    """Adds the class of the whole where a class of another name, or a call of one, gives the tree already."""
    base, call, given = expression.partition("(")
    body = f'    """{type(blocks).__name__}, under the name of this workflow."""\n'
    if call:
        body += f"\n    def __init__(self) -> None:\n        super().__init__({given.removesuffix(')')})\n"
    code.classes.append(f"class {code.class_name}({base}):\n{body}")


def _described(description: str) -> str:
    text = literal(description, str)
    return f"\n    @property\n    def description(self) -> str:\n        return {text}\n"


def _list(name: str, entries: list[str]) -> str:
    """A class attribute, on one line if that is short enough."""
    noqa = "  # noqa: RUF012"
    line = f"    {name} = [{', '.join(entries)}]"
    if len(line) + len(noqa) <= LINE_LENGTH:
        return f"{line}{noqa}\n"
    return f"    {name} = [{noqa}\n" + "".join(f"        {entry},\n" for entry in entries) + "    ]\n"
