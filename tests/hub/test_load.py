"""`load_workflow` and `PeRFlowModularPipeline.from_pretrained`: what loads, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline, StableDiffusionXLAutoBlocks

from perflow_blocks import PeRFlowModularPipeline, export_workflow, extract_delta, load_workflow, push_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.files import open_weights
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import tiny_sdxl_unet
from tests.conftest import index_of, load, make_pipeline, run
from tests.hub.loopback import LoopbackHub
from workflows.generate import referring_pipeline

pytestmark = pytest.mark.usefixtures("own_modules")

INDEX = "modular_model_index.json"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thin") / "flow"
    return export_workflow(make_pipeline(PeRFlowSDXLText2ImageBlocks()), path, mode="thin", weights="include")


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


def hub_entry(kind: str, location: str, library: str = "diffusers", **details: Any) -> list[Any]:
    source = {"type_hint": [library, kind], "pretrained_model_name_or_path": location, **details}
    return [library, kind, {"subfolder": "", "variant": None, "revision": None, **source}]


def refused(place: Path | str, load_with: Callable[..., Any] = load_workflow, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_with(place, **{"trust_remote_code": True, **options})
    return str(caught.value)


def test_a_preset_needs_no_trust_and_draws_the_same(thin: Path, tmp_path: Path) -> None:
    assert torch.equal(run(load_workflow(thin)), run(make_pipeline(PeRFlowSDXLText2ImageBlocks())))
    typed = load_workflow(thin, dtype=torch.float64, device="cpu")
    assert {typed.unet.dtype, typed.vae.dtype, typed.text_encoder.dtype} == {torch.float64}
    assert load_workflow(thin, load_components=False).unet is None
    stored = make_pipeline(PeRFlowSDXLText2ImageBlocks()).to(torch.float16)
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


@pytest.mark.parametrize("code", ["Other = 1", "Blocks = dict"])
def test_code_without_blocks_is_refused(flow: Path, code: str) -> None:
    assert "defines no blocks Blocks" in refused(with_code(flow, code))


def test_two_workflows_and_two_versions_do_not_mix(flow: Path, tmp_path: Path) -> None:
    """Also where their modules have the same names, and once others are loaded."""
    given = "from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks as Given\n"
    code = f"from . import part\n{given}class Blocks(Given):\n    description = property(lambda self: part.NAME)\n"
    other, pipes = shutil.copytree(flow, tmp_path / "other"), {}
    for name, directory in [("a", flow), ("b", other), ("c", flow)]:
        (directory / "part.py").write_text(f"NAME = {name!r}\n{'#' * ord(name)}")  # of another size, as Python asks
        pipes[name] = load(with_code(directory, code), load_components=False)
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
    place = {"pretrained_model_name_or_path": "owner/model", "subfolder": "unet"}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), {"unet": place})
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
def test_files_that_lead_out_or_are_broken_are_refused_in_one_line(
    flow: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(flow)
    for way in (load_workflow, PeRFlowModularPipeline.from_pretrained):
        text = refused(flow, way)
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


# From the Hub


REPO = "someone/work.flow"


def push_version(hub: LoopbackHub, repository: Path, number: int, tmp_path: Path) -> tuple[str, torch.Tensor]:
    """Code, windows, weights and delta of its own; the commit and the image."""
    delta = extract_delta(tiny_sdxl_unet(number + 1), tiny_sdxl_unet())
    save_delta(delta, tmp_path / "delta.safetensors", DeltaRecipe(num_inference_steps=4), torch.float32)
    pipe: Any = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.update_components(num_time_windows=number + 1, delta=str(tmp_path / "delta.safetensors"))
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(number)
    mode: Any = ("thin", "self-contained")[number]
    directory = export_workflow(pipe, tmp_path / f"v{number}", mode=mode, weights="include")
    commit = push_workflow(directory, REPO).commit
    assert commit is not None and (directory / "delta").is_dir()
    hub.repositories[REPO].refs[f"v{number}"] = commit
    return commit, run(pipe)


def test_a_revision_holds_for_code_weights_and_delta_also_offline(
    default_hub: LoopbackHub, repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commits, images = zip(*(push_version(default_hub, repository, number, tmp_path) for number in (0, 1)), strict=True)
    assert not torch.equal(*images)

    def compare(pipe: Any, number: int) -> None:
        module = type(pipe.blocks).__module__
        assert module.startswith("perflow_blocks." if number == 0 else "diffusers_modules.")
        assert pipe.config["num_time_windows"] == number + 1
        assert torch.equal(run(pipe), images[number])

    asked: list[tuple[int, dict[str, Any]]] = [(0, {"revision": commits[0]}), (0, {"revision": "v0"}), (1, {})]
    for number, options in asked:
        compare(load(REPO, **options), number)
    requests = len(default_hub.requests)
    for number, options in (asked[0], asked[2]):
        compare(load(REPO, local_files_only=True, **options), number)
    assert len(default_hub.requests) == requests
    plain: Any = ModularPipeline.from_pretrained(REPO, trust_remote_code=True)
    plain.load_components()
    compare(plain, 1)
    pinned = re.findall(r"revision=('\w+')", caplog.text)
    assert pinned == [repr(commits[1])] * 2  # main, also offline; a preset runs no code


def test_what_the_hub_does_not_hold_is_one_line(default_hub: LoopbackHub, thin: Path) -> None:
    push_workflow(with_code(Path(shutil.copytree(thin, thin.parent / "pushed")), "Blocks = dict\n"), REPO)
    default_hub.create("someone/outside", {INDEX: b'{"delta": "../x"}'})
    assert f"{REPO} runs code of its own (block.py" in refused(REPO, trust_remote_code=False)
    assert "nonesuch" in refused(REPO, revision="nonesuch")
    assert "owner/missing is not a directory" in refused("owner/missing")
    assert "load it once with a network" in refused("owner/missing", local_files_only=True)
    assert "names '../x' as the delta" in refused("someone/outside")


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import not_installed_thing", "No module named 'not_installed_thing'"),
        ("import perflow_blocks\nperflow_blocks.Gone", "has no attribute 'Gone'"),
        (
            "from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks as SavedBlocks",
            "defines no blocks SavedBlocks of PeRFlow",
        ),
    ],
)
def test_code_that_cannot_run_or_is_diffusers_own_is_one_line(code: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code)
    index = {"auto_map": {"ModularPipelineBlocks": "block.SavedBlocks"}}
    (tmp_path / "modular_config.json").write_text(json.dumps(index))
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=rule):
        load_workflow(tmp_path, trust_remote_code=True)
