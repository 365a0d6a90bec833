"""The page of `perflow app` in a real browser. `make test-browser` installs what this needs; else it is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("playwright", reason="make test-browser installs playwright")
pytest.importorskip("gradio", reason="the page needs gradio")

from playwright import sync_api as playwright

from perflow_blocks.app.page import served
from perflow_blocks.app.studio import Studio
from perflow_blocks.batches import read_settings
from perflow_blocks.cli.page import opened
from perflow_blocks.demo import weights_directory

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="make test-browser installs Chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # gradio's own use of pandas
]
OPTIONS = ["--no-sandbox", "--enable-unsafe-swiftshader"]  # the editor draws with WebGL, here without a GPU
STATUS = "document.querySelector('#status').innerText"
VIEW = {"width": 1280, "height": 1100}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A page with the embedded model."""
    location = str(weights_directory())

    def load(place: str) -> Any:
        return opened(place, torch.device("cpu"), torch.float32, embedded=True)

    with served(Studio({"embedded": location}, {}, load)) as page:
        yield str(page.local_url)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def user(browser: Any, address: str) -> Iterator[Callable[[], User]]:
    contexts: list[Any] = []

    def enter() -> User:
        contexts.append(browser.new_context(viewport=VIEW, accept_downloads=True))
        return User(contexts[-1].new_page(), address)

    yield enter
    for context in contexts:
        context.close()


