"""Guidance: every guider predicts as in diffusers, has the scale of its call, and is refused where it cannot work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.utils import logging

from perflow_blocks.blocks.guiders import check_guider, warn_about_few_steps
from perflow_blocks.delta.recipe import DeltaRecipe
from tests.blocks.conftest import (
    BATCHED,
    GUIDERS,
    IN_THREE,
    IN_TURN,
    UNGUIDED,
    distance,
    draw,
    hooks_of,
    layers,
    skip_layer,
    write_delta,
)
from tests.conftest import count_unet_calls, generator, make_pipeline, run, watch_models

pytestmark = pytest.mark.behaviour


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_draws_as_in_the_stock_denoiser(name: str) -> None:
    make, calls = GUIDERS[name]
    ours, stock = draw(make(3.0), guard=True), draw(make(3.0), stock=True)
    assert ours.calls == [[2 * size for size in sizes] for sizes in calls]  # two prompts
    assert stock.calls == [[2] * sum(sizes) for sizes in calls]
    assert len(ours.predictions) == 4
    for prediction, expected in zip(ours.predictions, stock.predictions, strict=True):
        if expected.any():  # unless it is one that CFG-Zero* zeroes
            assert distance(prediction, expected) < 1e-4
    assert distance(ours.latents, stock.latents) < 1e-4


@pytest.mark.parametrize(
    ("guider", "calls"),
    [
        (ClassifierFreeGuidance(1.0), [UNGUIDED] * 4),
        (ClassifierFreeGuidance(3.0, stop=0.5), [BATCHED, BATCHED, UNGUIDED, UNGUIDED]),
        (TangentialClassifierFreeGuidance(3.0, start=0.25, stop=0.75), [UNGUIDED, BATCHED, BATCHED, UNGUIDED]),
        (AutoGuidance(3.0, auto_guidance_config=layers(), start=0.5), [UNGUIDED, UNGUIDED, IN_TURN, IN_TURN]),
        (skip_layer(skip_layer_guidance_stop=0.5, stop=0.75), [IN_TURN, IN_THREE, IN_TURN, UNGUIDED]),
    ],
)
def test_start_and_stop_decide_step_by_step(guider: BaseGuidance, calls: list[list[int]]) -> None:
    assert draw(guider, prompts=1).calls == calls


class OwnScale(ClassifierFreeGuidance):
    """A user's guider that leaves the model alone."""

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        self.guidance_scale = 1.5 + self._step
        return super().forward(pred_cond, pred_uncond)


class OwnModel(ClassifierFreeGuidance):
    """A user's guider that changes the model for one of its batches."""

    def prepare_models(self, denoiser: Any) -> None:
        super().prepare_models(denoiser)
        denoiser.conv_out.bias.data += 1.0 if self._count_prepared == 2 else 0.0

    def cleanup_models(self, denoiser: Any) -> None:
        denoiser.conv_out.bias.data -= 1.0 if self._count_prepared == 2 else 0.0


@pytest.mark.parametrize(("guider", "calls"), [(OwnScale(3.0), BATCHED), (OwnModel(3.0), IN_TURN)])
def test_guiders_of_users_draw_as_in_the_stock_denoiser(guider: BaseGuidance, calls: list[int]) -> None:
    ours = draw(guider, prompts=1)
    assert ours.calls == [calls] * 4
    assert distance(ours.latents, draw(guider, prompts=1, stock=True).latents) < 1e-4


def predict(unet: Any) -> torch.Tensor:
    conditions = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}
    latents = torch.randn(1, 4, 16, 16, generator=generator(5))
    with torch.no_grad():
        return unet(latents, 500, torch.ones(1, 4, 32), added_cond_kwargs=conditions).sample


