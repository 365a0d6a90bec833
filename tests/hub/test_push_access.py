"""What `push_workflow` says when the Hub refuses, and `perflow push`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perflow_blocks.hub.errors import explained
from tests.hub.conftest import CONTENT, REPO, files_of, push, write_workflow
from tests.hub.loopback.server import LoopbackHub

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return write_workflow(tmp_path / "workflow", CONTENT)


@pytest.fixture
def ours(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The loopback Hub where huggingface_hub looks by default, with the token it finds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", loopback_hub.endpoint)
    template = f"{loopback_hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    return loopback_hub


def test_who_may_not_write_is_told_so(loopback_hub: LoopbackHub, workflow: Path) -> None:
    hub = loopback_hub
    for token in (hub.other_token, hub.read_token):  # a new repository, then one that is there
        with pytest.raises(ValueError, match=r"the token may not do this with someone/workflow .*pass one that may"):
            push(hub, workflow, token=token)
    assert hub.repositories == {}
    hub.create(REPO)
    with pytest.raises(ValueError, match=r"the token may not do this .*rights to write"):
        push(hub, workflow, token=hub.other_token)
    with pytest.raises(ValueError, match="the Hub does not accept the token; run `hf auth login`") as caught:
        push(hub, workflow, token="loopback-nobody")
    assert "loopback-nobody" not in str(caught.value) and caught.value.__cause__ is not None
    assert hub.files(REPO) == {} and not hub.asked("PUT /lfs/")


def test_private_repositories_of_others_are_as_missing(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.create(REPO, private=True)
    with pytest.raises(ValueError, match=r"the token may not do this with someone/workflow"):
        push(loopback_hub, workflow, token=loopback_hub.other_token)
    with pytest.raises(ValueError, match="does not exist, and a pull request needs a repository"):
        push(loopback_hub, workflow, token=loopback_hub.other_token, create_pr=True)


def test_a_gated_workflow_is_read_by_who_was_let_in(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.create(REPO, workflow, gated=True)
    with pytest.raises(ValueError, match=f"{REPO} is gated; ask for access at {loopback_hub.endpoint}/{REPO}"):
        push(loopback_hub, workflow, token=loopback_hub.other_token, create_pr=True)
    loopback_hub.repositories[REPO].granted.add("other")
    assert push(loopback_hub, workflow, token=loopback_hub.other_token, create_pr=True).up_to_date
    loopback_hub.fault("GET /api/models/", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(ValueError, match="is gated"):  # and not taken for one that has to be made
        push(loopback_hub, workflow, token=loopback_hub.other_token)
    assert not loopback_hub.asked("POST /api/repos/create")


def test_only_branches_and_pull_requests_are_pushed_to(loopback_hub: LoopbackHub, workflow: Path) -> None:
    with pytest.raises(ValueError, match="does not exist, and the branch next would be in a repository"):
        push(loopback_hub, workflow, revision="next")
    sha = loopback_hub.create(REPO)
    loopback_hub.tag(REPO, "v1")
    for revision in ("next", "v1", sha, "refs/pr/7"):
        with pytest.raises(ValueError, match=f"{REPO} has no branch {revision}; pass one of main"):
            push(loopback_hub, workflow, revision=revision)
    with pytest.raises(ValueError, match="revision refs/pr/1 is a pull request; leave create_pr out"):
        push(loopback_hub, workflow, revision="refs/pr/1", create_pr=True)
    assert loopback_hub.files(REPO) == {} and not loopback_hub.asked("POST")


def test_a_card_that_the_hub_refuses_stops_the_upload(loopback_hub: LoopbackHub, workflow: Path) -> None:
    write_workflow(workflow, {**CONTENT, "README.md": b"---\nlicense: [mit\n---\n"})
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        push(loopback_hub, workflow)
    assert loopback_hub.files(REPO) == {} and not loopback_hub.asked("PUT /lfs/")


def test_where_nobody_answers(workflow: Path, loopback_hub: LoopbackHub) -> None:
    with LoopbackHub() as gone:
        pass
    with pytest.raises(ConnectionError, match=rf"the connection to {gone.endpoint} failed .*try again"):
        push(loopback_hub, workflow, endpoint=gone.endpoint)
    loopback_hub.fault("GET /api/models/", status=502, times=None)
    with pytest.raises(ConnectionError, match="the Hub failed with status 502"):
        push(loopback_hub, workflow)


def test_an_answer_that_is_no_hub_s(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.fault("POST /api/validate-yaml", cut_download=0)
    with pytest.raises(ConnectionError, match=r"the connection to .* failed"):
        push(loopback_hub, workflow)


def test_errors_of_the_transfer_library_are_explained_and_others_left_alone() -> None:
    for error, kind in (
        (PermissionError("no access"), ValueError),
        (ConnectionError("no route"), ConnectionError),
        (PermissionError(13, "denied", "/local/file"), PermissionError),
        (FileNotFoundError(2, "missing", "/local/file"), FileNotFoundError),
        (RuntimeError("a defect"), RuntimeError),
    ):
        with pytest.raises(kind) as caught, explained(REPO, "http://hub"):
            raise error
        assert (caught.value is error) == (kind not in (ValueError, ConnectionError))


def test_the_command_publishes_and_says_where(ours: LoopbackHub, workflow: Path, run: Run) -> None:
    status, out, err = run("push", workflow, REPO, "--dry-run", "--private")
    assert status == 0, err
    assert "nothing was uploaded (--dry-run)" in out and ours.repositories == {}
    status, out, err = run("push", workflow, REPO, "--private", "-m", "First")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["file", "bytes"] and lines[-1] == f"{ours.endpoint}/{REPO}"
    size = f"{len(CONTENT['unet/first.safetensors']):,}"
    assert ["unet/first.safetensors", size, "new"] in [line.split() for line in lines]
    assert ours.head(REPO) in out and ours.repositories[REPO].private
    assert ours.files(REPO) == files_of(workflow)
    assert f"{REPO} is up to date" in run("push", workflow, REPO)[1]
    (workflow / "README.md").unlink()
    write_workflow(workflow, {name: content for name, content in CONTENT.items() if name != "README.md"})
    status, out, err = run("push", workflow, REPO, "--create-pr", "--token", ours.token)
    assert status == 0, err
    assert out.splitlines()[-1] == f"{ours.endpoint}/{REPO}/discussions/1"
    assert ["README.md", "0", "deleted"] in [line.split() for line in out.splitlines()]
    assert "README.md" in ours.files(REPO) and "README.md" not in ours.files(REPO, "refs/pr/1")
    assert ours.token not in out + err


def test_the_command_s_mistakes_are_one_line(ours: LoopbackHub, workflow: Path, run: Run) -> None:
    ours.create(REPO)
    for arguments, message in (
        ((workflow, "name"), "'name' names no owner; pass owner/name"),
        ((workflow / "unet", REPO), "holds no perflow_manifest.json"),
        ((workflow, REPO, "--token", "loopback-nobody"), "the Hub does not accept the token"),
        ((workflow, REPO, "--revision", "next"), f"{REPO} has no branch next"),
        ((workflow,), "Missing argument"),
    ):
        status, out, err = run("push", *arguments)
        assert (status, out) == (2, "") and message in err.splitlines()[-1]
        assert "loopback-nobody" not in err
    (workflow / "block.py").write_bytes(b"other")
    (workflow / "extra.txt").write_bytes(b"other")
    status, _, err = run("push", workflow, REPO)
    assert status == 2 and len(err.splitlines()) == 1
    assert "1 changed (block.py)" in err and "extra.txt is not in the manifest" in err
