"""Where samples come from: folders, prompt files, Hugging Face data sets, webdataset shards."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from perflow_blocks.training.data import DataConfig, open_dataset, problems
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


def epoch(config: DataConfig, batch_size: int = 4, batches: int = 6, **processes: int) -> list[int]:
    """The numbers in the captions of the first 24 samples."""
    return numbers(take(open_dataset(config, batch_size=batch_size, seed=0, **processes), batches))


@pytest.mark.parametrize("captions", ["metadata.jsonl", "captions.jsonl", ".txt"])
def test_a_folder_with_captions(tmp_path: Path, captions: str) -> None:
    make_folder(tmp_path, captions=captions)
    assert sorted(epoch(small("folder", tmp_path))) == list(range(24))


def test_a_folder_of_folders_with_both_kinds_of_captions(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", 8)
    make_folder(tmp_path / "b" / "c", 8, captions=".txt")
    (tmp_path / "b" / "c" / ".hidden.png").write_bytes(b"")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "b/c/000.png", "text": "number 100"}])
    config = small("folder", tmp_path)
    assert problems(config) == []
    assert sorted(epoch(config, batches=4)) == sorted([*range(8), *range(1, 8), 100])


def test_the_key_of_the_captions_can_be_named_and_lists_are_drawn_from(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    rows = [{"file_name": f"{n:03}.png", "de": [f"Nummer {n}", f"Zahl {n}"], "text": "no"} for n in range(2)]
    write_lines(tmp_path / "metadata.jsonl", rows)
    batches = take(open_dataset(small("folder", tmp_path, caption_column="de"), batch_size=2, seed=0), 12)
    assert {prompt for batch in batches for prompt in batch.prompts} == {"Nummer 0", "Zahl 0", "Nummer 1", "Zahl 1"}


def test_pictures_that_the_lines_name_and_that_are_not_there_count_as_missing(tmp_path: Path) -> None:
    make_folder(tmp_path, 6)
    (tmp_path / "003.png").unlink()
    source = open_dataset(small("folder", tmp_path), batch_size=1, seed=0)
    assert (source.num_samples, source.skipped) == (5, Counter({"missing file": 1}))


def test_max_samples_takes_the_first_ones(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert sorted(epoch(small("folder", tmp_path, max_samples=8), batches=2)) == list(range(8))


def test_prompts_from_text_and_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffnumber 0\n\n  number 1 \r\nnumber 2\n", encoding="utf-8")
    write_lines(tmp_path / "a.jsonl", [{"prompt": "number 0"}, {"prompt": ""}, {"text": "number 1"}, {"prompt": 7}])
    assert sorted(epoch(small("prompts", tmp_path / "a.txt"), 1, 3)) == [0, 1, 2]
    source = open_dataset(small("prompts", tmp_path / "a.jsonl"), batch_size=1, seed=0)
    assert sorted(numbers(take(source, 2))) == [0, 1]
    assert source.skipped == Counter({"no caption": 2})


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_lines(tmp_path: Path, mark: str) -> None:
    text = f"a{mark}cat"
    (tmp_path / "a.txt").write_bytes(f"{text}\r\nnumber 1\n".encode())
    line = '{"text": "' + text + '"}' if ord(mark) > 0x1F else json.dumps({"text": text})
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n\n".encode())
    make_folder(tmp_path / "pictures", 1)
    (tmp_path / "pictures" / "metadata.jsonl").write_bytes(line.replace("{", '{"file_name": "000.png", ').encode())
    batches = take(open_dataset(small("prompts", tmp_path / "a.txt"), batch_size=1, seed=0), 2)
    assert {batch.prompts[0] for batch in batches} == {text, "number 1"}
    for config in (small("prompts", tmp_path / "a.jsonl"), small("folder", tmp_path / "pictures")):
        [batch] = take(open_dataset(config, batch_size=1, seed=0), 1)
        assert batch.prompts == [text]


def test_the_home_directory_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("number 0\n")
    assert epoch(small("prompts", "~/a.txt"), 1, 1) == [0]


def rows(count: int = 24, *, start: int = 0) -> dict[str, list[Any]]:
    return {
        "picture": [
            {"bytes": encoded(picture(number, SHAPES[number % len(SHAPES)])), "path": None}
            for number in range(start, start + count)
        ],
        "label": list(range(start, start + count)),
        "text": [f"number {number}" for number in range(start, start + count)],
    }


FEATURES = Features({"picture": Image(), "label": Value("int64"), "text": Value("string")})


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 rows: saved alone, saved with splits, as one parquet file, and as a directory of four."""
    root = tmp_path_factory.mktemp("tables")
    dataset = Dataset.from_dict(rows(), features=FEATURES)
    dataset.save_to_disk(root / "saved")
    DatasetDict({"train": dataset, "test": dataset.select(range(4))}).save_to_disk(root / "splits")
    dataset.to_parquet(root / "one.parquet")
    for number in range(4):
        dataset.shard(4, number).to_parquet(root / "many" / f"train-{number}.parquet")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["saved", "splits", "one.parquet", "many"])
