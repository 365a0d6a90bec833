"""Batches from numbered samples: exact positions, processes, workers, and pictures that turn out bad."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks.training.data import BatchSource, DataConfig, open_dataset
from tests.training.conftest import (
    assert_same,
    encoded,
    make_folder,
    make_shards,
    numbers,
    picture,
    small,
    take,
    truncated,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"number {number}\n" for number in range(11)))
    return path


@pytest.fixture(params=["folder", "prompts", "demo", "webdataset"])
def config(request: pytest.FixtureRequest, folder: Path, shards: str, prompt_file: Path) -> DataConfig:
    paths = {"folder": folder, "prompts": prompt_file, "demo": None, "webdataset": shards}
    changes: dict[str, Any] = {"random_flip": True, "shuffle_buffer": 8}
    return small(request.param, paths[request.param], **changes, max_samples=13 if request.param == "demo" else None)


def opened(config: DataConfig, batch_size: int = 3, seed: int = 5, **processes: int) -> BatchSource:
    return open_dataset(config, batch_size=batch_size, seed=seed, **processes)


@pytest.mark.parametrize("done", [0, 2, 7, 8, 9, 19])
def test_a_resumed_run_gets_the_batches_of_the_unbroken_one(config: DataConfig, done: int) -> None:
    unbroken = take(opened(config), done + 6)
    source = opened(config)
    take(source, done)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = opened(config)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 6), unbroken[done:])


def test_the_position_is_that_of_the_batches_handed_out_not_of_those_read_ahead(config: DataConfig) -> None:
    with_workers = opened(_changed(config, num_workers=2))
    first = take(with_workers, 4)
    resumed = opened(_changed(config, num_workers=1))
    resumed.load_state_dict(with_workers.state_dict())
    assert_same([*first, *take(resumed, 3)], take(opened(config), 7))


def test_a_second_iterator_goes_on_from_the_position(config: DataConfig) -> None:
    source = opened(config)
    assert_same([*take(source, 2), *take(source, 3)], take(opened(config), 5))


def test_seeds_and_epochs_differ(config: DataConfig) -> None:
    def first_epochs(seed: int) -> list[str]:
        return [prompt for batch in take(opened(config, seed=seed), 16) for prompt in batch.prompts]

    assert first_epochs(1) == first_epochs(1) != first_epochs(2)
    half = 8 * 3 if config.kind in ("folder", "webdataset") else 3 * 3
    assert first_epochs(1)[:half] != first_epochs(1)[half : 2 * half]


def test_the_random_numbers_of_torch_are_left_alone(config: DataConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(opened(_changed(config, num_workers=1)), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_an_epoch_without_overlap(folder: Path, num_processes: int) -> None:
    epoch = 24 // (2 * num_processes)
    parts = [
        take(opened(small("folder", folder), 2, process_index=index, num_processes=num_processes), 2 * epoch)
        for index in range(num_processes)
    ]
    for start in (0, epoch):
        drawn = [number for part in parts for number in numbers(part[start : start + epoch])]
        assert len(drawn) == len(set(drawn)) == 24
    sizes = [[batch.target_sizes[0] for batch in part] for part in parts]
    assert all(part == sizes[0] for part in sizes)  # the same bucket in all processes at each step


def test_a_batch_is_of_one_bucket_and_says_the_original_sizes(folder: Path) -> None:
    batches = take(opened(small("folder", folder)), 8)
    assert len({batch.target_sizes[0] for batch in batches}) > 2
    for batch in batches:
        assert batch.pixels is not None and len(set(batch.target_sizes)) == 1
        assert tuple(batch.pixels.shape) == (3, 3, *batch.target_sizes[0])
        assert batch.pixels.dtype == torch.float32
        for number, size, pixels in zip(numbers([batch]), batch.original_sizes, batch.pixels, strict=True):
            assert round((pixels[0].mean().item() + 1) * 127.5) == number
            assert size == [(96, 96), (64, 128), (128, 64), (96, 80), (80, 96), (100, 130)][number % 6]


def test_prompts_have_no_pixels_and_time_ids_of_a_whole_square(prompt_file: Path) -> None:
    batch = take(opened(small("prompts", prompt_file)), 1)[0]
    assert batch.pixels is None
    assert batch.original_sizes == batch.target_sizes == [(64, 64)] * 3
    assert batch.crop_tops_lefts == [(0, 0)] * 3


def test_demo_pictures_agree_with_their_captions() -> None:
    batches = take(opened(small("demo", max_samples=192, trigger="toy"), 32), 6)
    reds = [
        pixels
        for batch in batches
        for prompt, pixels in zip(batch.prompts, batch.pixels if batch.pixels is not None else [], strict=True)
        if prompt.startswith("toy, ") and " red " in prompt
    ]
    assert reds
    assert all(((pixels[0] - pixels[2]) > 1.0).any() for pixels in reds)


def test_bad_pictures_are_left_out_and_counted_by_reason(folder: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, 24, captions=".txt")
    (tmp_path / "900.png").write_bytes(b"no picture")
    (tmp_path / "900.txt").write_text("number 900")
    (tmp_path / "901.png").write_bytes(encoded(picture(901)))
    (tmp_path / "902.png").write_bytes(encoded(picture(902, (20, 20))))
    (tmp_path / "902.txt").write_text("number 902")
    (tmp_path / "903.jpg").write_bytes(truncated())
    (tmp_path / "903.txt").write_text("number 903")
    source = opened(small("folder", tmp_path))
    known = Counter({"unreadable": 1, "no caption": 1, "too small": 1})
    assert (source.skipped, source.num_samples) == (known, 25)
    batches = take(source, 24)
    assert all(number < 900 for number in numbers(batches))
    assert source.skipped == known + Counter({"truncated": 1})  # once, in however many epochs
    assert "25 samples" in source.describe() and "1 truncated" in source.describe()
    resumed = opened(small("folder", tmp_path))
    resumed.load_state_dict(source.state_dict())
    assert resumed.skipped == source.skipped


def test_batches_are_equal_in_number_and_content_around_a_truncated_picture(tmp_path: Path) -> None:
    make_folder(tmp_path, 7, captions=".txt")
    (tmp_path / "900.jpg").write_bytes(truncated())
    (tmp_path / "900.txt").write_text("number 900")
    plain, workers = (small("folder", tmp_path, num_workers=count) for count in (0, 2))
    for index in range(2):
        source = opened(plain, 1, process_index=index, num_processes=2)
        batches = take(source, 8)  # two epochs of four batches for each process
        assert source.epoch == 2
        assert_same(batches, take(opened(workers, 1, process_index=index, num_processes=2), 8))


def test_mostly_bad_data_is_a_warning_and_only_bad_data_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, 3, captions=".txt")
    for number in range(4):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
        (tmp_path / f"bad{number}.txt").write_text("number 0")
    with caplog.at_level(logging.WARNING):
        opened(small("folder", tmp_path))
    assert "4 of 7 samples are left out (4 unreadable)" in caplog.text
    for path in tmp_path.glob("0*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no usable sample among 7, left out were: 7 unreadable; give pictures"):
        opened(small("folder", tmp_path))


def test_good_data_gives_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        take(opened(small("folder", folder)), 2)
    assert caplog.text == ""


def test_only_truncated_pictures_are_an_error_when_they_are_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(truncated())
        (tmp_path / f"{number}.txt").write_text("number 0")
    with pytest.raises(ValueError, match="not one picture can be decoded"):
        take(opened(small("folder", tmp_path)), 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"batch_size": 4}, "3 and is 4"),
        ({"process_index": 1, "num_processes": 2}, "was"),
    ],
)
def test_a_position_of_other_settings_is_refused(config: DataConfig, changes: dict[str, int], complaint: str) -> None:
    state = opened(config).state_dict()
    with pytest.raises(ValueError, match=complaint):
        opened(config, **changes).load_state_dict(state)


def test_a_position_of_other_pictures_is_refused(folder: Path, tmp_path: Path) -> None:
    state = opened(small("folder", folder)).state_dict()
    with pytest.raises(ValueError, match="number of samples was 24 and is 23"):
        opened(small("folder", make_folder(tmp_path, 23))).load_state_dict(state)
    with pytest.raises(ValueError, match="bucket sizes"):
        opened(small("folder", folder, resolution=48)).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"process_index": 2, "num_processes": 2}, "process_index=2 is not below num_processes=2"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, arguments: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        opened(small("folder", folder), **arguments)


def _changed(config: DataConfig, **changes: Any) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})
