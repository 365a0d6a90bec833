"""The builder: what it builds is what the parts say, and what one pipeline changes no other one sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ComponentsManager,
    ControlNetModel,
    MultiControlNetModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

from perflow_blocks import (
    AttentionConfig,
    PeRFlowModularPipeline,
    PeRFlowPipelineBuilder,
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
    StepCallbackStep,
    WindowLogStep,
)
from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.demo import perflow_pipeline, weights_directory
from perflow_blocks.testing import load_tiny_ip_adapter
from perflow_blocks.testing.tiny import (
    BETAS,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image,
    tiny_image_encoder,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_vae,
)
from tests.blocks.conftest import write_delta
from tests.blocks.test_features_lora import write_lora
from tests.checkpoints import MODELS, checkpoint_components, save_checkpoint, save_ip_adapter
from tests.conftest import WHOLE, builder, generator, latents, make_pipeline, problems, run, save_repository

LORA_MODELS = ["CLIPTextModel", "CLIPTextModelWithProjection", "UNet2DConditionModel"]
Step = Callable[[PeRFlowPipelineBuilder, Path], PeRFlowPipelineBuilder]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta, two LoRAs and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("files")
    write_delta(folder / "delta.safetensors")
    for seed, name in enumerate(("ink", "oil.v2"), start=1):
        write_lora(folder / name, seed)
    save_ip_adapter(folder / "adapter")
    return folder


def with_ip_adapter(chain: PeRFlowPipelineBuilder, files: Path, **more: Any) -> PeRFlowPipelineBuilder:
    options = {"subfolder": "sdxl_models", "weight_name": "ip-adapter_sdxl.safetensors", **more}
    return chain.with_ip_adapter(files / "adapter", **options)


# What is built


def test_the_embedded_model_draws_what_its_own_pipeline_draws_and_comes_back_from_a_save(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"prompt": "a red star on a white background", "output_type": "pt", "output": "images"}
    pipe: Any = PeRFlowPipelineBuilder().from_pretrained(weights_directory()).build()
    pipe.save_pretrained(tmp_path)
    again = PeRFlowModularPipeline.from_pretrained(tmp_path)
    again.load_components()
    expected = perflow_pipeline()(generator=generator(), **inputs)
    for each in (pipe, again):
        assert type(each) is PeRFlowModularPipeline
        assert torch.equal(each(generator=generator(), **inputs), expected)


def test_nothing_is_loaded_before_build_nor_what_is_left_out(repository: Path, loads: list[str], files: Path) -> None:
    chain = builder(repository).with_delta(files / "delta.safetensors").with_attention("sliced").with_guidance(1.5)
    text = chain.describe()
    assert chain.problems() == loads == []
    assert chain.components_manager.components == {}
    for part in ("delta.safetensors", "sliced", "'guidance_scale': 1.5", f"{repository} unet", "float32 on cpu"):
        assert part in text
    chain.build()
    assert sorted(loads) == WHOLE
    assert "shared from" in chain.describe()
    loads.clear()
    assert builder(repository).with_component("text_encoder", None).build().text_encoder is None
    assert "CLIPTextModel" not in loads


STEPS: dict[str, Step] = {
    "source": lambda it, files: it,
    "delta": lambda it, files: it.with_delta(files / "delta.safetensors", scale=0.5),
    "guidance": lambda it, files: it.with_guidance(1.5, stop=0.5),
    "vae": lambda it, files: it.with_vae(tiny_vae(3)),
    "workflow": lambda it, files: it.with_workflow("text2image"),
    "config": lambda it, files: it.with_config(num_time_windows=2),
    "attention": lambda it, files: it.with_attention({"self": "sliced"}),
}


def test_the_order_of_steps_does_not_matter_and_each_leaves_its_builder_as_it_is(
    repository: Path, files: Path
) -> None:
    orders = list(permutations(STEPS))
    made = []
    for order in (orders[0], orders[-1], orders[len(orders) // 3]):
        chain = PeRFlowPipelineBuilder()
        for step in order:
            before, settings = chain, chain.settings
            chain = chain.from_pretrained(repository) if step == "source" else STEPS[step](chain, files)
            assert before.settings is settings
        made.append(chain)
    assert len({chain.describe() for chain in made}) == 1
    by_hand = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=1.5, stop=0.5))
    by_hand.update_components(num_time_windows=2, attention=AttentionConfig({"self": "sliced"}))
    expected = latents(by_hand, delta=files / "delta.safetensors", delta_scale=0.5)
    assert all(torch.equal(latents(chain.build()), expected) for chain in made)


def test_the_last_of_steps_that_set_the_same_thing_counts(repository: Path, files: Path) -> None:
    unet, guider = tiny_sdxl_unet(2), AdaptiveProjectedGuidance(guidance_scale=1.5)
    chain = PeRFlowPipelineBuilder().from_single_file("x.safetensors").from_pretrained(repository)
    chain = chain.with_unet(tiny_sdxl_unet(1)).with_unet(unet).with_config(num_time_windows=2)
    chain = chain.with_delta(files / "delta.safetensors").with_config(num_time_windows=3, delta_scale=0.5, delta=None)
    pipe = chain.with_guidance(3.0).with_guider(guider).build()
    assert (pipe.unet, pipe.guider) == (unet, guider)
    assert (pipe.config.num_time_windows, pipe.config.delta, pipe.config.delta_scale) == (3, None, 0.5)
    assert chain.with_guider(guider).with_component("guider", None).build().guider.guidance_scale == 2.0


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_calls_merge_the_delta_and_a_saved_pipeline_does_so_too(
    repository: Path, tmp_path: Path, files: Path, scale: float
) -> None:
    delta = files / "delta.safetensors"
    expected = latents(make_pipeline(), delta=delta, delta_scale=scale)
    assert torch.equal(latents(builder(repository).with_delta(delta, scale).build()), expected)
    builder(repository).with_delta(delta, scale).build().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert (index["delta"], index["delta_scale"]) == (f"delta/{delta.name}", scale)
    assert torch.equal(latents(builder(tmp_path).build()), expected)


def test_guidance_that_is_asked_for_wins_over_the_recipe(repository: Path, tmp_path: Path) -> None:
    chain = builder(repository).with_delta(write_delta(tmp_path / "delta", DeltaRecipe(guidance_scale=1.5)))
    for pipe, scale in ((chain.build(), 1.5), (chain.with_guidance(3.0).build(), 3.0)):
        latents(pipe)
        assert pipe.guider.guidance_scale == scale


def test_all_models_have_one_type_but_for_a_given_vae(repository: Path) -> None:
    half = PeRFlowPipelineBuilder().from_pretrained(repository, dtype=torch.float16).with_vae(tiny_vae()).build()
    assert {half.unet.dtype, half.text_encoder.dtype, half.text_encoder_2.dtype} == {torch.float16}
    assert half.vae.dtype == torch.float32
    given = builder(repository).with_unet(tiny_sdxl_unet().to(torch.bfloat16)).build()
    assert given.vae.dtype == given.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["object", "spec", "directory", "union"])
def test_a_component_is_given_in_several_forms(repository: Path, tmp_path: Path, form: str) -> None:
    model = tiny_controlnet_union() if form == "union" else tiny_controlnet(4)
    model.save_pretrained(tmp_path / "edges")
    spec = ComponentSpec("x", ControlNetModel, pretrained_model_name_or_path=str(tmp_path), subfolder="edges")
    given: Any = {"object": model, "spec": spec}.get(form, tmp_path)
    loading = {"subfolder": "edges"} if given is tmp_path else {}
    pipe = builder(repository).with_controlnet(given, freeze=True, **loading).build()
    assert type(pipe.controlnet) is type(model)
    assert all(torch.equal(w, pipe.controlnet.state_dict()[name]) for name, w in model.state_dict().items())
    assert not any(weight.requires_grad for weight in pipe.controlnet.parameters())
    assert all(weight.requires_grad for weight in pipe.unet.parameters())


def test_named_steps_reach_their_components(repository: Path) -> None:
    parts = tiny_sdxl_components(PeRFlowScheduler(**BETAS))
    chain = builder(repository).with_unet(parts["unet"]).with_vae(parts["vae"]).with_scheduler(parts["scheduler"])
    chain = chain.with_text_encoder(parts["text_encoder"], tokenizer=parts["tokenizer"])
    chain = chain.with_text_encoder(parts["text_encoder_2"], tokenizer=parts["tokenizer_2"], number=2)
    pipe = chain.with_controlnet([tiny_controlnet(1), tiny_controlnet(2)]).build()
    assert all(getattr(pipe, name) is part for name, part in parts.items())
    assert isinstance(pipe.controlnet, MultiControlNetModel)


def test_a_variant_of_the_weights(tmp_path: Path) -> None:
    folder = save_repository(tmp_path / "tiny")
    for weights in list(folder.glob("*/*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    pipe = PeRFlowPipelineBuilder().from_pretrained(folder, variant="fp16").build()
    assert torch.equal(latents(pipe), latents(make_pipeline()))


def test_components_without_a_pipeline_have_the_delta_merged(repository: Path, files: Path) -> None:
    chain = builder(repository).with_delta(files / "delta.safetensors").with_attention("sliced")
    components = chain.build_components()
    torch.testing.assert_close(components["unet"].state_dict(), tiny_sdxl_unet(1).state_dict())
    assert components["attention"].config.plan == ["self=sliced", "cross=sliced"]
    assert "controlnet" not in components


def test_settings_reach_the_pipeline(repository: Path) -> None:
    chain = builder(repository).with_config(window_boundaries=[1.0, 0.5, 0.0]).with_attention(["self=sliced"])
    pipe = chain.with_compile(backend="eager").with_prompt_cache(2).build()
    blocks = pipe.unet.mid_block.attentions[0].transformer_blocks
    assert all(block._compiled_call_impl is not None for block in [*blocks, pipe.vae.decoder])
    latents(pipe)
    latents(pipe)
    assert pipe.blocks.sub_blocks["text_encoder"].hits == 1
    assert pipe.scheduler.windows.boundaries == (1.0, 0.5, 0.0)
    assert {row.asked for row in pipe.attention.report().rows} == {"sliced", None}


def test_inserted_blocks_are_copies_that_stand_where_they_are_to_run(repository: Path) -> None:
    blocks, steps = PeRFlowSDXLAutoBlocks(), list[int]()
    chain = builder(repository).with_blocks(blocks).insert_block("watch", StepCallbackStep, after="solver")
    chain = chain.insert_block("log", WindowLogStep(), before="watch")
    chain = chain.insert_block("again", blocks.sub_blocks["merge_delta"], before="decode")
    pipe = chain.build()
    assert list(pipe.blocks.sub_blocks)[-2:] == ["again", "decode"]
    loops = [list(loop.sub_blocks) for loop in find_loops(pipe.blocks)]
    assert loops and all(loop[loop.index("solver") :][:3] == ["solver", "log", "watch"] for loop in loops)
    assert not any("log" in loop.sub_blocks for loop in find_loops(blocks))
    latents(chain.with_workflow("text2image").build(), step_callback=lambda info: steps.append(info.step))
    assert steps == [0, 1, 2, 3]


def test_loras_are_loaded_with_their_weights_in_any_order(repository: Path, files: Path) -> None:
    ink, oil = files / "ink", files / "oil.v2"
    by_hand = make_pipeline()
    by_hand.load_lora_weights(ink, adapter_name="ink")
    by_hand.load_lora_weights(oil, adapter_name="paint")
    by_hand.set_adapters(["ink", "paint"], [0.5, -0.25])
    expected = latents(by_hand)
    assert not torch.equal(expected, latents(make_pipeline()))
    for chain in (
        builder(repository).with_lora(ink, 0.5).with_lora(oil, -0.25, "paint"),
        builder(repository).with_lora(ink, 3.0).with_lora(oil, -0.25, "paint").with_lora(ink, 0.5),
    ):
        assert torch.equal(latents(chain.build()), expected)
    assert builder(repository).with_lora(oil).build().get_active_adapters() == ["oil"]


def test_an_ip_adapter_comes_with_its_encoder_or_takes_a_given_one(repository: Path, files: Path) -> None:
    chain = with_ip_adapter(builder(repository), files, scale=0.7)
    assert chain.build().image_encoder.config.image_size == 224
    chain = chain.with_component("image_encoder", tiny_image_encoder())
    pipe = chain.with_component("feature_extractor", tiny_feature_extractor()).build()
    by_hand = make_pipeline()
    load_tiny_ip_adapter(by_hand)
    by_hand.set_ip_adapter_scale(0.7)
    image = tiny_image(1)
    assert torch.equal(latents(pipe, ip_adapter_image=image), latents(by_hand, ip_adapter_image=image))


# What is shared


CHANGES: dict[str, tuple[Step, list[str]]] = {
    "guidance": (lambda it, files: it.with_guidance(1.5), []),
    "attention": (lambda it, files: it.with_attention("sliced"), []),
    "workflow": (lambda it, files: it.with_workflow("text2image"), []),
    "delta": (lambda it, files: it.with_delta(files / "delta.safetensors"), ["UNet2DConditionModel"]),
    "lora": (lambda it, files: it.with_lora(files / "ink", 0.5), LORA_MODELS),
    "ip-adapter": (
        lambda it, files: with_ip_adapter(it, files).with_component("image_encoder", tiny_image_encoder()),
        ["UNet2DConditionModel"],
    ),
    "compiled": (lambda it, files: it.with_compile(backend="eager"), ["UNet2DConditionModel", "AutoencoderKL"]),
    "frozen": (
        lambda it, files: it.with_component("vae", it.settings.source.location, subfolder="vae", freeze=True),
        ["AutoencoderKL"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_model_is_not_shared(repository: Path, loads: list[str], files: Path, change: str) -> None:
    """And the pipelines do not disturb one another, in whatever order they run."""
    step, expected = CHANGES[change]
    names = ("ip_adapter_embeds", "negative_ip_adapter_embeds") if change == "ip-adapter" else ()
    inputs = {name: [torch.ones(1, 1, 24)] for name in names}
    plain, alone = builder(repository), latents(step(builder(repository), files).build(), **inputs)
    one = plain.build()
    loads.clear()
    changed = step(plain, files)
    two = changed.build()
    assert sorted(loads) == sorted(expected)
    loads.clear()
    assert torch.equal(latents(two, **inputs), alone)
    assert torch.equal(latents(one), latents(make_pipeline()))
    assert torch.equal(latents(changed.build(), **inputs), alone)  # a second build shares all of it
    assert loads == []


def test_collections_and_types_keep_models_apart(repository: Path) -> None:
    manager = ComponentsManager()
    first = builder(repository, components_manager=manager, collection="sdxl").build()
    assert manager.get_one(name="unet", collection="sdxl") is first.unet
    chain = builder(repository, components_manager=manager).from_pretrained(repository, dtype=torch.bfloat16)
    assert (chain.build().unet.dtype, first.unet.dtype) == (torch.bfloat16, torch.float32)


OUTSIDE: dict[str, Callable[[Any, Path], Any]] = {
    "type": lambda pipe, files: pipe.unet.to(torch.float16),
    "unloaded": lambda pipe, files: pipe.unload_lora_weights(),
    "another one": lambda pipe, files: pipe.load_lora_weights(files / "oil.v2", adapter_name="other"),
}


@pytest.mark.parametrize("change", OUTSIDE)
def test_what_was_changed_since_is_loaded_again(repository: Path, files: Path, change: str) -> None:
    chain = builder(repository).with_lora(files / "ink")
    first = chain.build()
    expected = latents(first)
    OUTSIDE[change](first, files)
    again = chain.build()
    assert again.unet is not first.unet and again.vae is first.vae
    assert torch.equal(latents(again), expected)


def test_a_given_model_gets_its_loras_once_and_no_others_and_keeps_its_own(repository: Path, files: Path) -> None:
    given = builder(repository).with_unet(tiny_sdxl_unet())
    chain = given.with_lora(files / "ink", 0.5)
    first = chain.build()
    expected = latents(builder(repository).with_lora(files / "ink", 0.5).build())
    assert torch.equal(latents(chain.build()), expected)
    for other in (given, given.with_lora(files / "oil.v2")):
        assert "unet holds ink already" in problems(other)
    first.unload_lora_weights()
    assert torch.equal(latents(given.build()), latents(make_pipeline()))
    own = make_pipeline()
    own.load_lora_weights(files / "ink", adapter_name="own")
    chain = builder(repository).with_unet(own.unet).with_text_encoder(own.text_encoder)
    chain = chain.with_text_encoder(own.text_encoder_2, number=2)
    assert torch.equal(latents(chain.build()), latents(own))
    assert chain.with_guidance(1.5).problems() == []
    assert "unet holds own already" in problems(chain.with_lora(files / "oil.v2"))


# Where models are


def test_the_manager_moves_models_to_its_device(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a manager that notes what it is asked for, since a machine may have no accelerator."""
    asked: list[Any] = []
    monkeypatch.setattr(ComponentsManager, "enable_auto_cpu_offload", lambda self, device: asked.append(device))
    pipe = builder(repository).on("meta").offload("auto").build()
    assert asked == [torch.device("meta")]
    assert pipe.unet.device.type == "cpu"