class User:
    """Someone at the page, and the addresses that their browser asked."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.asked = page, list[str]()
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(address)
        self.button("Draw").wait_for()
        # Every line that is shown, however short.
        page.evaluate(
            "() => { window.lines = []; new MutationObserver(() => window.lines.push("
            f"{STATUS})).observe(document.querySelector('#status'), "
            "{childList: true, subtree: true, characterData: true}) }"
        )

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def fill(self, **fields: object) -> None:
        for label, value in fields.items():
            slider = self.page.get_by_label(f"number input for {label}", exact=True)
            self.page.get_by_label(label, exact=True).or_(slider).first.fill(str(value))

    def press(self, name: str, *, until: str = "PeRFlow,") -> list[str]:
        """Presses a button and waits for a line with `until`. Returns the lines that were shown."""
        self.page.evaluate("() => { window.lines = [] }")
        self.button(name).click()
        self.page.wait_for_function(f"window.lines.some(line => line.includes({until!r}))", timeout=60_000)
        return list(self.page.evaluate("() => window.lines"))

    def image(self, place: str, path: Path) -> Image.Image:
        """The image that is shown, by its download button."""
        self.page.locator(f"#{place} img").wait_for()
        self.page.wait_for_timeout(300)  # it may follow the line that tells of it
        with self.page.expect_download() as download:
            self.page.locator(f"#{place}").get_by_label("Download").click()
        download.value.save_as(path)
        return Image.open(path)


def test_a_prompt_becomes_an_image_that_grows_before_ones_eyes(user: Any, tmp_path: Path) -> None:
    me = user()
    me.fill(Prompt="a blue circle on a white background", Seed=5)
    lines = me.press("Draw")
    assert [f"window {n}, step {n} of 4" for n in (1, 2, 3, 4)] == [line for line in lines if "window" in line]
    red, _, blue = me.image("image", tmp_path / "a.png").convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert blue > red + 5
    settings = read_settings(tmp_path / "a.png")
    assert (settings["prompt"], settings["seed"]) == ("a blue circle on a white background", 5)
    me.press("Draw")
    items = me.page.locator(".thumbnail-lg")
    playwright.expect(items).to_have_count(2)
    items.nth(1).click()
    playwright.expect(me.page.get_by_text('"a blue circle on a white background"')).to_be_visible()
    assert {url.split("/")[2] for url in me.asked if url.startswith("http")} == {me.page.url.split("/")[2]}


def test_teacher_and_perflow_stand_side_by_side(user: Any, tmp_path: Path) -> None:
    me = user()
    me.fill(Prompt="a green heart on a mint background")
    lines = me.press("Compare with the teacher")
    assert "Teacher, DDIM, 50 steps, guidance 3:" in lines[-1] and "PeRFlow, 4 steps, guidance 1" in lines[-1]
    both = [me.image(place, tmp_path / f"{place}.png") for place in ("teacher", "image")]
    assert both[0].size == both[1].size == (64, 64)
    if target := os.environ.get("SCREENSHOT"):
        me.fill(Prompt="a red star on a white background")
        me.press("Draw")
        me.fill(Prompt="a yellow circle on a navy background")
        me.press("Compare with the teacher")
        me.image("teacher", tmp_path / "again.png")
        me.page.screenshot(path=target)


def test_what_is_drawn_upon_is_painted_anew(user: Any, tmp_path: Path) -> None:
    me = user()
    me.press("Draw")
    before = me.image("image", tmp_path / "before.png").convert("RGB")
    me.button("Start from this image").click()
    canvas = me.page.locator("canvas").first
    canvas.wait_for()
    me.page.wait_for_timeout(2000)  # until the editor has put the image there, which nothing tells
    box = canvas.bounding_box()
    middle, top, height = box["x"] + box["width"] / 2, box["y"], box["height"]
    mouse = me.page.mouse
    mouse.move(middle + 20, top + 0.1 * height)
    mouse.down()
    for n in range(20):  # the right half of the image
        mouse.move(middle + (110 if n % 2 else 20), top + (0.1 + 0.04 * n) * height, steps=4)
    mouse.up()
    me.page.wait_for_timeout(1000)
    me.fill(Prompt="a blue circle on a white background")
    me.press("Draw")
    after = me.image("image", tmp_path / "after.png").convert("RGB")
    settings = read_settings(tmp_path / "after.png")
    assert settings["strength"] == 0.8 and settings["image"]
    change = torch.tensor(list(before.get_flattened_data()), dtype=torch.float32)
    change = (change - torch.tensor(list(after.get_flattened_data()), dtype=torch.float32)).abs().view(64, 64, 3)
    assert change[8:56, 36:56].mean() > 3 * change[:, :24].mean()


def test_two_users_do_not_disturb_one_another(user: Any, tmp_path: Path) -> None:
    users, prompts = [user(), user()], ("a red star on a white background", "a blue ring on a black background")
    for me, prompt in zip(users, prompts, strict=True):
        me.fill(Prompt=prompt, Steps=16, Seed=3)
        me.page.evaluate("() => { window.lines = [] }")
    for me in users:
        me.button("Draw").click()
    for number, (me, prompt) in enumerate(zip(users, prompts, strict=True)):
        me.page.wait_for_function("window.lines.some(line => line.includes('PeRFlow,'))", timeout=60_000)
        together = me.image("image", tmp_path / f"{number}.png").tobytes()
        assert read_settings(tmp_path / f"{number}.png")["prompt"] == prompt
        playwright.expect(me.page.locator(".thumbnail-lg")).to_have_count(1)
        me.press("Draw")
        assert me.image("image", tmp_path / "alone.png").tobytes() == together


def test_a_run_can_be_stopped(user: Any) -> None:
    me = user()
    me.fill(Steps=32, Guidance=5)
    me.press("Draw", until="window 1")
    lines = me.press("Stop", until="stopped")
    me.page.wait_for_timeout(1500)
    assert not any("PeRFlow," in line for line in [*lines, *me.page.evaluate("() => window.lines")])
    me.fill(Steps=4)
    me.press("Draw")


@pytest.mark.parametrize(
    ("fields", "said"), [({"Prompt": "  "}, "a prompt is empty"), ({"Seed": -3}, "minimum value")]
)
def test_what_is_wrong_is_said_on_the_page(user: Any, fields: dict[str, Any], said: str) -> None:
    me = user()
    me.fill(**fields)
    me.button("Draw").click()
    playwright.expect(me.page.get_by_text(said).first).to_be_visible()


def test_a_message_names_files_without_their_folders(browser: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_text("not weights")
    load = partial(opened, device=torch.device("cpu"), dtype=torch.float32, embedded=True)
    with served(Studio({"embedded": str(weights_directory())}, {"mine": broken}, load)) as page:
        me = User(browser.new_page(), str(page.local_url))
        line = me.press("Draw", until="Not drawn")[-1]
        me.page.close()
    assert "broken.safetensors is not" in line and str(tmp_path) not in line
