"""Which attention plan holds: what was set last, for each pipeline, through a save; and plans that cannot be had."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models import MultiControlNetModel

from perflow_blocks import AttentionConfig
from perflow_blocks.testing import tiny_controlnet, tiny_sdxl_unet
from tests.attention.conftest import SAMPLE, Kernel, assert_same_processors, calls_of, embeddings, processors
from tests.conftest import make_pipeline, run

MakeKernel = Callable[..., Kernel]

pytestmark = pytest.mark.behaviour


def test_what_was_set_last_holds(kernel: MakeKernel) -> None:
    for name in ("a", "b", "c"):
        kernel(name)
    pipe = make_pipeline()
    before = processors(pipe.unet)

    def ran() -> set[str]:
        pipe.attention.reset()
        run(pipe, num_inference_steps=4)
        return {name for calls in calls_of(pipe).values() for name in calls}

    assert ran() == set()
    pipe.update_components(attention_plan="a")
    assert ran() == {"a"}
    pipe.update_components(attention=AttentionConfig("b"))
    assert ran() == {"b"}
    assert pipe.config.attention_plan == ["self=b", "cross=b"]
    pipe.update_components(attention_plan={"self": "c", "cross": "a"})
    assert ran() == {"a", "c"}
    assert ran() == {"a", "c"}
    pipe.update_components(attention=AttentionConfig())
    assert ran() == set()
    assert pipe.config.attention_plan is None
    assert_same_processors(pipe.unet, before)
    pipe.update_components(attention=AttentionConfig("a"))
    assert ran() == {"a"}
    pipe.update_components(attention_plan=None)
    assert ran() == set()
    assert_same_processors(pipe.unet, before)


def test_one_controlnet_in_two_places_is_one(kernel: MakeKernel) -> None:
    kernel("own")
    net, attention = tiny_controlnet(), AttentionConfig({"controlnet.nets.0.*": "own"})
    attention.attach({"controlnet": MultiControlNetModel([net, net])})
    assert {row.asked for row in attention.report().rows} == {"own"}
    assert len(attention.report().rows) == 4


def test_a_strategy_is_required_once_for_each_kind_of_call(kernel: MakeKernel) -> None:
    a, b = kernel("a"), kernel("b")
    pipe = make_pipeline()
    pipe.update_components(attention=AttentionConfig({"self": "a", "cross": "b"}))
    for _ in range(2):
        run(pipe, num_inference_steps=4)
    assert a.required == b.required == [(torch.device("cpu"), torch.float32, 8)]
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(torch.bfloat16)
    run(pipe, num_inference_steps=4)
    assert a.required[1:] == b.required[1:] == [(torch.device("cpu"), torch.bfloat16, 8)]


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"self": "a", "cross": "unfit"}, ImportError, "pip install it"),
        ({"self": "a", "nowhere.*": "a"}, ValueError, r"'nowhere\.\*' matches no attention module"),
    ],
)
def test_a_plan_that_cannot_be_had_changes_nothing(
    plan: dict[str, str], error: type[Exception], message: str, kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel("a")

    def require(*args: Any) -> None:
        raise ImportError("pip install it")

    monkeypatch.setattr(kernel("unfit"), "require", require)
    pipe = make_pipeline()
    before = processors(pipe.unet)
    pipe.update_components(attention=AttentionConfig(plan))
    for _ in range(2):
        with pytest.raises(error, match=message):
            run(pipe)
        assert_same_processors(pipe.unet, before)
        assert pipe.config.attention_plan is None
    pipe.update_components(attention=AttentionConfig("a"))
    run(pipe)
    assert pipe.config.attention_plan == ["self=a", "cross=a"]


def test_an_index_that_names_an_unknown_strategy_is_an_error_of_the_call() -> None:
    pipe = make_pipeline()
    pipe.update_components(attention_plan=["self=nonsense"])
    with pytest.raises(ValueError, match="'nonsense' is unknown; choose one of native, "):
        run(pipe)
    pipe.update_components(attention=None)
    with pytest.raises(ValueError, match="attention=None must be an AttentionConfig"):
        run(pipe)


def test_the_component_is_a_configuration(caplog: pytest.LogCaptureFixture) -> None:
    attention = AttentionConfig({"self": "sliced", "mid_block.*": "native"})
    entries = ["self=sliced", "mid_block.*=native"]
    assert attention.config.plan == entries
    assert json.loads(attention.to_json_string())["plan"] == entries
    for other in (AttentionConfig.from_config(attention.config), copy.deepcopy(attention)):
        assert other is not attention
        assert other.config.plan == entries
    pipe = make_pipeline()
    with caplog.at_level(logging.WARNING):
        pipe.update_components(attention=attention)
    assert [record.message for record in caplog.records if "modular_pipelines" in record.name] == []


def test_pipelines_that_share_a_unet_or_a_component_each_run_their_own_plan(kernel: MakeKernel) -> None:
    a, b = kernel("a"), kernel("b")
    unet = tiny_sdxl_unet()
    before = processors(unet)
    one, other = make_pipeline(unet=unet), make_pipeline(unet=unet)
    one.update_components(attention=AttentionConfig("a"))
    other.update_components(attention=AttentionConfig("b"))
    for _ in range(2):
        run(one, num_inference_steps=4)
        run(other, num_inference_steps=4)
    assert len(a.calls) == len(b.calls) == 2 * 4 * 8
    assert all(calls == {"a": 8} for calls in calls_of(one).values())
    assert all(calls == {"b": 8} for calls in calls_of(other).values())
    run(make_pipeline(unet=unet))  # one without a plan leaves the model as it found it, whoever attached
    assert_same_processors(unet, before)


def test_strategies_are_tried_where_the_model_will_run(kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernel("own")
    pipe = make_pipeline(attention=AttentionConfig("own"))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu", 0))
    run(pipe)
    AttentionConfig("own").attach({"unet": tiny_sdxl_unet()}, device="cpu")
    assert [device for device, *_ in own.required] == [torch.device("cpu", 0), torch.device("cpu")]
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is on device 'meta'.*pass device="):
        AttentionConfig("own").attach({"unet": tiny_sdxl_unet().to("meta")})
    with pytest.raises(ValueError, match=r"'sliced' does not run on cuda: .* such as 'native'"):
        attention, models = AttentionConfig("sliced"), {"unet": tiny_sdxl_unet()}
        attention.attach(models)
        attention.attach(models, device="cuda")


def test_threads_that_attach_at_once_leave_one_processor_to_detach(kernel: MakeKernel) -> None:
    kernel("own")
    unet, attention = tiny_sdxl_unet(), AttentionConfig("own")
    before = processors(unet)
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        expected = unet(SAMPLE, 500, **embeddings())[0]

        def call(_: int) -> torch.Tensor:
            attention.attach({"unet": unet})
            with torch.no_grad():
                return unet(SAMPLE, 500, **embeddings())[0]

        assert all(torch.equal(result, expected) for result in pool.map(call, range(8)))
    assert {tuple(row.calls) for row in attention.report().rows} == {("own",)}
    attention.detach()
    assert_same_processors(unet, before)
