"""Mistakes in a data configuration are found together, without reading pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perflow_blocks.training.data import DataConfig, open_dataset, problems
from tests.training.conftest import make_folder, small, write_lines


@pytest.mark.parametrize(
    ("values", "complaints"),
    [
        ({}, ["data.path is not set"]),
        ({"kind": "csv"}, ["data.kind='csv' is not one of datasets, folder, webdataset, prompts, demo"]),
        ({"kind": "demo"}, ["data.resolution=1024 is too large for the demo"]),
        ({"kind": "demo", "path": "x", "resolution": 64}, ["data.path='x' means nothing to data.kind='demo'"]),
        ({"path": "x", "streaming": True}, ["data.streaming=true goes with data.kind='datasets'"]),
        ({"kind": "datasets", "path": "x", "streaming": True, "split": "train[:5]"}, ["is a slice"]),
        ({"kind": "folder", "path": "x", "resolution": 1000}, ["1000 is no multiple of data.bucket_step=64; use 960"]),
        ({"kind": "folder", "path": "x", "resolution": 1001, "bucketing": False}, ["no multiple of 8; use 1000"]),
        (
            {"path": "x", "num_workers": -1, "max_samples": 0, "shuffle_buffer": 0, "max_aspect": 0.5},
            ["max_aspect=0.5", "max_samples=0", "shuffle_buffer=0", "num_workers=-1"],
        ),
        ({"path": "x", "max_enlargement": float("nan")}, ["data.max_enlargement=nan is too small"]),
    ],
)
def test_wrong_values_are_named_together(values: dict[str, Any], complaints: list[str]) -> None:
    found = problems(DataConfig(**values))
    assert len(found) == len(complaints), found
    assert all(re.search(re.escape(complaint), text) for complaint, text in zip(complaints, found, strict=True)), found
    with pytest.raises(ValueError, match=re.escape(complaints[-1])):
        open_dataset(DataConfig(**values), batch_size=1, seed=0)


def _folder_without_captions(path: Path) -> None:
    make_folder(path, 2, captions=".txt")
    for file in path.glob("*.txt"):
        file.unlink()


def _folder_with_a_broken_line(path: Path) -> None:
    make_folder(path, 2)
    (path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}\n{"file_name"\n')


def _folder_without_file_names(path: Path) -> None:
    make_folder(path, 2)
    write_lines(path / "metadata.jsonl", [{"image": "000.png", "text": "a"}])


def _folder_with_another_key(path: Path) -> None:
    make_folder(path, 2)
    write_lines(path / "metadata.jsonl", [{"file_name": "000.png", "description": "a"}])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (None, "is not a folder"),
        (Path.mkdir, "no pictures in"),
        (_folder_without_captions, "no captions in .* put metadata.jsonl or captions.jsonl there, or a .txt file"),
        (_folder_with_a_broken_line, "line 2 of .*metadata.jsonl is not JSON"),
        (_folder_without_file_names, 'a line without "file_name"'),
        (
            _folder_with_another_key,
            "no line of .* has the key 'text' or 'caption' or 'prompt'; set data.caption_column",
        ),
    ],
)
def test_what_is_wrong_with_a_folder(tmp_path: Path, make: Any, complaint: str) -> None:
    if make is not None:
        make(tmp_path / "data")
    [found] = problems(small("folder", tmp_path / "data"))
    assert re.search(complaint, found), found


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", None, "is not a file"),
        ("a.csv", b"a cat", "neither .txt nor .jsonl"),
        ("a.txt", b" \n\n", "no prompts"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'"a cat"\n', "line 1 of .* is no JSON object"),
        ("a.jsonl", b'{"words": "a cat"}\n', r"has the key 'text' or 'caption' or 'prompt' \(keys: words\)"),
        ("a.jsonl", b'{"text": ""}\n', "no prompts"),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    [found] = problems(small("prompts", tmp_path / name))
    assert re.search(complaint, found), found


def test_problems_are_found_without_opening_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("folder", make_folder(tmp_path))

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Image, "open", refuse)
    assert problems(config) == []


@pytest.mark.parametrize("kind", ["datasets", "webdataset"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("perflow_blocks.training.data.opening.find_spec", lambda name: None)
    assert problems(small(kind, "x")) == [
        f"data.kind={kind!r} needs the package {kind}; pip install 'perflow-blocks[train]'."
    ]


def test_other_kinds_work_without_the_optional_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    config = small("folder", make_folder(tmp_path))
    assert next(iter(open_dataset(config, batch_size=2, seed=0))).pixels is not None
