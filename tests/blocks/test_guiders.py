"""Every guider predicts as in diffusers' own denoiser, in one UNet call where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    TangentialClassifierFreeGuidance,
)

from perflow_blocks.blocks.guiders import is_batchable
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
    perturbed,
    skip_layer,
)
from tests.conftest import generator, make_pipeline

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


@pytest.mark.parametrize("make", [skip_layer, perturbed])
def test_skipped_layers_show_in_the_latents(make: Callable[..., Any]) -> None:
    strong, off = make(), make()
    strong.skip_layer_guidance_scale, off.skip_layer_guidance_scale = 5.0, 0.0
    plain = draw(ClassifierFreeGuidance(3.0)).latents
    assert distance(draw(strong).latents, plain) > 1e-3
    assert distance(draw(off).latents, plain) < 1e-5


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


class OwnCleanup(ClassifierFreeGuidance):
    def cleanup_models(self, denoiser: Any) -> None:
        pass


@pytest.mark.parametrize(("guider", "calls"), [(OwnScale(3.0), BATCHED), (OwnModel(3.0), IN_TURN)])
def test_guiders_of_users_draw_as_in_the_stock_denoiser(guider: BaseGuidance, calls: list[int]) -> None:
    ours = draw(guider, prompts=1)
    assert ours.calls == [calls] * 4
    assert distance(ours.latents, draw(guider, prompts=1, stock=True).latents) < 1e-4


def test_only_guiders_that_leave_the_model_alone_are_batchable() -> None:
    assert is_batchable(ClassifierFreeGuidance(3.0))
    assert is_batchable(OwnScale(3.0))
    assert not is_batchable(OwnModel(3.0))
    assert not is_batchable(OwnCleanup(3.0))
    assert not is_batchable(skip_layer())


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
