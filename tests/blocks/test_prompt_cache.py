"""The prompt cache: the encoders run once for a prompt, and what is kept is bounded, safe and the same bit for bit."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks

from perflow_blocks import PeRFlowSDXLAutoBlocks, PromptCacheStep
from perflow_blocks.blocks.encode import PeRFlowAutoTextEncoderStep, PeRFlowTextEncoderStep
from perflow_blocks.blocks.encode import PeRFlowCachedTextEncoderStep
from perflow_blocks.testing import check_block
from perflow_blocks.testing.tiny import tiny_sdxl_components
from tests.blocks.conftest import EMBEDS, TEXT, count_encodings, embedding, encode, same, text_pipeline, uncached
from tests.blocks.test_every_workflow import workflow_inputs, workflow_pipeline
from tests.conftest import generator, make_pipeline, run, watch_models

pytestmark = pytest.mark.behaviour


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_encodings(monkeypatch)


REQUESTS: dict[str, dict[str, Any]] = {
    "a prompt": {},
    "two texts": {"prompt": "a red star", "prompt_2": "a blue ring"},
    "negative": {"negative_prompt": "a ring"},
    "two negative texts": {"negative_prompt": "a ring", "negative_prompt_2": "a star"},
    "an empty negative text": {"negative_prompt": ""},
    "a list": {"prompt": ["a star", "a ring"], "negative_prompt": ["b", "c"]},
    "a list of one": {"prompt": ["a red star"]},
    "layers left out": {"clip_skip": 0, "negative_prompt": "a ring"},
    "more layers left out": {"clip_skip": 1, "negative_prompt": "a ring"},
}


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_each_request_is_encoded_once_and_never_mistaken_for_another(guidance: float) -> None:
    pipe = text_pipeline(cache := PromptCacheStep(), guider=ClassifierFreeGuidance(guidance_scale=guidance))
    ran, stop = watch_models(pipe)
    first = {}
    for count, (name, inputs) in enumerate(REQUESTS.items(), 1):
        ran.clear()
        first[name] = encode(pipe, **inputs)
        assert ran, name
        assert (cache.hits, cache.misses, len(cache.cache)) == (0, count, count)
    ran.clear()
    again = {name: encode(pipe, **inputs) for name, inputs in REQUESTS.items()}
    assert ran == []
    assert (cache.hits, cache.misses) == (len(REQUESTS),) * 2
    stop()
    for name, inputs in REQUESTS.items():
        expected = uncached(pipe, **inputs)
        assert (expected["negative_prompt_embeds"] is None) == (guidance == 1.0)
        assert same(first[name], expected), name
        assert same(again[name], expected), name


def test_pictures_are_the_same_with_and_without_a_cache() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = (cache := PromptCacheStep())
    plain, cached = make_pipeline(), make_pipeline(blocks)
    for seed in range(2):
        for given in ({}, {"negative_prompt": "b"}, {"prompt": ["a", "b"]}):
            inputs = {**given, "num_images_per_prompt": 2, "num_inference_steps": 4}
            expected = run(plain, generator=generator(seed), **inputs)
            assert torch.equal(run(cached, generator=generator(seed), **inputs), expected)
    assert (cache.hits, cache.misses) == (3, 3)


@pytest.mark.parametrize("name", StableDiffusionXLAutoBlocks._workflow_map)
def test_every_workflow_takes_the_cache(name: str) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = (cache := PromptCacheStep())
    pruned = blocks.get_workflow(name)
    assert type(pruned.sub_blocks["text_encoder"]) is PeRFlowCachedTextEncoderStep
    inputs, expected = workflow_inputs(name), run(workflow_pipeline(name), **workflow_inputs(name))
    for each in (blocks, pruned):
        pipe = workflow_pipeline(name, each)
        assert torch.equal(run(pipe, **inputs), expected)
        ran, _ = watch_models(pipe)
        cache.clear()
        assert torch.equal(run(pipe, **inputs), expected)
        assert "text_encoder" in ran and "text_encoder_2" in ran
        ran.clear()
        assert torch.equal(run(pipe, **inputs), expected)
        assert "unet" in ran and "text_encoder" not in ran and "text_encoder_2" not in ran
        assert (cache.hits, cache.misses) == (1, 1)


def test_embeddings_in_place_of_a_prompt_pass_by() -> None:
    plain, cached = text_pipeline(PeRFlowAutoTextEncoderStep()), text_pipeline(cache := PromptCacheStep())
    given = {name: tensor for name, tensor in encode(plain).items() if "negative" not in name}
    for _ in range(2):
        state = cached(**given)
        assert same({name: state.get(name) for name in EMBEDS}, encode(plain))
    assert (cache.hits, cache.misses, len(cache.cache)) == (0, 0, 0)


def test_writing_into_what_was_handed_out_does_no_harm() -> None:
    pipe = text_pipeline(PromptCacheStep())
    expected = uncached(pipe, negative_prompt="a ring")
    for _ in range(3):
        result = encode(pipe, negative_prompt="a ring")
        assert same(result, expected)
        for tensor in result.values():
            assert tensor is not None
            tensor.zero_()


def test_the_request_unused_for_longest_goes_first() -> None:
    pipe = text_pipeline(cache := PromptCacheStep(max_entries=2))
    for prompt, hits in (("a", 0), ("b", 0), ("a", 1), ("c", 1), ("a", 2), ("c", 3), ("b", 3), ("a", 3)):
        encode(pipe, prompt)
        assert cache.hits == hits
        assert len(cache.cache) <= 2


@pytest.mark.parametrize("number", [0, -1, 2.0, True, None, "64"])
def test_a_bound_that_is_not_a_positive_integer_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="max_entries"):
        PromptCacheStep(max_entries=number)


def test_what_the_guider_the_configuration_and_autocast_ask_for_is_part_of_the_request() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())

    def without_guidance() -> None:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))

    def with_empty_prompt() -> None:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0), force_zeros_for_empty_prompt=False)

    zeros = encode(pipe)
    assert zeros["negative_prompt_embeds"] is not None and not zeros["negative_prompt_embeds"].any()
    without_guidance()
    assert encode(pipe)["negative_prompt_embeds"] is None
    with_empty_prompt()
    empty = encode(pipe)["negative_prompt_embeds"]
    assert empty is not None and empty.any()
    exact = encode(pipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encode(pipe)
    assert not same(exact, rough)
    assert same(encode(pipe), exact)
    assert (cache.hits, cache.misses) == (2, 4)


def test_what_has_no_key_is_encoded_each_time() -> None:
    class Text(list[str]):
        """Compares as it likes."""

    pipe = text_pipeline(cache := PromptCacheStep())
    for scale in (torch.tensor(0.5), torch.tensor(0.25)):
        encode(pipe, cross_attention_kwargs={"scale": scale})
    assert (cache.hits, cache.misses, len(cache.cache)) == (0, 2, 0)
    with pytest.raises(TypeError, match="same type"):
        encode(pipe, ["a", "b"], negative_prompt=("a", "b"))
    encode(pipe, ["a", "b"], negative_prompt=["a", "b"])
    with pytest.raises(TypeError, match="same type"):
        encode(pipe, ["a", "b"], negative_prompt=("a", "b"))
    assert encode(pipe, Text(["a", "b"]))["prompt_embeds"].shape[0] == 2  # type: ignore[union-attr]


def test_copies_of_a_block_share_its_cache_and_pipelines_keep_apart(encoded: list[str]) -> None:
    cache = PromptCacheStep()
    first, second = text_pipeline(cache), text_pipeline(cache)
    with torch.no_grad():
        embedding(second).weight.mul_(1.5)  # before its first call
    for _ in range(2):
        assert same(encode(first), uncached(first))
        assert same(encode(second), uncached(second))
    assert (cache.hits, cache.misses, len(cache.cache)) == (2, 2, 2)
    assert first.blocks.hits == 2
    first.blocks.clear()
    encoded.clear()
    encode(first)
    assert encoded
    assert (cache.hits, cache.misses) == (0, 1)


def test_a_cache_does_not_hold_encoders() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    encode(pipe)
    encoder = weakref.ref(pipe.text_encoder)
    del pipe
    gc.collect()
    assert encoder() is None
    encode(text_pipeline(cache))
    assert (cache.hits, cache.misses) == (0, 2)


def test_a_pickled_block_has_an_empty_cache_of_the_same_bound() -> None:
    block = PromptCacheStep(max_entries=3)
    encode(text_pipeline(block))
    restored = pickle.loads(pickle.dumps(block))
    assert (restored.misses, len(restored.cache), restored.cache.max_entries) == (0, 0, 3)
    pipe = text_pipeline(restored)
    assert same(encode(pipe), encode(pipe))
    assert (restored.hits, restored.misses) == (1, 1)


def test_encoders_loaded_and_run_in_inference_mode() -> None:
    with torch.inference_mode():
        pipe = text_pipeline(cache := PromptCacheStep())
        first = encode(pipe)
    again = encode(pipe)
    assert same(again, first)
    assert (cache.hits, cache.misses) == (1, 1)
    assert again["prompt_embeds"] is not None
    again["prompt_embeds"].zero_()  # refused outside for tensors that are of inference mode


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_it_keeps_the_contract_of_the_block_in_whose_place_it_stands(guidance: float) -> None:
    stock, cached = PeRFlowAutoTextEncoderStep(), PromptCacheStep()
    for attribute in ("inputs", "intermediate_outputs", "outputs", "expected_components", "expected_configs"):
        assert getattr(stock, attribute) == getattr(cached, attribute)
    assert cached.block_trigger_inputs == stock.block_trigger_inputs
    assert "encoded once" in cached.doc
    leaf = PeRFlowCachedTextEncoderStep()
    assert leaf.inputs == PeRFlowTextEncoderStep().inputs
    components = {name: part for name, part in tiny_sdxl_components().items() if name in TEXT}
    components["guider"] = ClassifierFreeGuidance(guidance_scale=guidance)
    for block in (cached, leaf):
        for _ in range(2):
            check_block(block, components=components)
