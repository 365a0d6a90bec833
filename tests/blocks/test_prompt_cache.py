"""The prompt cache: the encoders run once for a prompt, and what is kept is bounded, safe and the same bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from peft import LoraConfig

from perflow_blocks import PeRFlowSDXLAutoBlocks, PromptCacheStep
from perflow_blocks.blocks.encode import PeRFlowAutoTextEncoderStep
from perflow_blocks.testing import check_block
from perflow_blocks.testing.tiny import TEXT_WIDTH, tiny_sdxl_components, tiny_tokenizer
from tests.blocks.conftest import (
    BOTH,
    TEXT,
    count_encodings,
    embedding,
    encode,
    same,
    text_pipeline,
    uncached,
    write,
)
from tests.blocks.test_every_workflow import workflow_inputs, workflow_pipeline
from tests.blocks.test_features_lora import write_lora
from tests.conftest import generator, make_pipeline, run, watch_models

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

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


def test_each_request_is_encoded_once_and_never_mistaken_for_another() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
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
        assert same(first[name], expected), name
        assert same(again[name], expected), name
        for tensor in again[name].values():  # a copy
            if tensor is not None:
                tensor.zero_()
        assert same(encode(pipe, **inputs), expected), name


def test_a_workflow_that_is_taken_out_keeps_the_cache() -> None:
    name = "ip_adapter_controlnet_union_inpainting"
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = (cache := PromptCacheStep())
    pruned = blocks.get_workflow(name)
    assert pruned.sub_blocks["text_encoder"] is cache
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


def test_the_request_unused_for_longest_goes_first() -> None:
    pipe = text_pipeline(cache := PromptCacheStep(max_entries=2))
    for prompt, hits in (("a", 0), ("b", 0), ("a", 1), ("c", 1), ("a", 2), ("c", 3), ("b", 3), ("a", 3)):
        encode(pipe, prompt)
        assert cache.hits == hits
        assert len(cache.cache) <= 2


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


def test_copies_of_a_block_share_its_cache_and_pipelines_keep_apart(encoded: list[str]) -> None:
    cache = PromptCacheStep()
    first, second = text_pipeline(cache), text_pipeline(cache)
    with torch.no_grad():
        embedding(second).weight.mul_(1.5)  # before its first call
    for _ in range(2):
        assert same(encode(first), uncached(first))
        assert same(encode(second), uncached(second))
    assert (cache.hits, cache.misses, len(cache.cache)) == (2, 2, 2)
    assert first.blocks is cache
    first.blocks.clear()
    encoded.clear()
    encode(first)
    assert encoded
    assert (cache.hits, cache.misses) == (0, 1)


def replace_encoder(pipe: Any) -> None:
    other = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    pipe.update_components(text_encoder=other)


def replace_tokenizer(pipe: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    pipe.register_components(tokenizer=tokenizer, tokenizer_2=tokenizer)


def add_token(pipe: Any) -> None:
    """A letter that the encoders know becomes a token of its own wherever it stands."""
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer.add_tokens("r")


def half(pipe: Any) -> None:
    for name in BOTH:
        getattr(pipe, name).to(torch.bfloat16)


def add_vectors(pipe: Any) -> None:
    vectors = torch.randn(2, TEXT_WIDTH, generator=generator(3))
    for number in ("", "_2"):
        parts = {"tokenizer": getattr(pipe, f"tokenizer{number}")}
        parts["text_encoder"] = getattr(pipe, f"text_encoder{number}")
        pipe.load_textual_inversion(vectors, token="star", **parts)


def add_lora(pipe: Any) -> None:
    torch.manual_seed(3)
    for encoder in BOTH:
        getattr(pipe, encoder).add_adapter(LoraConfig(**LORA), adapter_name="one")


Change = Callable[[Any], None]


CHANGES: dict[str, Change] = {
    "encoder replaced": replace_encoder,
    "tokenizer replaced": replace_tokenizer,
    "token added": add_token,
    "type": half,
    "textual inversion": add_vectors,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_encoders_is_seen(change: Change, encoded: list[str]) -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    old = [encode(pipe, prompt=prompt) for prompt in ("a red star", "a ring", "a red star")]
    assert (cache.hits, cache.misses, len(cache.cache)) == (1, 2, 2)
    change(pipe)
    encoded.clear()
    new = encode(pipe)
    assert {"CLIPTextModel", "CLIPTextModelWithProjection"} <= set(encoded)
    encoded.clear()
    assert same(encode(pipe), new)
    assert encoded == []
    expected = uncached(pipe)
    assert same(new, expected)
    assert not same(old[0], expected)


def test_with_loras_in_the_encoders_nothing_is_kept() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    plain = encode(pipe)
    add_lora(pipe)
    for scale in (1.0, 0.5):
        pipe.set_adapters("one", scale)
        found = encode(pipe)
        assert same(found, uncached(pipe)) and not same(found, plain)
    pipe.unload_lora_weights()
    assert same(encode(pipe), plain)
    assert (cache.hits, cache.misses, len(cache.cache)) == (1, 1, 1)


def test_an_encoder_changed_in_place_wants_a_clear() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    old = encode(pipe)
    write(pipe)
    assert same(encode(pipe), old)
    cache.clear()
    assert (cache.hits, cache.misses, len(cache.cache)) == (0, 0, 0)
    new = encode(pipe)
    assert same(new, uncached(pipe))
    assert not same(new, old)


def test_loras_from_files_are_scaled_by_the_call(tmp_path: Path) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = PromptCacheStep()
    cached, plain = make_pipeline(blocks), make_pipeline()
    plain_result = run(cached)
    folder = write_lora(tmp_path, 1)
    for pipe in (cached, plain):
        pipe.load_lora_weights(folder)
    for scale in (1.0, 0.3, 1.0):
        inputs = {"cross_attention_kwargs": {"scale": scale}}
        assert torch.equal(run(cached, **inputs), run(plain, **inputs)), scale
    assert not torch.equal(run(cached, **inputs), plain_result)


def test_it_keeps_the_contract_of_the_block_in_whose_place_it_stands() -> None:
    stock, cached = PeRFlowAutoTextEncoderStep(), PromptCacheStep()
    for attribute in ("inputs", "intermediate_outputs", "expected_components"):
        own, others = ([entry.name for entry in getattr(block, attribute)] for block in (cached, stock))
        assert own == others
    components = {name: part for name, part in tiny_sdxl_components().items() if name in TEXT}
    components["guider"] = ClassifierFreeGuidance(guidance_scale=2.0)
    for _ in range(2):
        check_block(cached, components=components)
    with pytest.raises(ValueError, match="max_entries"):
        PromptCacheStep(max_entries=0)
