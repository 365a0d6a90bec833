"""The demo's images and their judge: what is rendered is what the captions say, and what the judge reads back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from perflow_blocks.demo.images import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Prompt,
    RenderedImages,
    Scene,
    all_captions,
    render,
    render_images,
)
from perflow_blocks.demo.judge import judge, load_classifier, read_colors
from perflow_blocks.demo.models import load_tokenizer


@pytest.fixture(scope="module")
def held_out() -> RenderedImages:
    return render_images(120, seed=99, workers=1)


def test_captions_read_as_english() -> None:
    assert Prompt(shape="star").text == "a star"
    assert Prompt(shape="cross", color="orange").text == "an orange cross"
    full = Prompt(shape="heart", color="red", background="white", size="big", position="on the left")
    assert full.text == "a big red heart on a white background, on the left"


def test_a_caption_names_what_the_scene_shows_and_leaves_half_of_it_open() -> None:
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(400):
        scene = Scene.random(rng)
        prompt = Prompt.describe(scene, rng)
        assert prompt.shape == scene.shape
        for name in ("color", "background", "size", "position"):
            assert getattr(prompt, name) in (None, getattr(scene, name))
            named += getattr(prompt, name) is not None
    assert named / 1600 == pytest.approx(0.5, abs=0.05)


def test_every_word_of_the_captions_is_one_token_and_other_words_still_tokenize() -> None:
    tokenizer = load_tokenizer()
    words = {word for caption in all_captions() for word in caption.replace(",", " ,").split()}
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end
    longest = max(len(tokenizer(caption).input_ids) for caption in all_captions())
    assert longest <= tokenizer.model_max_length
    assert len(tokenizer("zebra").input_ids) > 3
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id


def test_rendering_is_reproducible_and_independent_of_the_workers() -> None:
    one, two = render_images(700, seed=5, workers=1), render_images(700, seed=5, workers=2)
    assert torch.equal(one.pixels, two.pixels) and one.scenes == two.scenes
    assert not torch.equal(one.pixels, render_images(700, seed=6, workers=1).pixels)


def test_colours_are_read_back_for_every_combination() -> None:
    rng = np.random.default_rng(1)
    scenes = [
        Scene(shape=shape, color=color, background=background, size=size, position=position)
        for (shape, color, background), size, position in zip(
            itertools.product(SHAPES, COLORS, BACKGROUNDS),
            itertools.cycle(SIZES),
            itertools.cycle(POSITIONS),
            strict=False,
        )
    ]
    images = [torch.tensor(np.asarray(render(scene, rng))).permute(2, 0, 1).float() for scene in scenes]
    assert [read_colors(image) for image in images] == [(s.color, s.background, True) for s in scenes]


def test_empty_and_muddy_images_are_not_clean() -> None:
    empty = torch.full((3, 64, 64), 242.0)
    assert read_colors(empty).color is None
    blend = empty.clone()
    blend[:, 20:44, 20:44] = torch.tensor([107.0, 122.0, 115.0])[:, None, None]  # between all colours
    assert not read_colors(blend).clean


def test_the_judge_counts_only_what_is_named_and_notices_each_error(held_out: RenderedImages) -> None:
    images = held_out.pixels.float() / 255.0
    exact = [Prompt(shape=s.shape, color=s.color, background=s.background) for s in held_out.scenes]
    assert np.mean(judge(images, exact, load_classifier())[1]) >= 0.97
    for name, table in (("color", COLORS), ("background", BACKGROUNDS), ("shape", SHAPES)):
        wrong = [replace(prompt, **{name: _another(table, getattr(prompt, name))}) for prompt in exact]
        assert np.mean(judge(images, wrong, load_classifier())[0]) <= 0.03
    shapes = [Prompt(shape=prompt.shape) for prompt in exact]
    assert np.mean(judge(images.roll(1, 2), shapes, load_classifier())[0]) >= 0.97


def _another(options: Iterable[str], value: str) -> str:
    names = tuple(options)
    return names[(names.index(value) + 1) % len(names)]
