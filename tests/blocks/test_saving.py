"""Pipelines that were saved come back as they were: in new processes, from the Hub, and not at all with a mistake."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import MultiControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from perflow_blocks import (
    AttentionConfig,
    PeRFlowModularPipeline,
    PeRFlowPipelineBuilder,
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
    PromptCacheStep,
    WindowLogStep,
    insert_loop_block,
    merge_delta,
)
from perflow_blocks.blocks import merge_delta as block
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.blocks.merge_delta import guidance_in_effect
from perflow_blocks.blocks.specs import SCHEDULER_SETTINGS
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.demo import perflow_pipeline, weights_directory
from perflow_blocks.demo.blocks import PeRFlowDemoBlocks
from perflow_blocks.testing.tiny import load_tiny_ip_adapter, tiny_controlnet
from tests.blocks.conftest import write_delta
from tests.conftest import latents, make_pipeline, python
from tests.hub.loopback import LoopbackHub

ROOT = Path(__file__).parent.parent.parent
INDEX = "modular_model_index.json"
OURS, DIFFUSERS = "PeRFlowModularPipeline", "StableDiffusionXLModularPipeline"
PRESET = "perflow_preset"


def loaded(pipe: Any) -> Any:
    pipe.load_components(dtype=torch.float32)
    return pipe


def of_the_demo(blocks: Any) -> Any:
    return loaded(PeRFlowModularPipeline(blocks, str(weights_directory())))


def from_init_pipeline() -> Any:
    pipe = loaded(PeRFlowSDXLText2ImageBlocks().init_pipeline(weights_directory()))
    pipe.update_components(
        guider=AdaptiveProjectedGuidance(1.5, eta=0.3),
        scheduler=PeRFlowScheduler.from_scheduler(
            pipe.scheduler, num_time_windows=2, solver_order=2, theta=[[0.01, 0.0], [0.0, -0.02]]
        ),
        attention=AttentionConfig({"self": "sliced"}),
    )
    return pipe


def from_the_builder() -> Any:
    chain = PeRFlowPipelineBuilder().from_pretrained(weights_directory()).with_guidance(1.5)
    return chain.with_delta(weights_directory() / "perflow_delta.safetensors", 0.5).build()


def recombined() -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "log", WindowLogStep(level=10), before="solver")
    blocks.sub_blocks["text_encoder"] = PromptCacheStep(5)
    del blocks.sub_blocks["ip_adapter"]
    return of_the_demo(blocks)


CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "init_pipeline": (from_init_pipeline, ("before", "after")),
    "builder": (from_the_builder, ("after",)),
    "recombined": (recombined, ("before",)),
    "demo blocks": (lambda: loaded(PeRFlowDemoBlocks().init_pipeline()), ("before",)),
}
"""How a pipeline is made, and whether it is saved before or after a call."""
STAGES = [(case, stage) for case, (_, stages) in CASES.items() for stage in stages]


def arrangement(block: Any) -> Any:
    settings = {name: value for name, value in vars(block).items() if name in ("level", "max_entries")}
    return [type(block).__name__, settings, [[name, arrangement(inner)] for name, inner in block.sub_blocks.items()]]


def facts(pipe: Any) -> Any:
    """What is to come back of a pipeline that was called."""
    scheduler = pipe.scheduler.config
    windows = [scheduler[name] for name in (*SCHEDULER_SETTINGS, "beta_start")]
    guider = [type(pipe.guider).__name__, guidance_in_effect(pipe.guider, pipe.config.guidance_scale, None)]
    loaded = sorted(name for name, component in pipe.components.items() if component is not None)
    return [arrangement(pipe.blocks), windows, guider, str(pipe.attention.report()), loaded]


def image(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt": "a red star on a white background", "num_inference_steps": 4, "output_type": "pt"}
    return latents(pipe, **inputs).contiguous()


def load_all(folder: str, results: str) -> None:
    """In a new process: loads all that was saved in both ways and says what it is."""
    report: dict[str, Any] = {}
    images: dict[str, Tensor] = {}
    for saved in sorted(Path(folder).iterdir()):
        case = saved.name.split("-")[0]
        for way, load in ((OURS, PeRFlowModularPipeline), (DIFFUSERS, ModularPipeline)):
            trust = way == DIFFUSERS or case == "recombined"  # not a preset as it is
            pipe = load.from_pretrained(saved if way == OURS else str(saved), trust_remote_code=trust)
            pipe.load_components()
            images[f"{saved.name}-{way}"] = image(pipe)
            report[f"{saved.name}-{way}"] = [type(pipe).__name__, len(merge_records(pipe.unet)), facts(pipe)]
    save_file(images, results)
    Path(results).with_suffix(".json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """By case: facts and image of the live pipeline; by case, stage and way: those of the reloaded ones."""
    folder = tmp_path_factory.mktemp("saving")
    expected: dict[str, Any] = {}
    for case, (make, stages) in CASES.items():
        pipe = make()
        if "before" in stages:
            pipe.save_pretrained(folder / "saved" / f"{case}-before")
        drawn = image(pipe)
        if "after" in stages:
            pipe.save_pretrained(str(folder / "saved" / f"{case}-after"))
        expected[case] = (json.loads(json.dumps(facts(pipe))), drawn)
    (folder / "saved").rename(folder / "moved")
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    code = "import sys; from tests.blocks.test_saving import load_all; load_all(*sys.argv[1:])"
    python("-c", code, folder / "moved", folder / "images.safetensors", environment=environment, cwd=ROOT)
    return expected, json.loads((folder / "images.json").read_text()), load_file(folder / "images.safetensors")


@pytest.mark.parametrize("way", [OURS, DIFFUSERS])
@pytest.mark.parametrize(("case", "stage"), STAGES)
def test_a_pipeline_comes_back_in_a_new_process(case: str, stage: str, way: str, reloaded: tuple[Any, ...]) -> None:
    expected, report, images = reloaded
    kind, deltas, found = report[f"{case}-{stage}-{way}"]
    assert (kind, deltas) == (way, 1)
    assert found == expected[case][0]
    assert torch.equal(images[f"{case}-{stage}-{way}"], expected[case][1])


def test_a_pushed_pipeline_comes_back_by_its_id(default_hub: LoopbackHub, tmp_path: Path) -> None:
    pipe = perflow_pipeline()
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/saved")
    expected = image(pipe)
    for load in (PeRFlowModularPipeline, ModularPipeline):
        again = load.from_pretrained("someone/saved", trust_remote_code=load is ModularPipeline)
        again.load_components()
        assert type(again.blocks) is PeRFlowSDXLAutoBlocks
        assert torch.equal(image(again), expected)
    files = default_hub.files("someone/saved")
    assert {"block.py", "modular_config.json", "delta/perflow_delta.safetensors", "README.md"} <= set(files)
    assert str(tmp_path) not in files[INDEX].decode()


def test_diffusers_own_round_trip(tmp_path: Path) -> None:
    """The logic of diffusers' `test_save_from_pretrained` and `test_load_expected_components_from_save_pretrained`."""
    pipe = make_pipeline()
    pipe.save_pretrained(str(tmp_path))
    index = json.loads((tmp_path / INDEX).read_text())
    assert None not in index.values() and "_blocks_class_name" not in index
    again = ModularPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.load_components(dtype=torch.float32)
    named = {
        name for name, value in index.items() if isinstance(value, list) and value[-1]["pretrained_model_name_or_path"]
    }
    loaded = {name for name, part in again.components.items() if getattr(part, "_diffusers_load_id", "null") != "null"}
    assert (
        named == loaded == {"unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    )
    assert (latents(again) - latents(pipe)).abs().max() < 1e-3


def test_a_reloaded_pipeline_can_be_saved_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pipe = recombined()
    expected = image(pipe)
    pipe.save_pretrained(first)
    again = PeRFlowModularPipeline.from_pretrained(first, trust_remote_code=True)
    again.load_components()
    again.save_pretrained(second)
    for name in ("block.py", "modular_config.json", INDEX):
        assert (second / name).read_text() == (first / name).read_text().replace(str(first), str(second))
    twice = PeRFlowModularPipeline.from_pretrained(second, trust_remote_code=True)
    twice.load_components()
    assert torch.equal(image(twice), expected)


def test_saving_changes_nothing_of_the_pipeline(tmp_path: Path) -> None:
    pipe = from_init_pipeline()
    image(pipe)
    parts, specs = dict(pipe.components), dict(pipe._component_specs)
    config = json.dumps(dict(pipe.config), default=str)
    pipe.save_pretrained(tmp_path / "saved")
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert pipe._component_specs == specs
    assert json.dumps(dict(pipe.config), default=str) == config


def test_numbers_of_numpy_are_saved_as_pythons_own(tmp_path: Path) -> None:
    pipe = make_pipeline(guider=AdaptiveProjectedGuidance(np.float32(1.5)))
    pipe.update_components(num_time_windows=np.int64(2), delta_scale=np.float32(0.5))
    pipe.save_pretrained(tmp_path)
    again: Any = PeRFlowModularPipeline.from_pretrained(tmp_path)
    again.load_components()
    assert [again.config.num_time_windows, again.config.delta_scale, again.guider.guidance_scale] == [2, 0.5, 1.5]


class Forgetful(LoopBlock):
    def __init__(self, strength: float) -> None:
        super().__init__()


def with_block(inserted: Any) -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "own", inserted, after="solver")
    return make_pipeline(blocks)


def with_lora(pipe: Any) -> Any:
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q"]), adapter_name="style")
    return pipe


def with_ip_adapter(pipe: Any) -> Any:
    load_tiny_ip_adapter(pipe)
    return pipe


def with_freeu(pipe: Any) -> Any:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    return pipe


def with_two_controlnets(pipe: Any) -> Any:
    pipe.register_components(controlnet=MultiControlNetModel([tiny_controlnet(), tiny_controlnet(1)]))
    return pipe


def with_own_class() -> Any:
    class Local(LoopBlock):
        pass

    return with_block(Local())


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "lora": (lambda: with_lora(make_pipeline()), "unet has the LoRA style, which is not saved; unload it with"),
    "ip-adapter": (lambda: with_ip_adapter(make_pipeline()), "unet has an IP-Adapter, which is not saved"),
    "freeu": (lambda: with_freeu(make_pipeline()), r"unet has FreeU, which is not saved; call pipe.disable_freeu\(\)"),
    "controlnets": (lambda: with_two_controlnets(make_pipeline()), "controlnet holds several models"),
    "image processor": (
        lambda: make_pipeline(image_processor=VaeImageProcessor(vae_scale_factor=16)),
        "image_processor was made with settings of its own",
    ),
    "windows": (
        lambda: make_pipeline(scheduler=PeRFlowScheduler(t_noise=0.9)),
        "the scheduler has t_noise=0.9, which no configuration value keeps",
    ),
    "local class": (with_own_class, r"\(Local\) cannot be saved: .* define it at the top of a \.py file"),
    "argument": (lambda: with_block(Forgetful(0.5)), "constructor argument 'strength' is not kept on the block"),
    "delta": (
        lambda: make_pipeline_naming("/nowhere/delta.safetensors"),
        r"/nowhere/delta.safetensors does not exist",
    ),
}


