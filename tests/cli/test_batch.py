"""Prompts files: what they may hold, rows that fail, killed and resumed runs, and several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from perflow_blocks.cli import main
from perflow_blocks.testing.tiny import tiny_image, tiny_sdxl_components

Run = Callable[..., tuple[int, str, str]]
ROWS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(path)
    tiny_image(1).save(path / "start.png")
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    """Images and sheet, and the manifest without times."""
    notes = json.dumps([{**entry, "seconds": None} for entry in manifest(out)])
    return {path.name: path.read_bytes() for path in out.glob("*.png")} | {"notes": notes.encode()}


def test_every_kind_of_file_gives_the_same_images(run: Run, model: Path, tmp_path: Path) -> None:
    picture = os.path.relpath(model / "start.png", tmp_path)
    files = [
        write(
            tmp_path / "a.csv",
            "prompt,negative,seed,size,steps,image\r\n"
            f'"a star, big",blue,7,16x24,,\r\n\r\na étoile,,,,,\r\na ring,,9,,5,{picture}\r\n',
        ),
        write(
            tmp_path / "a.jsonl",
            '{"prompt": "a star, big", "negative": "blue", "seed": 7, "size": "16x24"}\n{"prompt": "a étoile"}\n\n'
            + json.dumps({"prompt": "a ring", "seed": "9", "steps": 5, "image": picture, "size": None})
            + "\n",
        ),
    ]
    found = []
    for file in files:
        out = tmp_path / file.suffix
        request = ("--model", model, "--steps", 4, "--seed", 3, "--out", out, "--strength", 0.9, "--json")
        status, stdout, stderr = run("generate", "--prompts-file", file, *request)
        assert status == 0, stderr
        found.append(contents(out))
    assert found[0] == found[1]
    first, second, third = json.loads(stdout)["settings"]
    assert (first["prompt"], first["negative"], first["seed"], first["size"]) == ("a star, big", "blue", 7, [16, 24])
    assert (second["prompt"], second["seed"], second["steps"]) == ("a étoile", 4, 4)  # the run's second seed
    assert (third["seed"], third["steps"], third["image"]) == (9, 5, "start.png")
    text = write(tmp_path / "a.txt", "\ufeff# a comment\na étoile\n\n  a ring  \n")
    status, stdout, _ = run(
        "generate", "--prompts-file", text, "--model", model, "--steps", 4, "--out", tmp_path / "t"
    )
    assert [Path(line).name for line in stdout.splitlines()] == [
        "000-a-toile-seed0.png",
        "001-a-ring-seed1.png",
        "sheet.png",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,sed\na,1\n", "line 2: column sed is unknown; columns are prompt, negative, seed"),
        ("a.csv", "prompt\na,1\n", "line 2: column without a name"),
        ("a.csv", "prompt,seed\na,1\nb,x\n", "line 3: seed x must be an integer of at least 0"),
        ("a.csv", "seed\n1\n", "line 2: a prompt is empty"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n',
            "line 2: steps 0 must be an integer of at least 1",
        ),
        ("a.jsonl", '{"prompt": "a", "size": "67"}\n', "line 1: size 67 must be in multiples of"),
        ("a.jsonl", '{"prompt": "a", "image": "none.png"}\n', "none.png does not exist"),
        ("a.jsonl", "{\n", "line 1: "),
        ("a.jsonl", "[1]\n", "line 1: it must be an object"),
    ],
)
def test_a_mistake_in_any_row_is_found_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setattr("perflow_blocks.cli.pipeline.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    status, stdout, stderr = run("generate", "--prompts-file", write(tmp_path / name, text), "--out", tmp_path / "out")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert name in stderr and message in stderr and not (tmp_path / "out").exists()


def test_a_file_in_another_encoding_is_told_of(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt\na étoile\n".encode("utf-16"))
    status, _, stderr = run("generate", "--prompts-file", tmp_path / "a.csv")
    assert status == 2 and f"{tmp_path / 'a.csv'} is not in UTF-8" in stderr


def test_a_row_that_fails_is_noted_and_does_not_stop_the_others(run: Run, model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "steps": 5000}\n{"prompt": "c"}\n')
    request = ("generate", "--prompts-file", file, "--model", model, "--steps", 4, "--out", tmp_path / "out")
    status, stdout, stderr = run(*request)
    assert status == 1 and len(stdout.splitlines()) == 3 and "1 of 3 images failed" in stderr
    assert [bool(entry["error"]) for entry in manifest(tmp_path / "out")] == [False, True, False]
    assert "5000 steps" in manifest(tmp_path / "out")[1]["error"]
    write(file, '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    status, stdout, _ = run(*request, "--resume")
    assert status == 0 and [Path(line).name[:3] for line in stdout.splitlines()] == ["001", "she"]
    assert [entry["error"] for entry in manifest(tmp_path / "out")] == [None] * 3
    write(file, '{"prompt": "a"}\n{"prompt": "b", "steps": 5000}\n{"prompt": "c"}\n')
    assert run(*request)[0] == 1  # the image of before stays
    write(file, '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    status, stdout, _ = run(*request, "--resume")
    assert status == 0 and len(stdout.splitlines()) == 1
    assert [entry["error"] for entry in manifest(tmp_path / "out")] == [None] * 3


def test_resuming_draws_again_what_was_drawn_otherwise(run: Run, model: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.png"

    def drawn(*options: object) -> list[str]:
        request = ("generate", "a", "b", "--model", model, "--steps", 4, "--image", start, "--out", tmp_path / "out")
        status, stdout, stderr = run(*request, "--resume", *options)
        assert status == 0, stderr
        return [Path(line).name[:3] for line in stdout.splitlines()[:-1]]

    tiny_image(1).save(start)
    assert drawn() == ["000", "001"] and drawn() == []
    assert drawn("--guidance", 3) == ["000", "001"] == drawn()
    tiny_image(2).save(start)
    assert drawn() == ["000", "001"]
    damaged = tmp_path / "out" / "001-b-seed1.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert drawn() == ["001"]


def in_child(arguments: list[str], rows: int | None = None) -> None:
    """Runs the command in a copy of this process, which dies as it starts to note row number `rows`."""
    child = os.fork()
    if child == 0:
        count: Iterator[int] = iter(range(1000))

        def hook(event: str, details: tuple[Any, ...]) -> None:
            if event == "open" and "manifest.0" in str(details[0]) and details[1] == "a" and next(count) == rows:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            main(arguments)
        except SystemExit as done:
            os._exit(int(done.code or 0))
        finally:
            os._exit(9)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (0 if rows is None else -signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_row_ends_after_resuming_with_the_files_of_an_unbroken_one(
    model: Path, tmp_path: Path
) -> None:
    """Each of the resumed runs is killed too, until all rows are drawn."""
    code = "from tests.cli.test_batch import kill_at_every_row; kill_at_every_row()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(model)], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(manifest(tmp_path / "killed")) == ROWS
    assert not list((tmp_path / "killed").glob("manifest.*.jsonl"))


def kill_at_every_row() -> None:
    """In a process with one thread, which can be forked."""
    import torch

    torch.set_num_threads(1)
    write(Path("a.txt"), "".join(f"star {number}\n" for number in range(ROWS)))
    request = ["generate", "--prompts-file", "a.txt", "--model", sys.argv[1], "--steps", "4", "--quiet"]
    in_child([*request, "--out", "whole"])
    for _ in range(ROWS):
        in_child([*request, "--out", "killed", "--resume"], rows=0)
    in_child([*request, "--out", "killed", "--resume"])


def test_two_processes_give_the_files_of_one(tmp_path: Path) -> None:
    """The embedded model, as `accelerate launch` runs it: the variables are those that it sets."""
    write(
        tmp_path / "a.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in ("a star", "a ring", "a heart"))
    )
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, "-m", "perflow_blocks.cli", "generate", "--prompts-file", "a.jsonl"]
        command += ["--image", "red.png", "--steps", "4", "--device", "cpu", "--out", name]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(done.stdout.split()) == sorted(
            str(path.relative_to(tmp_path)) for path in (tmp_path / name).glob("*.png")
        )
        assert "3 images" in done.stderr and "images per second" in done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
