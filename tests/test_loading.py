"""The checkout's root and the embedded model's directory as modular repositories, loaded in a clean process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import BETAS, tiny_sdxl_components
from tests.conftest import python

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "perflow_blocks" / "demo" / "weights"
REPOSITORY_FILES = ("block.py", "modular_config.json", "modular_model_index.json")

SCRIPT = """
import json, sys
from diffusers import ModularPipeline

def load(directory):
    pipe = ModularPipeline.from_pretrained(directory, trust_remote_code=True)
    from perflow_blocks import PeRFlowSDXLAutoBlocks
    assert type(pipe.blocks) is PeRFlowSDXLAutoBlocks, type(pipe.blocks)
    report = {"pipeline": type(pipe).__name__, "specs": {}, "config": {}}
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        report["specs"][name] = [spec.pretrained_model_name_or_path, spec.subfolder, spec.variant]
    for name in ("prediction_type", "num_time_windows", "default_num_inference_steps", "guidance_scale", "delta"):
        report["config"][name] = pipe.config[name]
    return pipe, report

def generate(pipe, report):
    from perflow_blocks.delta.merge import merge_record
    pipe.load_components()
    report["missing"] = pipe.null_component_names
    models = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    report["dtypes"] = sorted({str(model.dtype) for model in models})
    state = pipe(prompt="a red star")
    report["image"] = [type(state.images[0]).__name__, *state.images[0].size]
    report["steps"] = state.num_inference_steps
    report["guidance"] = pipe.guider.guidance_scale
    report["merged"] = merge_record(pipe.unet).source

reports = []
for number, directory in enumerate(sys.argv[1:]):
    pipe, report = load(directory)
    if number:
        generate(pipe, report)
    reports.append(report)
print("REPORTS" + json.dumps(reports))
"""


@pytest.fixture(scope="module")
def reports(embedded_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """What a new process without network, in another directory and with an empty cache, says about the repositories.

    One process for all, since most of its time goes into imports. The checkout, of which nothing is generated, is
    first: so it is loaded where the package was not imported before.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("HF_MODULES_CACHE", None)
    # The package is imported as where it is installed; the path stands in for that where tests run uninstalled.
    environment["PYTHONPATH"] = str(ROOT)
    directories = (ROOT, embedded_copy, EMBEDDED)
    printed = python("-c", SCRIPT, *directories, environment=environment, cwd=elsewhere)
    return dict(zip(directories, json.loads(printed.split("REPORTS")[1]), strict=True))


def test_the_checkout_is_a_modular_repository(reports: dict[Path, dict[str, Any]]) -> None:
    report = reports[ROOT]
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert report["pipeline"] == "StableDiffusionXLModularPipeline"
    assert report["specs"] == {
        "unet": ["hansyan/perflow-sdxl-base", "unet", "v0-fix"],
        "vae": ["madebyollin/sdxl-vae-fp16-fix", "", None],
        "text_encoder": [base, "text_encoder", "fp16"],
        "text_encoder_2": [base, "text_encoder_2", "fp16"],
        "tokenizer": [base, "tokenizer", None],
        "tokenizer_2": [base, "tokenizer_2", None],
        "scheduler": [base, "scheduler", None],
        "image_encoder": [None, "", None],  # for those who bring IP-Adapters and ControlNets
        "controlnet": [None, "", None],
    }
    assert report["config"] == {
        "prediction_type": "ddim_eps",
        "num_time_windows": 4,
        "default_num_inference_steps": 6,
        "guidance_scale": 2.0,
        "delta": None,
    }


@pytest.fixture(scope="module")
def embedded_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded directory's layout around tiny random models, in half precision as they ship."""
    directory = tmp_path_factory.mktemp("copy") / "model"
    components = tiny_sdxl_components(DDIMScheduler(**BETAS))
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            component.half()
        component.save_pretrained(directory / name)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads the type that the config names, diffusers float32: so float32 is the default of all.
        config = directory / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    for name in REPOSITORY_FILES:
        shutil.copy(EMBEDDED / name, directory / name)
    recipe = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, num_inference_steps=4, guidance_scale=1.0)
    delta = {name: torch.full_like(weight, 1e-3) for name, weight in components["unet"].state_dict().items()}
    save_delta(delta, directory / "perflow_delta.safetensors", recipe)
    return directory


def assert_generates_from(directory: Path, report: dict[str, Any]) -> None:
    brought = {"image_encoder", "controlnet"}  # by those who use them
    assert {spec[0] for name, spec in report["specs"].items() if name not in brought} == {str(directory)}
    assert set(report["missing"]) == brought
    assert report["dtypes"] == ["torch.float32"]
    assert report["image"][0] == "Image"
    assert report["merged"] == str(directory / "perflow_delta.safetensors")


def test_the_embedded_layout_generates_offline_from_anywhere(
    embedded_copy: Path, reports: dict[Path, dict[str, Any]]
) -> None:
    report = reports[embedded_copy]
    assert_generates_from(embedded_copy, report)
    assert report["image"] == ["Image", 32, 32]
    assert (report["steps"], report["guidance"]) == (4, 1.0)


def test_the_embedded_model_generates_offline_from_anywhere(reports: dict[Path, dict[str, Any]]) -> None:
    assert_generates_from(EMBEDDED, reports[EMBEDDED])


@pytest.mark.parametrize("directory", [ROOT, EMBEDDED], ids=["root", "embedded"])
def test_no_index_lets_the_stock_blocks_in(directory: Path) -> None:
    index = json.loads((directory / "modular_model_index.json").read_text())
    assert "_blocks_class_name" not in index  # or else a failing block.py silently gives the stock pipeline
    assert "/work" not in json.dumps(index)


def test_both_repositories_run_the_same_class() -> None:
    name = "modular_config.json"  # the root's files are generated, the embedded model's are part of the package
    assert (ROOT / name).read_text() == (EMBEDDED / name).read_text()


def test_a_directory_without_its_code_is_an_error_and_not_the_stock_pipeline(
    embedded_copy: Path, tmp_path: Path
) -> None:
    from diffusers import ModularPipeline

    directory = shutil.copytree(embedded_copy, tmp_path / "model")
    (directory / "modular_config.json").unlink()
    with pytest.raises(ValueError, match="No pipeline blocks could be resolved"):
        ModularPipeline.from_pretrained(str(directory), trust_remote_code=True, local_files_only=True)
