"""Exported workflows: what they hold, that they come back as they were, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ModularPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perflow_blocks import (
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
    PeRFlowSetTimestepsStep,
    WindowLogStep,
    export_workflow,
    insert_loop_block,
    merge_delta,
    rescale_delta,
)
from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks, PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing import tiny_sdxl_unet
from tests.conftest import index_of, make_pipeline, python, run
from workflows.generate import referring_pipeline

pytestmark = pytest.mark.usefixtures("own_modules")

FILES = {"README.md", "block.py", "mellon_pipeline_config.json", "modular_config.json", "modular_model_index.json"}
PLACE = {"pretrained_model_name_or_path": "owner/model", "subfolder": "unet", "variant": "v0-fix", "revision": "abc"}
RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=2, num_inference_steps=3, guidance_scale=1.0)


@pytest.fixture
def pipe(repository: Path) -> Any:
    """Weights that were read from a file, which compute the same to the bit when they are read again."""
    return with_weights(PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository)))


@pytest.fixture
def referring() -> Any:
    return referring_pipeline(PeRFlowSDXLText2ImageBlocks(), {"unet": PLACE}, num_time_windows=2)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "accelerator.safetensors"
    save_delta({name: torch.full_like(w, 1e-3) for name, w in tiny_sdxl_unet().state_dict().items()}, path, RECIPE)
    return path


def with_weights(pipe: Any) -> Any:
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def again(directory: Path) -> Any:
    """What diffusers loads from an export."""
    return with_weights(ModularPipeline.from_pretrained(str(directory), trust_remote_code=True))


def text_of(directory: Path) -> str:
    return "\n".join(path.read_text() for path in directory.rglob("*") if path.suffix in {".json", ".md", ".py"})


def refused(given: Any, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        export_workflow(given, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))
    return str(caught.value)


def test_a_repository_by_reference(tmp_path: Path, referring: Any) -> None:
    directory = export_workflow(referring, tmp_path / "out")
    assert {path.name for path in directory.iterdir()} == FILES
    index = index_of(directory)
    assert index["unet"][:2] == ["diffusers", "UNet2DConditionModel"] and index["unet"][2].items() >= PLACE.items()
    assert "vae" not in index and "delta" not in index and "_blocks_class_name" not in index
    assert (index["_class_name"], index["num_time_windows"]) == ("StableDiffusionXLModularPipeline", 2)
    config = json.loads((directory / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "block.PeRFlowSDXLText2ImageBlocks"}
    assert config["requirements"] == {"perflow-blocks": ">=0.2"}
    plain = ModularPipeline.from_pretrained(str(directory), trust_remote_code=True)
    assert type(plain.blocks) is PeRFlowSDXLText2ImageBlocks
    assert plain.get_component_spec("unet").revision == "abc" and plain.config["num_time_windows"] == 2
    assert "no components" in (export_workflow(PeRFlowSetTimestepsStep(), tmp_path / "step") / "README.md").read_text()


def test_a_repository_in_the_cache_is_referred_to_by_its_id_and_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--flow" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    place = {"pretrained_model_name_or_path": f"{snapshot}{os.sep}", "subfolder": "unet"}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), {"unet": place})
    source = index_of(export_workflow(pipe, tmp_path / "out"))["unet"][2]
    assert (source["pretrained_model_name_or_path"], source["revision"]) == ("owner/flow", "0123456789" * 4)


def test_components_and_settings_come_back(tmp_path: Path, pipe: Any) -> None:
    pipe.update_components(
        guider=AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5),
        scheduler=PeRFlowScheduler.from_scheduler(pipe.scheduler, num_time_windows=3),
        attention_plan={"self": "sliced"},
        default_num_inference_steps=5,
    )
    expected = run(pipe)
    directory = export_workflow(pipe, tmp_path / "out", weights="include")
    folders = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "guider"}
    assert {path.name for path in directory.iterdir() if path.is_dir()} == folders
    index = index_of(directory)
    assert {index[name][2]["pretrained_model_name_or_path"] for name in folders} == {None}
    assert index["scheduler"][1] == "EulerDiscreteScheduler" and index["attention_plan"] == ["self=sliced"]
    assert "| 5 | AdaptiveProjectedGuidance | ddim_eps | 3, equal |" in (directory / "README.md").read_text()
    directory = export_workflow(pipe, directory, weights="include", overwrite=True)
    assert torch.equal(run(again(directory)), expected)
    twice = export_workflow(again(directory), tmp_path / "twice", weights="include")
    assert str(tmp_path) not in text_of(twice) and index_of(twice) == index_of(directory)


@pytest.mark.parametrize(
    ("title", "folder", "name"),
    [
        ("<script>x</script>\n# Two [a](b)", "it's", "it-s"),
        (None, 'a "quote"; import os', "a-quote-import-os"),
        ("it: - 'x'", "x", "x"),
    ],
)
def test_titles_and_folder_names_are_escaped(
    title: str | None, folder: str, name: str, tmp_path: Path, referring: Any
) -> None:
    directory = export_workflow(referring, tmp_path / folder, title=title, licence="other", notes="A *note*.")
    card = ModelCard.load(directory / "README.md")
    assert card.data.license == "other" and card.data.base_model == ["owner/model"]
    assert {"diffusers", "modular-diffusers", "perflow", "text-to-image"} <= {*card.data.tags}
    headings = [line for line in card.text.splitlines() if line.startswith("# ")]
    assert len(headings) == 1 and "<" not in card.text and "A *note*." in card.text
    code = card.text.split("```py\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    assert f'"your-name/{name}"' in code


def test_a_card_says_what_there_is_and_shows_the_given_example(tmp_path: Path) -> None:
    places = {"unet": PLACE, "vae": {"pretrained_model_name_or_path": "owner/vae"}}
    values = {"default_num_inference_steps": 5, "window_boundaries": [1.0, 0.3, 0.0], "prediction_type": "velocity"}
    pipe = referring_pipeline(PeRFlowSDXLImage2ImageBlocks(), places, **values)
    text = (export_workflow(pipe, tmp_path / "out") / "README.md").read_text()
    assert "| 5 | 2 | velocity | 2, from 1, 0.3, 0 |" in text and "pipeline_tag: image-to-image" in text
    assert "[owner/model](https://huggingface.co/owner/model), `unet`, variant `v0-fix`, revision `abc`" in text
    assert (
        'from_pretrained("your-name/out", trust_remote_code=True)' in text and 'image=load_image("photo.png"),' in text
    )
    assert all(f"- `{param.name}` (" in text for param in pipe.blocks.inputs)
    own = export_workflow(pipe, tmp_path / "own", example="draw('x')")
    text = (own / "README.md").read_text()
    assert "```py\ndraw('x')\n```" in text and "load_image" not in text


def test_mellon_reads_its_configuration(tmp_path: Path) -> None:
    """That of presets is read by the tests of the repositories under workflows/."""
    node = MellonPipelineConfig.load(export_workflow(PeRFlowSetTimestepsStep(), tmp_path / "b"))
    assert node.node_params["custom"]["params"]


def test_an_image_is_small_and_tells_nothing_else(tmp_path: Path, referring: Any) -> None:
    info = PngInfo()
    info.add_text("prompt", "/home/somebody/model")
    Image.new("RGB", (2048, 512)).save(tmp_path / "given.png", pnginfo=info)
    directory = export_workflow(referring, tmp_path / "out", image=tmp_path / "given.png")
    with Image.open(directory / "picture.png") as written:
        assert written.size == (1024, 256) and written.info == {}
    assert "(picture.png)" in (directory / "README.md").read_text()


# Deltas


def test_a_merged_delta_is_in_included_weights_and_copied(tmp_path: Path, pipe: Any, delta: Path) -> None:
    expected = run(pipe, delta=delta)
    directory = export_workflow(pipe, tmp_path / "out", weights="include")
    assert (directory / "delta" / delta.name).read_bytes() == delta.read_bytes()
    assert index_of(directory)["delta"] == f"delta/{delta.name}" and str(delta.parent) not in text_of(directory)
    assert "| 3 | 1 | ddim_eps | 2, equal |" in (directory / "README.md").read_text()
    copy = again(directory)
    torch.testing.assert_close(run(copy), expected, rtol=1e-4, atol=1e-3)
    assert [(record.source, record.reloaded) for record in merge_records(copy.unet)] == [(delta.name, True)]


@pytest.mark.parametrize("how", ["configured", "given", "merged"])
def test_a_delta_alone_lies_beside_references(tmp_path: Path, referring: Any, delta: Path, how: str) -> None:
    if how == "configured":
        referring.update_components(delta=str(delta), delta_scale=0.5)
    if how == "merged":
        referring.register_components(unet=merged_unet(referring, delta, 0.5))
    given = delta if how == "given" else None
    directory = export_workflow(referring, tmp_path / "out", weights="delta-only", delta=given)
    index = index_of(directory)
    assert index["unet"][2]["pretrained_model_name_or_path"] == "owner/model"
    assert (index["delta"], index["delta_scale"]) == (f"delta/{delta.name}", 1.0 if how == "given" else 0.5)
    assert (directory / index["delta"]).read_bytes() == delta.read_bytes()
    assert "| 3 | 1 | ddim_eps |" in (directory / "README.md").read_text()


def merged_unet(pipe: Any, delta: Path, scale: float) -> Any:
    unet: Any = tiny_sdxl_unet()
    merge_delta(unet, delta, scale)
    unet._diffusers_load_id = pipe.get_component_spec("unet").load_id
    return unet


def test_deltas_that_would_be_lost_are_refused(tmp_path: Path, referring: Any, delta: Path) -> None:
    only: dict[str, Any] = {"weights": "delta-only"}
    assert "needs one delta of one file" in refused(referring, tmp_path, **only)
    assert "absent does not exist" in refused(referring, tmp_path, weights="delta-only", delta="absent")
    message = rf"the delta {delta.name} is not part of the weights that are referred to; pass weights='delta-only'"
    assert message in refused(referring, tmp_path, delta=delta)
    referring.register_components(unet=merged_unet(referring, delta, 1.0))
    assert message in refused(referring, tmp_path)
    rescale_delta(referring.unet, 0.5, scales={"up_blocks.*": 0.25})
    assert "pass weights='include'" in refused(referring, tmp_path, weights="delta-only", delta=delta)
    other = tmp_path / "other.safetensors"
    save_delta({"conv_in.bias": torch.ones(32)}, other, RECIPE)
    referring.register_components(unet=merged_unet(referring, delta, 1.0))
    for weights in ("delta-only", "include"):
        text = refused(referring, tmp_path, weights=weights, delta=other)
        assert f"{delta.name} is merged, and delta= names another one; leave delta= out" in text


# Refusals


def test_weights_that_others_do_not_have_are_refused_together(
    tmp_path: Path, repository: Path, referring: Any
) -> None:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    text = refused(pipe, tmp_path)
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    assert f"{repository}, where {', '.join(sorted(names, key=text.index))} came from" in text
    assert text.startswith("nothing was exported: ") and "weights='include'" in text
    for given in (pipe, pipe.blocks):
        assert "no component is loaded" in refused(given, tmp_path, weights="include")
    referring.register_components(unet=tiny_sdxl_unet().to("meta"))
    referring.update_components(vae=make_pipeline().vae, attention_plan="nonesuch")
    text = refused(referring, tmp_path)
    assert "vae was put in as an object" in text and "strategy 'nonesuch' is unknown" in text
    assert "unet has weights without values" in refused(referring, tmp_path, weights="include")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fat"}, "mode='fat' is unknown; pass one of thin, self-contained."),
        ({"weights": "some"}, "weights='some' is unknown; pass one of reference, include, delta-only."),
        ({"image": "absent.png"}, "image='absent.png' cannot be read"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refused(PeRFlowSDXLText2ImageBlocks(), tmp_path, **options)


def test_a_directory_is_replaced_only_where_that_is_meant_and_loses_nothing(tmp_path: Path) -> None:
    blocks, target = PeRFlowSDXLText2ImageBlocks(), tmp_path / "out"
    target.mkdir()
    export_workflow(blocks, target, mode="self-contained")
    with pytest.raises(ValueError, match="pass overwrite=True"):
        export_workflow(blocks, target)
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"holds files that no export wrote \(mine.txt\)"):
        export_workflow(blocks, target, overwrite=True)
    (target / "mine.txt").unlink()
    (target / "__pycache__").mkdir()  # as loading leaves it
    export_workflow(blocks, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == FILES
    (target / "modular_model_index.json").unlink()
    for path in (target, target / "block.py"):
        with pytest.raises(ValueError, match="is not a workflow repository"):
            export_workflow(blocks, path, overwrite=True)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.vae, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_workflow(pipe, tmp_path / "out", weights="include")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Code


OWN_BLOCK = """
from typing import Any
from diffusers.modular_pipelines import InputParam, OutputParam
from perflow_blocks import LoopBlock, StepInfo
from perflow_blocks import PreviewStep as Preview
from own_folder_{number} import factor as helper