def test_data_sets_of_every_form(tables: Path, name: str, streaming: bool) -> None:
    config = small("datasets", tables / name, streaming=streaming, shuffle_buffer=6)
    assert problems(config) == []
    drawn = epoch(config)
    assert sorted(drawn) == list(range(24)) != drawn


def test_rows_with_paths_lists_of_captions_and_bad_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures", 6)
    (tmp_path / "cut.jpg").write_bytes(truncated())
    paths = [*sorted(str(path) for path in (tmp_path / "pictures").glob("*.png")), str(tmp_path / "cut.jpg")]
    table = {
        "image": [*paths, None, str(tmp_path / "gone.png"), paths[0]],
        "captions": [*([f"number {number}", ""] for number in range(7)), ["number 7"], ["number 8"], []],
    }
    features = Features({"image": Value("string"), "captions": List(Value("string"))})
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    reasons = Counter({"missing file": 2, "no caption": 1})
    for streaming in (False, True):
        config = small("datasets", tmp_path / "a.parquet", caption_column="captions", streaming=streaming)
        source = open_dataset(config, batch_size=1, seed=0)
        assert {number for number in numbers(take(source, 12))} == set(range(6))
        assert source.skipped == reasons + Counter({"truncated": 1})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_file_with_paths(tmp_path: Path, streaming: bool) -> None:
    make_folder(tmp_path / "pictures", 6)
    paths = [str(tmp_path / "pictures" / f"{number:03}.png") for number in range(6)]
    lines = [
        "image,text,label",
        *(f"{path},number {number},7" for number, path in enumerate([*paths, "gone.png", ""])),
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    config = small("datasets", tmp_path / "a.csv", streaming=streaming)
    assert problems(config) == []
    source = open_dataset(config, batch_size=1, seed=0)
    assert sorted(numbers(take(source, 6))) == list(range(6))
    take(source, 6)
    assert source.skipped == Counter({"missing file": 2})
    [problem] = problems(small("datasets", tmp_path / "a.csv", streaming=streaming, image_column="label"))
    assert "the column 'label' of the data set" in problem and "holds int and no pictures" in problem


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "No columns to parse from file"),
        ("a.csv", b"image,text\na.png,a\nb.png,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"image,text\na.png,caf\xe9\n", "codec can't decode"),
        ("a.jsonl", b'{"image": "a.png", "text": "a"}\n{"image":\n', "JSON parse error"),
        ("a.parquet", b"PAR1 and no more PAR1", "data.path"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes, reason: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(content)
    [problem] = problems(small("datasets", tmp_path / name, streaming=streaming))
    assert problem.startswith(f"data.path='{tmp_path / name}' cannot be opened as a data set (")
    assert reason in problem and problem.endswith("or mend its files.")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_relative_paths_start_where_the_table_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, whole: bool
) -> None:
    make_folder(tmp_path / "a" / "pictures", 3)
    lines = ["image,text", *(f"../pictures/{number:03}.png,number {number}" for number in range(3))]
    (tmp_path / "a" / "tables").mkdir()
    (tmp_path / "a" / "tables" / "train.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    path = Path("a/tables") if whole else Path("a/tables/train.csv")
    source = open_dataset(small("datasets", path, streaming=streaming), batch_size=1, seed=0)
    assert sorted(numbers(take(source, 3))) == [0, 1, 2]


def test_slices_of_a_split(tables: Path) -> None:
    assert sorted(epoch(small("datasets", tables / "many", split="train[:8]"), batches=2)) == list(range(8))


@pytest.mark.parametrize(
    ("name", "changes", "complaints"),
    [
        ("nowhere", {}, ["there is no such file or directory"]),
        ("splits", {"split": "validation"}, ["data.split='validation' is not one of its splits: train, test"]),
        ("many", {"split": "validation"}, ["validation"]),
        ("many", {"image_column": "image"}, ["no column 'image' of pictures: .* columns picture, label, text"]),
        (
            "saved",
            {"image_column": "image", "caption_column": "caption"},
            ["no column 'image' of pictures", "no column caption of captions"],
        ),
    ],
)
def test_what_is_wrong_with_a_data_set(
    tables: Path, name: str, changes: dict[str, Any], complaints: list[str]
) -> None:
    for streaming in (False, True):
        config = small("datasets", tables / name, streaming=streaming, **changes)
        found = problems(config)
        assert len(found) == len(complaints)
        assert all(re.search(complaint, text) for complaint, text in zip(complaints, found, strict=True)), found
        with pytest.raises(ValueError, match=complaints[0]):
            open_dataset(config, batch_size=1, seed=0)


def test_an_empty_data_set_is_a_problem(tmp_path: Path) -> None:
    Dataset.from_dict({"picture": [], "label": [], "text": []}, features=FEATURES).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        config = small("datasets", tmp_path / "a.parquet", streaming=streaming)
        with pytest.raises(ValueError, match=r"no rows|no data"):
            take(open_dataset(config, batch_size=1, seed=0), 1)


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("max_samples", [None, 17])
@pytest.mark.parametrize("kind", ["datasets", "webdataset"])
def test_streams_are_shared_without_overlap(
    tables: Path, tmp_path: Path, kind: str, num_processes: int, max_samples: int | None
) -> None:
    """Four files for two, three and five processes: whole files each, or turns."""
    path = tables / "many" if kind == "datasets" else make_shards(tmp_path)
    config = small(kind, path, streaming=kind == "datasets", max_samples=max_samples, shuffle_buffer=4)
    parts = []
    for index in range(num_processes):
        source = open_dataset(config, batch_size=1, seed=0, process_index=index, num_processes=num_processes)
        part: list[int] = []
        for batch in source:
            if source.epoch > 0:
                break
            part += numbers([batch])
        parts.append(part)
    assert sorted(number for part in parts for number in part) == list(range(max_samples or 24))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_of_a_data_set_resumes_exactly(tables: Path, num_processes: int) -> None:
    config = small("datasets", tables / "many", streaming=True, shuffle_buffer=5, random_flip=True)
    options = {"batch_size": 3, "seed": 1, "process_index": num_processes - 1, "num_processes": num_processes}
    unbroken = take(open_dataset(config, **options), 14)
    for done in (1, 4, 9):
        source = open_dataset(DataConfig(**{**vars(config), "num_workers": 1}), **options)
        assert_same(take(source, done), unbroken[:done])
        resumed = open_dataset(config, **options)
        resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
        assert_same(take(resumed, 5), unbroken[done : done + 5])


def test_shards_of_a_directory_and_json_captions(tmp_path: Path) -> None:
    for shard in range(2):
        files = []
        for number in range(shard * 4, shard * 4 + 4):
            files.append((f"{number}.png", encoded(picture(number))))
            files.append((f"{number}.json", json.dumps({"caption": f"number {number}"}).encode()))
        write_shard(tmp_path / f"{shard}.tar", files)
    config = small("webdataset", tmp_path)
    assert problems(config) == []
    assert sorted(epoch(config, batches=2)) == list(range(8))


def test_bad_samples_and_damaged_shards_are_counted(tmp_path: Path) -> None:
    good = [
        (f"{n}.{form}", data) for n in range(8) for form, data in (("png", encoded(picture(n))), ("txt", b"number 1"))
    ]
    bad = [
        ("a.txt", b"number 1"),
        ("b.png", encoded(picture(0))),
        ("c.png", b"no picture"),
        ("c.txt", b"number 1"),
        ("d.jpg", truncated()),
        ("d.txt", b"number 1"),
        ("e.png", encoded(picture(0, (20, 20)))),
        ("e.txt", b"number 1"),
    ]
    write_shard(tmp_path / "0.tar", [*good, *bad])
    (tmp_path / "1.tar").write_bytes(b"no tar file at all")
    source = open_dataset(small("webdataset", tmp_path), batch_size=1, seed=0)
    batches = take(source, 20)
    assert all(batch.pixels is not None and len(batch.prompts) == 1 for batch in batches)
    assert source.skipped == Counter(
        {"missing file": 1, "no caption": 1, "unreadable": 1, "truncated": 1, "too small": 1, "damaged shard": 1}
    )


def test_a_stream_of_truncated_pictures_ends_in_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a.jpg", truncated()), ("a.txt", b"number 1")])
    with pytest.raises(ValueError, match=r"no usable sample in a whole epoch, left out were: 1 truncated"):
        take(open_dataset(small("webdataset", tmp_path), batch_size=2, seed=0), 1)


@pytest.mark.parametrize(
    ("files", "path", "complaint"),
    [
        ([], "", "no .tar files"),
        (
            [("a.png", b""), ("a.txt", b"a cat")],
            "s-{0..2}.tar",
            "2 of 3 shards .* are not there, the first one .*s-1.tar",
        ),
        ([], "s-0.tar", "no samples"),
        (
            [("a.cls", b"1"), ("a.txt", b"a cat")],
            "s-0.tar",
            "has no picture .* it has cls, txt; set data.image_column",
        ),
        ([("a.jpg", b""), ("a.cls", b"1")], "s-0.tar", "has no caption .* it has jpg, cls; set data.caption_column"),
    ],
)
def test_what_is_wrong_with_shards(tmp_path: Path, files: list[tuple[str, bytes]], path: str, complaint: str) -> None:
    if path:
        write_shard(tmp_path / "s-0.tar", files)
    with pytest.raises(ValueError, match=complaint):
        open_dataset(small("webdataset", tmp_path / path), batch_size=1, seed=0)


def test_moved_shards_resume_and_others_do_not(tmp_path: Path) -> None:
    sources = [
        open_dataset(small("webdataset", make_shards(tmp_path / name, shards=count)), batch_size=1, seed=0)
        for name, count in (("a", 2), ("b", 2), ("c", 3))
    ]
    sources[1].load_state_dict(sources[0].state_dict())
    with pytest.raises(ValueError, match="checksum of the files"):
        sources[2].load_state_dict(sources[0].state_dict())


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_named() -> None:
    [found] = problems(small("datasets", "nobody/nothing"))
    assert found.startswith("data.path='nobody/nothing' cannot be opened as a data set (")


@pytest.mark.parametrize("kind", ["datasets", "webdataset"])
def test_files_and_samples_of_a_stream_come_in_another_order_each_epoch(
    tables: Path, tmp_path: Path, kind: str
) -> None:
    path = tables / "many" if kind == "datasets" else make_shards(tmp_path)
    for buffer in (1, 6):
        config = small(kind, path, streaming=kind == "datasets", shuffle_buffer=buffer, bucketing=False)
        drawn = epoch(config, batches=24)
        epochs = [drawn[start : start + 24] for start in (0, 24, 48, 72)]
        assert all(sorted(order) == list(range(24)) for order in epochs)
        assert len({tuple(number // 6 for number in order) for order in epochs}) > 1  # files
        assert len(set(map(tuple, epochs))) > 2


def test_the_shorter_side_decides_whether_a_picture_is_too_small(tmp_path: Path) -> None:
    make_folder(tmp_path, 2, captions=".txt")
    for number, size in ((2, (30, 400)), (3, (400, 30)), (4, (50, 400))):
        (tmp_path / f"00{number}.png").write_bytes(encoded(picture(number, size)))
        (tmp_path / f"00{number}.txt").write_text(f"number {number}")
    source = open_dataset(small("folder", tmp_path, bucketing=False), batch_size=1, seed=0)
    assert (source.num_samples, source.skipped) == (3, Counter({"too small": 2}))
