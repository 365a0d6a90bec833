"""`load_workflow` from directories: what it verifies, what it refuses, and that nothing fails in silence."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline, StableDiffusionXLAutoBlocks

from perflow_blocks import export_workflow, load_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks, PeRFlowSDXLText2ImageBlocks
from perflow_blocks.hub import loading
from perflow_blocks.hub.manifest import MANIFEST, write_manifest
from tests.conftest import run
from tests.hub.conftest import hub_entry, index_of, loaded, referring_pipeline, tiny_pipeline, use_own_modules


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_own_modules(tmp_path / "modules", monkeypatch)
    return tmp_path / "modules"


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thin") / "flow"
    return export_workflow(tiny_pipeline(PeRFlowSDXLText2ImageBlocks()), path, mode="thin", weights="include")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_workflow(PeRFlowSDXLText2ImageBlocks(), tmp_path_factory.mktemp("whole") / "flow")


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def rewritten(directory: Path, name: str, old: str, new: str) -> None:
    """Changes a file and the manifest with it, as its author can."""
    text = (directory / name).read_text()
    assert old in text
    (directory / name).write_text(text.replace(old, new))
    manifest = json.loads((directory / MANIFEST).read_text())
    write_manifest(directory, blocks=manifest["blocks"], mode=manifest["mode"])


def refused(directory: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_workflow(directory, **{"trust_remote_code": True, **options})
    return str(caught.value)


def test_every_changed_code_file_is_named_and_nothing_is_run(whole: Path, tmp_path: Path, modules: Path) -> None:
    directory = copy_of(whole, tmp_path)
    names = sorted(path.name for path in directory.glob("*.py"))
    assert len(names) > 20
    for name in ("block.py", names[7]):
        original = (directory / name).read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        (directory / name).write_bytes(bytes(changed))
        assert f"1 changed ({name})" in refused(directory)
        (directory / name).write_bytes(original)
    (directory / "extra.py").write_text("")
    assert "1 unexpected (extra.py)" in refused(directory)
    assert list(modules.iterdir()) == []  # where diffusers would have copied the code before it ran


@pytest.mark.parametrize("name", ["modular_model_index.json", "modular_config.json", "README.md"])
def test_changed_and_missing_files_are_named(thin: Path, tmp_path: Path, name: str) -> None:
    directory = copy_of(thin, tmp_path)
    (directory / name).write_text((directory / name).read_text() + " ")
    assert f"1 changed ({name})" in refused(directory)
    (directory / name).unlink()
    assert f"1 missing ({name})" in refused(directory)


def test_without_trust_the_error_says_what_would_run(thin: Path, whole: Path, modules: Path) -> None:
    text = refused(thin, trust_remote_code=False)
    assert "block.py (" in text and "the package perflow-blocks" in text and "trust_remote_code=True" in text
    text = refused(whole, trust_remote_code=False)
    code = [path.name for path in whole.glob("*.py")]
    assert all(f"{name} (" in text for name in code) and "the package" not in text and str(whole) in text
    assert list(modules.iterdir()) == []


def test_code_that_fails_is_an_error_and_not_the_stock_blocks(thin: Path, tmp_path: Path) -> None:
    directory = copy_of(thin, tmp_path)
    index = {**index_of(directory), "_blocks_class_name": "StableDiffusionXLAutoBlocks"}
    (directory / "modular_model_index.json").write_text(json.dumps(index))
    rewritten(directory, "block.py", "from perflow_blocks", 'open("/nowhere/at/all")\nfrom perflow_blocks')
    stock = ModularPipeline.from_pretrained(str(directory), trust_remote_code=True)
    assert type(stock.blocks) is StableDiffusionXLAutoBlocks  # what is to be prevented
    text = refused(directory)
    assert f"the code of {directory} does not run (FileNotFoundError" in text and "install perflow-blocks" in text


def test_blocks_other_than_the_manifest_names_are_an_error(thin: Path, tmp_path: Path) -> None:
    directory = copy_of(thin, tmp_path)
    rewritten(directory, "modular_config.json", "block.PeRFlowSDXLText2ImageBlocks", "block.Other")
    assert "runs block.Other, and the manifest says block.PeRFlowSDXLText2ImageBlocks" in refused(directory)
    rewritten(directory, "modular_config.json", "block.Other", "block.PeRFlowSDXLText2ImageBlocks")
    rewritten(
        directory,
        "block.py",
        "__all__",
        "from diffusers import StableDiffusionXLAutoBlocks as PeRFlowSDXLText2ImageBlocks\n__all__",
    )
    assert "gives the blocks StableDiffusionXLAutoBlocks" in refused(directory)


def test_components_that_fail_are_listed_together_with_their_sources(thin: Path, tmp_path: Path) -> None:
    directory = copy_of(thin, tmp_path)
    shutil.rmtree(directory / "vae")
    index = index_of(directory)
    missing = str(tmp_path / "missing")
    index["text_encoder"] = hub_entry("CLIPTextModel", missing, "transformers", subfolder="te", variant="fp16")
    (directory / "modular_model_index.json").write_text(json.dumps(index))
    rewritten(directory, "README.md", "# ", "# ")
    shutil.rmtree(directory / "text_encoder")
    write_manifest(directory, blocks="PeRFlowSDXLText2ImageBlocks", mode="thin")
    text = refused(directory, local_files_only=True)
    assert "2 of 7 components" in text
    assert f"- vae: the index names no source, and {directory / 'vae'} holds none" in text
    assert f"- text_encoder from {missing}, subfolder te, variant fp16: " in text
    assert load_workflow(directory, trust_remote_code=True, load_components=False).unet is None


def test_a_component_that_the_index_leaves_out_is_no_failure(tmp_path: Path) -> None:
    index = {"unet": hub_entry("UNet2DConditionModel", "owner/model", subfolder="unet")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    directory = export_workflow(pipe, tmp_path / "out", mode="thin")
    text = refused(directory, local_files_only=True)
    assert "1 of 1 components" in text and "unet from owner/model, subfolder unet" in text and "vae" not in text


def test_a_revision_is_for_repositories_and_a_place_has_to_be_there(thin: Path, tmp_path: Path) -> None:
    assert "is for repositories" in refused(thin, revision="main")
    assert "no repository's id" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert f"holds no {MANIFEST}" in refused(tmp_path / "empty")


def test_type_and_device_are_as_asked(thin: Path) -> None:
    pipe = loaded(thin, dtype=torch.float64, device="cpu")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float64}


def test_two_workflows_whose_files_are_alike_in_size_and_time_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python takes bytecode for up to date by the source's size and second; diffusers copies all to one place."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    first = export_workflow(PeRFlowSDXLText2ImageBlocks(), tmp_path / "a", mode="thin", name="Flow", description="A.")
    second = Path(shutil.copytree(first, tmp_path / "b"))
    rewritten(second, "block.py", '"A."', '"B."')
    assert (first / "block.py").stat().st_size == (second / "block.py").stat().st_size
    time.sleep(1.02 - time.time() % 1)  # at the beginning of a second
    for directory, description in [(first, "A."), (second, "B."), (first, "A.")]:
        assert loaded(directory, load_components=False).blocks.description == description


def test_another_module_of_the_same_name_in_the_process_is_an_error(whole: Path, tmp_path: Path) -> None:
    assert type(loaded(whole, load_components=False).blocks).__name__ == "PeRFlowSDXLText2ImageBlocks"
    directory = copy_of(whole, tmp_path)
    assert loaded(directory, load_components=False) is not None
    sibling = next(path for path in directory.glob("perflow_*windows.py"))
    rewritten(directory, sibling.name, '"""', '"""Another text. ')
    assert f"another {sibling.name} than that of {directory} is imported" in refused(directory, load_components=False)


def test_self_contained_workflows_live_side_by_side(tmp_path: Path, repository: Path) -> None:
    expected = {}
    for kind in (PeRFlowSDXLText2ImageBlocks, PeRFlowSDXLImage2ImageBlocks):
        pipe = kind().init_pipeline(str(repository))
        pipe.load_components()
        expected[export_workflow(pipe, tmp_path / kind.__name__, weights="include")] = type(pipe.blocks).__name__
    for directory, name in expected.items():
        pipe = loaded(directory)
        assert type(pipe.blocks).__name__ == name
        assert type(pipe.blocks).__module__.startswith("diffusers_modules.local.")
        assert type(pipe.attention).__module__.startswith("diffusers_modules.local.perflow_")
    assert "diffusers_modules.local.block" in sys.modules


def test_a_self_contained_workflow_draws_the_same_and_is_exported_again(tmp_path: Path, repository: Path) -> None:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(num_time_windows=2, guidance_scale=1.5)
    expected = run(pipe)
    again = loaded(export_workflow(pipe, tmp_path / "first", weights="include"))
    assert torch.equal(run(again), expected)
    assert type(again.scheduler).__module__.startswith("diffusers_modules.local.perflow_")
    third = loaded(export_workflow(again, tmp_path / "second", weights="include"))
    assert torch.equal(run(third), expected)
    assert index_of(tmp_path / "second") == index_of(tmp_path / "first")


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/more.txt", "vae.safetensors", "kernel.SO"]
)
def test_files_that_a_library_may_load_have_to_be_in_the_manifest(thin: Path, tmp_path: Path, name: str) -> None:
    directory = copy_of(thin, tmp_path)
    (directory / "notes.txt").write_text("one's own")
    (directory / "unet" / ".DS_Store").write_bytes(b"")
    load_workflow(directory, trust_remote_code=True, load_components=False)
    (directory / name).write_text("{}")
    assert f"1 unexpected ({name})" in refused(directory)


def test_weights_are_read_if_asked(thin: Path, tmp_path: Path) -> None:
    directory = copy_of(thin, tmp_path)
    path = directory / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load_workflow(directory, trust_remote_code=True, load_components=False)
    assert "1 changed (unet/diffusion_pytorch_model.safetensors)" in refused(directory, verify_weights=True)


def test_code_that_another_process_puts_in_place_is_an_error(
    thin: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes no notice of the lock, between the copy of the code and its import."""
    place = modules / "diffusers_modules" / "local" / "block.py"
    real = loading.ModularPipelineBlocks.from_pretrained

    def overtaken(*arguments: Any, **options: Any) -> Any:
        blocks = real(*arguments, **options)
        place.write_text(place.read_text() + "# another")
        return blocks

    monkeypatch.setattr(loading.ModularPipelineBlocks, "from_pretrained", overtaken)
    assert "another process loaded other code while that of" in refused(thin)


def test_the_modules_are_in_packages_which_win_over_those_of_another_cache(
    whole: Path, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "diffusers_modules" / "local"
    other.mkdir(parents=True)
    for folder in (other, other.parent):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(other.parent.parent)
    monkeypatch.syspath_prepend(modules)
    load_workflow(whole, trust_remote_code=True, load_components=False)
    assert (modules / "diffusers_modules" / "__init__.py").is_file()
