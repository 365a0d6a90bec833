"""The batches of an epoch: each sample once, one bucket a batch, the same number for each process."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from perflow_blocks.training.data.plan import Group, group_leftovers, plan_epoch


def plan(homes: list[int], group_size: int, seed: int = 0) -> list[Group]:
    """A plan where the aspect ratio is the bucket's number and a little more for each sample."""
    numbers = np.asarray(homes, np.int64)
    return plan_epoch(numbers, numbers + np.linspace(0, 0.5, len(homes)), group_size, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_every_sample_is_in_one_group_at_most_and_few_are_left(homes: list[int], size: int, seed: int) -> None:
    groups = plan(homes, size, seed)
    assert all(len(members) == size for members, _ in groups)
    members = np.concatenate([members for members, _ in groups])
    if len(homes) >= size:
        assert len(groups) == len(homes) // size
        assert len(set(members.tolist())) == len(members)
    else:
        assert len(groups) == 1 and set(members.tolist()) == set(range(len(homes)))


def test_whole_groups_are_of_one_bucket() -> None:
    homes = [0] * 8 + [1] * 4 + [2] * 12
    groups = plan(homes, 4)
    assert sorted(bucket for _, bucket in groups) == [0, 0, 1, 2, 2, 2]
    assert all({homes[member] for member in members} == {bucket} for members, bucket in groups)


def test_leftovers_join_their_neighbours_in_the_middle_ones_bucket() -> None:
    homes = np.asarray([0, 5, 0, 5, 1, 4])
    groups = list(group_leftovers(np.arange(6), homes, homes.astype(float), 3, repeat=False))
    assert [(sorted(members.tolist()), bucket) for members, bucket in groups] == [([0, 2, 4], 0), ([1, 3, 5], 5)]


def test_what_remains_differs_from_epoch_to_epoch() -> None:
    def left_out(seed: int) -> frozenset[int]:
        members = np.concatenate([members for members, _ in plan([0] * 10, 4, seed)])
        return frozenset(range(10)) - set(members.tolist())

    assert len({left_out(seed) for seed in range(10)}) > 5


def test_fewer_samples_than_a_group_are_repeated_evenly() -> None:
    [(members, _)] = plan([0, 1, 2], 7)
    assert sorted(np.bincount(members).tolist()) == [2, 2, 3]


def test_the_order_of_groups_mixes_buckets_and_depends_on_the_seed() -> None:
    homes = [0] * 40 + [1] * 40
    orders = [[bucket for _, bucket in plan(homes, 4, seed)] for seed in range(3)]
    assert orders[0] != sorted(orders[0]) and orders[0] != orders[1] != orders[2]
    assert [bucket for _, bucket in plan(homes, 4, 0)] == orders[0]
