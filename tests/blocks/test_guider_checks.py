"""Guiders that cannot work are refused before a model runs; settings for many steps are warned of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    MagnitudeAwareGuidance,
    SkipLayerGuidance,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging

from perflow_blocks.blocks.guiders import check_guider, warn_about_few_steps
from perflow_blocks.testing import tiny_sdxl_unet
from tests.blocks.conftest import draw, hooks_of, layers, perturbed, skip_layer, smoothed
from tests.conftest import make_pipeline, watch_models

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "guider is of type NoneType"),
    "number": (lambda: 3.0, "guider is of type float"),
    "class": (lambda: ClassifierFreeGuidance, "guider is the class ClassifierFreeGuidance"),
    "scale_missing": (lambda: ClassifierFreeGuidance(None), "guider.*ClassifierFreeGuidance.*NoneType"),
    "scale_not_finite": (lambda: ClassifierFreeGuidance(float("nan")), "guider.*guidance_scale=nan"),
    "scale_infinite": (lambda: ClassifierFreeGuidance(float("inf")), "guider.*guidance_scale=inf"),
    "smoothed": (smoothed, "SmoothedEnergyGuidance.*PerturbedAttentionGuidance"),
    "magnitude": (lambda: MagnitudeAwareGuidance(3.0), "MagnitudeAwareGuidance.*AdaptiveProjectedGuidance"),
    "skip_without_cfg": (lambda: skip_layer(1.0), "SkipLayerGuidance.*guidance_scale"),
    "perturbed_without_cfg": (lambda: perturbed(1.0), "PerturbedAttentionGuidance.*guidance_scale"),
    "skip_before_cfg": (lambda: skip_layer(start=0.5), "SkipLayerGuidance.*start and stop"),
    "skip_after_cfg": (lambda: skip_layer(stop=0.5), "SkipLayerGuidance.*start and stop"),
    "auto_path": (lambda: skip_layer(config=layers(fqn="auto")), "SkipLayerGuidance: fqn='auto'"),
    "layer_numbers": (lambda: SkipLayerGuidance(3.0, 2.8, 0.0, 1.0, skip_layer_guidance_layers=[0]), "fqn='auto'"),
    "unknown_path": (lambda: skip_layer(config=layers(fqn="transformer_blocks")), "fqn='transformer_blocks'"),
    "no_list": (lambda: skip_layer(config=layers(fqn="mid_block")), "fqn='mid_block'"),
    "index_beyond": (lambda: skip_layer(config=layers(indices=[0, 1])), r"indices=\[0, 1\].*from 0 to 0"),
    "index_negative": (lambda: skip_layer(config=layers(indices=[-1])), r"indices=\[-1\]"),
    "index_alone": (lambda: skip_layer(config=layers(indices=0)), "indices=0 "),
    "index_missing": (lambda: skip_layer(config=layers(indices=[])), r"indices=\[\]"),
    "blocks_of_another_kind": (lambda: skip_layer(config=layers(fqn="down_blocks")), "SkipLayerG.*DownBlock2D"),
    "second_of_two": (lambda: skip_layer(config=[layers(), layers(fqn="down_blocks")]), "SkipLayerG.*DownBlock2D"),
    "auto_unknown_path": (lambda: AutoGuidance(3.0, auto_guidance_config=layers(fqn="blocks")), "AutoGuidance: fqn="),
}


@pytest.mark.behaviour
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    unet = tiny_sdxl_unet()
    with pytest.raises(ValueError, match=message) as refusal:
        check_guider(make(), unet)
    assert "\n" not in str(refusal.value)
    assert hooks_of(unet) == []
    for path in re.findall(r'indices=\[0\], fqn="([^"]*)"', str(refusal.value)):
        check_guider(skip_layer(config=layers(fqn=path)), unet)  # what the error proposes works


@pytest.mark.behaviour
def test_a_refusal_comes_before_any_model_runs() -> None:
    pipe = make_pipeline()
    ran, _ = watch_models(pipe)
    for name in ("number", "scale_not_finite", "magnitude", "unknown_path", "blocks_of_another_kind"):
        make, message = REFUSED[name]
        pipe.guider = make()
        with pytest.raises(ValueError, match=message):
            pipe(prompt="a star", num_inference_steps=4)
    assert ran == []


def test_other_attention_processors_are_refused_for_perturbed_attention_only() -> None:
    unet = tiny_sdxl_unet()
    unet.set_attn_processor(AttnProcessor())
    check_guider(skip_layer(), unet)
    with pytest.raises(ValueError, match=r"PerturbedAttentionG.*AttnProcessor'>.*AttnProcessor2_0"):
        check_guider(perturbed(), unet)
    assert hooks_of(unet) == []


def test_levels_of_frequency_decoupled_guidance_must_be_guided_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.guiders.frequency_decoupled_guidance._CAN_USE_KORNIA", True)
    unet = tiny_sdxl_unet()
    check_guider(FrequencyDecoupledGuidance([3.0, 2.0]), unet)
    for settings in ({"guidance_scales": [3.0, 1.0]}, {"start": [0.0, 0.5]}, {"stop": [0.5, 1.0]}):
        with pytest.raises(ValueError, match=r"FrequencyDecoupledGuidance.*start and stop"):
            check_guider(FrequencyDecoupledGuidance(**settings), unet)
    with pytest.raises(ValueError, match=r"guidance_scales=inf"):
        check_guider(FrequencyDecoupledGuidance([3.0, float("inf")]), unet)


class RepairedNorm(MagnitudeAwareGuidance):
    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        return ClassifierFreeGuidance.forward(self, pred_cond, pred_uncond)


class RenamedNorm(MagnitudeAwareGuidance):
    pass


@pytest.mark.parametrize(
    "guider",
    [
        RepairedNorm(3.0),
        MagnitudeAwareGuidance(1.0),
        smoothed(seg_guidance_scale=0.0),
        SkipLayerGuidance(3.0, skip_layer_guidance_layers=[0], enabled=False),
        skip_layer(start=0.25, skip_layer_guidance_start=0.25, skip_layer_guidance_stop=0.75, stop=0.75),
        skip_layer(1.0, skip_layer_guidance_scale=0.0),
    ],
)
def test_a_fault_without_effect_is_not_refused(guider: BaseGuidance) -> None:
    check_guider(guider, tiny_sdxl_unet())


def test_a_subclass_that_inherits_a_fault_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="RenamedNorm"):
        check_guider(RenamedNorm(3.0), tiny_sdxl_unet())


def test_what_is_refused_is_broken_in_the_stock_denoiser() -> None:
    """When one of these fails, diffusers was repaired, and the refusal can go."""

    def stock(guider: BaseGuidance) -> torch.Tensor:
        return draw(guider, stock=True, checked=False).latents

    with pytest.raises(RuntimeError, match="must be a 2-tuple"):
        stock(MagnitudeAwareGuidance(3.0))
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
        (AdaptiveProjectedMixGuidance(3.0), 6, "never projects within 6 steps.*start_step=5; set at most 4"),
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
        (AdaptiveProjectedMixGuidance(3.0), 7),
        (AdaptiveProjectedMixGuidance(3.0, adaptive_projected_guidance_start_step=2), 4),
    ],
)
def test_settings_for_as_many_steps_are_not_warned_of(
    guider: BaseGuidance, steps: int, warnings: pytest.LogCaptureFixture
) -> None:
    warn_about_few_steps(guider, steps)
    assert not warnings.text
    assert guider.get_state()["step"] is None  # as if no step had been asked for
