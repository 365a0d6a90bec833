"""Batches of every kind of data: exact positions, processes, workers, and samples that turn out bad."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from perflow_blocks.training.config import DataConfig
from perflow_blocks.training.data import BatchSource, open_dataset, open_rows
from tests.training.conftest import (
    SHAPES,
    assert_same,
    encoded,
    make_folder,
    make_shards,
    numbers,
    picture,
    small,
    take,
    truncated,
    write_lines,
    write_shard,
)

FEATURES = Features({"picture": Image(), "label": Value("int64"), "text": Value("string")})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 24 images: in a folder, in shards, in parquet files; and prompts."""
    root = tmp_path_factory.mktemp("data")
    make_folder(root / "folder")
    (root / "prompts.txt").write_text("".join(f"number {number}\n" for number in range(11)))
    images = [{"bytes": encoded(picture(n, SHAPES[n % len(SHAPES)])), "path": None} for n in range(24)]
    rows = {"picture": images, "label": list(range(24)), "text": [f"number {n}" for n in range(24)]}
    dataset = Dataset.from_dict(rows, features=FEATURES)
    dataset.to_parquet(root / "one.parquet")
    for number in range(4):
        dataset.shard(4, number).to_parquet(root / "many" / f"train-{number}.parquet")
    shards = Path(make_shards(root / "shards"))
    return {"folder": root / "folder", "prompts": root / "prompts.txt", "webdataset": shards, "root": root}


KINDS = {
    "folder": ("folder", "folder"),
    "prompts": ("prompts", "prompts"),
    "table": ("datasets", "one.parquet"),
    "stream": ("datasets", "many"),
    "webdataset": ("webdataset", "webdataset"),
    "demo": ("demo", None),
}


def config_of(name: str, paths: dict[str, Path], **changes: Any) -> DataConfig:
    kind, where = KINDS[name]
    path = None if where is None else paths.get(where, paths["root"] / where)
    settings = {"random_flip": True, "shuffle_buffer": 8, "max_samples": 13 if name == "demo" else None}
    return small(kind, path, streaming=name == "stream", **{**settings, **changes})


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, paths: dict[str, Path]) -> DataConfig:
    return config_of(request.param, paths)


def opened(config: DataConfig, batch_size: int = 3, seed: int = 5, **processes: int) -> BatchSource:
    return open_dataset(config, batch_size=batch_size, seed=seed, **processes)


def saved(source: BatchSource) -> dict[str, Any]:
    return json.loads(json.dumps(source.state_dict()))


def epochs(source: BatchSource, count: int) -> list[list[int]]:
    """The numbers in the captions of whole epochs."""
    found: list[list[int]] = [[] for _ in range(count)]
    for task in source._tasks():
        batch, _, (epoch, _) = source[task]
        if epoch >= count:
            break
        found[epoch] += numbers([batch] if batch is not None else [])
    return found


def test_a_resumed_run_gets_the_batches_of_the_unbroken_one_with_any_workers(config: DataConfig) -> None:
    unbroken = take(opened(config), 23)
    for done, workers, later in ((0, 0, 0), (3, 2, 0), (8, 0, 1), (17, 0, 0)):
        source = opened(config.model_copy(update={"num_workers": workers}))
        assert_same(take(source, done), unbroken[:done])
        resumed = opened(config.model_copy(update={"num_workers": later}))
        resumed.load_state_dict(saved(source))
        assert_same(take(resumed, 6), unbroken[done : done + 6])
    assert_same(take(source, 3), unbroken[17:20])  # a second iterator goes on too


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_resumes_where_it_was(config: DataConfig, count: int) -> None:
    for index in range(count):
        processes = {"process_index": index, "num_processes": count}
        unbroken = take(opened(config, 2, **processes), 9)
        source = opened(config, 2, **processes)
        take(source, 5)
        resumed = opened(config, 2, **processes)
        resumed.load_state_dict(saved(source))
        assert_same(take(resumed, 4), unbroken[5:])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", ["folder", "table", "stream", "webdataset"])
