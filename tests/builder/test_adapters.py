"""LoRAs, IP-Adapters and blocks that the builder puts in."""

from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks

from perflow_blocks import PeRFlowSDXLAutoBlocks, StepCallbackStep, WindowLogStep
from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.testing import load_tiny_ip_adapter
from perflow_blocks.testing.tiny import tiny_feature_extractor, tiny_image_encoder, tiny_picture
from tests.blocks.test_features_lora import write_lora
from tests.conftest import builder, latents, make_pipeline, problems
from tests.hub.conftest import save_ip_adapter


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / name, seed) for seed, name in enumerate(("ink", "oil.v2"), start=1)]


def test_loras_are_loaded_with_their_weights(repository: Path, loras: list[Path]) -> None:
    one, two = loras
    made = [
        builder(repository).with_lora(one, 0.5).with_lora(two, -0.25, "paint").build(),
        builder(repository).with_lora(two, -0.25, "paint").with_lora(one, 0.5).build(),
        builder(repository)
        .with_lora(one, 3.0)
        .with_lora(two, 1.0, "paint")
        .with_lora(one / "pytorch_lora_weights.safetensors", 0.5, "ink")
        .with_lora(two, -0.25, "paint")
        .build(),
    ]
    by_hand = make_pipeline()
    by_hand.load_lora_weights(one, adapter_name="ink")
    by_hand.load_lora_weights(two, adapter_name="paint")
    by_hand.set_adapters(["ink", "paint"], [0.5, -0.25])
    expected = latents(by_hand)
    assert not torch.equal(expected, latents(make_pipeline()))
    assert set(made[0].get_active_adapters()) == {"ink", "paint"}
    for pipe in made:
        torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=5e-4)
        assert torch.equal(latents(pipe), latents(made[0]))


def test_the_order_of_loras_does_not_matter(repository: Path, loras: list[Path]) -> None:
    """Not even by rounding, since sums of three or more hang on their order."""
    steps = [(loras[0], 0.5, "c"), (loras[1], -0.25, "a"), (loras[0], 0.3, "b")]
    chains = []
    for order in (steps, steps[::-1], [steps[1], steps[0], steps[2]]):
        chain = builder(repository)
        for step in order:
            chain = chain.with_lora(*step)
        chains.append(chain)
    assert len({chain.describe() for chain in chains}) == 1
    made = [chain.build() for chain in chains]
    assert [list(pipe.unet.peft_config) for pipe in made] == [["a", "b", "c"]] * 3
    assert all(torch.equal(latents(pipe), latents(made[0])) for pipe in made)


