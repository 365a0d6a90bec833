"""The loopback Hub against huggingface_hub itself: what other tests rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.loopback.server import LoopbackHub

REPO = "someone/model"
WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}\n", "unet/weights.safetensors": WEIGHTS, "unet/deep/notes.txt": b"notes"}


@pytest.fixture
def api(loopback_hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=loopback_hub.endpoint, token=loopback_hub.token)


def add(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def download(hub: LoopbackHub, cache: Path, revision: str | None = None, token: str | None = None) -> dict[str, bytes]:
    """All files of a snapshot, but .gitattributes."""
    found = snapshot_download(
        REPO, revision=revision, cache_dir=cache, endpoint=hub.endpoint, token=token or hub.token, max_workers=1
    )
    files = {
        path.relative_to(found).as_posix(): path.read_bytes() for path in Path(found).rglob("*") if path.is_file()
    }
    del files[".gitattributes"]
    return files


def test_what_is_pushed_comes_back_at_every_revision(loopback_hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "someone"
    assert api.create_repo(REPO, private=True).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError):
        api.create_repo(REPO)
    assert api.model_info(REPO).private is True

    first = api.create_commit(REPO, add(FILES), commit_message="first").oid
    loopback_hub.tag(REPO, "v1")
    assert api.list_repo_refs(REPO).tags[0].name == "v1"
    changes = [*add({"config.json": b"[]"}), CommitOperationDelete("unet/deep/notes.txt")]
    second = api.create_commit(REPO, changes, commit_message="second").oid
    request = api.create_commit(REPO, add({"new.txt": b"new"}), commit_message="third", create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")

    now = {"config.json": b"[]", "unet/weights.safetensors": WEIGHTS}
    assert loopback_hub.files(REPO) == now
    wanted = {first: FILES, "v1": FILES, second: now, "main": now, "refs/pr/1": {**now, "new.txt": b"new"}}
    for revision, files in wanted.items():
        assert download(loopback_hub, tmp_path, revision) == files
        assert sorted(sibling.rfilename for sibling in api.model_info(REPO, revision=revision).siblings or []) == [
            ".gitattributes",
            *sorted(files),
        ]
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["second", "first", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, add({"x": b"x"}), commit_message="late", parent_commit=first)


@pytest.mark.parametrize("part_size", [100_000_000, 3000])
def test_large_files_are_stored_apart_once(loopback_hub: LoopbackHub, api: HfApi, part_size: int) -> None:
    loopback_hub.create(REPO)
    loopback_hub.part_size = part_size
    for name in ("a.safetensors", "b.safetensors"):
        api.create_commit(REPO, add({name: WEIGHTS}), commit_message=name)
    assert len(loopback_hub.asked("PUT /lfs/")) == -(-len(WEIGHTS) // part_size)
    assert loopback_hub.files(REPO) == {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}
    listed = {entry.path: entry for entry in api.get_paths_info(REPO, ["a.safetensors", ".gitattributes", "nothing"])}
    assert sorted(listed) == [".gitattributes", "a.safetensors"]
    assert listed["a.safetensors"].lfs.size == len(WEIGHTS) and listed[".gitattributes"].lfs is None


def test_trees_are_listed_by_folder_and_by_page(loopback_hub: LoopbackHub, api: HfApi) -> None:
    loopback_hub.create(REPO, FILES)
    loopback_hub.page_size = 2
    every = [".gitattributes", "config.json", "unet", "unet/deep", "unet/deep/notes.txt", "unet/weights.safetensors"]
    assert sorted(entry.path for entry in api.list_repo_tree(REPO, recursive=True)) == every
    assert sorted(entry.path for entry in api.list_repo_tree(REPO)) == [".gitattributes", "config.json", "unet"]
    below = sorted(entry.path for entry in api.list_repo_tree(REPO, "unet"))
    assert below == ["unet/deep", "unet/weights.safetensors"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing"))


def test_nobody_sees_more_than_he_may(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    hub = loopback_hub
    hub.create(REPO, FILES, private=True)
    strangers: tuple[str | bool, ...] = (hub.other_token, False)
    for token in strangers:
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).model_info(REPO)
    hub.create(REPO, FILES, gated=True)
    for number, token in enumerate(strangers):
        HfApi(endpoint=hub.endpoint, token=token).model_info(REPO)
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "config.json", cache_dir=tmp_path / str(number), endpoint=hub.endpoint, token=token)
    hub.repositories[REPO].granted.add("other")
    assert download(hub, tmp_path / "granted", token=hub.other_token) == FILES
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.endpoint, token="unknown").model_info(REPO)
    for writer in (hub.other_token, hub.read_token):
        with pytest.raises(HfHubHTTPError, match="rights to write"):
            HfApi(endpoint=hub.endpoint, token=writer).create_commit(REPO, add(FILES), commit_message="not mine")


def test_what_is_not_there_is_said_to_be_missing(loopback_hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    loopback_hub.create(REPO, FILES)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.json", cache_dir=tmp_path)


def test_faults_come_as_often_as_asked_for(
    loopback_hub: LoopbackHub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = loopback_hub
    hub.create(REPO, FILES)
    hub.fault(r"PUT /lfs/", cut_upload=5000)
    hub.fault(r"POST .*/preupload/", status=503)
    hub.fault(r"POST .*/preupload/", status=429, headers={"Retry-After": "7"})
    api.create_commit(REPO, add({"new.safetensors": WEIGHTS[1:]}), commit_message="with trouble")
    assert [request.received for request in hub.asked("PUT /lfs/")] == [5000, len(WEIGHTS) - 1]
    assert [request.status for request in hub.asked("preupload")] == [503, 429, 200]

    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is not a whole one is lost
    hub.fault(r"GET .*/weights.safetensors", cut_download=4000)
    assert download(hub, tmp_path / "cut") == {**FILES, "new.safetensors": WEIGHTS[1:]}
    assert [request.headers.get("range") for request in hub.asked("GET .*/weights")] == [None, "bytes=4000-"]

    hub.fault("POST .*/commit/", status=500, times=None)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.create_commit(REPO, add({"x": b"x"}), commit_message="refused")
    hub.mend()
    api.create_commit(REPO, add({"x": b"x"}), commit_message="accepted")
    assert hub.files(REPO)["x"] == b"x"


def test_a_process_of_its_own_finds_it_by_its_environment(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    """The clients that know the endpoint and the token from the environment alone, such as diffusers."""
    loopback_hub.create(REPO, FILES, private=True)
    code = (
        "from huggingface_hub import HfApi, snapshot_download\n"
        f"print(snapshot_download({REPO!r}))\n"
        f"HfApi().upload_file(path_or_fileobj=b'1', path_in_repo='more.safetensors', repo_id={REPO!r})\n"
    )
    environment = loopback_hub.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").read_bytes() == FILES["config.json"]
    assert loopback_hub.files(REPO) == {**FILES, "more.safetensors": b"1"}
