"""Image-to-image: where a picture enters the path, how it is noised there, and a run split between two pipelines."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing.tiny import BETAS, tiny_image
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

PICTURE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(11))
NOISE = torch.randn(1, 4, 16, 16, generator=generator())
"""What the prepare step draws from the generator of `run`."""


class TrueNoise(torch.nn.Module):
    """Stands in for the UNet's forward: a student that always predicts the noise that was added."""

    def forward(self, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (NOISE.repeat(sample.shape[0], 1, 1, 1),)


def oracle_pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    pipe = make_pipeline()
    monkeypatch.setattr(pipe.unet, "forward", TrueNoise().forward)
    return pipe


def path(timestep: int) -> Tensor:
    """PICTURE and NOISE on the chord of the window that the timestep lies in."""
    return PeRFlowScheduler(**BETAS).add_noise_chord(PICTURE, NOISE, torch.tensor(timestep))


def first_sample(pipe: Any, **inputs: Any) -> Tensor:
    """What the UNet is given first, of one of its two batches."""
    seen: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    run(pipe, image_latents=PICTURE, **inputs)
    hook.remove()
    return seen[0][:1]


@pytest.mark.parametrize(
    ("strength", "steps", "timesteps"),
    [
        (0.3, 4, [300, 250]),
        (0.1, 4, [100]),
        (0.0001, 4, [1]),
        (1, 4, [1000, 750, 500, 250]),
        (0.3, 8, [300, 250, 125]),
        (0.9, 6, [900, 875, 750, 625, 500, 250]),
    ],
)
def test_the_steps_that_are_run_for_a_strength(strength: float, steps: int, timesteps: list[int]) -> None:
    pipe = make_pipeline()
    calls = count_unet_calls(pipe)
    state = pipe(prompt="a", image_latents=PICTURE, strength=strength, num_inference_steps=steps, output_type="latent")
    assert state.get("timesteps").tolist() == timesteps
    assert state.get("num_inference_steps") == len(timesteps) == len(calls)
    assert state.get("step_plan").next_times[-1] == 0.0


def test_marginal_noising_is_offered_and_differs_inside_windows_only() -> None:
    pipe = make_pipeline()
    for strength, inside in ((0.3, True), (0.5, False), (0.75, False), (0.9, True)):
        chord = first_sample(pipe, strength=strength, noising="chord")
        marginal = first_sample(pipe, strength=strength, noising="marginal")
        expected = PeRFlowScheduler(**BETAS).add_noise(PICTURE, NOISE, torch.tensor(round(strength * 1000)))
        torch.testing.assert_close(marginal, expected, rtol=1e-5, atol=1e-5)
        assert ((chord - marginal).abs().max() > 1e-2) == inside


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_student_that_predicts_the_noise_recovers_the_picture_from_the_chord(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = oracle_pipeline(monkeypatch)
    target = PeRFlowScheduler(**BETAS).add_noise(PICTURE, NOISE, torch.tensor(1))  # abar ends at its first entry
    on_chord = run(pipe, image_latents=PICTURE, strength=strength, num_inference_steps=4)
    torch.testing.assert_close(on_chord, target, rtol=1e-4, atol=1e-4)
    off_path = run(pipe, image_latents=PICTURE, strength=strength, num_inference_steps=4, noising="marginal")
    assert (off_path - target).abs().max() > 1e-2


def test_the_picture_is_noised_with_the_windows_in_force() -> None:
    pipe = make_pipeline(scheduler=PeRFlowScheduler(**BETAS, window_boundaries=[1.0, 0.6, 0.0]))
    sample = first_sample(pipe, strength=0.5)
    scheduler = PeRFlowScheduler(**BETAS, window_boundaries=[1.0, 0.6, 0.0])
    expected = scheduler.add_noise_chord(PICTURE, NOISE, torch.tensor(500))
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)
    assert (sample - path(500)).abs().max() > 1e-2


def test_without_a_strength_a_third_is_redrawn_and_a_hole_wholly() -> None:
    pipe, inputs = make_pipeline(), {"prompt": "a", "image_latents": PICTURE, "output_type": "latent"}
    assert pipe(**inputs).get("step_plan").times[0] == 0.3
    assert pipe(**inputs, mask=torch.ones(1, 1, 16, 16)).get("step_plan").times[0] == 1.0


def test_custom_timesteps_are_cut_at_the_strength() -> None:
    pipe = make_pipeline()
    inputs = {"prompt": "a", "image_latents": PICTURE, "timesteps": [1000, 750, 700, 500, 250, 90]}
    state = pipe(**inputs, strength=0.72, output_type="latent")
    assert state.get("timesteps").tolist() == [720, 700, 500, 250, 90]


def test_pictures_and_prompts_are_matched_in_order() -> None:
    """Two prompts, two pictures, two images a prompt: each as it would be alone."""
    pipe = make_pipeline()
    pictures, prompts = [tiny_image(1), tiny_image(2)], ["a star", "a ring"]
    seeds = [generator(seed) for seed in (1, 2, 3, 4)]
    together = run(pipe, prompt=prompts, image=pictures, num_images_per_prompt=2, strength=0.6, generator=seeds)
    for row, (prompt, picture, seed) in enumerate(
        zip(["a star"] * 2 + ["a ring"] * 2, [pictures[0]] * 2 + [pictures[1]] * 2, (1, 2, 3, 4), strict=True)
    ):
        alone = run(pipe, prompt=prompt, image=picture, strength=0.6, generator=[generator(seed)])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_given_latents_are_taken_as_they_are() -> None:
    pipe = make_pipeline()
    start = torch.randn(1, 4, 16, 16, generator=generator(5))
    torch.testing.assert_close(first_sample(pipe, latents=start.clone(), strength=0.4), start)


@pytest.mark.parametrize(("share", "steps"), [(0.25, 6), (0.75, 4)])
def test_base_and_refiner_in_one_run_equal_the_unsplit_run(share: float, steps: int) -> None:
    pipe = make_pipeline()
    calls = count_unet_calls(pipe)
    whole = run(pipe, num_inference_steps=steps)
    base = run(pipe, num_inference_steps=steps, denoising_end=share)
    refined = run(pipe, image_latents=base, num_inference_steps=steps, denoising_start=share)
    assert len(calls) == 2 * steps
    assert (base - whole).abs().max() > 0.1
    torch.testing.assert_close(refined, whole, rtol=1e-5, atol=1e-5)


def test_shares_snap_to_window_boundaries_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline()
    with caplog.at_level(logging.WARNING):
        base = run(pipe, num_inference_steps=4, denoising_end=0.8)
        refined = run(pipe, image_latents=base, num_inference_steps=4, denoising_start=0.8)
    assert "denoising_end=0.8 lies inside a time window; denoising_end=0.75 is used" in caplog.text
    assert "denoising_start=0.8 lies inside a time window; denoising_start=0.75 is used" in caplog.text
    torch.testing.assert_close(refined, run(pipe, num_inference_steps=4), rtol=1e-5, atol=1e-5)
    assert torch.equal(base, run(pipe, num_inference_steps=4, denoising_end=0.75))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"denoising_start": 0.74, "denoising_end": 0.76}, "nothing is left to run from time 0.25 to time 0.25"),
        ({"strength": 0.2505, "denoising_end": 0.75}, "nothing is left to run from time 0.2505 to time 0.25"),
    ],
)
def test_a_run_of_no_steps_is_refused_before_the_unet(inputs: dict[str, Any], message: str) -> None:
    pipe = make_pipeline()
    calls = count_unet_calls(pipe)
    with pytest.raises(ValueError, match=message):
        run(pipe, image_latents=PICTURE, **inputs)
    assert calls == []