# Original checkpoints


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, tokenizers and scheduler, without weights."""
    whole = save_repository(tmp_path_factory.mktemp("whole") / "sdxl", **checkpoint_components())
    folder = tmp_path_factory.mktemp("config") / "sdxl"
    return Path(shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_checkpoint_is_the_models_it_was_written_from(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched for it, and its scheduler is none that a user set, which calls would warn of."""
    asked: list[Any] = []
    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, lambda *place, **_: asked.append(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    checkpoint = save_checkpoint(tmp_path / "tuned.safetensors", checkpoint_components())
    chain = PeRFlowPipelineBuilder().from_single_file(checkpoint, config=config)
    pipe = chain.build()
    for name in MODELS:
        expected = checkpoint_components()[name].state_dict()
        assert all(torch.equal(weight, expected[key]) for key, weight in getattr(pipe, name).state_dict().items())
    found = latents(pipe)
    assert "the scheduler that was set" not in caplog.text
    assert torch.equal(found, latents(make_pipeline(**checkpoint_components())))
    assert chain.with_guidance(1.5).build().unet is pipe.unet
    half = PeRFlowPipelineBuilder().from_single_file(checkpoint, config=config, dtype=torch.float16).build()
    assert {getattr(half, name).dtype for name in MODELS} == {torch.float16}
    assert asked == []


def test_a_checkpoint_without_a_vae_takes_one_that_is_given(config: Path, tmp_path: Path) -> None:
    parts = checkpoint_components()
    file = save_checkpoint(tmp_path / "part.safetensors", parts, leave_out=("vae",))
    chain = PeRFlowPipelineBuilder().from_single_file(file, config=config)
    scheduler = PeRFlowScheduler(**BETAS)
    pipe = chain.with_vae(parts["vae"]).with_scheduler(scheduler).build()
    assert (pipe.vae, pipe.scheduler) == (parts["vae"], scheduler)
    with pytest.raises(SingleFileComponentError, match="Weights for this component appear to be missing"):
        chain.build()
    assert run(pipe).isfinite().all()


def test_blocks_of_the_source_s_own_are_not_dropped_in_silence(repository: Path, tmp_path: Path) -> None:
    place = shutil.copytree(repository, tmp_path / "copy")
    (place / "modular_config.json").write_text('{"auto_map": {"ModularPipelineBlocks": "block.SavedBlocks"}}')
    builder = PeRFlowPipelineBuilder().from_pretrained(place)
    (problem,) = builder.problems()
    assert f"{place} has blocks of its own, and its code is not run here; call with_blocks(" in problem
    assert builder.with_blocks(PeRFlowSDXLAutoBlocks()).problems() == []
