"""The guidance of a call: its own scale, none from 0 to 1, and never the shared component's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, AutoGuidance, ClassifierFreeGuidance, LayerSkipConfig

from perflow_blocks.delta.recipe import DeltaRecipe
from tests.blocks.conftest import write_delta
from tests.conftest import count_unet_calls, make_pipeline, run


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
