"""The page without a browser: what it serves, and what it says. `make test-browser` drives it."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perflow_blocks.app.studio import Studio

pytest.importorskip("gradio", reason="the page needs gradio")

from perflow_blocks.app.page import editable, make_request, served, without_paths


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/srv/my models/a/unet fits not", "a/unet fits not"),
        ("delta /home/me/d.safetensors, of ~/other/e.bin", "delta d.safetensors, of e.bin"),
        ("pass 512 or 1/2 of https://huggingface.co/a/b", "pass 512 or 1/2 of https://huggingface.co/a/b"),
        ("someone/model has none", "someone/model has none"),
    ],
)
def test_a_message_names_no_path_of_the_server(message: str, shown: str) -> None:
    assert without_paths(message, ["/srv/my models/a", "someone/model", None, False, Path("/srv")]) == shown


def test_what_is_left_open_is_left_to_the_weights() -> None:
    fields: dict[str, Any] = {
        "prompt": "a",
        "negative": "",
        "model": "m",
        "delta": "d",
        "editor": None,
        "strength": 1.0,
    }
    request = make_request(**fields, steps=0, guidance=0, seed=None, anew=False)
    assert (request.steps, request.guidance, request.seed, request.image) == (None, None, 0, None)
    seeds = {make_request(**fields, steps=4, guidance=2, seed=0, anew=True).seed for _ in range(4)}
    assert len(seeds) == 4


def test_small_images_are_enlarged_for_the_brush() -> None:
    for size, expected in (((64, 128), (512, 1024)), ((600, 700), (600, 700))):
        image, _ = editable(Image.new("RGB", size))
        assert image is not None and image.size == expected


def test_the_page_is_served_on_this_machine_alone_and_asks_no_other() -> None:
    studio = Studio({"m": "/srv/models/m"}, {"d": Path("/srv/deltas/d.safetensors")}, lambda place: pytest.fail())
    with served(studio) as page:
        assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
        texts = [urllib.request.urlopen(page.local_url + path).read().decode() for path in ("", "config")]
        assert all("PeRFlow" in text and "/srv" not in text and "googleapis" not in text for text in texts)
        port = int(page.local_url.rstrip("/").rpartition(":")[2])
        with socket.socket() as other:  # another address of this machine
            other.settimeout(1)
            assert other.connect_ex(("127.0.0.2", port)) != 0
    with socket.socket() as after:
        assert after.connect_ex(("127.0.0.1", port)) != 0
