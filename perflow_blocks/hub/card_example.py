"""The example of a model card: the Python that loads a workflow and draws with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

LINE_LENGTH = 119
"""Of the code on a card."""

PICTURES = {
    "image": 'load_image("photo.png")',
    "mask_image": 'load_image("mask.png")',
    "control_image": 'load_image("control.png")',
    "ip_adapter_image": 'load_image("style.png")',
}
"""The pictures that a call may be about, and what the example passes."""


@dataclass(frozen=True, kw_only=True)
class CardExample:
    """How the example of a card goes on from loading, where passing a prompt and pictures would not do.

    Attributes:
        prompt: what to draw.
        imports: names that diffusers has, to be imported besides ModularPipeline.
        setup: lines of Python between loading and call. `pipe` is the pipeline, `{repository}` stands for its id, and
            there are torch and, where it is used, load_image.
        arguments: inputs of the call as Python, in place of those that would be passed or beside them.
        pipeline: the variable that is called; another one than `pipe` is one that the set-up makes.
        dtype: of the models, as torch calls it.
        device: where they are put.
    """

    prompt: str = "a lighthouse at dusk"
    imports: Sequence[str] = ()
    setup: Sequence[str] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)
    pipeline: str = "pipe"
    dtype: str = "float16"
    device: str = "cuda"


def example_inputs(blocks: Any) -> list[InputParam]:
    """The inputs that the example passes: those that a call needs, and for one task what it is about."""
    subjects = {"prompt"} if getattr(blocks, "_workflow_map", None) else {"prompt", *PICTURES}
    return [param for param in blocks.inputs if param.required or param.name in subjects]


def require_example(example: CardExample, blocks: Any) -> None:
    """Checks that the example could run with these blocks.

    Raises:
        ValueError: it passes what they do not take, or is no Python.
    """
    known = {param.name for param in blocks.inputs}
    if unknown := [name for name in example.arguments if name not in known]:
        raise ValueError(
            f"the example passes {', '.join(unknown)}, which the blocks do not take; leave that out, or pass some of "
            f"{', '.join(sorted(filter(None, known)))}."
        )
    try:
        compile(example_code(example, blocks, "owner/name"), "example", "exec")
    except SyntaxError as error:
        raise ValueError(
            f"the example is no Python ({error.msg}: {(error.text or '').strip()}); mend its lines and arguments."
        ) from error


def example_code(example: CardExample, blocks: Any, repository: str) -> str:
    """Its lines, from the imports to the picture."""
    usual = {"prompt": json.dumps(example.prompt, ensure_ascii=False), **PICTURES}
    arguments = {str(param.name): usual.get(str(param.name), "...") for param in example_inputs(blocks)}
    passed = [f"{name}={value}" for name, value in {**arguments, **example.arguments}.items()]
    setup = [line.replace("{repository}", repository) for line in example.setup]
    loads_pictures = any("load_image(" in line for line in (*setup, *passed))
    draws = "images" in [param.name for param in blocks.outputs]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(['ModularPipeline', *example.imports]))}",
        *(["from diffusers.utils import load_image"] if loads_pictures else []),
        "",
        f'pipe = ModularPipeline.from_pretrained("{repository}", trust_remote_code=True)',
        f"pipe.load_components(dtype=torch.{example.dtype})",
        f'pipe.to("{example.device}")',
        *setup,
    ]
    if not draws:
        return "\n".join([*lines, _call("state", example.pipeline, passed)])
    call = _call("image", example.pipeline, [*passed, 'output="images"'], "[0]")
    return "\n".join([*lines, call, 'image.save("picture.png")'])


def loader_code(example: CardExample, repository: str) -> str:
    """The line that loads the same pipeline with the package."""
    return _call(
        "pipe",
        "load_workflow",
        [f'"{repository}"', "trust_remote_code=True", f"dtype=torch.{example.dtype}", f'device="{example.device}"'],
    )


def _call(result: str, called: str, arguments: Sequence[str], end: str = "") -> str:
    """A call with its arguments in as many lines as they need."""
    joined = ", ".join(arguments)
    for text in (f"{result} = {called}({joined}){end}", f"{result} = {called}(\n    {joined}\n){end}"):
        if all(len(line) <= LINE_LENGTH for line in text.splitlines()):
            return text
    return f"{result} = {called}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){end}"
