"""What users of diffusers expect of a call: batches, generators, latents, embeddings, output types, and no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep

from perflow_blocks.testing.tiny import (
    IMAGE_SIZE,
    IMAGE_WIDTH,
    LATENT_SIZE,
    load_tiny_ip_adapter,
    tiny_image,
)
from tests.blocks.conftest import TASKS, workflow_inputs
from tests.conftest import count_unet_calls, generator, make_pipeline, run, watch_models

pytestmark = pytest.mark.behaviour

PROMPTS = ["a star", "a ring"]
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
NEGATIVES = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")

workflows = pytest.mark.parametrize("workflow", TASKS)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for all: a test that leaves something behind makes another fail."""
    return make_pipeline()


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def noise(pictures: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(pictures, 4, LATENT_SIZE, LATENT_SIZE, generator=generator(seed))


def embeddings(**prompts: Any) -> dict[str, torch.Tensor]:
    """What the text encoder block makes of the prompts, by the names of a call's inputs."""
    pipe = make_pipeline(StableDiffusionXLTextEncoderStep())
    values = pipe(**prompts).values
    return {name: values[name] for name in (*EMBEDDINGS, *NEGATIVES) if values[name] is not None}


@workflows
def test_a_call_leaves_nothing_behind(pipe: Any, workflow: str) -> None:
    first = run(pipe, **workflow_inputs(workflow))
    for other in TASKS:
        different = {"prompt": PROMPTS, "negative_prompt": "a dot", "num_images_per_prompt": 2, "clip_skip": 1}
        run(pipe, **workflow_inputs(other) | different | {"num_inference_steps": 6, "height": 24, "width": 40})
    assert torch.equal(run(pipe, **workflow_inputs(workflow)), first)


@workflows
def test_a_call_changes_none_of_its_arguments(pipe: Any, workflow: str) -> None:
    inputs = workflow_inputs(workflow)
    inputs |= {"prompt": list(PROMPTS), "negative_prompt": ["a dot", "a line"], "num_images_per_prompt": 2}
    inputs |= {"cross_attention_kwargs": {"scale": 0.5}, "generator": generators(0, 1, 2, 3), "latents": noise(4)}
    sources = list(inputs["generator"])
    run(pipe, **inputs)
    assert inputs["prompt"] == PROMPTS
    assert inputs["negative_prompt"] == ["a dot", "a line"]
    assert inputs["cross_attention_kwargs"] == {"scale": 0.5}
    assert inputs["generator"] == sources
    assert torch.equal(inputs["latents"], noise(4))
    for name, value in workflow_inputs(workflow).items():
        assert np.array_equal(inputs[name], value), name


def test_image_embeddings_follow_their_prompts_and_stay_as_they_are() -> None:
    pipe = make_pipeline()
    load_tiny_ip_adapter(pipe)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["image_embeds"][0]), with_kwargs=True
    )
    numbers = torch.arange(4.0).view(4, 1, 1).expand(4, 1, IMAGE_WIDTH)
    given = {"ip_adapter_embeds": [numbers[:2]], "negative_ip_adapter_embeds": [numbers[2:]]}
    run(pipe, **given, prompt=PROMPTS, num_images_per_prompt=2)
    assert seen[0][:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # the guided batch, then the unguided one
    assert torch.equal(torch.cat([tensor for (tensor,) in given.values()]), numbers)


@workflows
def test_the_pictures_of_each_prompt_stand_together(pipe: Any, workflow: str) -> None:
    def inputs(*numbers: int) -> dict[str, Any]:
        """Prompt, negative prompt and given picture of these numbers."""
        own = {"prompt": [PROMPTS[n] for n in numbers], "negative_prompt": [("a dot", "a line")[n] for n in numbers]}
        pictures = {} if workflow == "text2image" else {"image": [tiny_image(n) for n in numbers]}
        return workflow_inputs(workflow) | own | pictures

    together = run(pipe, **inputs(0, 1), num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    each = [(0, 1), (0, 2), (1, 3), (1, 4)]
    alone = [run(pipe, **inputs(number), generator=generator(seed)) for number, seed in each]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    # or else a wrong order would go unseen
    for changed in ({"prompt": "a ring"}, {"negative_prompt": "a line"}):
        assert not torch.allclose(run(pipe, **inputs(0) | changed, generator=generator(1)), alone[0], atol=1e-2)


@workflows
def test_one_generator_draws_for_all_and_a_list_for_each(pipe: Any, workflow: str) -> None:
    inputs = workflow_inputs(workflow) | {"num_images_per_prompt": 2}
    shared = run(pipe, **inputs, generator=generator(1))
    assert torch.equal(run(pipe, **inputs, generator=generator(1)), shared)
    assert not torch.allclose(shared[0], shared[1], atol=1e-2)
    twins = run(pipe, **inputs, generator=generators(1, 1))
    torch.testing.assert_close(twins[0], twins[1], rtol=1e-4, atol=1e-4)
    one = run(pipe, **workflow_inputs(workflow), generator=generators(1))
    assert torch.equal(one, run(pipe, **workflow_inputs(workflow), generator=generator(1)))


@workflows
def test_output_types_agree(pipe: Any, workflow: str) -> None:
    inputs = workflow_inputs(workflow) | {"num_images_per_prompt": 2}
    latents = run(pipe, **inputs)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert expected.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert expected.std() > 0.05
    if workflow == "inpainting":  # whose known pixels are those of the given picture
        known = torch.from_numpy(np.array(inputs["image"])).permute(2, 0, 1) / 255
        expected = torch.where(torch.from_numpy(np.array(inputs["mask_image"])) > 127, expected, known)
    tensors, arrays, pictures = (run(pipe, **inputs, output_type=kind) for kind in ("pt", "np", "pil"))
    torch.testing.assert_close(tensors, expected, rtol=0, atol=1e-6)
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    for image, array in zip(pictures, arrays, strict=True):
        assert np.abs(np.asarray(image) / 255 - array).max() <= 0.5 / 255 + 1e-6


@workflows
def test_embeddings_stand_for_prompts(pipe: Any, workflow: str) -> None:
    texts = {"prompt": PROMPTS, "negative_prompt": ["a dot", "a line"]}
    inputs = workflow_inputs(workflow) | {"num_images_per_prompt": 2}
    expected = run(pipe, **inputs, **texts)
    given = embeddings(**texts)
    copies = {name: tensor.clone() for name, tensor in given.items()}
    assert torch.equal(run(pipe, **inputs, **given, prompt=None), expected)
    assert all(torch.equal(given[name], copies[name]) for name in given)


def test_embeddings_without_negatives_are_guided_by_zeros(pipe: Any) -> None:
    given = embeddings(prompt=PROMPTS)
    assert not given["negative_prompt_embeds"].any()  # as SDXL's base model was trained
    positive = {name: given[name] for name in EMBEDDINGS}
    assert torch.equal(run(pipe, **positive, prompt=None), run(pipe, prompt=PROMPTS))


def test_embeddings_need_no_negatives_and_no_text_encoder_without_guidance() -> None:
    unguided = ClassifierFreeGuidance(guidance_scale=1.0)
    expected = run(make_pipeline(guider=unguided))
    without = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    pipe = make_pipeline(guider=unguided, **without)
    batches = count_unet_calls(pipe)
    given = embeddings(prompt="a red star")
    assert torch.equal(run(pipe, **{name: given[name] for name in EMBEDDINGS}, prompt=None), expected)
    assert set(batches) == {1}


def test_a_model_that_takes_no_zeros_for_negatives_needs_them_under_guidance() -> None:
    pipe = make_pipeline()
    pipe.update_components(force_zeros_for_empty_prompt=False)
    ran, _ = watch_models(pipe)
    given = embeddings(prompt="a star", negative_prompt="a dot")
    positive = {name: given[name] for name in EMBEDDINGS}
    with pytest.raises(ValueError, match=r"^negative_prompt_embeds is missing; pass it beside prompt_embeds"):
        run(pipe, **positive, prompt=None)
    assert ran == []
    assert torch.equal(run(pipe, **given, prompt=None), run(pipe, prompt="a star", negative_prompt="a dot"))
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert torch.isfinite(run(pipe, **positive, prompt=None)).all()