def test_two_files_of_one_repository_are_two_loras(repository: Path, tmp_path: Path, loras: list[Path]) -> None:
    for name, folder in zip(("ink", "oil"), loras, strict=True):
        shutil.copy(folder / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    files = [f"{name}.safetensors" for name in ("ink", "oil")]
    chain = builder(repository).with_lora(tmp_path, weight_name=files[0]).with_lora(tmp_path, weight_name=files[1])
    assert chain.build().get_active_adapters() == ["ink", "oil"]
    chain = builder(repository)
    for file in (tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"):
        chain = chain.with_lora(tmp_path, weight_name=str(file.relative_to(tmp_path)))
    assert "2 LoRAs are called 'x'; pass adapter_name" in problems(chain)


def test_the_name_of_a_lora_follows_from_its_file(repository: Path, loras: list[Path]) -> None:
    assert builder(repository).with_lora(loras[1]).build().get_active_adapters() == ["oil"]


@pytest.mark.parametrize("given", [False, True], ids=["encoder beside it", "encoder given"])
def test_an_ip_adapter_comes_with_its_encoder(repository: Path, tmp_path: Path, given: bool) -> None:
    save_ip_adapter(tmp_path / "adapter")
    chain = builder(repository).with_ip_adapter(
        tmp_path / "adapter", subfolder="sdxl_models", weight_name="ip-adapter_sdxl.safetensors", scale=0.7
    )
    if given:
        chain = chain.with_component("image_encoder", tiny_image_encoder())
    by_hand = make_pipeline()
    load_tiny_ip_adapter(by_hand)
    by_hand.set_ip_adapter_scale(0.7)
    pipe = chain.with_workflow("ip_adapter_text2image").build()
    size = pipe.image_encoder.config.image_size
    assert pipe.feature_extractor.crop_size["height"] == size == (32 if given else 224)
    if given:
        assert torch.equal(
            latents(pipe, ip_adapter_image=tiny_picture(1)), latents(by_hand, ip_adapter_image=tiny_picture(1))
        )
    assert builder(repository, components_manager=chain.components_manager).build().unet is not pipe.unet


def test_a_feature_extractor_of_ones_own(repository: Path) -> None:
    extractor = tiny_feature_extractor()
    assert builder(repository).with_component("feature_extractor", extractor).build().feature_extractor is extractor


INSERTIONS: dict[str, dict[str, Any]] = {
    "log": {"block": WindowLogStep, "before": "denoiser"},
    "watch": {"block": StepCallbackStep, "after": "solver"},
    "again": {"block": WindowLogStep(), "after": "watch"},
    "check": {"block": PeRFlowSDXLAutoBlocks().sub_blocks["check_inputs"], "before": "decode"},
    "inner": {"block": PeRFlowSDXLAutoBlocks().sub_blocks["merge_delta"], "after": "denoise.input"},
}


@pytest.mark.parametrize("order", [list(INSERTIONS), list(INSERTIONS)[::-1]], ids=["forward", "backward"])
def test_blocks_are_inserted_where_they_are_to_stand(order: list[str]) -> None:
    from perflow_blocks import PeRFlowPipelineBuilder
    from perflow_blocks.builder.arrangement import arrange_blocks
    from perflow_blocks.builder.problems import Problems

    chain = PeRFlowPipelineBuilder()
    for name in order:
        chain = chain.insert_block(name, **INSERTIONS[name])
    found = Problems()
    blocks = arrange_blocks(chain.settings, found)
    assert list(found) == []
    top, inner = list(blocks.sub_blocks), list(blocks.sub_blocks["denoise"].sub_blocks)
    assert top[-3:] == ["denoise", "check", "decode"]
    assert inner[:2] == ["input", "inner"]
    loops = [list(loop.sub_blocks)[:6] for loop in find_loops(blocks)]
    assert len(loops) == 4
    assert all(loop == ["finite_guard", "log", "denoiser", "solver", "watch", "again"] for loop in loops)


def test_insertions_do_not_hang_on_the_order_of_calls() -> None:
    from perflow_blocks import PeRFlowPipelineBuilder
    from perflow_blocks.builder.arrangement import arrange_blocks
    from perflow_blocks.builder.problems import Problems

    places = {"a": {"after": "denoiser"}, "b": {"before": "solver"}, "c": {"before": "a"}, "d": {"after": "a"}}
    results = set()
    for order in permutations(places):
        chain = PeRFlowPipelineBuilder()
        for name in order:
            chain = chain.insert_block(name, WindowLogStep, **places[name])
        blocks = arrange_blocks(chain.settings, Problems())
        results |= {tuple(loop.sub_blocks) for loop in find_loops(blocks)}
    assert {names[1:7] for names in results} == {("denoiser", "c", "a", "d", "b", "solver")}


def test_blocks_that_wait_for_one_another_are_told() -> None:
    from perflow_blocks import PeRFlowPipelineBuilder

    chain = PeRFlowPipelineBuilder().insert_block("a", WindowLogStep, after="b")
    text = problems(chain.insert_block("b", WindowLogStep, after="a"))
    assert "insert_block('a'): there is no block 'b'" in text


def test_inserted_blocks_run_in_the_workflow(repository: Path) -> None:
    steps: list[int] = []
    chain = builder(repository).insert_block("watch", StepCallbackStep, after="solver").with_workflow("text2image")
    latents(chain.build(), step_callback=lambda info: steps.append(info.step))
    assert steps == [0, 1, 2, 3]


def test_blocks_are_copied_when_they_are_given(repository: Path) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    chain = builder(repository).with_blocks(blocks)
    blocks.sub_blocks.pop("decode")
    pipe = chain.insert_block("log", WindowLogStep, before="denoiser").build()
    assert "decode" in pipe.blocks.sub_blocks
    assert all("log" not in loop.sub_blocks for loop in find_loops(blocks))


def check_inputs() -> Any:
    return PeRFlowSDXLAutoBlocks().sub_blocks["check_inputs"]


@pytest.mark.parametrize("name", ["zinner", "inner"])
def test_a_block_goes_into_an_inserted_one_which_is_copied(name: str) -> None:
    from perflow_blocks import PeRFlowPipelineBuilder
    from perflow_blocks.builder.arrangement import arrange_blocks
    from perflow_blocks.builder.problems import Problems

    given = SequentialPipelineBlocks.from_blocks_dict({"first": check_inputs(), "second": check_inputs()})
    chain = PeRFlowPipelineBuilder().insert_block("seq", given, before="decode")
    chain = chain.insert_block(name, check_inputs(), before="seq.second").insert_block(
        "a", check_inputs(), after=f"seq.{name}"
    )
    given.sub_blocks.pop("first")
    for _ in range(2):
        found = Problems()
        blocks = arrange_blocks(chain.settings, found)
        assert list(found) == []
        assert list(blocks.sub_blocks["seq"].sub_blocks) == ["first", name, "a", "second"]
    assert list(given.sub_blocks) == ["second"]
