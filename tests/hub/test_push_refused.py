"""What `push_workflow` refuses before it asks the network for anything, all of it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import perflow_blocks
from perflow_blocks.hub.manifest import write_manifest
from perflow_blocks.hub.publishable import private_content
from tests.hub.conftest import CONTENT, REPO, push, write_workflow
from tests.hub.loopback.server import LoopbackHub

SECRET = "hf_" + "Abcdefghij" * 3 + "1234"


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return write_workflow(tmp_path / "workflow", CONTENT)


def refused(hub: LoopbackHub, directory: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        push(hub, directory, **options)
    assert hub.requests == [], "the network was asked"
    return str(caught.value)


def test_all_problems_are_named_at_once(loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path) -> None:
    content = {**CONTENT, "notes.md": f"a\nb {SECRET}\n".encode(), "unet/config.json": b'{"a": "/home/me/models"}\n'}
    write_workflow(workflow, content)
    (workflow / "unet" / "first.safetensors").write_bytes(CONTENT["unet/first.safetensors"][:-1] + b"x")
    (workflow / "perflow_part.py").unlink()
    for leftover in (".cache/huggingface/x", "__pycache__/block.cpython-311.pyc", ".git/config", "unet/.DS_Store"):
        (workflow / leftover).parent.mkdir(parents=True, exist_ok=True)
        (workflow / leftover).write_text("x")
    (workflow / "extra.txt").write_text("x")
    (workflow / "linked").symlink_to(tmp_path, target_is_directory=True)
    text = refused(loopback_hub, workflow)
    assert text.startswith(f"nothing was pushed, since {workflow} cannot be published:\n- ")
    for part in (
        "1 changed (unet/first.safetensors), 1 missing (perflow_part.py), 1 unexpected (linked)",
        "- notes.md: line 2 holds what looks like a Hugging Face token (hf_...); take it out",
        "- unet/config.json: line 1 names the path /home/me;",
        "- .cache is not to be published",
        "- __pycache__ is not to be published",
        "- .git is not to be published",
        "- unet/.DS_Store is not to be published",
        "- extra.txt is not in the manifest; remove it",
        "- linked is a link that leads out of the directory",
    ):
        assert part in text, part
    assert SECRET not in text and SECRET[:8] not in text
    assert len(text.splitlines()) == 10


def test_leftovers_are_refused_also_where_the_manifest_names_them(loopback_hub: LoopbackHub, workflow: Path) -> None:
    write_workflow(workflow, {**CONTENT, "__pycache__/a.pyc": b"x", "block.pyc": b"x", ".env": b"x"})
    text = refused(loopback_hub, workflow)
    for name in ("__pycache__", "block.pyc", ".env"):
        assert f"- {name} is not to be published" in text


def test_what_nothing_can_load_is_refused(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    directory = write_workflow(tmp_path / "few", {"block.py": b""})
    expected = "modular_config.json, modular_model_index.json is not in the manifest"
    assert expected in refused(loopback_hub, directory)
    assert "is no directory" in refused(loopback_hub, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no perflow_manifest.json" in refused(loopback_hub, tmp_path / "empty")


def test_what_comes_with_a_download_is_no_obstacle(loopback_hub: LoopbackHub, workflow: Path) -> None:
    (workflow / ".gitattributes").write_text("x")
    push(loopback_hub, workflow)
    assert loopback_hub.repositories[REPO].find("main").files[".gitattributes"].content != b"x"  # type: ignore[union-attr]


def test_files_of_a_cache_are_links_that_lead_out(loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path) -> None:
    (workflow / "block.py").rename(tmp_path / "blob")
    (workflow / "block.py").symlink_to(tmp_path / "blob")
    assert "block.py is a link that leads out of the directory; put a copy" in refused(loopback_hub, workflow)
    (workflow / "block.py").unlink()
    (workflow / "block.py").symlink_to("perflow_part.py")
    write_manifest(workflow, blocks="block.Blocks", mode="thin")
    push(loopback_hub, workflow)


def test_the_token_in_use_is_found_whatever_it_looks_like(loopback_hub: LoopbackHub, workflow: Path) -> None:
    write_workflow(workflow, {**CONTENT, "notes.bin": b"\0\0 " + loopback_hub.token.encode()})
    text = refused(loopback_hub, workflow)
    assert "notes.bin: line 1 holds what looks like the token that is in use (loo...)" in text
    assert loopback_hub.token not in text


@pytest.mark.parametrize("repo_id", ["workflow", "a/b/c", "some one/workflow", "someone/", "someone/work..flow"])
def test_names_of_no_repository(loopback_hub: LoopbackHub, workflow: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="pass owner/name") as caught:
        perflow_blocks.push_workflow(workflow, repo_id, token=loopback_hub.token, endpoint=loopback_hub.endpoint)
    assert repr(repo_id) in str(caught.value) and loopback_hub.requests == []


def test_a_token_is_needed_and_never_repeated(loopback_hub: LoopbackHub, workflow: Path) -> None:
    assert "no token for the Hub was found; run `hf auth login`" in refused(loopback_hub, workflow, token=None)
    for token in (f"{SECRET}\nx", f"{SECRET} x", f"{SECRET}é"):
        text = refused(loopback_hub, workflow, token=token)
        assert "the token holds spaces" in text and SECRET not in text


def findings(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(private_content(path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('path = "/home/me/x.txt"', "/home/me"),
        ("see /Users/me/x.txt.", "/Users/me"),
        ("(/root/.cache/x.txt)", "/root/.cache"),
        ("PATH=/bin:/home/me/x.txt", "/home/me"),
        ('open("C:\\\\Users\\\\me\\\\x.txt")', "C:\\\\Users\\\\me"),
        ("https://host/home/me/x and https://host/Users/me", None),
        ("a/home/me, ./home/me, ~/home/me", None),
        ("/home/ alone, /homeward/bound, /rooted/x", None),
        (f"x{SECRET}", None),
        ("def hf_hub_download_with_a_very_long_name_indeed(): ...", None),
    ],
)
def test_paths_of_users_are_found(tmp_path: Path, text: str, found: str | None) -> None:
    for name in ("a.py", "a.json"):
        expected = [] if found is None else [f"line 3 names the path {found}"]
        assert findings(tmp_path / name, f"\n\n{text}\n".encode()) == expected


def test_of_weights_the_metadata_are_read(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"base_model": "/home/me/sdxl", "token": SECRET}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"/home/me/x"
    assert findings(tmp_path / "a.safetensors", content) == [
        "names the path /home/me",
        "holds what looks like a Hugging Face token (hf_...)",
    ]
    assert findings(tmp_path / "b.safetensors", b"\xff" * 20) == findings(tmp_path / "empty", b"") == []


@pytest.mark.parametrize(
    "secret",
    [SECRET, "ghp_" + "a1" * 18, "github_pat_" + "a" * 60, "AKIA" + "A1" * 8, "-----BEGIN RSA PRIVATE KEY-----"],
)
def test_tokens_are_found_in_every_kind_of_file(tmp_path: Path, secret: str) -> None:
    for name in ("a.py", "vocab.json", "a.bin"):
        (found,) = findings(tmp_path / name, b'\0 "' + secret.encode() + b'"')
        assert "holds what looks like a" in found and secret not in found


def test_what_the_package_itself_publishes_holds_nothing_private() -> None:
    package = Path(perflow_blocks.__file__).parent
    files = [*package.rglob("*.py"), *(path for path in (package / "demo" / "weights").rglob("*") if path.is_file())]
    assert len(files) > 100
    ours = package / "hub" / "publishable.py"  # which names what it looks for
    assert {path: found for path in files if path != ours and (found := list(private_content(path)))} == {}
