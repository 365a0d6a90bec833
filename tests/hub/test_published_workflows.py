"""The repositories under workflows/ and at the root: up to date, complete, and loadable."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from huggingface_hub import ModelCard

from perflow_blocks import load_workflow
from perflow_blocks.hub.entries import is_on_hub
from perflow_blocks.hub.manifest import MANIFEST, read_manifest, verify_manifest
from perflow_blocks.hub.push import push_workflow
from tests.hub.conftest import index_of, use_own_modules
from tests.hub.loopback import LoopbackHub
from workflows.generate import PUBLISHED, ROOT, ROOT_FILES, WORKFLOWS, generate, generate_root, main

SDXL_COMPONENTS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
OWN_COMPONENTS = {
    "sdxl-controlnet": {"controlnet"},
    "sdxl-tile-upscaler": {"controlnet"},
    "sdxl-ip-adapter": {"image_encoder"},
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_workflows_that_were_announced_are_there() -> None:
    wanted = ["text2image", "image2image", "inpaint", "controlnet", "tile-upscaler", "ip-adapter", "base-refiner"]
    assert sorted(PUBLISHED) == sorted([*(f"sdxl-{name}" for name in wanted), "demo-text2image"])


def test_the_files_are_what_the_export_writes(name: str, tmp_path: Path) -> None:
    made = generate(name, tmp_path)
    names = {MANIFEST, *read_manifest(made).files}
    there = {path.name for path in (WORKFLOWS / name).iterdir() if path.is_file()}
    assert there == names
    stale = [n for n in sorted(names) if (made / n).read_bytes() != (WORKFLOWS / name / n).read_bytes()]
    assert stale == [], "run `make workflows`"


def test_the_files_of_the_root_are_what_the_export_writes(tmp_path: Path) -> None:
    made = generate_root(tmp_path)
    stale = [n for n in ROOT_FILES if (made / n).read_bytes() != (ROOT / n).read_bytes()]
    assert stale == [], "run `make workflows`"


def test_a_workflow_loads_offline_with_the_blocks_it_names(name: str) -> None:
    pipe = load_workflow(WORKFLOWS / name, trust_remote_code=True, load_components=False)
    assert type(pipe.blocks) is PUBLISHED[name].blocks
    assert type(pipe).__name__ == "PeRFlowModularPipeline"
    for key, value in PUBLISHED[name].config.items():
        assert pipe.config[key] == value
    assert pipe.doc and all(param.description for param in [*pipe.blocks.inputs, *pipe.blocks.outputs])


def test_an_index_names_classes_that_there_are_and_repositories_of_the_hub(name: str) -> None:
    index = index_of(WORKFLOWS / name)
    entries: dict[str, Any] = {key: value for key, value in index.items() if isinstance(value, list)}
    expected = set() if name.startswith("demo") else SDXL_COMPONENTS | OWN_COMPONENTS.get(name, set())
    assert set(entries) == expected and "_blocks_class_name" not in index
    specs = {spec.name: spec for spec in PUBLISHED[name].blocks().expected_components}
    for key, (library, kind, source) in entries.items():
        assert isinstance(getattr(import_module(library), kind), type)
        assert specs[key].type_hint.__name__ == kind
        assert is_on_hub(source["pretrained_model_name_or_path"])


def test_every_component_that_a_workflow_needs_has_a_source(name: str) -> None:
    pipe = load_workflow(WORKFLOWS / name, trust_remote_code=True, load_components=False)
    specs = [pipe.get_component_spec(key) for key in pipe.pretrained_component_names]
    without = {spec.name for spec in specs if spec.pretrained_model_name_or_path is None}
    assert without == ({"controlnet", "image_encoder"} if name == "sdxl-base-refiner" else set())


def test_a_card_is_complete(name: str) -> None:
    card = ModelCard.load(WORKFLOWS / name / "README.md")
    assert card.data.license == "apache-2.0" and "perflow" in card.data.tags
    assert f"# {PUBLISHED[name].title}" in card.text and "Its block does not say." not in card.text
    steps, guidance = ("4", "1") if name.startswith("demo") else ("6", "2")
    assert f"| {steps} | {guidance} | ddim_eps | 4, equal |" in card.text


def test_mellon_reads_it(name: str) -> None:
    config = MellonPipelineConfig.load(WORKFLOWS / name)
    nodes = [node for node in config.node_params.values() if node is not None]
    assert config.label == PUBLISHED[name].title and len(nodes) >= 3
    blocks = PUBLISHED[name].blocks()
    assert {node["block_name"] for node in nodes} <= set(blocks.sub_blocks)


def test_a_workflow_can_be_pushed_as_it_stands(name: str, loopback_hub: LoopbackHub) -> None:
    options: dict[str, Any] = {"endpoint": loopback_hub.endpoint, "token": loopback_hub.token}
    report = push_workflow(WORKFLOWS / name, f"someone/{name}", dry_run=True, **options)
    assert report.files.keys() == {MANIFEST, *verify_manifest(WORKFLOWS / name).files}
    assert "recipe.py" in report.files


def test_the_demo_draws_from_its_own_directory() -> None:
    pipe = load_workflow(WORKFLOWS / "demo-text2image", trust_remote_code=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    state = pipe(prompt="a red star on a white background", generator=torch.Generator().manual_seed(3))
    assert state.num_inference_steps == 4 and state.images[0].size == (64, 64)
    assert json.loads((WORKFLOWS / "demo-text2image" / "modular_config.json").read_text())["requirements"]


def test_the_generator_says_what_it_changed(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    assert {path.name for path in main(root)} == {*ROOT_FILES, "README.md", MANIFEST}
    stale = root / "workflows" / "sdxl-inpaint" / "block.py"
    stale.write_text("")
    assert main(root) == [stale]
    assert stale.read_bytes() == (WORKFLOWS / "sdxl-inpaint" / "block.py").read_bytes()