class Doubling(LoopBlock):
    description = "Loop step that makes the latents larger."
    inputs = [InputParam("latents", required=True, description="Latents.")]
    intermediate_outputs = [OutputParam("latents", description="Larger latents.")]

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.steps = steps

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        from own_folder_{number}.factor import FACTOR
        if i < self.steps:
            block_state.latents = FACTOR * block_state.latents + 0 * helper.FACTOR
        return components, block_state
"""


def own_blocks(folder: Path, factor: float, patch: pytest.MonkeyPatch, number: int = 0) -> Any:
    """Blocks with a user's own in the loop, whose module is there in the version that multiplies by `factor`.

    It lies in a folder without an `__init__.py`, which Python takes for a package too.
    """
    package = folder / f"own_folder_{number}"
    package.mkdir(parents=True)
    (package / "block.py").write_text(OWN_BLOCK.format(number=number))
    (package / "factor.py").write_text(f"FACTOR = {factor}\n")
    patch.syspath_prepend(folder)
    for module in ("", ".block", ".factor"):
        patch.delitem(sys.modules, package.name + module, raising=False)
    blocks = PeRFlowSDXLAutoBlocks()
    block = importlib.import_module(f"{package.name}.block").Doubling(2)
    insert_loop_block(blocks, "double", block, after="solver")
    insert_loop_block(blocks, "log", WindowLogStep(level=10), before="solver")
    return blocks


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import perflow_blocks
except ImportError:
    import torch
    from diffusers import ModularPipeline
for place in sys.argv[2:]:
    pipe = ModularPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    latents = pipe(
        prompt="a red star", generator=torch.Generator().manual_seed(0), output_type="latent", output="images"
    )
    torch.save(latents, place + "/latents.pt")
    assert all(type(x).__module__.startswith("diffusers_modules.local.") for x in (pipe.blocks, pipe.scheduler))
    assert pipe.null_component_names in ([], ["image_encoder", "controlnet"], ["controlnet", "image_encoder"])
"""


