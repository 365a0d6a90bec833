"""The page without a browser: what it serves, and what it says. `make test-browser` drives it."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perflow_blocks.app.studio import Studio
from perflow_blocks.delta.extract import save_delta

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
    request = make_request("a", "", "m", "d", 0, 0, None, False, None, 1)
    assert (request.steps, request.guidance, request.seed, request.image) == (None, None, 0, None)
    seeds = {make_request("a", "", "m", "d", 4, 2, 0, True, None, 1).seed for _ in range(4)}
    assert len(seeds) == 4


def test_small_images_are_enlarged_for_the_brush() -> None:
    for size, expected in (((64, 128), (512, 1024)), ((600, 700), (600, 700))):
        image, _ = editable(Image.new("RGB", size))
        assert image is not None and image.size == expected


def test_the_page_is_served_on_this_machine_alone_and_asks_no_other() -> None:
    studio = Studio({"m": "/srv/models/m"}, {"d": Path("/srv/deltas/d.safetensors")}, lambda place: pytest.fail())
    with served(studio) as page:
        address = str(page.local_url)
        assert address.startswith("http://127.0.0.1:") and page.share_url is None
        texts = [urllib.request.urlopen(address + path).read().decode() for path in ("", "config")]
        assert all("PeRFlow" in text and "/srv" not in text and "googleapis" not in text for text in texts)
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.socket() as other:  # another address of this machine
            other.settimeout(1)
            assert other.connect_ex(("127.0.0.2", port)) != 0
    with socket.socket() as after:
        assert after.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "{folder}/one/x", "--model", "{folder}/two/x"], "two models have the same name"),
        (
            ["--delta", "{folder}/one/d.safetensors", "--delta", "{folder}/two/d.safetensors"],
            "two deltas have the same",
        ),
    ],
)
def test_wrong_options_are_told(run: Any, tmp_path: Path, options: list[Any], said: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "model_index.json").write_text("{}")
        save_delta({"weight": torch.ones(2)}, tmp_path / name / "d.safetensors")
    status, _, stderr = run("app", *(str(option).format(folder=tmp_path) for option in options))
    assert status == 2 and said in stderr and len(stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_told(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, stderr = run("app", "--port", port)
    assert status == 2 and f"--port {port}: the page cannot listen there; pass another port." in stderr


def test_without_gradio_it_says_what_to_install(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["perflow_blocks.cli.page"], "find_spec", lambda name: None)
    status, _, stderr = run("app")
    assert status == 2 and "pip install 'perflow-blocks[app]'" in stderr
