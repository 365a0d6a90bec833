"""The repositories under workflows/ and at the root: up to date, complete, loadable; their cards' Python runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from huggingface_hub import ModelCard
from transformers import CLIPVisionModelWithProjection

from perflow_blocks import export_workflow
from perflow_blocks.testing import tiny_controlnet, tiny_image, tiny_mask, tiny_sdxl_unet
from tests.checkpoints import save_ip_adapter
from tests.conftest import index_of, make_pipeline
from workflows.generate import PUBLISHED, ROOT, ROOT_FILES, SDXL, WORKFLOWS, main

pytestmark = pytest.mark.usefixtures("own_modules")


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_files_are_what_the_export_writes(tmp_path: Path) -> None:
    """And the generator says what it changed."""
    made = main(tmp_path / "checkout")
    assert len(made) == 5 * len(PUBLISHED) + len(ROOT_FILES)
    places = [path.relative_to(tmp_path / "checkout") for path in made]
    stale = [str(place) for place, path in zip(places, made, strict=True) if differs(ROOT / place, path)]
    assert stale == [], "run `make workflows`"
    for directory in map(WORKFLOWS.joinpath, PUBLISHED):
        wanted = {"recipe.py", *(place.name for place in places if (ROOT / place).parent == directory)}
        assert {path.name for path in directory.iterdir() if path.is_file()} == wanted
    changed = tmp_path / "checkout" / "workflows" / "sdxl-inpaint" / "block.py"
    changed.write_text("")
    assert main(tmp_path / "checkout") == [changed]


def differs(one: Path, other: Path) -> bool:
    return not one.is_file() or one.read_bytes() != other.read_bytes()


def test_a_workflow_loads_offline_as_what_it_says(name: str) -> None:
    workflow = PUBLISHED[name]
    pipe: Any = ModularPipeline.from_pretrained(str(WORKFLOWS / name), trust_remote_code=True)
    assert type(pipe.blocks) is workflow.blocks and "_blocks_class_name" not in index_of(WORKFLOWS / name)
    assert {key: pipe.config[key] for key in workflow.config} == workflow.config
    assert pipe.doc and all(param.description for param in [*pipe.blocks.inputs, *pipe.blocks.outputs])
    entries = {key: value for key, value in index_of(WORKFLOWS / name).items() if isinstance(value, list)}
    assert set(entries) == set(workflow.sources) >= (set() if name.startswith("demo") else set(SDXL))
    for key, (library, kind, source) in entries.items():
        assert getattr(import_module(library), kind) is pipe.get_component_spec(key).type_hint
        assert source.items() >= workflow.sources[key].items()
    specs = [pipe.get_component_spec(key) for key in pipe.pretrained_component_names]
    without = {spec.name for spec in specs if spec.pretrained_model_name_or_path is None}
    assert without == ({"controlnet", "image_encoder"} if name == "sdxl-base-refiner" else set())


def test_a_card_is_complete_and_mellon_reads_its_nodes(name: str) -> None:
    card = ModelCard.load(WORKFLOWS / name / "README.md")
    assert card.data.license == "apache-2.0" and "perflow" in card.data.tags
    steps, guidance = ("4", "1") if name.startswith("demo") else ("6", "2")
    assert f"| {steps} | {guidance} | ddim_eps | 4, equal |" in card.text
    config = MellonPipelineConfig.load(WORKFLOWS / name)
    nodes = [node for node in config.node_params.values() if node is not None]
    assert config.label == PUBLISHED[name].title and f"# {config.label}" in card.text and len(nodes) >= 3
    assert {node["block_name"] for node in nodes} <= set(PUBLISHED[name].blocks().sub_blocks)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What the cards load from the Hub, at tiny size, and images in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, image in {"photo": tiny_image(1), "style": tiny_image(2), "control": tiny_image(3)}.items():
        image.save(f"{name}.png")
    tiny_mask().save("mask.png")
    save_ip_adapter(tmp_path / "adapter")
    tiny_sdxl_unet(1).save_pretrained(tmp_path / "other" / "unet", variant="v0-fix")
    return {"h94/IP-Adapter": tmp_path / "adapter", "hansyan/perflow-sdxl-dreamshaper": tmp_path / "other"}


def with_tiny_weights(name: str, adapter: Path, folder: Path) -> Path:
    """The workflow with tiny weights in it; the demo's own are tiny."""
    if name.startswith("demo"):
        return WORKFLOWS / name
    load_encoder = CLIPVisionModelWithProjection.from_pretrained
    makers: dict[str, Callable[[], Any]] = {
        "controlnet": tiny_controlnet,
        "image_encoder": lambda: load_encoder(adapter / "sdxl_models" / "image_encoder"),
    }
    further = {part: make() for part, make in makers.items() if part in PUBLISHED[name].sources}
    return export_workflow(make_pipeline(PUBLISHED[name].blocks(), **further), folder / name, weights="include")


def test_the_example_of_a_card_runs(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    places[f"your-name/{name}"] = with_tiny_weights(name, places["h94/IP-Adapter"], tmp_path)
    card = (WORKFLOWS / name / "README.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    assert ("float16" in code and '"cuda"' in code) != name.startswith("demo")
    for source, place in places.items():
        code = code.replace(f'"{source}"', repr(str(place)))
    defined: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code.replace('"cuda"', '"cpu"').replace("float16", "float32"), "README.md", "exec"), defined)
    image, pipe = defined["image"], defined["pipe"]
    assert type(pipe.blocks) is PUBLISHED[name].blocks and (tmp_path / "image.png").is_file()
    match name:
        case "sdxl-tile-upscaler":
            assert image.size == (64, 64) and defined["photo"].size == (32, 32)
        case "sdxl-ip-adapter":
            assert pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
        case "sdxl-base-refiner":
            assert defined["refiner"].unet is not pipe.unet
        case "demo-text2image":
            pixels = np.asarray(image.convert("RGB"), dtype=int)
            red = (pixels[..., 0] > 120) & (pixels[..., 1:].max(-1) < 90)
            assert pixels[:4].max() < 60 and red.mean() > 0.05