def test_self_contained_exports_need_no_package_and_do_not_mix(
    repository: Path, tmp_path: Path, delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one process that cannot import this package: a preset, and two versions of a user's module."""
    cases: dict[str, torch.Tensor] = {}
    for name, factor in (("preset", None), ("version 1.0", 1.5), ("version 2.0", 0.5)):
        blocks = PeRFlowSDXLAutoBlocks() if factor is None else own_blocks(tmp_path / f"{factor}", factor, monkeypatch)
        pipe = with_weights(blocks.init_pipeline(str(repository)))
        if factor is None:
            pipe.update_components(attention_plan="sliced", delta=str(delta))
        export_workflow(pipe, tmp_path / name, mode="self-contained", weights="include")
        cases[str(tmp_path / name)] = run(pipe)
        assert all(path.name.startswith(("block", "perflow_")) for path in (tmp_path / name).glob("*.py"))
    config = json.loads((tmp_path / "preset" / "modular_config.json").read_text())
    assert list(config["requirements"]) == ["diffusers"]
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    python("-S", "-c", SCRIPT, sysconfig.get_paths()["purelib"], *cases, environment=environment, cwd=home)
    drawn = [torch.load(Path(place) / "latents.pt") for place in cases]
    for latents, expected in zip(drawn, cases.values(), strict=True):
        assert torch.equal(latents, expected)
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("mode", ["thin", "self-contained"])
def test_own_modules_go_with_an_export(
    mode: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A self-contained export that was loaded can be exported again."""
    with monkeypatch.context() as patch:
        pipe = with_weights(own_blocks(tmp_path / "own", 2.0, patch, 1).init_pipeline(str(repository)))
        expected = run(pipe)
        directory = export_workflow(pipe, tmp_path / "flow", mode=mode, weights="include")
        shutil.rmtree(tmp_path / "own")
    for module in ("", ".block", ".factor"):
        sys.modules.pop(f"own_folder_1{module}", None)
    assert "block.SavedBlocks" in (directory / "modular_config.json").read_text()
    copy = again(directory)
    assert torch.equal(run(copy), expected)
    twice = export_workflow(copy, tmp_path / "twice", mode=mode, weights="include")
    assert torch.equal(run(again(twice)), expected)
    assert not list(twice.glob("*diffusers_modules*"))  # names would become longer with each export


def test_code_that_no_file_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(ModularPipelineBlocks):
        pass

    blocks = PeRFlowSDXLText2ImageBlocks()
    blocks.sub_blocks["own"] = Local()
    assert "block 'own' (Local) cannot be saved" in refused(blocks, tmp_path)
    Local.__module__, Local.__qualname__ = "__main__", "Local"
    monkeypatch.setattr(sys.modules["__main__"], "Local", Local, raising=False)
    assert "define it at the top of a .py file" in refused(blocks, tmp_path, mode="self-contained")
    (tmp_path / "measured.py").write_text(
        "from diffusers.modular_pipelines import ModularPipelineBlocks\n"
        "from perflow_blocks.testing import check_block\n\n\nclass Measured(ModularPipelineBlocks): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    blocks.sub_blocks["own"] = importlib.import_module("measured").Measured()
    text = refused(blocks, tmp_path, mode="self-contained")
    assert "line 2 of measured imports perflow_blocks.testing" in text and 'pass mode="thin"' in text
    assert export_workflow(blocks, tmp_path / "thin")