def make_pipeline_naming(delta: str) -> Any:
    pipe = make_pipeline()
    pipe.update_components(delta=delta)
    return pipe


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_would_not_come_back_is_an_error_before_anything_is_written(mistake: str, tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_blocks_of_others_run_only_where_they_are_trusted(tmp_path: Path) -> None:
    with_block(WindowLogStep()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        PeRFlowModularPipeline.from_pretrained(tmp_path)


def test_what_a_revision_holds_is_read_at_that_revision() -> None:
    place = str(weights_directory())
    pipe: Any = PeRFlowModularPipeline.from_pretrained(place, revision="v1")
    assert {pipe.get_component_spec(name).revision for name in ("vae", "unet")} == {"v1"}


@pytest.mark.parametrize("name", ["perflow_blocks.cli.__main__.main", "perflow_blocks.blocks.auto_blocks.deepcopy", 3])
def test_a_directory_can_name_nothing_but_presets(name: Any, tmp_path: Path) -> None:
    make_pipeline().save_config(tmp_path)
    config = json.loads((tmp_path / "modular_config.json").read_text())
    assert config[PRESET] == "perflow_blocks.blocks.auto_blocks.PeRFlowSDXLAutoBlocks"
    (tmp_path / "modular_config.json").write_text(json.dumps({**config, PRESET: name}))
    with pytest.raises(ValueError, match="must be a preset of perflow_blocks"):
        PeRFlowModularPipeline.from_pretrained(tmp_path)
    assert "perflow_blocks.cli.__main__" not in sys.modules


def test_without_a_type_all_models_are_float32(tmp_path: Path) -> None:
    make_pipeline().to(torch.float16).save_pretrained(tmp_path)
    pipe = PeRFlowModularPipeline.from_pretrained(tmp_path)
    for options, dtype in (({}, torch.float32), ({"dtype": torch.float16}, torch.float16)):
        pipe.load_components(["unet", "text_encoder_2"], **options)
        assert {pipe.unet.dtype, pipe.text_encoder_2.dtype} == {dtype}


def test_a_plain_model_gets_the_blocks_for_every_task(repository: Path) -> None:
    pipe: Any = PeRFlowModularPipeline.from_pretrained(repository)
    assert (type(pipe), type(pipe.blocks)) == (PeRFlowModularPipeline, PeRFlowSDXLAutoBlocks)
    assert pipe.get_component_spec("image_encoder").pretrained_model_name_or_path is None
    pipe.load_components()
    assert torch.equal(latents(pipe), latents(make_pipeline()))
    one = PeRFlowModularPipeline.from_pretrained(repository, workflow="text2image")
    assert list(one.blocks.sub_blocks) == list(PeRFlowSDXLAutoBlocks().get_workflow("text2image").sub_blocks)


@pytest.mark.parametrize("given", ["call", "folder", "mapping", "configuration"])
def test_a_merged_delta_is_saved_merged_and_merged_once(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_delta(tmp_path / "own_delta.safetensors")
    pipe = make_pipeline()
    match given:
        case "call":
            expected = latents(pipe, delta=path)
        case "folder":
            folder = tmp_path / "folder"
            folder.mkdir()
            path = path.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
            pipe.update_components(delta=str(folder), delta_variant="fp16")
            expected = latents(pipe)
        case "mapping":
            merge_delta(pipe.unet, load_file(path))
            expected = latents(pipe)
        case _:
            pipe.update_components(delta=str(path), delta_scale=0.5)
            expected = latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    path.unlink()  # the copy is what counts
    monkeypatch.setattr(block, "merge_delta", lambda *_: pytest.fail("merged again"))
    again: Any = PeRFlowModularPipeline.from_pretrained(tmp_path / "saved")
    again.load_components()
    assert torch.equal(latents(again), expected)
    assert [(record.reloaded, record.scale) for record in merge_records(again.unet)] == [
        (True, 0.5 if given == "configuration" else 1.0)
    ]
    named = json.loads((tmp_path / "saved" / INDEX).read_text()).get("delta")
    assert named == {"mapping": None, "folder": "delta/perflow_delta.safetensors"}.get(
        given, "delta/own_delta.safetensors"
    )
    if named is not None:
        assert torch.equal(
            latents(again, delta=tmp_path / "saved" / named, delta_scale=again.config.delta_scale), expected
        )


def test_a_guider_is_saved_as_it_is_now_and_wins_over_a_recipe(tmp_path: Path) -> None:
    """Also where the saved pipeline named another one, and where it is not loaded when it is saved again."""
    delta = write_delta(tmp_path / "delta.safetensors", DeltaRecipe(guidance_scale=1.0))
    make_pipeline(guider=AdaptiveProjectedGuidance(1.5)).save_pretrained(tmp_path / "first")
    again: Any = PeRFlowModularPipeline.from_pretrained(tmp_path / "first")
    again.load_components()
    again.update_components(guider=ClassifierFreeGuidance(3.0))
    again.guider.guidance_scale = 2.0
    again.save_pretrained(tmp_path / "second")
    PeRFlowModularPipeline.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    third: Any = PeRFlowModularPipeline.from_pretrained(tmp_path / "third")
    third.load_components()
    latents(third, delta=delta)
    assert type(third.guider) is ClassifierFreeGuidance and third.guider.guidance_scale == 2.0


def test_what_plain_diffusers_saves_after_a_call_does_not_load_as_other_blocks(tmp_path: Path) -> None:
    pipe = ModularPipeline.from_pretrained(str(weights_directory()), trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    image(pipe)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    with pytest.raises(ValueError, match="No pipeline blocks could be resolved"):
        ModularPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    kinds = []
    text = (ROOT / "docs" / "saving.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(code, "saving.md", "exec"), names)
        kinds.append(type(names["pipe"]).__name__)
    assert kinds == [OURS, OURS, DIFFUSERS]


@pytest.mark.parametrize("asked", [{"delta_scale": 0.25}, {"delta": False}])
def test_a_saved_delta_can_be_rescaled_and_taken_out(asked: Any, tmp_path: Path, caplog: Any) -> None:
    """From the copy of its file; the base is not there, so that sums are exact to one rounding."""
    pipe = perflow_pipeline()
    latents(pipe, delta_scale=0.5)
    pipe.save_pretrained(tmp_path)
    again = loaded(PeRFlowModularPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(latents(again, **asked), latents(pipe, **asked), rtol=0, atol=1e-3)
    assert sum("exact to one rounding" in record.message for record in caplog.records) == 1
    assert torch.equal(latents(again, **asked), latents(again, **asked))


def test_options_that_are_not_of_loading_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch_dtype is not an option of from_pretrained; .*load_components"):
        PeRFlowModularPipeline.from_pretrained(weights_directory(), torch_dtype=torch.float16)


def test_a_delta_that_a_call_put_in_place_is_the_one_that_is_saved(tmp_path: Path, caplog: Any) -> None:
    """And after loading it can be replaced again, and taken out, to one rounding."""
    recipe = DeltaRecipe(num_inference_steps=4, guidance_scale=1.0)
    first = write_delta(tmp_path / "one.safetensors", recipe)
    second = write_delta(tmp_path / "two.safetensors", recipe, part="mid_block")
    pipe = make_pipeline()
    base = latents(pipe, guidance_scale=1.0)
    pipe.update_components(delta=str(first))
    expected = latents(pipe, delta=second)
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = PeRFlowModularPipeline.from_pretrained(tmp_path / "saved")
    again.load_components()
    assert again.config.delta == "delta/two.safetensors" and torch.equal(latents(again), expected)
    replaced = latents(again, delta=first)
    torch.testing.assert_close(replaced, latents(pipe, delta=first), atol=1e-4, rtol=1e-4)
    assert "The UNet was loaded with two.safetensors in its weights" in caplog.text
    torch.testing.assert_close(latents(again, delta=False, guidance_scale=1.0), base, atol=1e-4, rtol=1e-4)


def test_the_path_of_a_delta_is_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    delta = write_delta(tmp_path / "perflow_delta.safetensors", DeltaRecipe(num_inference_steps=4))
    pipe: Any = PeRFlowModularPipeline.from_pretrained(weights_directory())
    pipe.update_components(delta="perflow_delta.safetensors")
    assert pipe.config.delta == str(delta)
    monkeypatch.chdir("/")
    pipe.update_components(delta="perflow_delta.safetensors")  # the pipeline's own
    assert block.delta_path(None, pipe) == weights_directory() / "perflow_delta.safetensors"
