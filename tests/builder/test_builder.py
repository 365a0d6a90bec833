"""The builder: what it builds is what the parts say, whatever the order of its steps."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ControlNetModel, MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

from perflow_blocks import (
    AttentionConfig,
    PeRFlowModularPipeline,
    PeRFlowPipelineBuilder,
    PeRFlowScheduler,
    PeRFlowSDXLAutoBlocks,
)
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.demo import perflow_pipeline, weights_directory
from perflow_blocks.testing.tiny import (
    BETAS,
    tiny_controlnet,
    tiny_inpainting_unet,
    tiny_picture,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_vae,
)
from tests.blocks.conftest import write_delta
from tests.conftest import WHOLE, builder, generator, latents, make_pipeline, save_repository


def test_the_embedded_model_draws_what_its_own_pipeline_draws() -> None:
    inputs = {"prompt": "a red star on a white background", "output_type": "pt", "output": "images"}
    pipe: Any = PeRFlowPipelineBuilder().from_pretrained(weights_directory()).build()
    own: Any = perflow_pipeline()
    for each in (pipe, own):
        each.set_progress_bar_config(disable=True)
    assert type(pipe) is PeRFlowModularPipeline
    assert torch.equal(pipe(generator=generator(), **inputs), own(generator=generator(), **inputs))


def test_a_repository_is_built_as_diffusers_loads_it(repository: Path, loads: list[str]) -> None:
    pipe = builder(repository).build()
    assert sorted(loads) == WHOLE
    assert torch.equal(latents(pipe), latents(make_pipeline()))
    assert {str(getattr(pipe, name).dtype) for name in ("unet", "vae", "text_encoder")} == {"torch.float32"}
    assert set(pipe.null_component_names) == {"controlnet", "image_encoder"}


def test_nothing_is_loaded_before_build(repository: Path, loads: list[str], tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "delta.safetensors")
    first = builder(repository).with_delta(delta).with_attention("sliced").with_guidance(1.5)
    text = first.describe()
    assert first.problems() == []
    assert loads == []
    assert first.components_manager.components == {}
    for part in (str(delta), "sliced", "guidance_scale=1.5", str(repository / "unet"), "torch.float32", "on cpu"):
        assert part in text
    assert "problems" not in text


def test_steps_leave_their_builder_as_it_is(repository: Path) -> None:
    first = builder(repository)
    before = first.settings
    second = (
        first.with_guidance(1.5)
        .with_unet(tiny_sdxl_unet(1))
        .with_config(num_time_windows=2)
        .with_workflow("inpainting")
    )
    assert first.settings is before
    assert first.describe() != second.describe()
    assert first.components_manager is second.components_manager


STEPS = {
    "source": lambda it, where: it.from_pretrained(where["repository"], dtype=torch.float32),
    "delta": lambda it, where: it.with_delta(where["delta"], scale=0.5),
    "guidance": lambda it, where: it.with_guidance(1.5, stop=0.5),
    "vae": lambda it, where: it.with_vae(tiny_vae(3)),
    "workflow": lambda it, where: it.with_workflow("text2image"),
    "config": lambda it, where: it.with_config(num_time_windows=2),
    "attention": lambda it, where: it.with_attention({"self": "sliced"}),
}


def test_the_order_of_steps_does_not_matter(repository: Path, tmp_path: Path) -> None:
    where = {"repository": repository, "delta": write_delta(tmp_path / "delta.safetensors")}
    orders = list(permutations(STEPS))
    made = []
    for order in (orders[0], orders[-1], orders[len(orders) // 3]):
        chain = PeRFlowPipelineBuilder()
        for step in order:
            chain = STEPS[step](chain, where)
        made.append((chain.describe(), chain.build()))
    first = latents(made[0][1])
    assert len({text for text, _ in made}) == 1
    assert all(torch.equal(latents(pipe), first) for _, pipe in made[1:])
    by_hand = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=1.5, stop=0.5))
    by_hand.update_components(num_time_windows=2, attention=AttentionConfig({"self": "sliced"}))
    assert torch.equal(first, latents(by_hand, delta=where["delta"], delta_scale=0.5))


def test_a_step_that_is_taken_again_replaces_the_first(repository: Path) -> None:
    one, two = tiny_sdxl_unet(1), tiny_sdxl_unet(2)
    chain = builder(repository).with_unet(one).with_unet(two).with_config(num_time_windows=2)
    pipe = chain.with_config(num_time_windows=3).with_guidance(1.5).with_guidance(3.0).build()
    assert pipe.unet is two
    assert (pipe.config.num_time_windows, pipe.guider.guidance_scale) == (3, 3.0)


def test_the_delta_is_merged_by_the_first_call_at_its_scale(repository: Path, tmp_path: Path) -> None:
    recipe = DeltaRecipe(num_inference_steps=5, guidance_scale=1.5, num_time_windows=2)
    delta = write_delta(tmp_path / "delta.safetensors", recipe)
    for scale in (1.0, 0.5, 0.0):
        pipe = builder(repository).with_delta(delta, scale).build()
        expected = latents(make_pipeline(), delta=delta, delta_scale=scale, num_inference_steps=None)
        assert torch.equal(latents(pipe, num_inference_steps=None), expected)
        assert torch.equal(latents(pipe, num_inference_steps=None), expected)
    assert torch.equal(
        latents(builder(repository).with_delta(delta, 0.5).build(), delta_scale=1.0),
        latents(make_pipeline(), delta=delta),
    )


def test_a_delta_goes_into_a_unet_for_inpainting(repository: Path, tmp_path: Path) -> None:
    chain = builder(repository).with_delta(write_delta(tmp_path / "delta.safetensors"))
    assert chain.with_unet(tiny_inpainting_unet()).problems() == []


@pytest.mark.parametrize("guided", [None, 2.0, 3.0])
def test_guidance_that_is_asked_for_wins_over_the_recipe(
    repository: Path, tmp_path: Path, guided: float | None
) -> None:
    delta = write_delta(tmp_path / "delta.safetensors", DeltaRecipe(guidance_scale=1.5))
    chain = builder(repository).with_delta(delta)
    pipe = (chain if guided is None else chain.with_guidance(guided)).build()
    latents(pipe)
    assert pipe.guider.guidance_scale == (1.5 if guided is None else guided)


def test_a_guider_of_ones_own(repository: Path) -> None:
    guider = AdaptiveProjectedGuidance(guidance_scale=1.5)
    assert builder(repository).with_guider(guider).build().guider is guider
    chain = builder(repository).with_component("guider", guider)
    assert chain.build().guider is guider
    spec = ComponentSpec(
        "guider", ClassifierFreeGuidance, config={"guidance_scale": 3.0}, default_creation_method="from_config"
    )
    assert chain.with_component("guider", spec).build().guider.guidance_scale == 3.0
    assert chain.with_component("guider", spec).with_guider(guider).build().guider is guider
    assert chain.with_component("guider", None).build().guider.guidance_scale == 2.0
    assert chain.with_component("guider", spec).with_component("guider", None).build().guider.guidance_scale == 2.0


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, "auto"],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_all_models_are_loaded_in_one_type(repository: Path, dtype: Any) -> None:
    pipe = PeRFlowPipelineBuilder().from_pretrained(repository, dtype=dtype).build()
    expected = torch.float32 if dtype == "auto" else dtype
    assert {getattr(pipe, n).dtype for n in ("unet", "vae", "text_encoder", "text_encoder_2")} == {expected}


def test_the_type_of_given_models_is_that_of_all(repository: Path) -> None:
    pipe = builder(repository).with_unet(tiny_sdxl_unet().to(torch.bfloat16)).build()
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["object", "spec", "directory", "named"])
def test_a_component_is_given_in_several_forms(repository: Path, tmp_path: Path, form: str) -> None:
    model = tiny_controlnet(4)
    model.save_pretrained(tmp_path / "models" / "edges")
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "object": (model, {}),
        "spec": (
            ComponentSpec(
                "anything",
                ControlNetModel,
                pretrained_model_name_or_path=str(tmp_path / "models"),
                subfolder="edges",
            ),
            {},
        ),
        "directory": (tmp_path / "models", {"subfolder": "edges"}),
        "named": (str(tmp_path / "models" / "edges"), {}),
    }
    given, loading = forms[form]
    pipe = builder(repository).with_controlnet(given, freeze=True, **loading).build()
    assert all(not weight.requires_grad for weight in pipe.controlnet.parameters())
    assert any(weight.requires_grad for weight in pipe.unet.parameters())
    image = tiny_picture(1)
    expected = latents(make_pipeline(controlnet=tiny_controlnet(4)), control_image=image)
    assert torch.equal(latents(pipe, control_image=image), expected)


def test_several_controlnets_are_given_as_a_list(repository: Path) -> None:
    models = [tiny_controlnet(1), tiny_controlnet(2)]
    pipe = builder(repository).with_controlnet(models).build()
    assert isinstance(pipe.controlnet, MultiControlNetModel)
    assert list(pipe.controlnet.nets) == models


def test_named_forms_reach_their_components(repository: Path) -> None:
    parts = tiny_sdxl_components(PeRFlowScheduler(**BETAS))
    pipe = (
        builder(repository)
        .with_unet(parts["unet"])
        .with_vae(parts["vae"])
        .with_text_encoder(parts["text_encoder"], tokenizer=parts["tokenizer"])
        .with_text_encoder(parts["text_encoder_2"], tokenizer=parts["tokenizer_2"], number=2)
        .with_scheduler(parts["scheduler"])
        .build()
    )
    assert all(getattr(pipe, name) is part for name, part in parts.items())


def test_a_component_that_is_left_out_is_not_loaded(repository: Path, loads: list[str]) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks.pop("decode")
    pipe = builder(repository).with_blocks(blocks).with_component("text_encoder", None).build()
    assert pipe.text_encoder is None
    assert "CLIPTextModel" not in loads


def test_other_weights_of_the_repository(tmp_path: Path) -> None:
    folder = save_repository(tmp_path / "tiny")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (weights,) = (folder / name).glob("*.safetensors")
        weights.rename(weights.with_name(weights.name.replace(".safetensors", ".fp16.safetensors")))
    pipe = PeRFlowPipelineBuilder().from_pretrained(folder, variant="fp16").build()
    assert torch.equal(latents(pipe), latents(make_pipeline()))
    assert pipe.get_component_spec("unet").variant == "fp16"
    assert pipe.get_component_spec("tokenizer").variant is None


def test_components_without_a_pipeline_have_the_delta_merged(repository: Path, tmp_path: Path) -> None:
    chain = builder(repository).with_delta(write_delta(tmp_path / "delta.safetensors"))
    components = chain.with_attention("sliced").build_components()
    student = tiny_sdxl_unet(1).state_dict()
    torch.testing.assert_close(components["unet"].state_dict(), student)
    assert components["attention"].config.plan == ["self=sliced", "cross=sliced"]
    assert "controlnet" not in components


def test_settings_reach_the_pipeline(repository: Path) -> None:
    chain = builder(repository).with_config(window_boundaries=[1.0, 0.5, 0.0])
    pipe = chain.with_compile(backend="eager").with_prompt_cache(2).with_attention(["self=sliced"]).build()
    blocks = pipe.unet.mid_block.attentions[0].transformer_blocks
    assert all(block._compiled_call_impl is not None for block in [*blocks, pipe.vae.decoder])
    assert pipe.config.attention_plan == ["self=sliced"]
    latents(pipe)
    latents(pipe)
    assert pipe.blocks.sub_blocks["text_encoder"].hits == 1
    assert pipe.scheduler.windows.boundaries == (1.0, 0.5, 0.0)
    assert {row.asked for row in pipe.attention.report().rows} == {"sliced", None}
