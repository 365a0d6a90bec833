"""An attention plan in effect: every module runs what it is asked to, counted at the kernel, and all can be undone."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from perflow_blocks import AttentionConfig, PeRFlowApplyAttentionStep
from perflow_blocks.attention.strategies import AttentionStrategy
from perflow_blocks.testing import check_block, tiny_controlnet, tiny_image, tiny_sdxl_unet
from tests.attention.conftest import (
    HALF,
    SAMPLE,
    Kernel,
    assert_same_processors,
    attentions,
    calls_of,
    embeddings,
    processors,
)
from tests.blocks.conftest import distance, guard_against_reads, loop_pipeline
from tests.conftest import make_pipeline, run

MakeKernel = Callable[..., Kernel]

pytestmark = pytest.mark.behaviour
HERE = {  # what runs on a CPU: its type, and how far from native it may be
    "native": (torch.float32, 0.0),
    "native_math": (torch.float32, 1e-5),
    "native_flash": (torch.bfloat16, 2e-2),
    "flex": (torch.float32, 1e-5),
    "sliced": (torch.float32, 0.0),
    "auto": (torch.float32, 0.0),
}
CONTROL = {"control_image": tiny_image(3), "num_inference_steps": 4}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", HERE)
def test_every_strategy_runs_in_every_module_and_agrees_with_native(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, tolerance = HERE[name]
    pipe = loop_pipeline("controlnet_text2image", dtype=dtype)
    expected = run(pipe, **CONTROL)
    models = {"unet": pipe.unet, "controlnet": pipe.controlnet}
    before = {label: processors(model) for label, model in models.items()}
    backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}

    kernel_calls, original = Counter[str](), AttentionStrategy.__call__

    def spy(self: Any, *args: Any) -> Any:
        kernel_calls[self.name] += 1
        return original(self, *args)

    pipe.update_components(attention=AttentionConfig(name))
    run(pipe, **CONTROL)  # probes come here
    pipe.attention.reset()
    monkeypatch.setattr(AttentionStrategy, "__call__", spy)
    result = run(pipe, **CONTROL)
    monkeypatch.undo()

    ran = "native" if name == "auto" else name  # there is nothing better on a CPU
    modules = [f"{label}.{path}" for label, model in models.items() for path in attentions(model)]
    assert len(modules) == 8 + 4
    assert calls_of(pipe) == {module: {ran: 4} for module in modules}
    assert {row.asked for row in pipe.attention.report().rows} == {name}
    assert kernel_calls == {ran: 4 * len(modules)}
    assert distance(result, expected) <= tolerance

    pipe.attention.detach()
    for label, model in models.items():
        assert_same_processors(model, before[label])
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == backend
    assert state.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())


def test_kinds_and_patterns_reach_the_modules_they_mean_and_no_others(kernel: MakeKernel) -> None:
    own, cross, special = kernel("own"), kernel("cross_"), kernel("special")
    pipe = make_pipeline()
    before = processors(pipe.unet)
    plan = {"self": "own", "unet.mid_block.*": "special", "up_blocks.*.attentions.1.*.attn2": "cross_"}
    pipe.update_components(attention=AttentionConfig(plan))
    run(pipe, num_inference_steps=4)
    for row in pipe.attention.report().rows:
        asked: str | None
        if ".mid_block." in row.module:
            asked = "special"
        elif row.module.endswith("attn1"):
            asked = "own"
        else:
            asked = "cross_" if "up_blocks.0.attentions.1" in row.module else None
        assert row.asked == asked
        assert row.calls == ({asked: 4} if asked else {})
        if asked is None:
            name = row.module.removeprefix("unet.")
            assert processors(pipe.unet)[name] is before[name]
    assert (len(own.calls), len(cross.calls), len(special.calls)) == (3 * 4, 4, 2 * 4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"encoder_attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])},
        {"attention_mask": torch.tensor([[1] * 64, [1] * 40 + [0] * 24])},
    ],
    ids=["none", "prompt", "picture"],
)
def test_native_is_bit_for_bit_what_the_plain_processor_computes(fused: bool, masks: dict[str, Any]) -> None:
    unet = tiny_sdxl_unet()
    if fused:
        unet.fuse_qkv_projections()
    with torch.no_grad():
        unmasked = unet(SAMPLE, 500, **embeddings())[0]
        expected = unet(SAMPLE, 500, **embeddings(), **masks)[0]
        attention = AttentionConfig("native")
        attention.attach({"unet": unet})
        result = unet(SAMPLE, 500, **embeddings(), **masks)[0]
    assert torch.equal(result, expected)
    assert bool(masks) != torch.equal(expected, unmasked)
    assert {row.calls.get("native") for row in attention.report().rows} == {1}


def test_a_call_that_a_strategy_does_not_take_runs_native_and_is_told_once(
    kernel: MakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    maskless = kernel("maskless", mask=False)
    unet, attention = tiny_sdxl_unet(), AttentionConfig("maskless")
    masks = {"encoder_attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])}
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings(), **masks)[0]
        attention.attach({"unet": unet})
        with caplog.at_level(logging.WARNING):
            results = [unet(SAMPLE, 500, **embeddings(), **masks)[0] for _ in range(2)]
    assert all(torch.equal(result, expected) for result in results)
    assert len(maskless.calls) == 4 * 2
    for row in attention.report().rows:
        cross = row.kind == "cross"
        assert row.calls == ({"native": 2} if cross else {"maskless": 2})
        assert row.fallbacks == ({"takes no mask": 2} if cross else {})
    (told,) = [record.message for record in caplog.records if "native attention" in record.message]
    assert "attn2 runs native attention instead of maskless, which takes no mask." in told
    assert "takes no mask (2 native)" in str(attention.report())


def test_nothing_is_read_from_the_device_within_the_loop(kernel: MakeKernel) -> None:
    kernel("half", dtypes=HALF)
    pipe = make_pipeline()
    pipe.update_components(attention=AttentionConfig({"self": "sliced", "cross": "half"}))
    guard_against_reads(pipe)
    run(pipe, num_inference_steps=4)
    assert {tuple(row.calls) for row in pipe.attention.report().rows} == {("sliced",), ("native",)}


def test_a_model_with_a_plan_is_saved_copied_and_pickled(kernel: MakeKernel, tmp_path: Path) -> None:
    a = kernel("a", shift=0.25)
    unet, attention = tiny_sdxl_unet(), AttentionConfig({"self": "a"})
    unet.save_pretrained(tmp_path / "before")
    attention.attach({"unet": unet})
    unet.save_pretrained(tmp_path / "after")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    with torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]
        for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
            attention.reset()
            a.calls.clear()
            assert torch.equal(other(SAMPLE, 500, **embeddings())[0], expected)
            assert len(a.calls) == 4
            assert not any(row.calls for row in attention.report().rows)  # a copy counts for itself
            AttentionConfig().attach({"unet": other})
            plain = other(SAMPLE, 500, **embeddings())[0]
            assert {type(processor) for processor in processors(other).values()} == {AttnProcessor2_0}
            assert not torch.equal(plain, expected)


def test_other_processors_are_kept_and_named() -> None:
    unet, mine = tiny_sdxl_unet(), AttnProcessor()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(mine)
    attention = AttentionConfig("sliced")
    attention.attach({"unet": unet})
    kept = {row.module: row.kept for row in attention.report().rows if row.kept}
    assert kept == {"unet.mid_block.attentions.0.transformer_blocks.0.attn1": "AttnProcessor"}
    assert processors(unet)["mid_block.attentions.0.transformer_blocks.0.attn1"] is mine
    assert "kept: AttnProcessor" in str(attention.report())


def test_the_report_is_a_table_with_one_line_for_modules_that_are_alike() -> None:
    models = {"unet": tiny_sdxl_unet(), "controlnet": tiny_controlnet(), "a": tiny_sdxl_unet()}
    attention = AttentionConfig({"self": "sliced", "unet.mid_block.*": "native"})
    attention.attach(models)
    head, *lines = str(attention.report()).splitlines()
    assert head.split() == ["module", "kind", "asked", "for", "ran", "why"]
    assert len(attention.report().rows) == 8 + 4 + 8
    assert len(lines) == 4 + 2 + 2
    columns = [head.index(title) for title in ("module", "kind", "asked", "ran")]
    cells = [[line[start:].split()[0] for start in columns] for line in lines if line.startswith("controlnet")]
    name = "controlnet.down_blocks.1.attentions.0.transformer_blocks.0.attn"
    assert cells == [[f"{name}1", "self", "sliced", "-"], [f"{name}2", "cross", "-", "-"]]
    assert all("and 1 like it" in line for line in lines if line.startswith("controlnet"))
    assert len(str(AttentionConfig().report()).splitlines()) == 1


def test_the_block_keeps_its_contract() -> None:
    block, attention, unet = PeRFlowApplyAttentionStep(), AttentionConfig("sliced"), tiny_sdxl_unet()
    check_block(block, components={"attention": attention, "unet": unet})
    assert {row.asked for row in attention.report().rows} == {"sliced"}
    check_block(block, components={"attention_plan": ["self=flex"]})