def test_processes_share_an_epoch_without_overlap(name: str, count: int, paths: dict[str, Path]) -> None:
    for most in (None, 15):
        config = config_of(name, paths, max_samples=most)
        parts = [epochs(opened(config, 1, process_index=index, num_processes=count), 2) for index in range(count)]
        for epoch in range(2):
            drawn = [number for part in parts for number in part[epoch]]
            assert len(drawn) == len(set(drawn)) >= (most or 24) // count * count
            assert len(drawn) <= (most or 24) and (name in ("stream", "webdataset") or max(drawn) < (most or 24))


def test_epochs_and_seeds_differ_and_hold_everything(config: DataConfig) -> None:
    first, second = epochs(opened(config, 1), 2) if config.kind != "demo" else ([0], [1])
    assert sorted(first) == sorted(second) or config.kind == "demo"
    assert first != second
    prompts = [[p for b in take(opened(config, seed=seed), 8) for p in b.prompts] for seed in (1, 1, 2)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_random_numbers_of_torch_are_left_alone(paths: dict[str, Path]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(opened(config_of("folder", paths, num_workers=1)), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_of_one_bucket_for_all_processes_and_says_the_original_sizes(paths: dict[str, Path]) -> None:
    config = config_of("folder", paths, random_flip=False)
    parts = [take(opened(config, 3, process_index=index, num_processes=2), 4) for index in range(2)]
    assert [b.target_sizes[0] for b in parts[0]] == [b.target_sizes[0] for b in parts[1]]
    assert len({batch.target_sizes[0] for batch in parts[0]}) > 1
    for batch in parts[0]:
        assert batch.pixels is not None and tuple(batch.pixels.shape) == (3, 3, *batch.target_sizes[0])
        for number, size, pixels in zip(numbers([batch]), batch.original_sizes, batch.pixels, strict=True):
            assert round((pixels[0].mean().item() + 1) * 127.5) == number and size == SHAPES[number % 6]


def test_prompts_have_no_pixels_and_time_ids_of_a_whole_square(paths: dict[str, Path]) -> None:
    batch = take(opened(config_of("prompts", paths)), 1)[0]
    assert batch.pixels is None and batch.crop_tops_lefts == [(0, 0)] * 3
    assert batch.original_sizes == batch.target_sizes == [(64, 64)] * 3
    column = opened(small("prompts", paths["root"] / "one.parquet"), 1)
    assert sorted(epochs(column, 1)[0]) == list(range(24)) and next(iter(column)).pixels is None


def test_demo_images_agree_with_their_captions() -> None:
    batches = take(opened(small("demo", max_samples=192, trigger="toy"), 32), 6)
    rows = [row for batch in batches for row in zip(batch.prompts, batch.pixels, strict=True)]  # type: ignore[arg-type]
    reds = [pixels for prompt, pixels in rows if prompt.startswith("toy, ") and " red " in prompt]
    assert reds and all(((pixels[0] - pixels[2]) > 1.0).any() for pixels in reds)


def metadata(root: Path, kind: str) -> None:
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "metadata.jsonl").unlink()
    table = Dataset.from_list(lines)
    table.to_csv(root / "metadata.csv") if kind == "csv" else table.to_parquet(root / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "both"])
def test_a_folder_of_folders_with_captions_of_every_kind(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "a" / "b", 8, captions=".txt" if kind == "txt" else "metadata.jsonl")
    (tmp_path / ".hidden.png").write_bytes(b"")
    wanted = list(range(8))
    if kind in ("csv", "parquet"):
        metadata(tmp_path / "a" / "b", kind)
    if kind == "both":
        make_folder(tmp_path / "c", 3, captions=".txt")
        write_lines(tmp_path / "metadata.jsonl", [{"file_name": "c/000.png", "text": "number 100"}])
        wanted += [1, 2, 100]
    assert sorted(epochs(opened(small("folder", tmp_path), 1), 1)[0]) == sorted(wanted)


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_with_paths_lists_of_captions_and_bad_images(tmp_path: Path, streaming: bool) -> None:
    make_folder(tmp_path / "pictures", 6)
    (tmp_path / "cut.jpg").write_bytes(truncated())
    names = [f"pictures/{number:03}.png" for number in range(6)]
    captions = [*([f"number {number}", f"number {number}0"] for number in range(6)), ["x 7"], ["x"], ["x"], []]
    table = {"image": [*names, "cut.jpg", None, "gone.png", names[0]], "captions": captions}
    features = Features({"image": Value("string"), "captions": List(Value("string"))})
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    source = opened(small("datasets", tmp_path / "a.parquet", caption_column="captions", streaming=streaming), 1)
    drawn = set(numbers(take(source, 48)))
    assert {n if n < 6 else n // 10 for n in drawn} == set(range(6)) and len(drawn) > 6
    assert source.skipped.keys() == {"missing file", "no caption", "truncated"}
    if not streaming:
        assert (source.skipped["missing file"], source.skipped["no caption"]) == (2, 1)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_csv_and_json_files(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, 6)
    rows = [{"image": f"{number:03}.png", "caption": f"number {number}"} for number in range(6)]
    {
        "a.csv": lambda path: path.write_text("image,caption\n" + "\n".join(",".join(row.values()) for row in rows)),
        "a.jsonl": lambda path: write_lines(path, rows),
        "a.json": lambda path: path.write_text(json.dumps(rows)),
    }[name](tmp_path / name)
    for streaming in (False, True):
        source = opened(small("datasets", tmp_path / name, streaming=streaming), 1)
        assert sorted(epochs(source, 1)[0]) == list(range(6))


def test_relative_paths_start_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a" / "images", 3)
    (tmp_path / "a" / "train.csv").write_text(
        "image,text\n" + "".join(f"images/00{n}.png,number {n}\n" for n in range(3))
    )
    monkeypatch.chdir(tmp_path)
    for config in (small("folder", "a/images"), small("datasets", "a/train.csv"), small("folder", ".")):
        assert sorted(epochs(opened(config, 1), 1)[0]) == [0, 1, 2]


def test_slices_and_the_first_samples(paths: dict[str, Path]) -> None:
    sliced = small("datasets", paths["root"] / "many", split="train[:8]")
    for config in (sliced, config_of("folder", paths, max_samples=8), config_of("table", paths, max_samples=8)):
        assert sorted(epochs(opened(config, 1), 1)[0]) == list(range(8))


def test_bad_images_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    make_folder(tmp_path, 6, captions=".txt")
    bad = {"900.png": b"no image", "902.png": encoded(picture(902, (20, 20))), "903.jpg": truncated()}
    for name, data in {**bad, "901.png": encoded(picture(901))}.items():
        (tmp_path / name).write_bytes(data)
        if name != "901.png":
            (tmp_path / name).with_suffix(".txt").write_text("number 900")
    source = opened(small("folder", tmp_path), 2)
    known = Counter({"unreadable": 1, "no caption": 1, "too small": 1})
    assert source.skipped == known
    assert all(number < 900 for number in numbers(take(source, 12)))
    assert source.skipped - known == Counter({"truncated": source.skipped["truncated"]})
    assert "7 samples (" in source.describe() and " truncated" in source.describe()


def test_bad_samples_and_damaged_shards_are_counted(tmp_path: Path) -> None:
    good = [(f"{n}.{end}", data) for n in range(8) for end, data in (("png", encoded(picture(n))), ("txt", b"x 1"))]
    good[1] = ("0.json", b'{"caption": "x 1"}')
    bad = [("a.txt", b"x 1"), ("b.png", encoded(picture(0))), ("c.png", b"no image"), ("c.txt", b"x 1")]
    bad += [("d.jpg", truncated()), ("d.txt", b"x 1"), ("e.png", encoded(picture(0, (20, 20)))), ("e.txt", b"x 1")]
    write_shard(tmp_path / "0.tar", [*good, *bad])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(b"not a tar file at all")
    (tmp_path / "2.tar").write_bytes(whole[: len(whole) // 2 + 700])
    source = opened(small("webdataset", tmp_path), 1)
    for batch in source:
        assert batch.pixels is not None
        if source.epoch > 0:
            break
    once = {"missing file", "no caption", "unreadable", "truncated", "too small"}
    assert source.skipped["damaged shard"] >= 2 and once <= source.skipped.keys()


def test_data_without_a_usable_sample_is_an_error(tmp_path: Path) -> None:
    for name, data in (("headless", b""), ("cut", truncated())):
        for image in make_folder(tmp_path / name, 2, captions=".txt").glob("*.png"):
            image.write_bytes(data)
    write_shard(tmp_path / "a.tar", [(f"{n}.{end}", b"x") for n in range(300) for end in ("png", "txt")])
    write_shard(tmp_path / "b.tar", [("a.jpg", truncated()), ("a.txt", b"x")])
    for name in ("headless", "cut", "a.tar", "b.tar"):
        with pytest.raises(ValueError, match="No sample is usable"):
            take(opened(small("webdataset" if name.endswith("tar") else "folder", tmp_path / name), 1), 1)


def test_a_position_of_other_data_is_refused(tmp_path: Path, paths: dict[str, Path]) -> None:
    make_folder(tmp_path / "folder", 23)
    make_shards(tmp_path / "shards", shards=3)
    for name, complaint in (("folder", "held 24 samples .* and holds 23 samples"), ("webdataset", "4 .* holds .* 3")):
        other = small(name, tmp_path / ("folder" if name == "folder" else "shards"))
        with pytest.raises(ValueError, match=complaint):
            opened(other).load_state_dict(saved(opened(config_of(name, paths))))


def test_links_and_pipes_do_no_harm(tmp_path: Path) -> None:
    make_folder(tmp_path, 3, captions=".txt")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "001.png").unlink()
    os.mkfifo(tmp_path / "001.png")
    (tmp_path / "002.txt").unlink()
    os.mkfifo(tmp_path / "002.txt")
    source = opened(small("folder", tmp_path), 1)
    assert source.skipped == Counter({"missing file": 1, "no caption": 1}) and "1 samples" in source.describe()
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"1 of its 1 .tar files are missing, such as"):
        open_rows(small("webdataset", tmp_path / "a.tar"))


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        return root / name

    return make


def lines(*rows: dict[str, str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DEEP = b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
FOLDER = "pictures/metadata.jsonl"


@pytest.mark.parametrize(
    ("kind", "make", "complaint"),
    [
        ("folder", lambda root: root / "none", "it is not a folder"),
        ("folder", lambda root: root, "the folder holds no images"),
        ("folder", lambda root: write("a.png", b"")(root).parent, "the folder holds no captions; add metadata.jsonl"),
        (
            "folder",
            lambda root: write(FOLDER, b'{"file_name": "a.png"}\n{"f')(root).parent,
            "line 2 of metadata",
        ),
        (
            "folder",
            lambda root: write(FOLDER, lines({"image": "a"}))(root).parent,
            "no column file_name, only image",
        ),
        ("folder", lambda root: write(FOLDER, lines({"file_name": "a"}))(root).parent, "no column text or caption or"),
        ("folder", lambda root: write(FOLDER, DEEP)(root).parent, "line 1 of metadata.jsonl is not usable JSON"),
        ("prompts", lambda root: root / "none.txt", "there is no such file"),
        ("prompts", write("a.doc", b"a cat"), "it is not a .txt, .json"),
        ("prompts", write("a.txt", b""), "a.txt is empty"),
        ("prompts", write("a.txt", b"\xff\xfe\x00"), "can't decode byte"),
        (
            "prompts",
            write("a.jsonl", b'{"words": "a cat"}\n'),
            "no column text or caption or prompt or txt, only words",
        ),
        ("prompts", write("a.jsonl", DEEP), "line 1 of a.jsonl is not usable JSON: maximum recursion depth"),
        ("datasets", write("many/a.jsonl", DEEP), "line 1 of a.jsonl is not usable JSON"),
        ("datasets", write("a.csv", b"image,text\na.png,a\nb.png,b,c\n"), "Expected 2 fields in line 3, saw 3"),
        ("datasets", write("a.csv", b"picture,text\na.png,a\n"), "no column image of images, only picture, text"),
        ("datasets", write("a.parquet", b"PAR1 and no more PAR1"), "cannot be used"),
        ("webdataset", lambda root: root, "no .tar files in"),
        ("webdataset", lambda root: root / "x{0..1000000000}.tar", "it names 1000000001 shards; 100000 is the most"),
        ("webdataset", lambda root: root / "x{00..02}.tar", "3 of its 3 .tar files are missing, such as .*x00.tar"),
    ],
)
def test_what_is_wrong_with_data_is_said_in_one_line(
    tmp_path: Path, kind: str, make: Callable[[Path], Path], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        path = make(tmp_path)
        open_rows(small(kind, path.parent if path.parent.name == "many" else path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.path=")


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.path=nobody/nothing cannot be used: .*nobody/nothing"):
        open_rows(small("datasets", "nobody/nothing"))
