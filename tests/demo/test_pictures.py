"""The demo's data and its judges: what is rendered is what the captions say, and what the judges read back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from perflow_blocks.demo.data import RenderedPictures, render_pictures
from perflow_blocks.demo.models import MAX_TOKENS, build_tokenizer
from perflow_blocks.demo.pictures import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Prompt,
    Scene,
    all_captions,
    render,
)
from perflow_blocks.evaluation.classifier import classifier_accuracy, load_classifier
from perflow_blocks.evaluation.judge import frechet_distance, judge, paired_difference, proportion
from perflow_blocks.evaluation.pixels import read_colors


@pytest.fixture(scope="module")
def held_out() -> RenderedPictures:
    return render_pictures(600, seed=99, workers=1)


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
    tokenizer = build_tokenizer()
    words = {word for caption in all_captions() for word in caption.replace(",", " ,").split()}
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, word  # start, the word, end
    longest = max(len(tokenizer(caption).input_ids) for caption in all_captions())
    assert longest <= MAX_TOKENS
    assert len(tokenizer("zebra").input_ids) > 3
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id


def test_rendering_is_reproducible_and_independent_of_the_workers() -> None:
    one, two = render_pictures(700, seed=5, workers=1), render_pictures(700, seed=5, workers=2)
    assert torch.equal(one.pixels, two.pixels) and one.scenes == two.scenes
    assert not torch.equal(one.pixels, render_pictures(700, seed=6, workers=1).pixels)


def test_an_unknown_shape_is_refused() -> None:
    scene = Scene(shape="hexagon", color="red", background="white", size="big", position="on the left")
    with pytest.raises(ValueError, match=r"hexagon.*circle, square"):
        render(scene, np.random.default_rng(0))


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
    pictures = torch.stack([torch.from_numpy(np.asarray(render(scene, rng)).copy()) for scene in scenes])
    readings = read_colors(pictures.permute(0, 3, 1, 2) / 255)
    assert [(r.color, r.background, r.clean) for r in readings] == [(s.color, s.background, True) for s in scenes]


def test_empty_and_muddy_pictures_are_not_clean() -> None:
    empty = torch.full((1, 3, 64, 64), 0.95)
    assert read_colors(empty)[0].color is None
    blend = torch.full((1, 3, 64, 64), 0.95)
    blend[..., 20:44, 20:44] = torch.tensor([0.42, 0.48, 0.45])[:, None, None]  # between all colours
    assert not read_colors(blend)[0].clean


def test_the_shipped_classifier_recognises_held_out_renders(held_out: RenderedPictures) -> None:
    assert classifier_accuracy(load_classifier(), held_out) >= 0.97


def test_the_judge_counts_only_what_is_named_and_notices_each_error(held_out: RenderedPictures) -> None:
    classifier, pictures = load_classifier(), held_out.unit_interval()
    scenes = held_out.scenes
    exact = [Prompt(shape=s.shape, color=s.color, background=s.background) for s in scenes]
    assert proportion(judge(pictures, exact, classifier).strict)[0] >= 0.97
    for wrong in (
        [Prompt(shape=s.shape, color=_another(COLORS, s.color)) for s in scenes],
        [Prompt(shape=s.shape, background=_another(BACKGROUNDS, s.background)) for s in scenes],
        [Prompt(shape=_another(SHAPES, s.shape)) for s in scenes],
    ):
        assert proportion(judge(pictures, wrong, classifier).accurate)[0] <= 0.03


def test_distances_rise_with_distortion(held_out: RenderedPictures) -> None:
    classifier, pictures = load_classifier(), held_out.unit_interval()
    real, drawn = pictures[:300], pictures[300:]
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance((drawn + s * noise).clamp(0, 1), real, classifier) for s in (0.0, 0.2, 0.5)]
    assert distances[0] < distances[1] < distances[2]
    assert frechet_distance(real, real, classifier) == pytest.approx(0.0, abs=1e-3)


def test_standard_errors() -> None:
    hits = torch.tensor([True] * 75 + [False] * 25)
    assert proportion(hits) == pytest.approx((0.75, (0.75 * 0.25 / 100) ** 0.5))
    mean, error = paired_difference(hits, torch.zeros(100, dtype=torch.bool))
    assert mean == pytest.approx(0.75) and error == pytest.approx(0.0435, abs=1e-3)
    assert paired_difference(hits, hits) == (0.0, 0.0)


def _another(options: Iterable[str], value: str) -> str:
    names = tuple(options)
    return names[(names.index(value) + 1) % len(names)]
