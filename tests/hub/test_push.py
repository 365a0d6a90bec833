"""`push_workflow`: what is published is what was there, in one commit, and it comes back byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from perflow_blocks import push_workflow
from perflow_blocks.hub.manifest import MANIFEST, verify_manifest, write_manifest
from perflow_blocks.hub.publish import PushReport
from tests.hub.conftest import CONTENT, REPO, changes, download, files_of, push, write_workflow
from tests.hub.loopback.repository import StoredFile
from tests.hub.loopback.server import LoopbackHub


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return write_workflow(tmp_path / "workflow", CONTENT)


def test_a_snapshot_of_what_was_pushed_is_equal(loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path) -> None:
    report = push(loopback_hub, workflow)
    assert changes(report) == dict.fromkeys([*CONTENT, MANIFEST], "new")
    sizes = {file.path: file.size for file in report.files}
    assert sizes == {path: len(content) for path, content in files_of(workflow).items()}
    assert report.total_bytes == report.uploaded_bytes == sum(sizes.values())
    assert (report.url, report.commit) == (f"{loopback_hub.endpoint}/{REPO}", loopback_hub.head(REPO))
    assert len(loopback_hub.asked("POST .*/commit/")) == 1
    assert len(loopback_hub.asked("PUT /lfs/")) == 2

    snapshot = download(loopback_hub, tmp_path / "cache")
    assert files_of(snapshot) == files_of(workflow)
    verify_manifest(snapshot, weights=True)
    asked = len(loopback_hub.requests)
    assert snapshot_download(REPO, cache_dir=tmp_path / "cache", local_files_only=True) == snapshot
    verify_manifest(snapshot, weights=True)
    assert len(loopback_hub.requests) == asked


def test_what_is_pushed_names_the_repository_and_the_directory_stays(
    loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    """Also to another repository than the export was for; a dry run says nothing else than the push does."""
    unet = b'["diffusers", "UNet", {"pretrained_model_name_or_path": %s, "subfolder": "unet"}]'
    card = b'pipe = load_workflow("%s", trust_remote_code=True)\n'
    content = {
        **CONTENT,
        "modular_model_index.json": b'{"unet": ' + unet % b'"someone/first"' + b"}\n",
        "mellon_pipeline_config.json": b'{"label": "Mine", "default_repo": "someone/first"}\n',
        "README.md": card % b"someone/first",
    }
    directory = write_workflow(tmp_path / "workflow", content)
    before = files_of(directory)
    for repo_id in ("someone/first", "someone/second"):
        planned = push_to(loopback_hub, directory, repo_id, dry_run=True)
        done = push_to(loopback_hub, directory, repo_id)
        assert (planned.files, planned.total_bytes) == (done.files, done.total_bytes)
        assert files_of(directory) == before
        published = loopback_hub.files(repo_id)
        index = json.loads(published["modular_model_index.json"])
        assert index["unet"][2]["pretrained_model_name_or_path"] == repo_id
        assert json.loads(published["mellon_pipeline_config.json"])["default_repo"] == repo_id
        assert published["README.md"] == card % repo_id.encode()
        verify_manifest(write_files(tmp_path / repo_id, published), weights=True)
        for options in ({"dry_run": True}, {}):
            again = push_to(loopback_hub, directory, repo_id, **options)
            assert again.up_to_date and again.commit == done.commit
    assert loopback_hub.files("someone/first") == before


def push_to(hub: LoopbackHub, directory: Path, repo_id: str, **options: Any) -> PushReport:
    return push_workflow(directory, repo_id, endpoint=hub.endpoint, token=hub.token, **options)


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_nothing_new_is_no_commit(loopback_hub: LoopbackHub, workflow: Path) -> None:
    first = push(loopback_hub, workflow)
    asked = len(loopback_hub.asked("POST"))
    again = push(loopback_hub, workflow)
    assert again.up_to_date and not first.up_to_date
    assert (again.commit, again.uploaded_bytes) == (first.commit, 0)
    assert len(loopback_hub.asked("POST")) == asked


def test_a_later_workflow_takes_the_place_of_the_former(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.create(REPO, {"mine.txt": b"by hand", "perflow_mine.py": b"by hand", "README.md": b"by hand"})
    first = push(loopback_hub, workflow)
    assert changes(first)["README.md"] == "changed"
    (workflow / "perflow_part.py").rename(workflow / "perflow_other.py")
    (workflow / "block.py").write_bytes(b"from .perflow_other import Blocks\n")
    (workflow / "unet" / "second.safetensors").unlink()
    (workflow / "unet" / "first.safetensors").write_bytes(CONTENT["unet/first.safetensors"][:-1] + b"x")
    write_manifest(workflow, blocks="block.Blocks", mode="self-contained")
    second = push(loopback_hub, workflow)
    assert changes(second) == {
        "block.py": "changed",
        MANIFEST: "changed",
        "perflow_other.py": "new",
        "perflow_part.py": "deleted",
        "unet/first.safetensors": "changed",
        "unet/second.safetensors": "deleted",
    }
    assert len(loopback_hub.asked("POST .*/commit/")) == 2
    kept = {"mine.txt": b"by hand", "perflow_mine.py": b"by hand"}
    assert loopback_hub.files(REPO) == {**files_of(workflow), **kept}
    assert first.commit is not None
    assert loopback_hub.files(REPO, first.commit)["perflow_part.py"] == CONTENT["perflow_part.py"]


def test_what_a_broken_manifest_names_is_not_deleted(loopback_hub: LoopbackHub, workflow: Path) -> None:
    there = {"old.py": b"", MANIFEST: b'{"files": {"old.py": {}}}'}
    loopback_hub.create(REPO, there)
    assert changes(push(loopback_hub, workflow))[MANIFEST] == "changed"
    assert loopback_hub.files(REPO) == {**files_of(workflow), "old.py": b""}


def test_every_revision_can_be_loaded(loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path) -> None:
    first, before = push(loopback_hub, workflow), files_of(workflow)
    loopback_hub.tag(REPO, "v1")
    loopback_hub.branch(REPO, "next")
    (workflow / "block.py").write_bytes(b"# second\n")
    write_manifest(workflow, blocks="block.Blocks", mode="self-contained")
    second = push(loopback_hub, workflow, revision="next", commit_message="On a branch")
    assert second.url == f"{loopback_hub.endpoint}/{REPO}/tree/next"
    assert loopback_hub.repositories[REPO].commits[str(second.commit)].message == "On a branch"
    wanted = {"main": before, "v1": before, first.commit: before, "next": files_of(workflow)}
    for revision, files in wanted.items():
        snapshot = download(loopback_hub, tmp_path / "cache", revision)
        assert files_of(snapshot) == files
        verify_manifest(snapshot, weights=True)


def test_a_pull_request_leaves_main_alone(loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path) -> None:
    loopback_hub.create(REPO, {"README.md": b"by hand"})
    report = push(loopback_hub, workflow, create_pr=True, token=loopback_hub.other_token)
    assert report.url == f"{loopback_hub.endpoint}/{REPO}/discussions/1"
    assert loopback_hub.files(REPO) == {"README.md": b"by hand"}
    assert files_of(download(loopback_hub, tmp_path / "cache", "refs/pr/1")) == files_of(workflow)
    (workflow / "block.py").write_bytes(b"# improved\n")
    write_manifest(workflow, blocks="block.Blocks", mode="self-contained")
    again = push(loopback_hub, workflow, revision="refs/pr/1")
    assert changes(again) == {"block.py": "changed", MANIFEST: "changed"}
    assert loopback_hub.files(REPO, "refs/pr/1") == files_of(workflow)
    assert loopback_hub.files(REPO) == {"README.md": b"by hand"}


def test_a_dry_run_without_a_network_lists_the_files(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.fault(r"GET /api/models", times=None, status=503)
    report = push(loopback_hub, workflow, dry_run=True)
    assert report.dry_run and not report.compared and report.uploaded_bytes == report.total_bytes > 0
    assert {file.change for file in report.files} == {"new"}
    with pytest.raises(ConnectionError):
        push(loopback_hub, workflow)


def test_a_dry_run_only_says_what_would_be(loopback_hub: LoopbackHub, workflow: Path) -> None:
    report = push(loopback_hub, workflow, dry_run=True)
    assert report.dry_run and report.commit is None and report.uploaded_bytes == report.total_bytes
    assert changes(report) == dict.fromkeys([*CONTENT, MANIFEST], "new")
    assert loopback_hub.repositories == {}
    loopback_hub.create(REPO, {"block.py": CONTENT["block.py"], "README.md": b"by hand"})
    report = push_workflow(workflow, REPO, dry_run=True, endpoint=loopback_hub.endpoint)  # without a token
    assert "block.py" not in changes(report) and changes(report)["README.md"] == "changed"
    assert {request.line.split()[0] for request in loopback_hub.requests} == {"GET"}


def test_a_private_repository_is_made_private(loopback_hub: LoopbackHub, workflow: Path) -> None:
    push(loopback_hub, workflow, private=True)
    assert loopback_hub.repositories[REPO].private
    push(loopback_hub, workflow, private=True)
    loopback_hub.repositories[REPO].private = False
    with pytest.raises(ValueError, match="exists and is public; change that in its settings, or leave private out"):
        push(loopback_hub, workflow, private=True)


@pytest.mark.parametrize("part_size", [100_000_000, 4000])
def test_an_upload_that_breaks_off_is_completed(loopback_hub: LoopbackHub, workflow: Path, part_size: int) -> None:
    hub = loopback_hub
    hub.part_size = part_size
    first = verify_manifest(workflow).files["unet/first.safetensors"].sha256
    second = verify_manifest(workflow).files["unet/second.safetensors"].sha256
    hub.fault(f"PUT /lfs/.*{second}", cut_upload=3000, times=None)
    with pytest.raises(ConnectionError, match=r"the connection to .* failed .* are not sent again"):
        push(hub, workflow)
    assert hub.files(REPO) == {} and not hub.asked("POST .*/commit/")
    assert [request.received for request in hub.asked(f"PUT /lfs/.*{second}")] == [3000] * 6  # it tries for a while
    assert list(hub.repositories[REPO].storage) == [first]
    sent = len(hub.asked(f"PUT /lfs/.*{first}"))

    hub.mend()
    push(hub, workflow)
    assert len(hub.asked(f"PUT /lfs/.*{first}")) == sent
    assert hub.files(REPO) == files_of(workflow)
    assert len(hub.asked("POST .*/commit/")) == 1


def test_a_process_that_is_killed_leaves_nothing_half_done(
    loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path
) -> None:
    hub = loopback_hub
    second = verify_manifest(workflow).files["unet/second.safetensors"].sha256
    hub.fault(f"PUT /lfs/.*{second}", cut_upload=3000, times=None)
    command = [sys.executable, "-m", "perflow_blocks.cli", "push", str(workflow), REPO]
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pause = threading.Event()
        while not (hub.asked(f"PUT /lfs/.*{second}") and len(hub.repositories[REPO].storage) == 1):
            assert process.poll() is None, process.communicate()
            pause.wait(0.02)
        process.kill()
    assert hub.files(REPO) == {}
    hub.mend()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"{hub.endpoint}/{REPO}"
    assert hub.files(REPO) == files_of(workflow)
    finished = [request for request in hub.asked("PUT /lfs/") if request.status == 200]
    assert len(finished) == 2, "one that had arrived was sent again"


def test_a_commit_that_fails_changes_nothing(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.create(REPO, {"README.md": b"by hand"})
    loopback_hub.fault("POST .*/commit/", status=500)
    with pytest.raises(ConnectionError, match="the Hub failed with status 500"):
        push(loopback_hub, workflow)
    assert loopback_hub.files(REPO) == {"README.md": b"by hand"}
    push(loopback_hub, workflow)
    assert len(loopback_hub.asked("PUT /lfs/")) == 2  # by the first attempt
    assert loopback_hub.files(REPO) == files_of(workflow)


def test_a_busy_hub_is_waited_for(loopback_hub: LoopbackHub, workflow: Path) -> None:
    loopback_hub.fault("POST .*/preupload/", status=429, headers={"Retry-After": "1"})
    loopback_hub.fault("PUT /lfs/", status=503, times=2)
    push(loopback_hub, workflow)
    assert loopback_hub.files(REPO) == files_of(workflow)


def test_a_download_that_breaks_off_is_completed(
    loopback_hub: LoopbackHub, workflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    push(loopback_hub, workflow)
    loopback_hub.fault("GET .*/resolve/.*second", cut_download=0, times=None)
    with pytest.raises(Exception, match="closed connection"):
        download(loopback_hub, tmp_path / "cache")
    (snapshot,) = (tmp_path / "cache").glob("*/snapshots/*")
    with pytest.raises(ValueError, match=r"missing \(.*unet/second.safetensors"):
        verify_manifest(snapshot)
    loopback_hub.mend()
    loopback_hub.fault("GET .*/resolve/.*second", cut_download=5000)  # once: the client goes on from there by itself
    assert files_of(download(loopback_hub, tmp_path / "cache")) == files_of(workflow)
    assert loopback_hub.asked("GET .*/resolve/.*second")[-1].headers["range"] == "bytes=5000-"
    verify_manifest(snapshot, weights=True)


def test_a_push_between_comparison_and_commit_is_noticed(
    loopback_hub: LoopbackHub, workflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback_hub.create(REPO)
    usual = loopback_hub.is_large

    def is_large(path: str, size: int) -> bool:  # asked when the upload begins
        if loopback_hub.files(REPO) == {}:
            loopback_hub.repositories[REPO].commit({"between.txt": StoredFile(b"between", False)})
        return usual(path, size)

    monkeypatch.setattr(loopback_hub, "is_large", is_large)
    with pytest.raises(ValueError, match=r"changed by someone else meanwhile .* push again"):
        push(loopback_hub, workflow)
    assert loopback_hub.files(REPO) == {"between.txt": b"between"}


def test_a_file_that_the_hub_leaves_out_is_named(loopback_hub: LoopbackHub, workflow: Path) -> None:
    """As it does with what a repository's .gitignore names."""
    loopback_hub.create(REPO)
    loopback_hub.ignored = {"unet/first.safetensors"}
    with pytest.raises(ValueError, match=r"does not hold unet/first.safetensors as the manifest says"):
        push(loopback_hub, workflow)
