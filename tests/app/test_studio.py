"""What the page asks for: previews and results as the pipeline gives them, for one user at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw

from perflow_blocks.app.studio import NONE, OWN, Event, Opened, Request, Studio, edited
from perflow_blocks.cli.page import opened
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline, weights_directory
from perflow_blocks.evaluation.samplers import seeded_latents, teacher_sampler

DELTA = weights_directory() / "perflow_delta.safetensors"


@pytest.fixture(scope="module")
def loaded() -> Opened:
    return opened(str(weights_directory()), torch.device("cpu"), torch.float32, embedded=True)


@pytest.fixture
def studio(loaded: Opened) -> Studio:
    return Studio({"embedded": "", "other": ""}, {"mine": DELTA}, lambda place: loaded)


def asked(**changes: Any) -> Request:
    return Request(**{"prompt": "a red star on a white background", "model": "embedded", "delta": OWN, **changes})


def last(events: Iterator[Event]) -> tuple[Image.Image, dict[str, Any]]:
    *_, event = events
    assert event.image is not None and event.settings is not None
    return event.image, dict(event.settings)


def test_an_image_grows_step_by_step_into_what_the_pipeline_draws(studio: Studio) -> None:
    events = list(studio.draw(asked(seed=3, steps=6)))
    assert [event.text for event in events[:6]] == [
        f"window {window}, step {step} of 6" for step, window in enumerate((1, 1, 2, 2, 3, 4), 1)
    ]
    previews, result = [event.image for event in events[:6]], events[6]
    assert all(one is not None and one.size == (64, 64) for one in previews) and result.settings is not None
    generator = torch.Generator().manual_seed(3)
    expected = perflow_pipeline()(asked().prompt, num_inference_steps=6, generator=generator).images[0]
    assert result.image == expected and result.settings["steps"] == 6 and result.settings["seed"] == 3

    def apart(image: Any) -> float:
        return float(np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean())

    assert apart(previews[5]) < 1 < apart(previews[0])


def test_the_teacher_and_perflow_draw_from_the_same_noise(studio: Studio) -> None:
    events = list(studio.compare(asked(seed=5), 10))
    classic = teacher_pipeline()
    sampler = teacher_sampler(classic, "ddim", 10, 3.0)
    drawn = sampler.draw([asked().prompt], seeded_latents(classic, [5]))[0].permute(1, 2, 0).numpy()
    assert [event.text.split(":")[0] for event in events[1:]] == [
        "Teacher, DDIM, 10 steps, guidance 3",
        "PeRFlow, 4 steps, guidance 1, seed 5",
    ]
    assert np.abs(np.asarray(events[1].image, float) / 255 - drawn).max() < 0.01
    assert events[2].image == last(studio.draw(asked(seed=5)))[0]


def test_the_part_that_is_drawn_upon_is_painted_anew(studio: Studio) -> None:
    image = last(studio.draw(asked()))[0].resize((200, 100))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 100, 100))
    result, settings = last(studio.draw(asked(prompt="a blue star", image=image, mask=mask, strength=0.9)))
    assert result.size == (88, 48) and settings["strength"] == 0.9  # as large as 64 x 64, of these proportions
    change = np.asarray(ImageChops.difference(result, image.resize(result.size)), float).mean((0, 2))
    assert change[:40].mean() > 3 * change[48:].mean()
    whole, settings = last(studio.draw(asked(prompt="a blue star", image=image, strength=0.5)))
    assert whole.size == (88, 48) and settings["strength"] == 0.5


@pytest.mark.parametrize("background", [Image.new("RGB", (20, 10), "red"), Image.new("RGBA", (20, 10), (0, 0, 0, 0))])
def test_an_edited_image_is_opaque_and_its_layers_are_the_mask(background: Image.Image) -> None:
    layer = Image.new("RGBA", (40, 20))
    assert edited({"background": background, "layers": [layer]})[1] is None
    ImageDraw.Draw(layer).rectangle((0, 0, 19, 19), "#ff00ff")
    image, mask = edited({"background": background, "layers": [Image.new("RGBA", (20, 10)), layer]})
    assert image is not None and image.getpixel((3, 3)) == ((255, 0, 0) if background.mode == "RGB" else (255,) * 3)
    assert mask is not None and mask.getbbox() == (0, 0, 10, 10)
    assert edited({"background": None, "layers": [layer]}) == edited(None) == (None, None)


def test_each_draws_with_the_delta_chosen(studio: Studio, loaded: Opened) -> None:
    own = last(studio.draw(asked()))[0]
    base = last(studio.draw(asked(delta=NONE)))
    assert base[0] != own and base[1]["delta"] is None and not merge_records(loaded.pipeline.unet)
    mine = last(studio.draw(asked(delta="mine")))
    assert mine[0] == own and mine[1]["delta"]["file"] == DELTA.name
    list(studio.compare(asked(delta="mine"), 2))
    assert last(studio.draw(asked(delta=NONE)))[0] == base[0] and last(studio.draw(asked()))[0] == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "a prompt is empty"),
        ({"guidance": -1.0}, "guidance"),
        ({"delta": "/etc/passwd"}, "not offered"),
        ({"model": "someone/else"}, "not offered"),
    ],
)
def test_a_mistake_is_said(studio: Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(studio.draw(asked(**changes)))


def test_without_a_delta_there_is_no_teacher(studio: Studio) -> None:
    with pytest.raises(ValueError, match="has no teacher to compare with"):
        list(studio.compare(asked(delta=NONE), 4))


def test_a_user_who_stops_ends_the_run(studio: Studio, loaded: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = list[None](), loaded.pipeline.unet.forward

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        return forward(*arguments, **settings)

    monkeypatch.setattr(loaded.pipeline.unet, "forward", counted)
    events = studio.draw(asked(steps=32))
    assert next(events).text == "window 1, step 1 of 32"
    events.close()  # type: ignore[attr-defined]
    assert 1 <= len(calls) < 32


def test_users_get_what_they_asked_for(studio: Studio) -> None:
    alone = {seed: last(studio.draw(asked(seed=seed)))[0] for seed in range(4)}
    together: dict[int, Image.Image] = {}

    def user(seed: int) -> None:
        together[seed] = last(studio.draw(asked(seed=seed, delta="mine" if seed % 2 else OWN)))[0]

    users = [threading.Thread(target=user, args=(seed,)) for seed in alone]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert together == alone


def test_only_one_model_is_loaded(loaded: Opened) -> None:
    places: list[str] = []

    def load(place: str) -> Opened:
        places.append(place)
        return loaded

    studio = Studio({"first": "a", "second": "b"}, {}, load)
    for name in ("first", "first", "second", "first"):
        last(studio.draw(asked(model=name)))
    assert places == ["a", "b", "a"]
