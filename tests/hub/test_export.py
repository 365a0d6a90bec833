"""`export_workflow`: what is written, and that the settings of a pipeline come back with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, DDIMScheduler, ModularPipeline
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from perflow_blocks import AttentionConfig, PeRFlowScheduler, PeRFlowSDXLAutoBlocks, export_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks, PeRFlowSDXLText2ImageBlocks
from perflow_blocks.hub.manifest import read_manifest, verify_manifest
from perflow_blocks.testing import tiny_picture
from perflow_blocks.testing.tiny import BETAS
from tests.conftest import run
from tests.hub.conftest import (
    hub_entry,
    index_of,
    loaded,
    referring_pipeline,
    text_of,
    tiny_pipeline,
    use_own_modules,
)

FILES = {
    "README.md",
    "block.py",
    "mellon_pipeline_config.json",
    "modular_config.json",
    "modular_model_index.json",
    "perflow_manifest.json",
}
UNET = hub_entry("UNet2DConditionModel", "owner/model", subfolder="unet", variant="v0-fix", revision="abc")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)


@pytest.fixture
def pipe(repository: Path) -> Any:
    """Tiny text-to-image from a directory: weights that were read from a file compute the same to the bit again."""
    return loaded_from(repository)


def loaded_from(repository: Path, **components: Any) -> Any:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exported(pipe: Any, directory: Path, **options: Any) -> Path:
    return export_workflow(pipe, directory, **{"mode": "thin", "weights": "include", **options})


def test_a_repository_by_reference(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLModularPipeline", "unet": UNET, "num_time_windows": 2}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    directory = export_workflow(pipe, tmp_path / "out", mode="thin", title="A title", licence="mit", notes="A note.")
    assert {path.name for path in directory.iterdir()} == FILES
    written = index_of(directory)
    assert written["unet"] == UNET and "vae" not in written and "_blocks_class_name" not in written
    assert (written["_class_name"], written["num_time_windows"]) == ("StableDiffusionXLModularPipeline", 2)
    assert "delta" not in written
    manifest = verify_manifest(directory, weights=True)
    assert (manifest.blocks, manifest.mode, set(manifest.files)) == (
        "PeRFlowSDXLText2ImageBlocks",
        "thin",
        FILES - {"perflow_manifest.json"},
    )
    config = json.loads((directory / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "block.PeRFlowSDXLText2ImageBlocks"}
    assert config["requirements"] == {"perflow-blocks": ">=0.1"}
    assert str(tmp_path) not in text_of(directory)
    again = loaded(directory, load_components=False)
    assert type(again.blocks) is PeRFlowSDXLText2ImageBlocks
    assert again.get_component_spec("unet").revision == "abc"
    assert again.config["num_time_windows"] == 2


def test_the_card_says_what_it_is_and_how_to_run_it(tmp_path: Path) -> None:
    index = {
        "unet": UNET,
        "vae": hub_entry("AutoencoderKL", "madebyollin/sdxl-vae-fp16-fix"),
        "default_num_inference_steps": 5,
        "prediction_type": "velocity",
        "window_boundaries": [1.0, 0.3, 0.0],
    }
    pipe = referring_pipeline(PeRFlowSDXLImage2ImageBlocks(), index, tmp_path / "given")
    options: dict[str, Any] = {"repo_id": "me/mine", "title": "A title", "licence": "mit", "notes": "A note."}
    directory = export_workflow(pipe, tmp_path / "out", mode="thin", **options)
    card = ModelCard.load(directory / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.base_model == ["owner/model", "madebyollin/sdxl-vae-fp16-fix"]
    assert {"diffusers", "modular-diffusers", "perflow"} <= set(card.data.tags)
    assert card.text.startswith("\n# A title") and "A note." in card.text
    assert "| 5 | 2 | velocity | 2, from 1, 0.3, 0 |" in card.text
    assert "[owner/model](https://huggingface.co/owner/model), `unet`, variant `v0-fix`, revision `abc`" in card.text
    assert "| mit |" in card.text and "| see the repository |" in card.text
    for param in pipe.blocks.inputs:
        assert f"| `{param.name}` |" in card.text
    assert "Its block does not say." not in card.text and "| `images` |" in card.text
    snippets = [part.split("\n```")[0] for part in card.text.split("```py\n")[1:]]
    assert len(snippets) == 2 and 'image=load_image("photo.png")' in snippets[0]
    assert 'ModularPipeline.from_pretrained("me/mine", trust_remote_code=True)' in snippets[0]
    for snippet in snippets:
        compile(snippet, "card", "exec")


def test_mellon_reads_its_configuration_for_stages_and_for_one_node(tmp_path: Path) -> None:
    whole = PeRFlowSDXLAutoBlocks()
    for name, blocks in (("stages", whole), ("node", whole.get_workflow("text2image"))):
        directory = export_workflow(blocks, tmp_path / name, mode="thin", title="Mine", repo_id="me/mine")
        config = MellonPipelineConfig.load(directory)
        assert (config.label, config.default_repo) == ("Mine", "me/mine")
        nodes = {key: node for key, node in config.node_params.items() if node is not None}
        assert set(nodes) == (
            {"text_encoder", "denoise", "vae_encoder", "decoder"} if name == "stages" else {"custom"}
        )
    params = nodes["custom"]["params"]
    assert params["prompt"]["display"] == "textarea" and params["images"]["type"] == "image"
    assert params["width"]["type"] == "custom"  # a number would be 0 where the block means None


def test_components_come_back_with_their_pictures(tmp_path: Path, pipe: Any) -> None:
    expected = run(pipe)
    directory = exported(pipe, tmp_path / "out")
    names = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    assert {path.name for path in directory.iterdir() if path.is_dir()} == names
    assert str(tmp_path) not in text_of(directory)
    again = loaded(directory)
    assert again.null_component_names == []
    assert torch.equal(run(again), expected)
    plain = ModularPipeline.from_pretrained(str(directory), trust_remote_code=True)
    plain.load_components()
    assert torch.equal(run(plain), expected)


def test_the_type_of_weights_is_kept(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    pipe.unet.to(torch.float16)
    directory = exported(pipe, tmp_path / "out")
    assert loaded(directory, dtype=torch.float16).unet.state_dict().keys() == pipe.unet.state_dict().keys()
    sizes = {path: entry.size for path, entry in read_manifest(directory).files.items() if "unet" in path}
    weights = sum(tensor.numel() for tensor in pipe.unet.state_dict().values())
    assert weights * 2 < sizes["unet/diffusion_pytorch_model.safetensors"] < weights * 3


def test_where_components_came_from_is_nowhere(tmp_path: Path) -> None:
    first = exported(tiny_pipeline(PeRFlowSDXLText2ImageBlocks()), tmp_path / "first")
    again = loaded(first)
    assert str(tmp_path) in str(again.unet.config)  # diffusers notes it, and saves it with the model
    assert str(tmp_path) not in text_of(exported(again, tmp_path / "second"))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"num_time_windows": np.int64(2), "default_num_inference_steps": 5}, {}),
        (
            {"window_boundaries": (1.0, 0.4, 0.0), "prediction_type": "velocity"},
            {"window_boundaries": [1.0, 0.4, 0.0]},
        ),
        ({"attention_plan": {"self": "sliced"}}, {"attention_plan": ["self=sliced"]}),
        ({"force_zeros_for_empty_prompt": False, "guidance_scale": 1.5}, {}),
    ],
)
def test_configuration_values_come_back(
    tmp_path: Path, pipe: Any, settings: dict[str, Any], kept: dict[str, Any]
) -> None:
    pipe.update_components(**settings)
    expected = run(pipe)
    again = loaded(exported(pipe, tmp_path / "out"))
    assert {name: again.config[name] for name in settings} == {**settings, **kept}
    assert torch.equal(run(again), expected)


def test_a_converted_scheduler_leaves_the_entry_of_its_source(tmp_path: Path) -> None:
    entry = hub_entry("DDIMScheduler", "owner/model", subfolder="scheduler")
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), {"scheduler": entry}, tmp_path / "given")
    donor = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    pipe.register_components(**{name: donor.components[name] for name in ("unet", "vae", "text_encoder")})
    pipe.register_components(
        **{name: donor.components[name] for name in ("text_encoder_2", "tokenizer", "tokenizer_2")}
    )
    pipe.register_components(scheduler=DDIMScheduler(**BETAS))
    run(pipe)
    pipe.update_components(num_time_windows=2)
    run(pipe)
    assert isinstance(pipe.scheduler, PeRFlowScheduler)  # and one that was made from another one
    assert index_of(exported(pipe, tmp_path / "out"))["scheduler"] == entry


def test_a_schedule_without_a_source_is_saved_as_a_stock_scheduler(tmp_path: Path, repository: Path) -> None:
    schedule: dict[str, Any] = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    schedule |= {"prediction_type": "v_prediction", "steps_offset": 1}  # for the way back
    pipe = loaded_from(repository, scheduler=DDIMScheduler(**schedule))
    expected = run(pipe)
    directory = exported(pipe, tmp_path / "out")
    assert index_of(directory)["scheduler"][:2] == ["diffusers", "EulerDiscreteScheduler"]
    assert "PeRFlowScheduler" not in text_of(directory)
    again = loaded(directory)
    assert {name: again.scheduler.config[name] for name in schedule} == schedule
    assert torch.equal(run(again), expected)


def test_a_scheduler_of_the_user_comes_back_as_configuration(tmp_path: Path, pipe: Any) -> None:
    pipe.update_components(scheduler=PeRFlowScheduler(num_time_windows=3, prediction_type="velocity"))
    expected = run(pipe)
    again = loaded(exported(pipe, tmp_path / "out"))
    assert (again.config["num_time_windows"], again.config["prediction_type"]) == (3, "velocity")
    assert torch.equal(run(again), expected)
    pipe.update_components(scheduler=PeRFlowScheduler(t_noise=0.9))
    with pytest.raises(ValueError, match=r"the scheduler has t_noise=0.9, which no configuration value keeps"):
        exported(pipe, tmp_path / "no")


@pytest.mark.parametrize("how", ["new", "attribute"])
def test_the_scale_of_a_guider_comes_back(tmp_path: Path, pipe: Any, how: str) -> None:
    if how == "new":
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.5))
    else:
        pipe.guider.guidance_scale = 3.5
    expected = run(pipe)
    directory = exported(pipe, tmp_path / "out")
    assert index_of(directory)["guidance_scale"] == 3.5 and "guider" not in index_of(directory)
    assert "| 6 | 3.5 |" in (directory / "README.md").read_text()
    assert torch.equal(run(loaded(directory)), expected)


@pytest.mark.parametrize(
    "guider",
    [ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5), AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5)],
    ids=["cfg", "apg"],
)
def test_a_guider_with_more_settings_is_a_component(tmp_path: Path, pipe: Any, guider: Any) -> None:
    pipe.update_components(guider=guider)
    pipe.guider.guidance_scale = 5.0
    expected = run(pipe)
    directory = exported(pipe, tmp_path / "out")
    assert index_of(directory)["guider"][:2] == ["diffusers", type(guider).__name__]
    assert type(guider).__name__ in (directory / "README.md").read_text()
    again = loaded(directory)
    assert type(again.guider) is type(guider) and again.guider.guidance_scale == 5.0
    assert torch.equal(run(again), expected)


def test_an_attention_component_that_was_not_run_comes_back(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    pipe.update_components(attention=AttentionConfig({"cross": "sliced"}))
    assert index_of(exported(pipe, tmp_path / "out"))["attention_plan"] == ["cross=sliced"]


def test_blocks_alone_are_a_repository_without_components(tmp_path: Path) -> None:
    directory = export_workflow(PeRFlowSDXLText2ImageBlocks(), tmp_path / "out", mode="thin")
    assert [value for value in index_of(directory).values() if isinstance(value, list)] == []
    assert "The index names no components" in (directory / "README.md").read_text()


def test_assembled_blocks_get_a_name_and_a_description(tmp_path: Path) -> None:
    blocks = PeRFlowSDXLAutoBlocks().get_workflow("image2image")
    directory = export_workflow(blocks, tmp_path / "my-flow", mode="thin", description="Draws again.")
    assert read_manifest(directory).blocks == "MyFlowBlocks"
    again = loaded(directory, load_components=False)
    assert type(again.blocks).__name__ == "MyFlowBlocks" and again.blocks.description == "Draws again."
    assert "Draws again." in (directory / "README.md").read_text()
    assert read_manifest(export_workflow(blocks, tmp_path / "other", mode="thin", name="Named")).blocks == "Named"


def test_a_picture_is_small_and_tells_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perflow_blocks.hub.picture.MAX_SIDE", 40)
    noise = torch.randint(0, 256, (80, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    info = PngInfo()
    info.add_text("model", "/home/somebody/model")
    Image.fromarray(noise.numpy()).save(tmp_path / "given.png", pnginfo=info)
    blocks = PeRFlowSDXLText2ImageBlocks()
    picture = export_workflow(blocks, tmp_path / "out", mode="thin", picture=tmp_path / "given.png") / "picture.png"
    with Image.open(picture) as written:
        assert written.text == {} and written.size == (40, 40)  # type: ignore[attr-defined]
    assert "(picture.png)" in (tmp_path / "out" / "README.md").read_text()
    tiny_picture(1).save(tmp_path / "small.webp")
    other = export_workflow(blocks, tmp_path / "small", mode="thin", picture=tmp_path / "small.webp") / "picture.png"
    with Image.open(other) as written:
        assert (written.format, written.size) == ("PNG", (32, 32))


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PeRFlowSDXLText2ImageBlocks())
    first, second = (exported(pipe, tmp_path / name / "flow", mode="self-contained") for name in ("a", "b"))
    assert read_manifest(first) == read_manifest(second)
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