@pytest.mark.parametrize("name", ["auto", "skip_layer", "perturbed_up"])
def test_the_unet_is_as_before_after_the_run(name: str) -> None:
    pipe = make_pipeline(guider=GUIDERS[name][0](3.0))
    before = predict(pipe.unet)
    first, again = (
        pipe(prompt="a star", generator=generator(), num_inference_steps=4, output_type="latent", output="latents")
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert hooks_of(pipe.unet) == []
    assert torch.equal(predict(pipe.unet), before)


def test_the_unet_is_as_before_after_a_failing_call() -> None:
    pipe = make_pipeline(guider=GUIDERS["auto"][0](3.0))
    before, calls = predict(pipe.unet), []

    def break_the_second(*_: Any) -> None:  # the first batch goes to the model as it is, the second to the hooked one
        calls.append(hooks_of(pipe.unet))
        if len(calls) == 2:
            raise RuntimeError("broken")

    broken = pipe.unet.register_forward_hook(break_the_second)
    with pytest.raises(RuntimeError, match="broken"):
        pipe(prompt="a star", num_inference_steps=4, output_type="latent")
    broken.remove()
    assert [set(hooks) for hooks in calls] == [set(), {"AutoGuidance_0"}]
    assert hooks_of(pipe.unet) == []
    assert torch.equal(predict(pipe.unet), before)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "guider is of type NoneType"),
    "number": (lambda: 3.0, "guider is of type float"),
    "class": (lambda: ClassifierFreeGuidance, "guider is the class ClassifierFreeGuidance"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        check_guider(make())
    assert "\n" not in str(refusal.value)


def test_a_refusal_comes_before_any_model_runs() -> None:
    pipe = make_pipeline()
    ran, _ = watch_models(pipe)
    pipe.guider = 3.0
    with pytest.raises(ValueError, match="guider is of type float"):
        pipe(prompt="a star", num_inference_steps=4)
    assert ran == []


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    log = logging.get_logger("perflow_blocks.blocks.guiders")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("guider", "steps", "message"),
    [
        (ClassifierFreeGuidance(3.0, stop=0.2), 4, "1 of its 2 predictions"),
        (SkipLayerGuidance(3.0, skip_layer_config=layers()), 8, "2 of its 3 predictions"),
        (ClassifierFreeZeroStarGuidance(3.0), 4, "prediction of 1 of the 4 steps.*set zero_init_steps=0"),
        (ClassifierFreeZeroStarGuidance(1.0), 4, "prediction of 1 of the 4 steps"),
    ],
)
def test_settings_for_many_steps_are_warned_of(
    guider: BaseGuidance, steps: int, message: str, warnings: pytest.LogCaptureFixture
) -> None:
    warn_about_few_steps(guider, steps)
    assert re.search(f"{type(guider).__name__}.*{message}", warnings.text)


@pytest.mark.parametrize(
    ("guider", "steps"),
    [
        (ClassifierFreeGuidance(3.0, stop=0.25), 4),
        (SkipLayerGuidance(3.0, skip_layer_config=layers()), 10),
        (ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), 4),
    ],
)
def test_settings_for_as_many_steps_are_not_warned_of(
    guider: BaseGuidance, steps: int, warnings: pytest.LogCaptureFixture
) -> None:
    warn_about_few_steps(guider, steps)
    assert not warnings.text
    assert guider.get_state()["step"] is None  # as if no step had been asked for


@pytest.mark.parametrize(("scale", "given"), [(0.0, "component"), (0.0, "call"), (0.5, "call")])
def test_a_scale_from_0_to_1_is_no_guidance(scale: float, given: str) -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=scale if given == "component" else 3.0))
    inputs = {"guidance_scale": scale} if given == "call" else {}
    rows = count_unet_calls(pipe)
    result = run(pipe, **inputs)
    assert set(rows) == {1}
    assert not torch.equal(result, run(pipe, prompt="a ring", **inputs))
    assert torch.equal(result, run(pipe, guidance_scale=1.0))


@pytest.mark.parametrize("kind", [ClassifierFreeGuidance, AdaptiveProjectedGuidance])
def test_the_scale_of_a_call_is_for_that_call(kind: Any) -> None:
    pipe = make_pipeline(guider=kind(guidance_scale=3.0))
    before = run(pipe)
    assert torch.equal(run(pipe, guidance_scale=5.0), run(make_pipeline(guider=kind(guidance_scale=5.0))))
    assert torch.equal(run(pipe), before)
    assert pipe.guider.guidance_scale == 3.0


def test_the_scale_of_a_call_wins_over_the_deltas(tmp_path: Path) -> None:
    pipe = make_pipeline()
    rows = count_unet_calls(pipe)
    run(pipe, delta=write_delta(tmp_path / "delta.safetensors", DeltaRecipe(guidance_scale=1.0)))
    run(pipe, guidance_scale=2.0)
    assert set(rows[: len(rows) // 2]) == {1} and set(rows[len(rows) // 2 :]) == {2}


def test_a_guider_without_a_scale_refuses_one() -> None:
    class Fixed(ClassifierFreeGuidance):
        def __init__(self) -> None:
            super().__init__()
            del self.guidance_scale

    with pytest.raises(ValueError, match="guidance_scale is given, but Fixed has no such scale"):
        run(make_pipeline(guider=Fixed()), guidance_scale=2.0)
    for wrong in (-1.0, float("nan"), "2"):
        with pytest.raises(ValueError, match="guidance_scale="):
            run(make_pipeline(), guidance_scale=wrong)
        with pytest.raises(ValueError, match="guidance_scale="):
            run(make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=wrong)))


def test_a_call_leaves_no_trace_on_the_component() -> None:
    guiders = [
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=0.5),
        AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([0], "mid_block.attentions.0.transformer_blocks")),
    ]
    for guider in guiders:
        pipe = make_pipeline(guider=guider)
        before = dict(vars(pipe.guider))
        run(pipe)
        assert vars(pipe.guider) == before


def test_a_callback_sees_each_step_and_may_change_the_latents() -> None:
    pipe, seen = make_pipeline(), list[tuple[Any, ...]]()

    def callback(of: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        seen.append((of, step, int(timestep), list(kwargs)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    assert run(pipe, num_inference_steps=4, callback_on_step_end=callback).abs().max() == 0
    assert seen == [(pipe, i, t, ["latents"]) for i, t in enumerate((1000, 750, 500, 250))]
