"""`push_workflow` and `perflow push`, against the loopback Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import RevisionNotFoundError

from perflow_blocks import push_workflow
from perflow_blocks.hub.push import PushReport
from tests.hub.loopback import Files, LoopbackHub

REPO = "someone/workflow"
UNET = '{"unet": ["diffusers", "UNet", {"pretrained_model_name_or_path": %s, "subfolder": "unet", "revision": null}]}'
CARD = b'---\nlicense: mit\n---\npipe = load_workflow("%s", trust_remote_code=True)\n'
CONTENT = {
    "README.md": CARD % b"your-name/workflow",
    "block.py": b"from .perflow_part import Blocks\n",
    "mellon_pipeline_config.json": b'{"label": "Mine", "default_repo": ""}',
    "modular_config.json": b'{"auto_map": {"ModularPipelineBlocks": "block.Blocks"}}\n',
    "modular_model_index.json": UNET.replace("%s", "null").encode(),
    "perflow_part.py": b"class Blocks: ...\n",
    "unet/first.safetensors": b"\2\0\0\0\0\0\0\0{}" + bytes(range(256)) * 40,
    "unet/second.safetensors": b"\2\0\0\0\0\0\0\0{}" + bytes(range(255)) * 80,
}
SECRET = "hf_" + "Abcdefghij" * 3 + "1234"

Run = Callable[..., tuple[int, str, str]]


def write(directory: Path, content: Files) -> Path:
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def push(hub: LoopbackHub, directory: Path, repo_id: str = REPO, **options: Any) -> PushReport:
    return push_workflow(directory, repo_id, **{"endpoint": hub.endpoint, "token": hub.token, **options})


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        push(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return write(tmp_path / "workflow", CONTENT)


def test_what_is_pushed_comes_back_and_names_the_repository(loopback_hub: LoopbackHub, workflow: Path) -> None:
    report = push(loopback_hub, workflow)
    assert (report.url, report.commit) == (f"{loopback_hub.endpoint}/{REPO}", loopback_hub.head(REPO))
    files = loopback_hub.files(REPO)
    assert report.files == {path: len(content) for path, content in files.items()}
    named = {"README.md", "mellon_pipeline_config.json", "modular_model_index.json"}
    assert {path for path in CONTENT if files[path] != CONTENT[path]} == named
    assert json.loads(files["modular_model_index.json"]) == json.loads(UNET.replace("%s", f'"{REPO}"'))
    assert json.loads(files["mellon_pipeline_config.json"]) == {"label": "Mine", "default_repo": REPO}
    assert files["README.md"] == CARD % REPO.encode()
    assert all((workflow / path).read_bytes() == content for path, content in CONTENT.items())


def test_code_and_weights_of_an_earlier_push_do_not_stay(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.create(REPO, {"mine.txt": b"by hand", "perflow_old.py": b"", "unet/old.safetensors.index.json": b""})
    push(loopback_hub, workflow)
    (workflow / "unet" / "second.safetensors").unlink()
    other = UNET.replace("%s", '"owner/base"').replace('"subfolder": "unet"', '"subfolder": "vae"')
    index = json.loads(other)  # weights of another repository stay its own
    (workflow / "modular_model_index.json").write_text(json.dumps(index))
    push(loopback_hub, workflow)
    assert loopback_hub.files(REPO).keys() == CONTENT.keys() - {"unet/second.safetensors"} | {"mine.txt"}
    assert json.loads(loopback_hub.files(REPO)["modular_model_index.json"]) == index


def test_branches_and_pull_requests_leave_main_alone(loopback_hub: LoopbackHub, workflow: Path) -> None:
    there = {"README.md": b"by hand"}
    sha = loopback_hub.create(REPO, there)
    loopback_hub.repositories[REPO].refs["next"] = sha
    request = push(loopback_hub, workflow, create_pr=True, token=loopback_hub.other_token)
    assert request.url == f"{loopback_hub.endpoint}/{REPO}/discussions/1"
    branch = push(loopback_hub, workflow, revision="next")
    assert branch.url == f"{loopback_hub.endpoint}/{REPO}/tree/next"
    push(loopback_hub, workflow, revision="refs/pr/1")
    assert loopback_hub.files(REPO) == there
    for revision in ("refs/pr/1", "next"):
        assert loopback_hub.files(REPO, revision).keys() == CONTENT.keys()
    with pytest.raises(RevisionNotFoundError):
        push(loopback_hub, workflow, revision="absent")


def test_a_dry_run_lists_the_files_without_a_network(loopback_hub: LoopbackHub, workflow: Path) -> None:
    report = push(loopback_hub, workflow, dry_run=True, token=None)
    assert report.commit is None and loopback_hub.requests == []
    assert report.files == push(loopback_hub, workflow).files


def test_a_private_repository_is_made_and_a_public_one_refused(loopback_hub: LoopbackHub, workflow: Path) -> None:
    for _ in range(2):
        push(loopback_hub, workflow, private=True)
    assert loopback_hub.repositories[REPO].private
    loopback_hub.create("someone/public")
    assert "exists and is public" in refused(loopback_hub, workflow, "someone/public", private=True)
    assert loopback_hub.files("someone/public") == {}


def test_what_the_hub_does_not_allow_is_one_line(loopback_hub: LoopbackHub, workflow: Path) -> None:
    hub = loopback_hub
    for options in ({"create_pr": True}, {"revision": "next"}):
        assert "someone/workflow does not exist" in refused(hub, workflow, **options)
    assert hub.repositories == {}
    for prepare in (dict, lambda: hub.create(REPO)):  # a new repository, then one that is there
        prepare()
        for token in (hub.other_token, hub.reader):
            assert "may not write to someone/workflow" in refused(hub, workflow, token=token)
    assert "does not accept the token" in refused(hub, workflow, token="loopback-nobody")
    assert "no token for the Hub was found; run `hf auth login`" in refused(hub, workflow, token=None)
    text = refused(hub, workflow, token=f"{SECRET}\nx")
    assert "no token" in text and SECRET not in text
    for repo_id in ("workflow", "a/b/c", "some one/workflow"):
        assert repo_id in refused(hub, workflow, repo_id)
    assert hub.files(REPO) == {}


def test_private_files_tokens_and_links_are_named_all_at_once(
    loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path
) -> None:
    header = json.dumps({"__metadata__": {"token": SECRET}}).encode()
    private = [".env", ".env.local", ".npmrc", ".pypirc", "sub/.git-credentials", ".aws/credentials", ".ssh/x"]
    private += ["a.pem", "a.key", "id_rsa"]
    tokens = {
        "line 2": [SECRET, "ghp_" + "a1" * 18, "github_pat_" + "a" * 60, "ASIA" + "A1" * 8, "sk-" + "a1" * 20],
        "line 1": ["-----BEGIN RSA PRIVATE KEY-----", "npm_" + "a1" * 18],
    }
    texts = [(line, secret) for line, secrets in tokens.items() for secret in secrets]
    write(workflow, dict.fromkeys(private, b"x"))
    write(workflow, {f"{i}.txt": b"\n" * (line == "line 2") + text.encode() for i, (line, text) in enumerate(texts)})
    write(workflow, {"unet/first.safetensors": len(header).to_bytes(8, "little") + header})
    (workflow / "linked.txt").symlink_to(write(tmp_path / "other", {"x": b""}) / "x")
    (workflow / "folder").symlink_to(tmp_path / "other")
    text = refused(loopback_hub, workflow)
    for path in private:
        assert f"- {path} is a private file" in text
    for number, (line, secret) in enumerate(texts):
        assert f"- {number}.txt holds what looks like a" in text and f"in {line}; take it out" in text
        assert secret not in text
    assert "- unet/first.safetensors holds what looks like a Hugging Face token in the metadata" in text
    assert "- linked.txt is a link that leads elsewhere" in text and "- folder is a link" in text
    assert len(text.splitlines()) == 1 + len(private) + len(texts) + 3
    assert loopback_hub.requests == []


def test_what_is_no_secret_is_pushed_and_caches_are_left_out(loopback_hub: LoopbackHub, workflow: Path) -> None:
    left_out = [".git/config", ".cache/x", "__pycache__/a.pyc", ".ipynb_checkpoints/x", ".DS_Store", ".gitattributes"]
    write(workflow, dict.fromkeys(left_out, SECRET.encode()))
    harmless = f"x{SECRET} def hf_hub_download_with_a_very_long_name_indeed(): ... #sk-a-heading-with-a-very-long-name"
    write(workflow, {"notes.md": harmless.encode(), "image.png": b"\0\0 " + SECRET.encode()})
    (workflow / "again.md").symlink_to("notes.md")
    push(loopback_hub, workflow)
    assert loopback_hub.files(REPO).keys() == CONTENT.keys() | {"notes.md", "image.png", "again.md"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modular_config.json", None, "is not a workflow: it has no modular_config.json"),
        ("block.py", None, "has no block.py, which its modular_config.json names"),
        ("modular_config.json", b'{"auto_map": 5}', "must name the blocks"),
        ("modular_config.json", b'{"auto_map": {"ModularPipelineBlocks": "/x/block.Blocks"}}', "must name the blocks"),
        ("modular_model_index.json", UNET.replace("%s", '"/data/unet"').replace('"unet"', '"x"').encode(), "/data/un"),
    ],
)
def test_a_directory_that_others_cannot_load_is_refused(
    loopback_hub: LoopbackHub, workflow: Path, name: str, content: bytes | None, message: str
) -> None:
    (workflow / name).unlink() if content is None else (workflow / name).write_bytes(content)
    assert message in refused(loopback_hub, workflow)
    assert loopback_hub.requests == []


def test_the_command(loopback_hub: LoopbackHub, workflow: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", loopback_hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    status, out, _ = run("push", workflow, REPO, "--dry-run", "--private")
    assert status == 0 and "nothing was uploaded (--dry-run)" in out and loopback_hub.repositories == {}
    status, out, _ = run("push", workflow, REPO, "--private", "-m", "First")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["file", "bytes"] and lines[-1] == f"{loopback_hub.endpoint}/{REPO}"
    size = f"{len(CONTENT['unet/first.safetensors']):,}"
    assert ["unet/first.safetensors", size] in [line.split() for line in lines]
    assert loopback_hub.head(REPO) in out and loopback_hub.repositories[REPO].private
    status, out, err = run("push", workflow, "name", "--token", loopback_hub.token)
    assert (status, out) == (2, "") and "pass owner/name" in err and len(err.splitlines()) == 1
