"""The model card of a workflow repository: what it is, how to run it, what it takes, where its weights come from."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusers.modular_pipelines.modular_pipeline_utils import generate_modular_model_card_content
from huggingface_hub import ModelCardData

from ..blocks.merge_delta import guidance_in_effect
from ..blocks.specs import usual_recipe
from ..delta.recipe import DeltaRecipe

CARD = "README.md"
OWNER = "your-name"
"""Whom a card names where the repository is not known yet; pushing replaces it."""
RIGHTS = "The code of perflow-blocks is licensed under Apache-2.0."
TAGS = ("diffusers", "modular-diffusers", "perflow", "few-step")
IMAGES = {
    "image": 'load_image("photo.png")',
    "mask_image": 'load_image("mask.png")',
    "control_image": 'load_image("control.png")',
    "ip_adapter_image": 'load_image("style.png")',
}
"""The images that a call may be about, and what the example passes."""


def make_card(
    blocks: Any,
    title: str,
    *,
    notes: str,
    recipe: Mapping[str, str],
    repository: str,
    index: Mapping[str, Any],
    saved: Collection[str],
    requirements: Mapping[str, str],
    example: str | None,
    image: str | None,
    licence: str | None,
) -> str:
    """The text of README.md, with its front matter.

    `saved` are the components that the repository itself holds, `requirements` the packages that the code needs. The
    other arguments are those of `export_workflow`, or files of the repository.
    """
    title = html.escape(" ".join(title.split()), quote=False).replace("[", "\\[").replace("]", "\\]")
    triggers = getattr(blocks, "_workflow_map", None) or {}
    workflows = [(f"`{name}`", ", ".join(f"`{given}`" for given in inputs)) for name, inputs in triggers.items()]
    entries = {spec.name: index[spec.name] for spec in blocks.expected_components if spec.name in index}
    places = {name: entry[2] for name, entry in entries.items() if name not in saved}
    components = [
        (f"`{name}`", f"`{kind}`", _link(places[name]) if name in places else f"this repository, `{name}`")
        for name, (_, kind, _) in entries.items()
    ]
    rights = f"This repository: {licence}. {RIGHTS}" if licence else RIGHTS
    sections = [
        f"# {title}",
        f"![{title}]({image})" if image else "",
        blocks.description.strip(),
        notes.strip(),
        _table("Recipe", tuple(recipe), [tuple(recipe.values())] if recipe else []),
        _run(requirements, example or example_code(blocks, repository), repository),
        _table("Workflows", ("workflow", "inputs that ask for it"), workflows),
        generate_modular_model_card_content(blocks)["io_specification_section"].strip(),
        _table("Components", ("component", "class", "from"), components)
        or "The index names no components: set your own with `pipe.update_components(...)`.",
        f"## Licence\n\n{rights}"
        + (" Weights that are referred to keep their repositories' licences." if places else ""),
    ]
    front = _front_matter(blocks, licence, places.values()).to_yaml()
    return f"---\n{front}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def make_recipe(pipe: Any, config: Mapping[str, Any], recipe: DeltaRecipe, guider: Any) -> dict[str, str]:
    """The sampling settings of a call that gives none, for blocks of this package."""
    if not {"prediction_type", "default_num_inference_steps"} <= {spec.name for spec in pipe.blocks.expected_configs}:
        return {}
    usual = usual_recipe(pipe)
    windows = config if {"num_time_windows", "window_boundaries"} & config.keys() else vars(recipe)
    boundaries = windows.get("window_boundaries")
    equal = f"{windows.get('num_time_windows') or 4}, equal"
    given = f"{len(boundaries) - 1}, from {', '.join(f'{time:g}' for time in boundaries)}" if boundaries else equal
    steps = config.get("default_num_inference_steps") or recipe.num_inference_steps or usual.num_inference_steps
    kind = "ClassifierFreeGuidance" if guider is None else type(guider).__name__
    scale = guidance_in_effect(guider or pipe.guider, config.get("guidance_scale"), recipe, usual)
    return {
        "steps": str(steps),
        "guidance": f"{scale:g}" if kind == "ClassifierFreeGuidance" else kind,
        "prediction type": config.get("prediction_type") or recipe.prediction_type or str(usual.prediction_type),
        "time windows": given,
    }


def example_code(blocks: Any, repository: str) -> str:
    """Python that loads a workflow and calls it; blocks for one task get the images that the task is about."""
    about = {"prompt"} if getattr(blocks, "_workflow_map", None) else {"prompt", *IMAGES}
    given = {"prompt": '"a lighthouse at dusk"', **IMAGES}
    names = [param.name for param in blocks.inputs if param.required or param.name in about]
    arguments = [f"{name}={given.get(name, '...')}" for name in names]
    draws = "images" in [param.name for param in blocks.outputs]
    lines = [
        "import torch",
        "from diffusers import ModularPipeline",
        *(["from diffusers.utils import load_image"] if any("load_image" in text for text in arguments) else []),
        "",
        f'pipe = ModularPipeline.from_pretrained("{repository}", trust_remote_code=True)',
        "pipe.load_components(dtype=torch.float16)",
        'pipe.to("cuda")',
        f"{'image' if draws else 'state'} = pipe(",
        *(f"    {argument}," for argument in [*arguments, *(['output="images"'] if draws else [])]),
        *([")[0]", 'image.save("image.png")'] if draws else [")"]),
    ]
    return "\n".join(lines)


def _run(requirements: Mapping[str, str], code: str, repository: str) -> str:
    packages = " ".join(f'"{name}{version}"' for name, version in {"diffusers": "", **requirements}.items())
    return (
        f"## Run\n\nIt needs `pip install {packages}`.\n\n```py\n{code.strip()}\n```\n\n"
        f'With the package perflow-blocks, `load_workflow("{repository}", trust_remote_code=True)` loads blocks and '
        "components, or says which of them failed. Pass `revision=` with a commit to pin code and weights."
    )


def _front_matter(blocks: Any, licence: str | None, places: Iterable[Mapping[str, Any]]) -> ModelCardData:
    names = {param.name for param in blocks.inputs if param.required or not getattr(blocks, "_workflow_map", None)}
    task = "image-to-image" if names & {"image", "control_image"} else "text-to-image"
    model = ["stable-diffusion-xl"] if blocks.model_name == "stable-diffusion-xl" else []
    if "tokenizer" in blocks.component_names and "tokenizer_2" not in blocks.component_names:
        model = ["stable-diffusion"]
    sources = dict.fromkeys(place["pretrained_model_name_or_path"] for place in places)
    return ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=task,
        base_model=[source for source in sources if not source.startswith("https://")] or None,
        tags=[*TAGS, *model, task],
    )


def _link(place: Mapping[str, Any]) -> str:
    source = place["pretrained_model_name_or_path"]
    link = source if source.startswith("https://") else f"[{source}](https://huggingface.co/{source})"
    details = {"": place["subfolder"], "variant ": place["variant"], "revision ": place["revision"]}
    return ", ".join([link, *(f"{what}`{value}`" for what, value in details.items() if value)])


def _table(heading: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return f"## {heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
