"""`load_workflow` and `PeRFlowModularPipeline.from_pretrained` on directories: what loads, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline, StableDiffusionXLAutoBlocks

from perflow_blocks import PeRFlowModularPipeline, export_workflow, load_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.files import open_weights
from tests.conftest import run
from tests.hub.conftest import hub_entry, index_of, loaded, referring_pipeline, tiny_pipeline, use_own_modules

INDEX = "modular_model_index.json"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thin") / "flow"
    return export_workflow(tiny_pipeline(PeRFlowSDXLText2ImageBlocks()), path, mode="thin", weights="include")


@pytest.fixture
def flow(thin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(thin, tmp_path / "flow"))


def change(directory: Path, name: str, **values: Any) -> None:
    """Sets entries of a JSON file."""
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_code(directory: Path, code: str) -> Path:
    """The workflow with other code, which is not a preset."""
    change(directory, "modular_config.json", perflow_preset=None, auto_map={"ModularPipelineBlocks": "block.Blocks"})
    (directory / "block.py").write_text(code)
    return directory


def refused(directory: Path | str, load: Callable[..., Any] = load_workflow, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(directory, **{"trust_remote_code": True, **options})
    return str(caught.value)


def test_a_preset_needs_no_trust_and_draws_the_same(thin: Path, tmp_path: Path) -> None:
    pipe = load_workflow(thin)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe), run(tiny_pipeline(PeRFlowSDXLText2ImageBlocks())))
    typed = load_workflow(thin, dtype=torch.float64, device="cpu")
    assert {typed.unet.dtype, typed.vae.dtype, typed.text_encoder.dtype} == {torch.float64}
    assert load_workflow(thin, load_components=False).unet is None
    stored = tiny_pipeline(PeRFlowSDXLText2ImageBlocks()).to(torch.float16)
    whole = load_workflow(export_workflow(stored, tmp_path / "half", weights="include"))
    assert {whole.unet.dtype, whole.text_encoder.dtype} == {torch.float32}


def test_without_trust_no_code_runs_and_the_error_names_it(flow: Path) -> None:
    with_code(flow, "raise RuntimeError")
    text = refused(flow, trust_remote_code=False)
    assert "block.py" in text and str(flow) in text and "trust_remote_code=True" in text


def test_code_that_fails_is_an_error_and_not_the_stock_blocks(flow: Path) -> None:
    change(flow, INDEX, _blocks_class_name="StableDiffusionXLAutoBlocks")
    with_code(flow, "open('/nowhere/at/all')")
    stock = ModularPipeline.from_pretrained(str(flow), trust_remote_code=True)
    assert type(stock.blocks) is StableDiffusionXLAutoBlocks  # what is to be prevented
    with pytest.raises(FileNotFoundError):
        load_workflow(flow, trust_remote_code=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", "needs what is not installed (No module named 'no_such_package')"),
        ("Other = 1", "defines no blocks Blocks"),
        ("Blocks = dict", "defines no blocks Blocks"),
        ("from diffusers import StableDiffusionXLAutoBlocks as Blocks", "no PeRFlow workflow"),
    ],
)
def test_code_without_blocks_of_perflow_is_refused(flow: Path, code: str, message: str) -> None:
    assert message in refused(with_code(flow, code))


def test_two_workflows_and_two_versions_do_not_mix(flow: Path, tmp_path: Path) -> None:
    """Also where their modules have the same names, and once others are loaded."""
    given = "from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks as Given\n"
    code = f"from . import part\n{given}class Blocks(Given):\n    description = property(lambda self: part.NAME)\n"
    other, pipes = shutil.copytree(flow, tmp_path / "other"), {}
    for name, directory in [("a", flow), ("b", other), ("c", flow)]:
        (directory / "part.py").write_text(f"NAME = {name!r}\n{'#' * ord(name)}")  # of another size, as Python asks
        pipes[name] = loaded(with_code(directory, code), load_components=False)
    assert {name: pipe.blocks.description for name, pipe in pipes.items()} == {name: name for name in pipes}


def test_components_that_fail_are_listed_together_with_their_sources(flow: Path, tmp_path: Path) -> None:
    shutil.rmtree(flow / "vae")
    shutil.rmtree(flow / "text_encoder")
    missing = str(tmp_path / "missing")
    change(flow, INDEX, text_encoder=hub_entry("CLIPTextModel", missing, "transformers", subfolder="te"))
    text = refused(flow, local_files_only=True)
    assert "2 of 7 components" in text
    assert f"- vae: the index names no source, and {flow / 'vae'} holds none" in text
    assert f"- text_encoder from {missing}/te: " in text


def test_a_component_that_the_index_leaves_out_is_no_failure(tmp_path: Path) -> None:
    index = {"unet": hub_entry("UNet2DConditionModel", "owner/model", subfolder="unet")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    text = refused(export_workflow(pipe, tmp_path / "out", mode="thin"), local_files_only=True)
    assert "1 of 1 components" in text and "unet from owner/model/unet" in text and "vae" not in text


def test_what_is_not_a_workflow_is_one_line(thin: Path, repository: Path, tmp_path: Path) -> None:
    assert "is for repositories" in refused(thin, revision="main")
    assert "not a directory, and no repository" in refused(tmp_path / "nothing")
    assert "is not a workflow: it has no modular_config.json" in refused(repository)


def index_with(**values: Any) -> Callable[[Path], None]:
    return lambda flow: change(flow, INDEX, **values)


def unet_with(**details: Any) -> Callable[[Path], None]:
    return index_with(unet=hub_entry("UNet2DConditionModel", **{"location": "owner/model", **details}))


def shards_with(name: str) -> Callable[[Path], None]:
    path = "unet/diffusion_pytorch_model.safetensors.index.json"
    return lambda flow: write(flow / path, json.dumps({"weight_map": {"conv_in.weight": name}}))


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (index_with(delta="../x"), "names '../x' as the delta"),
        (index_with(delta="delta\\..\\..\\x"), "as the delta"),
        (unet_with(subfolder="../.."), "names '../..' as the subfolder of unet"),
        (unet_with(subfolder="/etc"), "as the subfolder of unet"),
        (unet_with(subfolder=5), "names 5 as the subfolder of unet"),
        (unet_with(variant="x/../../y"), "as the variant of unet"),
        (unet_with(revision="../../x"), "as the revision of unet"),
        (unet_with(location=None, repo="../x"), "as the repo of unet"),
        (index_with(unet=["diffusers", "UNet2DConditionModel", 5]), "has a broken entry"),
        (unet_with(location="../other"), "as the pretrained_model_name_or_path of unet"),
        (shards_with("../x.safetensors"), "names files outside its folder (../x.safetensors)"),
        (shards_with("C:\\x.safetensors"), "names files outside its folder"),
        (lambda flow: write(flow / INDEX, "[]"), "must hold a JSON object, not a list"),
        (lambda flow: write(flow / INDEX, DEEP), "cannot be read as JSON"),
        (lambda flow: write(flow / "modular_config.json", DEEP), "cannot be read as JSON"),
        (lambda flow: write(flow / "modular_config.json", "5"), "must hold a JSON object"),
        (lambda flow: write(flow / "modular_config.json", '{"auto_map": 5}'), "must name the blocks"),
        (lambda flow: write(flow / "scheduler/scheduler_config.json", '{"_class_name": "UNet"}'), "not a scheduler's"),
        (lambda flow: write(flow / "scheduler/scheduler_config.json", DEEP), "cannot be read as JSON"),
        (lambda flow: change(flow, "scheduler/scheduler_config.json", num_train_timesteps=10**9), "must be at most"),
    ],
)
@pytest.mark.parametrize("load", [load_workflow, PeRFlowModularPipeline.from_pretrained])
def test_files_that_lead_out_or_are_broken_are_refused_in_one_line(
    flow: Path, spoil: Callable[[Path], None], message: str, load: Callable[..., Any]
) -> None:
    spoil(flow)
    text = refused(flow, load)
    assert message in text and "\n" not in text and len(text) < 500


def test_a_delta_s_shards_stay_in_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for text, message in [('{"weight_map": {"a": "../x"}}', "outside its folder"), (DEEP, "cannot be read as JSON")]:
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path)


def test_a_place_on_this_machine_is_kept_by_directories_alone(flow: Path) -> None:
    """`save_pretrained` writes the place of its weights, so that a directory may name it and a repository may not."""
    change(flow, INDEX, unet=hub_entry("UNet2DConditionModel", str(flow), subfolder="unet"))
    assert PeRFlowModularPipeline.from_pretrained(flow).get_component_spec("unet").subfolder == "unet"
    assert index_of(flow)["unet"][2]["pretrained_model_name_or_path"] == str(flow)
    assert load_workflow(flow).unet is not None
