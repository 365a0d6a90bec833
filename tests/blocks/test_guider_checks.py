"""Guiders that cannot work are refused before a model runs; settings for many steps are warned of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.utils import logging

from perflow_blocks.blocks.guiders import check_guider, warn_about_few_steps
from tests.blocks.conftest import draw, layers, perturbed, skip_layer, smoothed
from tests.conftest import make_pipeline, watch_models

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "guider is of type NoneType"),
    "number": (lambda: 3.0, "guider is of type float"),
    "class": (lambda: ClassifierFreeGuidance, "guider is the class ClassifierFreeGuidance"),
    "smoothed": (smoothed, "SmoothedEnergyGuidance.*PerturbedAttentionGuidance"),
    "derived": (lambda: Renamed(seg_guidance_layers=[0]), "Renamed.*PerturbedAttentionGuidance"),
    "skip_without_cfg": (lambda: skip_layer(1.0), "SkipLayerGuidance.*guidance_scale"),
    "perturbed_without_cfg": (lambda: perturbed(1.0), "PerturbedAttentionGuidance.*guidance_scale"),
    "skip_before_cfg": (lambda: skip_layer(start=0.5), "SkipLayerGuidance.*start and stop"),
    "skip_after_cfg": (lambda: skip_layer(stop=0.5), "SkipLayerGuidance.*start and stop"),
}


@pytest.mark.behaviour
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        check_guider(make())
    assert "\n" not in str(refusal.value)


@pytest.mark.behaviour
def test_a_refusal_comes_before_any_model_runs() -> None:
    pipe = make_pipeline()
    ran, _ = watch_models(pipe)
    for name in ("number", "smoothed", "skip_without_cfg"):
        make, message = REFUSED[name]
        pipe.guider = make()
        with pytest.raises(ValueError, match=message):
            pipe(prompt="a star", num_inference_steps=4)
    assert ran == []


class Renamed(SmoothedEnergyGuidance):
    pass


class Repaired(SmoothedEnergyGuidance):
    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        pass


@pytest.mark.parametrize(
    "guider",
    [
        Repaired(seg_guidance_layers=[0]),
        SkipLayerGuidance(3.0, skip_layer_guidance_layers=[0], enabled=False),
        skip_layer(start=0.25, skip_layer_guidance_start=0.25, skip_layer_guidance_stop=0.75, stop=0.75),
        skip_layer(1.0, skip_layer_guidance_scale=0.0),
    ],
)
def test_a_fault_without_effect_is_not_refused(guider: BaseGuidance) -> None:
    check_guider(guider)


def test_what_is_refused_is_broken_in_the_stock_denoiser() -> None:
    """When one of these fails, diffusers was repaired, and the refusal can go."""

    def stock(guider: BaseGuidance) -> torch.Tensor:
        return draw(guider, stock=True, checked=False).latents

    assert torch.equal(stock(smoothed(seg_guidance_scale=5.0)), stock(smoothed(seg_guidance_scale=0.0)))
    wrong = ClassifierFreeGuidance(2.8, start=0.25)  # by the negative prompt, with the scale that the layers have
    assert torch.equal(stock(skip_layer(1.0)), stock(wrong))
    assert torch.equal(stock(perturbed(1.0)), stock(wrong))


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
        (ClassifierFreeGuidance(1.0), 4),
        (ClassifierFreeGuidance(3.0, stop=0.25), 4),
        (SkipLayerGuidance(3.0, skip_layer_config=layers()), 10),
        (ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), 4),
        (ClassifierFreeZeroStarGuidance(3.0, enabled=False), 4),
    ],
)
def test_settings_for_as_many_steps_are_not_warned_of(
    guider: BaseGuidance, steps: int, warnings: pytest.LogCaptureFixture
) -> None:
    warn_about_few_steps(guider, steps)
    assert not warnings.text
    assert guider.get_state()["step"] is None  # as if no step had been asked for
