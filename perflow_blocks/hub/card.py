"""The model card of a workflow repository: what it is, how to run it, what it takes, where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

from .card_example import CardExample, example_code, example_inputs, loader_code
from .card_tables import component_table, config_table, input_table, output_table, table
from .entries import Entry

TAGS = ("diffusers", "modular-diffusers", "perflow", "few-step")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says beyond the blocks.

    Attributes:
        title: heading.
        mode: "self-contained" or "thin".
        blocks: the workflow's blocks.
        description: what they do.
        class_name: their class in the repository.
        entries: components of the index.
        config: configuration values of the index.
        recipe: names of sampling settings to their values, as text.
        repository: what the examples load.
        licence: identifier for the front matter; None where the user names none.
        picture: file name of a picture in the repository.
        notes: what users of this workflow have to know, in Markdown.
        requirements: packages that the code needs, and their versions.
        example: how the workflow is used.
    """

    title: str
    mode: str
    blocks: Any
    description: str
    class_name: str
    entries: Sequence[Entry]
    config: Mapping[str, Any]
    recipe: Mapping[str, str]
    repository: str
    licence: str | None = None
    picture: str | None = None
    notes: str = ""
    requirements: Mapping[str, str] = field(default_factory=dict)
    example: CardExample = field(default_factory=CardExample)


def make_card(facts: CardFacts) -> str:
    """The text of README.md, with its YAML front matter."""
    blocks = facts.blocks
    sections = [
        f"# {facts.title}",
        "" if facts.picture is None else f"![{facts.title}]({facts.picture})",
        facts.description.strip(),
        facts.notes.strip(),
        _section("Recipe", table(tuple(facts.recipe), [tuple(facts.recipe.values())]) if facts.recipe else ""),
        _section("Run", _run(facts)),
        _section("Workflows", _workflows(blocks)),
        _section("Inputs", input_table(blocks.inputs)),
        _section("Outputs", output_table(blocks.outputs)),
        _section("Components", _components(facts)),
        _section("Configuration", config_table(blocks.expected_configs, facts.config)),
        _section("Code", _code(facts)),
        _section("Licence", _licence(facts)),
    ]
    front = f"---\n{_front_matter(facts).to_yaml()}\n---\n\n"
    return front + "\n\n".join(section for section in sections if section) + "\n"


def _components(facts: CardFacts) -> str:
    if facts.entries:
        return component_table(facts.entries)
    if any(spec.pretrained_model_name_or_path for spec in facts.blocks.expected_components):
        return "The blocks name their components themselves; the index names none."
    return "The index names no components: load your own, and set them with `pipe.update_components(...)`."


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}" if text else ""


def _front_matter(facts: CardFacts) -> ModelCardData:
    names = {param.name for param in example_inputs(facts.blocks)}
    task = "image-to-image" if names & {"image", "control_image"} else "text-to-image"
    bases = [entry.location for entry in facts.entries if entry.location and not entry.location.startswith("https")]
    return ModelCardData(
        license=facts.licence,
        library_name="diffusers",
        pipeline_tag=task,
        base_model=list(dict.fromkeys(bases)) or None,
        tags=[*TAGS, *(["stable-diffusion-xl"] if facts.blocks.model_name == "stable-diffusion-xl" else []), task],
    )


def _run(facts: CardFacts) -> str:
    needed = {"diffusers": "", **facts.requirements}
    packages = " ".join(f'"{name}{version}"' if version else name for name, version in needed.items())
    code = example_code(facts.example, facts.blocks, facts.repository)
    loader = _LOADER.format(code=loader_code(facts.example, facts.repository))
    return f"It needs `pip install {packages}`.\n\n```py\n{code}\n```\n\n{loader}"


_LOADER = """With the package perflow-blocks the files are compared with `perflow_manifest.json` before any code runs,
components that fail to load are an error, and a `revision` counts for code and weights alike (with plain
`from_pretrained` it does not for weights that lie in the repository, which come from its main branch):

```py
import torch
from perflow_blocks import load_workflow

{code}
```"""


def _workflows(blocks: Any) -> str:
    names = getattr(blocks, "_workflow_map", None)
    if not names:
        return ""
    rows = [(f"`{name}`", ", ".join(f"`{trigger}`" for trigger in triggers)) for name, triggers in names.items()]
    return "What a call is given decides what it does.\n\n" + table(("workflow", "inputs that ask for it"), rows)


def _code(facts: CardFacts) -> str:
    described = {
        "thin": f"`block.py` takes `{facts.class_name}` from the installed package perflow-blocks.",
        "self-contained": (
            f"`block.py` defines `{facts.class_name}`; the files beside it are all that it runs besides diffusers and "
            "what diffusers needs, generated from perflow-blocks and to be read before they are trusted."
        ),
    }
    return f"{described[facts.mode]} `perflow_manifest.json` has the SHA-256 of every file."


def _licence(facts: CardFacts) -> str:
    code = "The code of perflow-blocks is licensed under Apache-2.0."
    if any(entry.location for entry in facts.entries):
        code += " Weights that are referred to keep the licences of their repositories."
    return code if facts.licence is None else f"This repository: {facts.licence}. {code}"
