"""Other encoders, tokenizers, types and LoRAs have embeddings of their own; weights changed in place want a clear."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig

from perflow_blocks import PeRFlowSDXLAutoBlocks, PromptCacheStep
from perflow_blocks.blocks.encode import PeRFlowAutoTextEncoderStep
from perflow_blocks.testing.tiny import TEXT_WIDTH, tiny_tokenizer
from tests.blocks.conftest import BOTH, count_encodings, encode, same, text_pipeline, uncached, write
from tests.blocks.test_features_lora import write_lora
from tests.conftest import generator, make_pipeline, run

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

pytestmark = pytest.mark.behaviour


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_encodings(monkeypatch)


def replace_encoder(pipe: Any) -> None:
    other = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    pipe.update_components(text_encoder=other)


def replace_tokenizer(pipe: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    pipe.register_components(tokenizer=tokenizer, tokenizer_2=tokenizer)


def shorten(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 8


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


def remove_vectors(pipe: Any) -> None:
    for number in ("", "_2"):
        pipe.unload_textual_inversion(
            tokenizer=getattr(pipe, f"tokenizer{number}"), text_encoder=getattr(pipe, f"text_encoder{number}")
        )


def add_lora(pipe: Any, name: str = "one") -> None:
    torch.manual_seed(len(name))
    for encoder in BOTH:
        getattr(pipe, encoder).add_adapter(LoraConfig(**LORA), adapter_name=name)


def use_lora(pipe: Any, name: str) -> None:
    for encoder in BOTH:
        getattr(pipe, encoder).set_adapter(name)


def scale_lora(pipe: Any, scale: Any) -> None:
    pipe.set_adapters("one", scale)


def replace_lora(pipe: Any) -> None:
    """Under the same name, which gives the new matrices the place of the old ones in memory."""
    pipe.unload_lora_weights()
    torch.manual_seed(9)
    for encoder in BOTH:
        getattr(pipe, encoder).add_adapter(LoraConfig(**LORA), adapter_name="one")


def turn(pipe: Any, method: str) -> None:
    for encoder in BOTH:
        getattr(getattr(pipe, encoder), method)()


def scale_second_layer(pipe: Any) -> None:
    layers = [module for module in pipe.text_encoder.modules() if hasattr(module, "lora_A")]
    layers[1].set_scale("one", 0.25)


def fuse(pipe: Any, scale: float = 1.0) -> None:
    pipe.fuse_lora(components=BOTH, lora_scale=scale)


def unfuse(pipe: Any) -> None:
    pipe.unfuse_lora(components=BOTH)


Change = Callable[[Any], None]


CHANGES: dict[str, tuple[list[Change], Change]] = {
    "encoder replaced": ([], replace_encoder),
    "tokenizer replaced": ([], replace_tokenizer),
    "tokenizer shortened": ([], shorten),
    "token added": ([], add_token),
    "type": ([], half),
    "textual inversion": ([], add_vectors),
    "textual inversion unloaded": ([add_vectors], remove_vectors),
    "LoRA": ([], add_lora),
    "LoRA scaled": ([add_lora], lambda pipe: scale_lora(pipe, 0.5)),
    "LoRA scaled by another tensor": (
        [add_lora, lambda pipe: scale_lora(pipe, torch.tensor(0.25))],
        lambda pipe: scale_lora(pipe, torch.tensor(0.5)),
    ),
    "LoRA scaled by another number of NumPy": (
        [add_lora, lambda pipe: scale_lora(pipe, np.float32(0.25))],
        lambda pipe: scale_lora(pipe, np.float32(0.5)),
    ),
    "LoRA scaled in one layer": ([add_lora], scale_second_layer),
    "LoRA switched": ([add_lora, lambda pipe: add_lora(pipe, "three")], lambda pipe: use_lora(pipe, "one")),
    "LoRA replaced": ([add_lora], replace_lora),
    "LoRA off": ([add_lora], lambda pipe: turn(pipe, "disable_adapters")),
    "LoRA on": (
        [add_lora, lambda pipe: turn(pipe, "disable_adapters")],
        lambda pipe: turn(pipe, "enable_adapters"),
    ),
    "LoRA fused": ([add_lora], lambda pipe: fuse(pipe, 0.5)),
    "LoRA fused and unfused": ([add_lora, lambda pipe: fuse(pipe, 0.5)], unfuse),
    "LoRA unloaded": ([add_lora], lambda pipe: pipe.unload_lora_weights()),
}


@pytest.mark.parametrize(("before", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_encoders_is_seen(before: list[Change], change: Change, encoded: list[str]) -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    for step in before:
        step(pipe)
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


@pytest.mark.parametrize("number", [1, 2])
def test_loras_from_files_are_seen(number: int, tmp_path: Path, encoded: list[str]) -> None:
    """Loaded one after the other without a call in between, under one name, and scaled by the call."""
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = PromptCacheStep()
    cached, plain = make_pipeline(blocks), make_pipeline()
    plain_result = run(cached)
    for seed in range(number):
        folder = write_lora(tmp_path / str(seed), seed)
        for pipe in (cached, plain):
            pipe.unload_lora_weights()
            pipe.load_lora_weights(folder)
    for scale in (1.0, 0.3, 1.0, 0.3):
        inputs = {"cross_attention_kwargs": {"scale": scale}}
        assert torch.equal(run(cached, **inputs), run(plain, **inputs)), scale
    encoded.clear()
    assert not torch.equal(run(cached, **inputs), plain_result)
    assert encoded == []


def test_a_scale_of_zero_resets_the_lora_as_it_does_without_a_cache() -> None:
    pipe, plain = text_pipeline(PromptCacheStep()), text_pipeline(PeRFlowAutoTextEncoderStep())
    for each in (pipe, plain):
        add_lora(each)
    for _ in range(2):
        for each in (pipe, plain):
            scale_lora(each, 0.5)
        for scale in (None, 0.0, 0.0, None):
            inputs = {"cross_attention_kwargs": scale if scale is None else {"scale": scale, "other": object()}}
            assert same(encode(pipe, **inputs), encode(plain, **inputs))


def test_encoders_that_are_offloaded_layer_by_layer() -> None:
    pipe = text_pipeline(cache := PromptCacheStep())
    prompts = ("a red star", "a ring")
    expected = {prompt: encode(pipe, prompt) for prompt in prompts}
    for name in BOTH:
        cpu_offload(getattr(pipe, name), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in pipe.text_encoder.parameters())
    for hits in (2, 4):
        assert all(same(encode(pipe, prompt), expected[prompt]) for prompt in prompts)
        assert cache.hits == hits
    assert cache.misses == 2
