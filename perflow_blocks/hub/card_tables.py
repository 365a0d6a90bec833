"""Tables of a model card, in Markdown: what blocks take, give and need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers.modular_pipelines.modular_pipeline_utils import ConfigSpec, InputParam, OutputParam

from .entries import Entry

KNOWN_LICENCES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "madebyollin/sdxl-vae-fp16-fix": "mit",
}
"""Of repositories that workflows often refer to; others speak for themselves."""

MODULES = re.compile(r"(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")

NO_DESCRIPTION = "Its block does not say."


def input_table(params: Sequence[InputParam]) -> str:
    """Inputs of the pipeline, the required ones first."""
    rows = [
        (f"`{param.name}`", _type(param.type_hint), _default(param), _text(param.description))
        for param in sorted(params, key=lambda param: not param.required)
        if param.name
    ]
    return table(("input", "type", "default", "what"), rows)


def output_table(params: Sequence[OutputParam]) -> str:
    rows = [(f"`{param.name}`", _type(param.type_hint), _text(param.description)) for param in params if param.name]
    return table(("output", "type", "what"), rows)


def component_table(entries: Iterable[Entry]) -> str:
    rows = [
        (f"`{entry.name}`", "-" if entry.kind is None else f"`{entry.kind.__name__}`", _source(entry), _licence(entry))
        for entry in entries
    ]
    return table(("component", "class", "from", "licence"), rows)


def config_table(specs: Iterable[ConfigSpec], values: Mapping[str, Any]) -> str:
    """The configuration values that the index sets and that blocks speak of; of specs of one name, the first does.

    Empty where there are none.
    """
    described: dict[str, str] = {}
    for spec in specs:
        described[spec.name] = described.get(spec.name) or spec.description or ""
    rows = [(f"`{name}`", f"`{value}`", _text(described[name])) for name, value in values.items() if described[name]]
    if not rows:
        return ""
    return table(("value", "set to", "what"), rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(description: str | None) -> str:
    return " ".join((description or "").split()) or NO_DESCRIPTION


def _type(hint: Any) -> str:
    """The type without the modules' names."""
    if hint is None:
        return "-"
    name = hint.__qualname__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return f"`{MODULES.sub('', name)}`"


def _default(param: InputParam) -> str:
    if param.required:
        return "required"
    plain = isinstance(param.default, (bool, int, float, str, list, tuple, dict))
    return f"`{param.default!r}`" if plain else "-"


def _source(entry: Entry) -> str:
    if entry.location is None:
        return f"this repository, `{entry.subfolder}`"
    is_url = entry.location.startswith("https://")
    link = entry.location if is_url else f"[{entry.location}](https://huggingface.co/{entry.location})"
    details = {"": entry.subfolder, "variant ": entry.variant, "revision ": entry.revision}
    return ", ".join([link, *(f"{what}`{value}`" for what, value in details.items() if value)])


def _licence(entry: Entry) -> str:
    return "this repository's" if entry.location is None else KNOWN_LICENCES.get(entry.location, "see the repository")
