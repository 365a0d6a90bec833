"""An attention plan beside all that touches attention: LoRA, IP-Adapters, fused projections, PAG, ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, MultiControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from perflow_blocks import AttentionConfig
from perflow_blocks.attention.processor import StrategyAttnProcessor
from perflow_blocks.testing import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_image,
    tiny_sdxl_unet,
)
from tests.attention.conftest import Kernel, assert_same_processors, calls_of, processors
from tests.blocks.conftest import distance, perturbed, skip_layer
from tests.blocks.test_features_lora import write_lora
from tests.conftest import make_pipeline, run

MakeKernel = Callable[..., Kernel]

pytestmark = pytest.mark.behaviour
STEPS = {"num_inference_steps": 4}
ADAPTED = {**STEPS, "ip_adapter_image": tiny_image(5)}


def types(pipe: Any) -> set[type]:
    return {type(processor) for processor in processors(pipe.unet).values()}


def test_a_lora_is_in_effect_under_a_plan(kernel: MakeKernel, tmp_path: Path) -> None:
    counted = kernel("counted")
    pipe, lora = make_pipeline(), write_lora(tmp_path, seed=1)
    plain = run(pipe, **STEPS)
    pipe.load_lora_weights(lora)
    full, half = run(pipe, **STEPS), run(pipe, **STEPS, cross_attention_kwargs={"scale": 0.5})
    pipe.update_components(attention=AttentionConfig("counted"))
    assert torch.equal(run(pipe, **STEPS), full)
    assert torch.equal(run(pipe, **STEPS, cross_attention_kwargs={"scale": 0.5}), half)
    assert not torch.equal(full, half)
    assert len(counted.calls) == 2 * 4 * 8
    pipe.fuse_lora()
    assert distance(run(pipe, **STEPS), full) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert distance(run(pipe, **STEPS), plain) < 1e-4
    assert len(counted.calls) == 4 * 4 * 8


def test_ip_adapters_keep_their_modules_and_the_plan_comes_back_after_them(kernel: MakeKernel) -> None:
    counted = kernel("counted")
    other = make_pipeline()
    load_tiny_ip_adapter(other)
    adapted = run(other, **ADAPTED)
    pipe = make_pipeline()
    plain = run(pipe, **STEPS)
    pipe.update_components(attention=AttentionConfig("counted"))
    assert torch.equal(run(pipe, **STEPS), plain)
    assert len(counted.calls) == 4 * 8
    load_tiny_ip_adapter(pipe)
    adapters = {name: p for name, p in processors(pipe.unet).items() if name.endswith("attn2")}
    assert torch.equal(run(pipe, **ADAPTED), adapted)
    assert not torch.equal(adapted, plain)
    assert len(counted.calls) == 4 * 8 + 4 * 4
    for row in pipe.attention.report().rows:
        kept = row.module.endswith("attn2")
        assert row.kept == ("IPAdapterAttnProcessor2_0" if kept else None)
        assert row.calls == {"counted": 4 if kept else 8}
        if kept:
            name = row.module.removeprefix("unet.")
            assert processors(pipe.unet)[name] is adapters[name]
    pipe.update_components(attention_plan=None)
    assert torch.equal(run(pipe, **ADAPTED), adapted)
    assert {kind.__name__ for kind in types(pipe)} == {"AttnProcessor2_0", "IPAdapterAttnProcessor2_0"}
    pipe.update_components(attention_plan="counted")
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe, **STEPS), plain)
    assert len(counted.calls) == 2 * 4 * 8 + 4 * 4
    assert {row.kept for row in pipe.attention.report().rows} == {None}
    pipe.attention.detach()
    assert types(pipe) == {AttnProcessor2_0}


def test_what_projects_the_images_of_an_adapter_is_left_alone() -> None:
    unet = tiny_sdxl_unet()
    unet.encoder_hid_proj = IPAdapterPlusImageProjection(24, 32, hidden_dims=16, depth=1, dim_head=8, heads=2)
    before = processors(unet.encoder_hid_proj)
    assert before
    attention = AttentionConfig("sliced")
    attention.attach({"unet": unet})
    assert_same_processors(unet.encoder_hid_proj, before)
    assert len(attention.report().rows) == 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("plan", [{"self": "flex", "cross": "sliced"}, "native"])
def test_perturbed_attention_is_the_same_with_and_without_a_plan(plan: Any, kernel: MakeKernel) -> None:
    kernel("counted")
    pipe = make_pipeline(guider=ClassifierFreeGuidance(3.0))
    unperturbed = run(pipe, **STEPS)
    pipe.update_components(guider=perturbed())
    expected = run(pipe, **STEPS)
    pipe.update_components(attention=AttentionConfig(plan))
    run(pipe, num_inference_steps=4)  # the guider's check meets the plan's processors at the next call
    pipe.attention.reset()
    assert distance(run(pipe, **STEPS), expected) < 2e-5
    assert distance(expected, unperturbed) > 1e-3
    asked = plan["self"] if isinstance(plan, dict) else plan
    rows = {row.module: row for row in pipe.attention.report().rows}
    middle = rows["unet.mid_block.attentions.0.transformer_blocks.0.attn1"]
    others = [row for row in rows.values() if row.kind == "self" and row is not middle]
    whole = sum(middle.calls.values())
    assert {row.calls[asked] for row in others} == {whole} == {1 * 2 + 3 * 3}
    if asked != "native":
        assert middle.calls == {asked: 8, "native": 3}  # the perturbed batch of each step but the first
        assert middle.fallbacks == {"cannot be perturbed by a guider": 3}
    else:
        assert middle.fallbacks == {}
    assert not any(row.fallbacks for row in others)


def test_skipped_layers_are_skipped_under_a_plan(kernel: MakeKernel) -> None:
    counted = kernel("counted")
    expected = run(make_pipeline(guider=skip_layer()), **STEPS)
    pipe = make_pipeline(guider=skip_layer(), attention=AttentionConfig("counted"))
    assert torch.equal(run(pipe, **STEPS), expected)
    assert len(counted.calls) == (4 * 2 + 3) * 8 - 3 * 2  # two modules of the skipped layer


CONTROLNETS: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "two": (
        lambda: MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)]),
        {"control_image": [tiny_image(3), tiny_image(4)], "controlnet_conditioning_scale": [0.5, 1.5]},
        2,
    ),
    "union": (tiny_controlnet_union, {"control_image": tiny_image(3), "control_mode": 1}, 1),
}


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_a_plan_reaches_every_controlnet(kind: str, kernel: MakeKernel) -> None:
    make, inputs, count = CONTROLNETS[kind]
    pipe = make_pipeline(controlnet=make())
    expected = run(pipe, **STEPS, **inputs)
    whole, mid = kernel("whole"), kernel("mid")
    before = processors(pipe.controlnet)
    pipe.update_components(attention=AttentionConfig({"controlnet.*": "whole", "controlnet.mid_block.*": "mid"}))
    assert torch.equal(run(pipe, **STEPS, **inputs), expected)
    assert (len(whole.calls), len(mid.calls)) == (4 * 2 * count, 4 * 2 * count)
    labels = {
        row.module.partition(".down")[0].partition(".mid")[0].partition(".up")[0]
        for row in pipe.attention.report().rows
    }
    names = {"controlnet"} if count == 1 else {"controlnet.nets.0", "controlnet.nets.1"}
    assert labels == {"unet", *names}
    assert {row.asked for row in pipe.attention.report().rows if row.module.startswith("unet")} == {None}
    pipe.attention.detach()
    assert_same_processors(pipe.controlnet, before)


def test_projections_fused_under_a_plan_run_it_and_come_apart(kernel: MakeKernel) -> None:
    counted = kernel("counted")
    pipe = make_pipeline()
    before = processors(pipe.unet)
    pipe.update_components(attention=AttentionConfig("counted"))
    plain = run(pipe, **STEPS)
    pipe.fuse_qkv_projections()
    assert distance(run(pipe, **STEPS), plain) < 1e-4
    assert {processor.fused for processor in processors(pipe.unet).values()} == {True}
    assert len(counted.calls) == 2 * 4 * 8
    assert all(calls == {"counted": 8} for calls in calls_of(pipe).values())
    pipe.unfuse_qkv_projections()
    assert_same_processors(pipe.unet, before)
    assert torch.equal(run(pipe, **STEPS), plain)
    assert types(pipe) == {StrategyAttnProcessor}
    pipe.unet.fuse_qkv_projections()  # diffusers puts the plan's processors aside
    pipe.attention.detach()
    pipe.unet.unfuse_qkv_projections()
    assert_same_processors(pipe.unet, before)
