"""Exports loaded by diffusers where this package is not installed: the same pictures, also from two in one process."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks import PeRFlowSDXLAutoBlocks, PreviewStep, WindowLogStep, insert_loop_block
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.hub.sources import workflow_sources
from perflow_blocks.testing import tiny_mask, tiny_picture, tiny_sdxl_unet
from tests.hub.conftest import block_tree, copy_weights, run_without_the_package, save_tiny_weights, write_repository
from tests.hub.sources_blocks import Doubling

SCRIPT = """
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks
from PIL import Image

def run(directory, inputs):
    pipe = ModularPipeline.from_pretrained(directory, trust_remote_code=True)
    pipe.load_components()
    for name in ("image", "mask_image"):
        if name in inputs:
            inputs[name] = Image.open(inputs[name])
    latents = pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="latent", output="images")
    torch.save(latents, directory + "/latents.pt")
    blocks = pipe.blocks
    return {
        "class": type(blocks).__name__,
        "modules": sorted({type(pipe.scheduler).__module__, type(blocks).__module__}),
        "processors": sorted({type(p).__module__.split(".")[0] for p in pipe.unet.attn_processors.values()}),
        "merged": any("merge" in str(key) for key in pipe.unet.config),
        "scheduler": type(pipe.scheduler).__name__,
        "missing": pipe.null_component_names,
        "tree": tree(blocks),
    }

jobs, versions = json.loads(sys.argv[2])
reports = [run(*job) for job in jobs]
loaded = [ModularPipelineBlocks.from_pretrained(path, trust_remote_code=True) for path in versions]
print("REPORT" + json.dumps([reports, [[type(blocks).VERSION, blocks.said()] for blocks in loaded]]))
"""


def altered() -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "double", Doubling(steps=2), after="solver")
    insert_loop_block(blocks, "preview", PreviewStep, before="solver")
    insert_loop_block(blocks, "log", WindowLogStep(level=10), before="solver")
    return blocks


EXPORTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Preset": (PeRFlowSDXLAutoBlocks, {"prompt": "a red star", "num_inference_steps": 4}),
    "Altered": (altered, {"prompt": "a red star", "num_inference_steps": 4}),
    "Picture": (
        lambda: PeRFlowSDXLAutoBlocks().get_workflow("inpainting"),
        {"prompt": "a ring", "image": "picture.png", "mask_image": "mask.png", "num_inference_steps": 4},
    ),
}


SETTINGS: dict[str, dict[str, Any]] = {
    "Altered": {"attention_plan": "sliced"},
    "Picture": {"delta": "delta.safetensors"},
}
"""What the index says besides: parts of the package that are not used otherwise."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[list[int]]]:
    """What one process without this package says: of the exports, and of two versions of one module."""
    home = tmp_path_factory.mktemp("isolated")
    save_tiny_weights(home / "weights")
    recipe = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, num_inference_steps=4, guidance_scale=1.5)
    delta = {name: torch.full_like(weight, 1e-3) for name, weight in tiny_sdxl_unet().state_dict().items()}
    save_delta(delta, home / "weights" / "delta.safetensors", recipe)
    tiny_picture(1).save(home / "picture.png")
    tiny_mask().save(home / "mask.png")
    jobs = []
    for name, (blocks, inputs) in EXPORTS.items():
        directory = write_repository(workflow_sources(blocks(), name), home / name, name)
        copy_weights(home / "weights", directory)
        (directory / "modular_model_index.json").write_text(json.dumps(_index(directory) | SETTINGS.get(name, {})))
        jobs.append([str(directory), inputs])
    with pytest.MonkeyPatch.context() as patch:
        versions = [export_version(number, home, patch) for number in VERSIONS]
    return home, *run_without_the_package(SCRIPT, home, json.dumps([jobs, versions]))


@pytest.fixture(scope="module")
def exports(reports: Any) -> dict[str, tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """For each export what was said of it, its latents, and those of this package."""
    home, said, _ = reports
    return {
        name: (report, torch.load(home / name / "latents.pt"), _here(home / name, *EXPORTS[name]))
        for name, report in zip(EXPORTS, said, strict=True)
    }


def _index(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "modular_model_index.json").read_text())


def _here(directory: Path, blocks: Any, inputs: dict[str, Any]) -> torch.Tensor:
    pipe = blocks().init_pipeline(str(directory))
    pipe.load_components()
    given = {"image": tiny_picture(1), "mask_image": tiny_mask()}
    inputs = {name: given.get(name, value) for name, value in inputs.items()}
    return pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="latent", output="images")


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_draws_what_the_package_draws(name: str, exports: Any) -> None:
    report, latents, expected = exports[name]
    assert report["class"] == name
    assert ("diffusers_modules" in report["processors"]) == (name == "Altered")
    assert report["merged"] == (name == "Picture")
    assert report["scheduler"] == "PeRFlowScheduler"
    assert all(module.startswith("diffusers_modules.local.") for module in report["modules"])
    assert set(report["missing"]) <= {"image_encoder", "controlnet"}
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_has_the_tree_of_its_blocks(name: str, exports: Any) -> None:
    assert exports[name][0]["tree"] == block_tree(EXPORTS[name][0]())


def test_the_exports_differ(exports: Any) -> None:
    """Or else a mix-up of their files in diffusers' folder would go unseen."""
    assert not torch.equal(exports["Preset"][1], exports["Altered"][1])


VERSIONS = (2, 3, 4)


def test_versions_of_a_module_live_in_one_process(reports: Any) -> None:
    """Written in one second, so that Python could take the second `block.py` for the first, but for their sizes."""
    home, _, versions = reports
    sizes = [(home / f"export{number}" / "block.py").stat().st_size for number in VERSIONS]
    assert len(set(sizes)) > 1
    assert [pair for pair, size in zip(versions, sizes, strict=True) if sizes.count(size) == 1] == [
        [number, number] for number, size in zip(VERSIONS, sizes, strict=True) if sizes.count(size) == 1
    ]


def export_version(number: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = directory / f"source{number}"
    folder.mkdir()
    (folder / "my_versions.py").write_text(
        "from diffusers.modular_pipelines import ModularPipelineBlocks\n\n\n"
        "def word():\n"
        f"    return {number}\n\n\n"
        "class Versioned(ModularPipelineBlocks):\n"
        f"    VERSION = {number}\n\n"
        "    def said(self):\n"
        "        return word()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_versions", raising=False)
    sources = workflow_sources(importlib.import_module("my_versions").Versioned(), "Versioned")
    return str(write_repository(sources, directory / f"export{number}", "Versioned"))
